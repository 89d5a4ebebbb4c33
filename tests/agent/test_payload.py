"""What is sent to a bare python3, and what an unfit one answers."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsgd_cli.agent import payload
from tests.agent.client import Host, Lines

AGENT = Path(payload.__file__).parent


def run(stub: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-I", "-u", "-c", stub]
    return subprocess.run(argv, input=stdin, capture_output=True, timeout=30, check=False)


def test_every_module_travels() -> None:
    files = {path.stem for path in AGENT.glob("*.py")} - {"__init__"}
    assert set(payload.MODULES) == files


def test_the_payload_is_ascii_and_counted() -> None:
    for entry in payload.ENTRIES:
        count, _, source = payload.payload(entry).partition(b"\n")
        assert int(count) == len(source)
        assert source.isascii()


@pytest.mark.parametrize("text", [payload.STUB, payload.HEAD], ids=["stub", "head"])
def test_an_old_python_can_parse_it(text: str) -> None:
    assert text.isascii()
    modern = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Await)
    for node in ast.walk(ast.parse(text, feature_version=(3, 4))):
        assert not isinstance(node, (*modern, ast.Nonlocal, ast.Starred, ast.YieldFrom))
        if isinstance(node, ast.FunctionDef):
            assert not node.args.kwonlyargs and not node.args.posonlyargs and node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)
        if isinstance(node, ast.Raise):
            assert node.cause is None
        if isinstance(node, ast.Name):
            assert node.id != "print"  # a statement in python 2


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 5, 2), (3, 6, 9), (3, 9, 25)])
def test_an_old_python_says_so(version: tuple[int, ...]) -> None:
    stub = f"import sys; sys.version_info = {version}\n{payload.STUB}"
    done = run(stub, payload.payload())
    assert done.returncode == 3
    said = json.loads(done.stdout)
    numbers = ".".join(map(str, version))
    message = f"python {numbers} is too old: dsgd needs 3.10 or newer"
    assert said == {"error": {"kind": "python", "message": message}}


def test_a_connection_that_ends_early_leaves_no_process() -> None:
    for stdin in (b"", b"12", payload.payload()[:1000]):
        done = run(payload.STUB, stdin)
        assert done.returncode == 1
        assert b"the connection ended before the program arrived" in done.stderr


def test_tracebacks_show_source_lines() -> None:
    body = "def f():\n    raise ValueError('here')  # the line\nf()\n"
    sources = {"dsgd_cli": "", "dsgd_cli.agent": "", "dsgd_cli.agent.x": body}
    tail = f"sys.meta_path.insert(0, Sources({sources!r}))\n"
    show = (
        "import traceback\ntry: import dsgd_cli.agent.x\nexcept ValueError: traceback.print_exc()\n"
    )
    done = run(payload.HEAD + tail + show, b"")
    assert b'dsgd_cli/agent/x.py", line 2, in f' in done.stderr
    assert b"raise ValueError('here')  # the line" in done.stderr


def test_a_login_banner_does_not_hide_the_first_line(host: Host) -> None:
    shell = 'echo "Welcome"; printf "no newline"; exec "$@"'
    argv = ["/bin/sh", "-c", shell, "sh", sys.executable, "-I", "-u", "-c", payload.STUB]
    lines = Lines(host.transport.open(argv))
    lines.stream.write(payload.payload())
    assert [lines.line(), lines.line()] == [b"Welcome", b"no newline"]
    word, _, facts = lines.line().partition(b" ")
    assert word == b"DSGD-READY"
    assert json.loads(facts)["python"] == list(sys.version_info[:3])


def test_it_comes_up_quickly() -> None:
    """Processor time, the best of some: 60 ms when this was written, 15 of them python's own."""

    def cpu_s() -> float:
        before = os.times()
        assert run(payload.STUB, payload.payload()).returncode == 0
        after = os.times()
        return after[2] + after[3] - before[2] - before[3]

    assert min(cpu_s() for _ in range(5)) < 0.2


def test_a_payload_made_on_a_host_is_the_same(host: Host) -> None:
    """The agent is started from a process that has no files of dsgd."""
    check = (
        "import hashlib\nfrom dsgd_cli.agent import payload\n"
        "print(hashlib.sha256(payload.payload('supervisor')).hexdigest())\n"
    )
    _, _, source = payload.payload().partition(b"\n")
    text = source.decode().rpartition("import dsgd_cli.agent.serve")[0] + check
    done = run(payload.STUB, b"%d\n%s" % (len(text), text.encode()))
    expected = hashlib.sha256(payload.payload("supervisor")).hexdigest()
    assert done.stdout.decode().strip() == expected, done.stderr
