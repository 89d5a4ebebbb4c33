"""How a run ends, in the words of the summary: outcome, reason, the metric that counts.

*converged*: the targets hold on the frozen vector. *finished*: there are no targets, and a limit,
a plateau or the algorithm itself ended the run. *stopped*: one of these came before the targets,
or somebody asked (then also if the targets happen to hold). *diverged*: see `convergence`.
*failed*: an error of the user's code or data, or `RunFailed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dsgd_cli.contract.names import process_name
from dsgd_cli.engine import convergence
from dsgd_cli.engine.events import Failure, Outcome, Prepared, Until
from dsgd_cli.engine.plateau import metric_of

OWN = "; if each host has examples of its own, say so: `per_host: true`"
CHANGED = "; the workers of one host must have the same examples: did they change?"
SAME = "; remove `per_host`, or give each host its own"
FORM = "; the examples of each host (`per_host`) must have the same form, columns and classes"


class Why(Enum):
    """What is ending the run; a later one in this list overrules an earlier one."""

    TARGET = 0
    LIMIT = 1
    STOP = 2
    DIVERGED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the run is ending; `failure` for FAILED."""

    why: Why
    reason: str
    failure: Failure | None = None

    @property
    def abrupt(self) -> bool:
        """No use in draining and judging."""
        return self.why in (Why.DIVERGED, Why.FAILED)


def outcome(ending: Ending, until: Until, frozen: Mapping[str, float] | None) -> Outcome:
    """`frozen`: the metrics of the frozen vector, if it has been evaluated."""
    if ending.why is Why.FAILED:
        return "failed"
    if ending.why is Why.DIVERGED:
        return "diverged"
    if ending.why is Why.STOP:
        return "stopped"
    if not convergence.targets(until):
        return "finished"
    met = frozen is not None and convergence.holds(until, frozen)
    return "converged" if met else "stopped"


def reason(ending: Ending, until: Until, frozen: Mapping[str, float] | None) -> str:
    """With where the targets stand on the vector that is exported, when that is what counts."""
    if ending.abrupt or frozen is None or not convergence.targets(until):
        return ending.reason
    stands = convergence.describe(until, frozen)
    return stands if ending.why is Why.TARGET else f"{ending.reason}: {stands}"


def metric_name(until: Until, metrics: Mapping[str, float]) -> str | None:
    """The metric to show: the target's, else what the model reports."""
    return next(iter(convergence.targets(until)), None) or metric_of(metrics)


def difference(
    first: Prepared, other: Prepared, same_data: bool = True, per_host: bool = False
) -> str | None:
    """One sentence about what two workers do not agree on, or None. `same_data`: they should have
    the same examples; `per_host`: it has been said that hosts have not."""
    names = [process_name("worker", who.worker) for who in (other, first)]
    pairs = {
        "dtype": (other.dtype, first.dtype),
        "tensors": (_shapes(other), _shapes(first)),
        "model, form of an example or names of the classes (digest)": (other.digest, first.digest),
    }
    also = "" if same_data else FORM
    if same_data and (other.examples, other.data_digest) != (first.examples, first.data_digest):
        pairs = {
            "training examples": (str(other.examples), str(first.examples)),
            "contents of the data (digest)": (other.data_digest, first.data_digest),
        }
        also = CHANGED if per_host else OWN
    columns = zip(other.columns, first.columns, strict=False)  # of some tables no row names them
    for number, (theirs, ours) in enumerate(columns, start=1):
        pairs[f"column {number}"] = (repr(theirs), repr(ours))
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            return f"{names[0]} and {names[1]} differ in their {what}: {theirs} and {ours}{also}"
    if not same_data and other.data_digest == first.data_digest:
        return f"{names[0]} and {names[1]} have the same examples, on different hosts{SAME}"
    return None


def _shapes(prepared: Prepared) -> str:
    return " ".join(f"{name}{list(shape)}" for name, shape in prepared.tensors)
