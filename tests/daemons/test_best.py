"""What a worker keeps of its best evaluations."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dsgd_cli.daemons.best import Best


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_one_that_is_known_are_kept_whole(tmp_path: Path) -> None:
    best = Best(tmp_path, worker=1, epoch=7)
    for evaluation, known in ((2, 0), (5, 2), (9, 5), (10, 5)):
        kept = best.keep(evaluation, np.full(3, evaluation, "float32"), known)
        content = Path(kept.path).read_bytes()
        assert np.frombuffer(content, "float32").tolist() == [evaluation] * 3
        assert (kept.bytes, kept.sha256) == (12, hashlib.sha256(content).hexdigest())
    assert names(tmp_path) == [f"best-worker-1-7-{n:09}.bin" for n in (5, 10)]


def test_another_incarnation_leaves_what_the_coordinator_knows_of(tmp_path: Path) -> None:
    first = Best(tmp_path, worker=1, epoch=7).keep(3, np.zeros(3, "float32"), 0)
    Best(tmp_path, worker=1, epoch=7).keep(4, np.ones(3, "float32"), 3)
    assert Path(first.path).is_file()


def test_what_is_left_of_another_run_is_removed_and_nothing_else(tmp_path: Path) -> None:
    Best(tmp_path, worker=1, epoch=7).keep(3, np.zeros(3, "float32"), 0)
    Best(tmp_path, worker=11, epoch=7).keep(3, np.zeros(3, "float32"), 0)
    Best(tmp_path, worker=1, epoch=8)
    assert names(tmp_path) == ["best-worker-11-7-000000003.bin"]
