"""The parameters of a worker's best evaluations, in its run directory, which goes with the cluster.

The newest is there and the one that the coordinator knows of: whoever dies between writing one and
saying so leaves that. Each is whole or not there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsgd_cli.daemons.computing import Vector
from dsgd_cli.wire import dsgd_pb2 as pb


class Best:
    """Of one run, which `epoch` numbers; what is left of earlier runs is removed."""

    def __init__(self, folder: Path, worker: int, epoch: int) -> None:
        self._folder = folder
        self._name = f"best-worker-{worker}-{epoch}"
        for path in folder.glob(f"best-worker-{worker}-*"):
            if not path.name.startswith(f"{self._name}-"):
                path.unlink(missing_ok=True)

    def keep(self, evaluation: int, flat: Vector, known: int) -> pb.Kept:
        """Writes them; `known`: the evaluation that is the best so far, whoever has kept it."""
        data = flat.data.cast("B")
        path = self._path(evaluation)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.rename(path)
        for other in self._folder.glob(f"{self._name}-*.bin"):
            if other not in (path, self._path(known)):
                other.unlink(missing_ok=True)
        return pb.Kept(path=str(path), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _path(self, evaluation: int) -> Path:
        return self._folder / f"{self._name}-{evaluation:09}.bin"
