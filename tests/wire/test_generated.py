"""The generated code is that of the .proto, and what mirrors it by hand agrees with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Operation, Reason
from dsgd_cli.wire.generate import GENERATED

WIRE = Path(pb.__file__).parent


def test_the_committed_code_is_what_the_proto_generates(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "dsgd_cli.wire.generate", str(tmp_path)]
    subprocess.run(module, check=True, cwd=WIRE.parents[1])
    for name in GENERATED:
        again = tmp_path / "dsgd_cli" / "wire" / name
        assert again.read_text() == (WIRE / name).read_text(), f"run {' '.join(module[1:3])}"


def test_the_enumerations_are_those_of_the_wire() -> None:
    assert {reason.name: int(reason) for reason in Reason} == dict(pb.Reason.items())
    assert {op.name: int(op) for op in Operation} == dict(pb.Operation.items())
