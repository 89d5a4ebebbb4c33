"""The algorithms by name: one literal table of what makes a run's strategy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsgd_cli.engine.algorithms import search
from dsgd_cli.engine.algorithms.base import Strategy
from dsgd_cli.engine.algorithms.sandblaster import Sandblaster
from dsgd_cli.engine.algorithms.stale_synchronous import Clocks
from dsgd_cli.engine.algorithms.streaming import Streaming, WarmStart
from dsgd_cli.engine.algorithms.synchronous import Synchronous
from dsgd_cli.engine.events import Settings
from dsgd_cli.engine.partitions import Partitions
from dsgd_cli.engine.tasks import EPOCHS_AHEAD, TaskQueue

NOISE = 8.0  # times the dtype's precision: what rounding does to a sum of losses


def _queue(settings: Settings, partitions: Partitions, ahead: int = EPOCHS_AHEAD) -> TaskQueue:
    assert settings.batch_size is not None
    return TaskQueue(partitions, settings.batch_size, settings.until.max_epochs, ahead)


def _downpour(settings: Settings, partitions: Partitions) -> Strategy:
    warm_start = settings.algorithm.get("warm_start")
    return Streaming(
        _queue(settings, partitions),
        warm_start=None if warm_start is None else WarmStart.of(warm_start),
    )


def _stale_synchronous(settings: Settings, partitions: Partitions) -> Strategy:
    return Streaming(_queue(settings, partitions), Clocks(settings.algorithm["bound"]))


def _synchronous(settings: Settings, partitions: Partitions) -> Strategy:
    backups = settings.algorithm["backup_workers"]
    assert settings.batch_size is not None
    ahead = EPOCHS_AHEAD
    if len(partitions.sizes) == 1:  # two steps are out at once, however few the examples
        ahead += -(-2 * settings.workers * settings.batch_size // partitions.examples)
    return Synchronous(
        _queue(settings, partitions.owners(), ahead),
        partitions,
        needed=settings.workers - backups,
        backups=backups,
        clip_norm=settings.optimizer.get("clip_norm"),
    )


def _sandblaster(settings: Settings, partitions: Partitions) -> Strategy:
    options = settings.algorithm
    how = search.Settings(
        method=options["method"],
        memory=options["memory"],
        l2=options["l2"],
        tolerance=options["tolerance"],
        noise=NOISE * float(np.finfo(settings.dtype).eps),
    )
    return Sandblaster(how, partitions, settings.workers, options["portions"])


STRATEGIES: dict[str, Callable[[Settings, Partitions], Strategy]] = {
    "downpour": _downpour,
    "synchronous": _synchronous,
    "stale_synchronous": _stale_synchronous,
    "sandblaster": _sandblaster,
}


def make_strategy(settings: Settings, partitions: Partitions) -> Strategy:
    """The coordinator's half of the run's algorithm."""
    return STRATEGIES[settings.algorithm["name"]](settings, partitions)
