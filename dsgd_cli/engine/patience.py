"""How long a run waits for whom. Whatever only an answer would end has a bound here.

A worker is judged by what it usually needs; as long as that is not known, by a bound that a first
batch with its imports, or a first evaluation, should stay well below. Servers are not in here: who
calls them knows when they are silent.
"""

from __future__ import annotations

SETUP_S = 300.0  # to load model and data; to write the first parameters; a first batch
FIRST_EVALUATION_S = 600.0
GATHER_S = 5.0  # those that are ready to train wait so long for those that still load
HANG_S = 30.0  # no step for so long, or for so many times the usual batch: the worker hangs
HANG_TIMES = 20
DRAIN_S = 5.0  # to end the batch in hand
DRAIN_TIMES = 3
STOP_DRAIN_S = 3.0  # the same once somebody has asked for the end: from then on
STOP_S = 5.5  # from then on until the export begins, judged or not
ALONE_S = 15.0  # without any worker: an agent may be about to start one again
ABSENT_S = 60.0  # without any worker of a host that has examples of its own
STALL_S = 1800.0  # nobody does anything, however often it is started again


def batch_s(usual_s: float | None) -> float:
    """How long a step counter may stand while there is work."""
    return SETUP_S if usual_s is None else max(HANG_S, HANG_TIMES * usual_s)


def evaluation_s(longest_s: float | None) -> float:
    """How long an evaluation may take."""
    return FIRST_EVALUATION_S if longest_s is None else max(HANG_S, HANG_TIMES * longest_s)


def drain_s(usual_s: float) -> float:
    """How long a worker may take until it has drained; `usual_s`: for what it has in hand."""
    return max(DRAIN_S, DRAIN_TIMES * usual_s)


def judging_s(longest_s: float | None) -> float:
    """How long the frozen vector may wait for its metrics, whoever is lost and comes back."""
    return SETUP_S + 2 * evaluation_s(longest_s)
