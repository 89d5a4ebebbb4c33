"""The parameters of a worker's best evaluations, in its run directory, which goes with the cluster.

The last two are there: whoever dies between writing one and saying so leaves the one before it,
which is what the coordinator knows of. Each is whole or not there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsgd_cli.daemons.computing import Vector
from dsgd_cli.wire import dsgd_pb2 as pb

KEPT = 2


class Best:
    """Of one run, which `epoch` numbers; what is left of earlier runs is removed."""

    def __init__(self, folder: Path, worker: int, epoch: int) -> None:
        self._folder = folder
        self._name = f"best-worker-{worker}-{epoch}"
        for path in folder.glob(f"best-worker-{worker}-*"):
            if not path.name.startswith(f"{self._name}-"):
                path.unlink(missing_ok=True)

    def keep(self, evaluation: int, flat: Vector) -> pb.Kept:
        """Writes them; evaluations are numbered upwards."""
        data = flat.data.cast("B")
        path = self._folder / f"{self._name}-{evaluation:09}.bin"
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.rename(path)
        for older in sorted(self._folder.glob(f"{self._name}-*.bin"))[:-KEPT]:
            older.unlink(missing_ok=True)
        return pb.Kept(path=str(path), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
