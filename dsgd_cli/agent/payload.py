"""The text that turns a bare python3 on a host into an agent's process.

`STUB` is the whole command: it reads a byte count and that many bytes of source from stdin and runs
them, so no argument carries anything of ours. The source installs an importer that holds this
package as text, then calls the entry's `main()`. It works from an installed package, and again from
a host that itself got the package this way (to start the agent there).

STUB and HEAD are read by whatever `python3` a host has: they keep to syntax that every python since
2.6 accepts, so that an old one answers with a sentence and not with a SyntaxError.
"""

from __future__ import annotations

import binascii
import functools
import json
import zlib

MODULES = (
    "bridge",
    "cache",
    "child",
    "clients",
    "commands",
    "facts",
    "files",
    "fleet",
    "framing",
    "hold",
    "launch",
    "lease",
    "life",
    "logfile",
    "logs",
    "names",
    "observe",
    "oom",
    "paths",
    "payload",
    "processes",
    "runs",
    "serve",
    "store",
    "strays",
    "supervisor",
    "teardown",
    "unpack",
)
ENTRIES = ("serve", "supervisor")

STUB = """\
import os,sys
def r(n):
 s=b''
 while len(s)<n:
  c=os.read(0,n-len(s))
  if not c:sys.exit('dsgd: the connection ended before the program arrived')
  s+=c
 return s
n=b''
while n[-1:]!=b'\\n':n+=r(1)
exec(r(int(n)))
"""

HEAD = """\
import sys
if sys.version_info[:2] < (3, 10):
    sys.stdout.write('\\n{"error": {"kind": "python", "message": "python %d.%d.%d is too old:'
                     ' dsgd needs 3.10 or newer"}}\\n' % tuple(sys.version_info[:3]))
    sys.stdout.flush()
    sys.exit(3)
import binascii, importlib.machinery, json, zlib
class Sources(object):
    # Finds and loads the modules that travelled as text. get_source gives tracebacks their lines.
    def __init__(self, sources):
        self.sources = sources
    def find_spec(self, name, path=None, target=None):
        if name not in self.sources:
            return None
        package = name in ('dsgd_cli', 'dsgd_cli.agent')
        return importlib.machinery.ModuleSpec(name, self, origin=name, is_package=package)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        name = module.__name__
        code = compile(self.sources[name], name.replace('.', '/') + '.py', 'exec')
        exec(code, module.__dict__)
    def get_source(self, name):
        return self.sources[name]
"""

TAIL = """\
sys.meta_path.insert(0, Sources(json.loads(zlib.decompress(binascii.a2b_base64('%s')))))
import dsgd_cli.agent.%s
dsgd_cli.agent.%s.main()
"""


@functools.cache
def payload(entry: str = "serve") -> bytes:
    """What follows STUB on stdin: the byte count, a newline, the source. ASCII only."""
    if entry not in ENTRIES:
        raise ValueError(f"not an entry: {entry!r}")
    packed = binascii.b2a_base64(
        zlib.compress(json.dumps(sources()).encode(), 9), newline=False
    ).decode()
    source = (HEAD + TAIL % (packed, entry, entry)).encode()
    return b"%d\n" % len(source) + source


@functools.cache
def sources() -> dict[str, str]:
    """The package as text, from wherever this very module came."""
    found = {"dsgd_cli": "", "dsgd_cli.agent": ""}
    for module in MODULES:
        found[f"dsgd_cli.agent.{module}"] = _source(f"dsgd_cli.agent.{module}")
    return found


def _source(name: str) -> str:
    import importlib.util

    spec = importlib.util.find_spec(name)
    get_source = getattr(spec.loader if spec else None, "get_source", None)
    text = get_source(name) if get_source else None
    if not isinstance(text, str):
        raise RuntimeError(f"the source of {name} is not at hand")
    return text
