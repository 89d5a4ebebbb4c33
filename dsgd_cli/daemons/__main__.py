"""Where every daemon starts: `python -I <code>/dsgd_cli/daemons/__main__.py worker/3 <cluster>`.

The agent starts it by path, isolated (-I): only what dsgd itself put there is importable, which is
the code folder that this file is in and the folders of DSGD_PATH (one per unpacked wheel). The
cluster's name is an argument for people who read `ps`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from importlib import import_module
from pathlib import Path

ROLES = {
    "coordinator": ("dsgd_cli.daemons.coordinator", "serve"),
    "server": ("dsgd_cli.daemons.server", "serve"),
    "worker": ("dsgd_cli.daemons.worker", "work"),
    "probe": ("dsgd_cli.daemons.probe", "probe"),
}


def main(arguments: list[str]) -> None:
    faulthandler.enable()
    folders = os.environ.get("DSGD_PATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(__file__).parents[2]), *filter(None, folders)]
    from dsgd_cli.daemons import lifecycle

    module, function = ROLES[arguments[0].partition("/")[0]]
    lifecycle.live(lambda line, first: getattr(import_module(module), function)(line, first))


if __name__ == "__main__":
    main(sys.argv[1:])
