"""Generates dsgd_pb2.py, dsgd_pb2.pyi and dsgd_pb2_grpc.py from dsgd.proto.

    python -m dsgd_cli.wire.generate

The result is committed, so that only developers need grpcio-tools; a test generates it again and
compares. The import path is `dsgd_cli.wire.dsgd_pb2` because protoc runs at the package's parent.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROTO = "dsgd_cli/wire/dsgd.proto"
GENERATED = ("dsgd_pb2.py", "dsgd_pb2.pyi", "dsgd_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes dsgd_cli/wire/<GENERATED> below `out`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    root = Path(__file__).parents[2]
    arguments = ["protoc", f"-I{root}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main([*arguments, PROTO]) != 0:
        raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2])
