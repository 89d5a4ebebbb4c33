"""What 75 million parameters cost in memory, as the kernel sees it while they are trained.

As large as the seed authors' larger network: with Adagrad, two servers and two workers. Over tcp
each process has its own memory; over shm a gradient is in one place that two processes see, so
there the whole is judged, in which each page counts once.
"""

from __future__ import annotations

import re
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import User

INPUTS, HIDDEN, CLASSES = 128 * 128 * 3, [1500, 600, 400, 350, 250], 102
EXAMPLES, SLOTS = 60, 1  # slots: Adagrad's
MB = 1_000_000

CLUSTER = f"""
name: NAME
servers: 2
workers: 2
channel: CHANNEL
train:
  model: {{mlp: {{hidden: {HIDDEN}}}}}
  data: {{npz: data.npz}}
  optimizer: {{adagrad: {{learning_rate: 0.001}}}}
  batch_size: 10
  evaluate: {{every: 4 steps}}
  until: {{max_steps: 12}}
"""


class Peaks:
    """The most memory of each process, and of all together; looked at until `close`."""

    def __init__(self, user: User) -> None:
        self.alone: dict[str, int] = {}  # resident, as VmHWM
        self.together = 0  # Pss: what several processes see is shared out among them
        self._user = user
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.is_set():
            total = 0
            for member in self._user.members():
                if not member.process.startswith(("server/", "worker/")):
                    continue
                total += _kilobytes(member.pid, "smaps_rollup", "Pss")
                alone = _kilobytes(member.pid, "status", "VmHWM")
                self.alone[member.process] = max(self.alone.get(member.process, 0), alone)
            self.together = max(self.together, total)
            time.sleep(0.05)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def _kilobytes(pid: int, file: str, what: str) -> int:
    """In bytes; 0 for a process that has ended."""
    try:
        found = re.search(rf"^{what}:\s*(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("channel", ["tcp", "shm"])
def test_a_server_holds_its_shard_and_a_worker_a_few_copies(user: User, channel: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((EXAMPLES, INPUTS), dtype=np.float32)
    y = np.arange(EXAMPLES) % CLASSES
    y[0] = CLASSES - 1
    np.savez(user.folder / "data.npz", x=x, y=y, x_test=x[:10], y_test=y[:10])
    count = sum(a * b + b for a, b in pairwise([INPUTS, *HIDDEN, CLASSES]))
    assert 74 * MB < count < 76 * MB
    user.write(CLUSTER.replace("CHANNEL", channel))
    peaks = Peaks(user)
    try:
        run = user.dsgd("train", "--json", timeout_s=500)
    finally:
        peaks.close()
    assert run.code == 0, run.err
    user.assert_nothing_left()
    print(channel, {name: size // MB for name, size in peaks.alone.items()}, peaks.together // MB)
    parameters, data = 4 * count, x.nbytes + x[:10].nbytes
    server = (2 + SLOTS) * parameters // 2 + 100 * MB
    worker = 5 * parameters + data + 150 * MB
    assert len(peaks.alone) == 4
    assert peaks.together <= 2 * server + 2 * worker
    if channel == "tcp":
        assert all(peaks.alone[f"server/{i}"] <= server for i in (0, 1))
        assert all(peaks.alone[f"worker/{i}"] <= worker for i in (0, 1))
