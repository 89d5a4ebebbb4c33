"""What the coordinator tells the run's state machine, and what the machine answers.

`Training.on(event, now_s) -> list[Decision]` is the whole interface: the daemon turns messages
into events, feeds them one at a time, and carries the decisions out in the order given. Events of
one worker must be fed in the order in which that worker sent them. Every event of a worker carries
its incarnation; what comes from an incarnation that is no longer the living one is ignored.
Nothing here does anything: values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsgd_cli.engine.tasks import Task
from dsgd_cli.engine.vectors import Op

Tensors = tuple[tuple[str, tuple[int, ...]], ...]
Outcome = Literal["converged", "finished", "stopped", "diverged", "failed"]
Unit = Literal["epoch", "step", "s"]


@dataclass(frozen=True, slots=True)
class Every:
    """How often the held-out set is evaluated: every `count` epochs, steps or seconds."""

    count: float = 1
    unit: Unit = "epoch"


@dataclass(frozen=True, slots=True)
class Until:
    """When the run ends. All targets given must hold at once, on the held-out set."""

    loss: float | None = None  # held-out loss <= this
    accuracy: float | None = None  # held-out accuracy >= this
    max_epochs: int | None = None
    max_steps: int | None = None  # gradient batches over all workers
    max_time_s: float | None = None  # since the first worker was started
    plateau: Mapping[str, Any] | None = None  # options of `plateau.Plateau`


@dataclass(frozen=True, slots=True)
class Settings:
    """What the machine must know of the specification.

    `algorithm` and `optimizer` are their options, the algorithm's with its name. `places`: where
    each host has examples of its own, the partition of each worker, counted from 0; else ().
    """

    seed: int
    batch_size: int | None
    until: Until
    every: Every = Every()
    algorithm: Mapping[str, Any] = field(default_factory=lambda: {"name": "downpour"})
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    dtype: str = "float32"
    places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """Who failed, and how: for `run_error`."""

    process: str  # "worker/3", or "" when it is nobody's
    error: str
    traceback: str = ""
    kind: str = "user"


# ── events ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A session opened. Incarnations of one worker grow; each session is a new one."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The session of this incarnation ended, or the worker is silent for too long."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Moved:
    """The worker's step counter, which its heartbeats carry, has risen: it does not hang."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Answer to `Prepare`: model and data are loaded.

    `digest` is of what all workers must have alike: the model, the seed, the form of an example,
    the names of the classes; `data_digest` of the examples, which those of one partition must have
    alike.
    """

    worker: int
    incarnation: int
    tensors: Tensors
    dtype: str
    examples: int  # training examples, of each epoch
    digest: str
    data_digest: str = ""
    held_out: int = 0  # examples that evaluations are of
    classes: tuple[str, ...] = ()  # what class numbers are called, if the data say so
    columns: tuple[str, ...] = ()  # what features are called, if the data say so
    label: str = ""  # and what the labels are


@dataclass(frozen=True, slots=True)
class Configured:
    """Answer to `ConfigureShards`: every server has its (empty) shard."""


@dataclass(frozen=True, slots=True)
class Initialised:
    """Answer to `Initialise`: this worker wrote every block of every shard."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """Answer to `Fence`, with the same two numbers: every shard has acknowledged it."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker did since its last report, all of it for one task.

    Sent when a task ends (`done_upto == task.stop`), while a long one runs, and before `Drained`.
    """

    worker: int
    incarnation: int
    task_id: int
    done_upto: int  # positions before this one are in the parameters: acknowledged by every shard
    steps: int  # gradient batches computed since the last report (refused ones included)
    examples: int  # examples in those batches; may run ahead of done_upto
    loss_sum: float = 0.0
    loss_count: int = 0  # mean training loss = loss_sum / loss_count
    staleness: Mapping[int, int] = field(default_factory=dict)  # updates by others -> pushes
    dropped: int = 0  # pushes that came too late, and are in no parameters
    shard_bytes: tuple[int, ...] = ()  # moved to and from each shard
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0
    nonfinite_streak: int = 0  # gradients refused as not finite in a row, up to now
    nonfinite_where: str = ""  # the tensor of the last of them
    round: int = 0  # of a `Work`: for which one it was contributed; 0: not finite, so for none


@dataclass(frozen=True, slots=True)
class Claimed:
    """The gradient of a `Work` without a part is computed: may it be contributed?"""

    worker: int
    incarnation: int
    task_id: int


@dataclass(frozen=True, slots=True)
class Ticked:
    """So many clocks of this worker are in all shards (stale_synchronous). The same number again:
    and it has none in hand, because it evaluates."""

    worker: int
    incarnation: int
    clock: int


FromStrategyWorker = Claimed | Ticked


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the worker that evaluated the best parameters so far has kept them."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Answer to `Evaluate`: the held-out set's metrics, with "loss" and often "accuracy"."""

    worker: int
    incarnation: int
    evaluation_id: int
    metrics: Mapping[str, float]
    kept: Kept | None = None  # as `Evaluate` has said


@dataclass(frozen=True, slots=True)
class Drained:
    """Answer to `Drain`, after the last reports: this worker holds no task and pushes nothing."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """Answer to `Freeze`: every shard refuses pushes."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """Answer to `Thaw`: every shard takes pushes again."""


@dataclass(frozen=True, slots=True)
class Exported:
    """Answer to `Export`: every server wrote its slice (the daemon remembers where)."""


@dataclass(frozen=True, slots=True)
class Committed:
    """Answer to `Commit`: every shard has made the update."""

    round: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Answer to `Measure`: the squared norm over all shards."""

    round: int
    squares: float


@dataclass(frozen=True, slots=True)
class Operated:
    """Answer to `Operate`: the numbers over all shards, in the order of the operations."""

    number: int
    numbers: tuple[float, ...]


Answered = Committed | Measured | Operated


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the run to end and its model to be kept: Ctrl-C, a lapsed lease."""

    why: str


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """An error that a restart would not cure (the user's code or data): the run has failed."""

    worker: int
    incarnation: int
    error: str
    traceback: str = ""
    kind: str = "user"


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run cannot go on and nothing can be saved: the layout is refused, a server is gone.

    `Finish` follows at once, in any phase.
    """

    failure: Failure


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes. A few a second are enough: only limits, bounds and progress wait for one."""


Event = (
    WorkerJoined
    | WorkerLost
    | Moved
    | Prepared
    | Configured
    | Initialised
    | Fenced
    | Report
    | Claimed
    | Ticked
    | Evaluated
    | Drained
    | Committed
    | Measured
    | Operated
    | Frozen
    | Thawed
    | Exported
    | StopRequested
    | WorkerFailed
    | RunFailed
    | Tick
)


# ── decisions ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load model and data, and answer `Prepared`. Every incarnation is asked once."""

    worker: int


@dataclass(frozen=True, slots=True)
class ConfigureShards:
    """Cut the shards and configure the servers; answer `Configured`. `examples` of an epoch."""

    tensors: Tensors
    dtype: str
    examples: int


@dataclass(frozen=True, slots=True)
class Initialise:
    """This worker writes the seeded first parameters into all shards; answer `Initialised`.

    Asked again of another worker if this one is lost: writing a block twice is harmless.
    """

    worker: int


@dataclass(frozen=True, slots=True)
class Start:
    """Parameters exist: pull them and be ready for `Grant` and `Evaluate`. No answer."""

    worker: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Append this task to the worker's queue (at most two are there)."""

    worker: int
    task: Task


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the gradient of this task, and contribute it.

    With a `part`: contribute it to the round as that; answer `Report` when every shard has it.
    Without, unless `Accept` has said it meanwhile: answer `Claimed`, keep it, and wait for `Accept`
    or `Late`. It is of parameters with so many updates in them (`needs`), which may come later
    than this; `fetch`: of those that are there now.
    """

    worker: int
    task: Task
    round: int
    part: int | None
    needs: int = 0
    fetch: bool = False


@dataclass(frozen=True, slots=True)
class Accept:
    """Contribute the gradient of this task, perhaps once more, to this round; answer `Report`."""

    worker: int
    task_id: int
    round: int
    part: int


@dataclass(frozen=True, slots=True)
class Late:
    """The gradient of this task is not needed: drop it, computed or not. No answer."""

    worker: int
    task_id: int


@dataclass(frozen=True, slots=True)
class Advance:
    """The worker may begin its clock `limit` (stale_synchronous). No answer."""

    worker: int
    limit: int


@dataclass(frozen=True, slots=True)
class Measure:
    """The squared norm of `scale` times the sum of the round's parts; answer `Measured`."""

    round: int
    parts: int
    scale: float


@dataclass(frozen=True, slots=True)
class Commit:
    """One update by `scale` times the sum of the round's parts; answer `Committed`."""

    round: int
    parts: int
    scale: float


@dataclass(frozen=True, slots=True)
class Operate:
    """Operations on the shards' vectors; `number` counts them from 1; answer `Operated`."""

    number: int
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class SetRate:
    """The learning rate is multiplied by this from now on, beside its schedule. No answer."""

    factor: float


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Pull, and compute the held-out set's metrics, before the next batch; answer `Evaluated`.

    `frozen`: no push is accepted meanwhile, so all blocks belong together. If the metric that
    counts (`plateau.metric_of`) is better than `best` (NaN: whatever it is), the worker keeps what
    it has evaluated, besides what it kept of evaluation `kept`. `keep`: where each host has
    held-out examples of its own, one worker of each evaluates, and only the first one keeps.
    """

    worker: int
    evaluation_id: int
    frozen: bool
    best: float = math.nan
    keep: bool = True
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Expel:
    """This incarnation hangs: end its session and say why, so that its agent starts it again.

    To the machine it is lost already; its `Fence` follows.
    """

    worker: int
    incarnation: int
    why: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Every shard must refuse this worker's incarnations below `incarnation`; answer `Fenced`.

    That goes for pushes and for the blocks that `Initialise` writes. Retried by the daemon until
    every shard has acknowledged it.
    """

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """End the batch in hand, push what has been accumulated, report each task that was touched,
    drop the queue (granted tasks; evaluations that have not begun), then answer `Drained`."""

    worker: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """Every shard refuses pushes from now on; answer `Frozen`."""


@dataclass(frozen=True, slots=True)
class Thaw:
    """Every shard takes pushes again; answer `Thawed`."""


@dataclass(frozen=True, slots=True)
class Export:
    """Every server writes its slice to disk; answer `Exported`."""


@dataclass(frozen=True, slots=True)
class Record:
    """A line of metrics.jsonl: plain JSON values; `kind` is report, epoch, evaluate or event."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """A line for the terminal: step, epoch, examples, examples_per_s, shard_bytes, loss, metric,
    value, elapsed_s, limits, workers."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Best:
    """The best of all evaluations, by the metric that counts, and who has kept its parameters."""

    metric: str
    value: float
    step: int
    worker: int
    kept: Kept
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over. Given exactly once, the last decision of all."""

    outcome: Outcome
    reason: str
    metric: str | None = None
    value: float | None = None
    loss: float | None = None  # held-out
    steps: int = 0
    examples: int = 0
    seconds: float = 0.0
    epochs: int = 0  # complete ones
    exported: bool = False  # whether an `Export` was answered
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the exported vector
    failure: Failure | None = None
    best: Best | None = None  # the best of all evaluations
    staleness: Mapping[int, int] = field(default_factory=dict)  # updates by others -> pushes
    dropped: int = 0  # pushes that came too late
    classes: tuple[str, ...] = ()  # what class numbers are called, if the data say so
    columns: tuple[str, ...] = ()  # what features are called, if the data say so
    label: str = ""  # and what the labels are


Decision = (
    Prepare
    | ConfigureShards
    | Initialise
    | Start
    | Grant
    | Work
    | Accept
    | Late
    | Advance
    | Measure
    | Commit
    | Operate
    | SetRate
    | Evaluate
    | Expel
    | Fence
    | Drain
    | Freeze
    | Thaw
    | Export
    | Record
    | Progress
    | Finish
)
