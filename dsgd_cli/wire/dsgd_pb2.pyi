from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PULL: _ClassVar[Operation]
    PUSH: _ClassVar[Operation]
    PUSH_PULL: _ClassVar[Operation]
    WRITE: _ClassVar[Operation]
    CONTRIBUTE: _ClassVar[Operation]

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNKNOWN: _ClassVar[Reason]
    WRONG_CLUSTER: _ClassVar[Reason]
    WRONG_EPOCH: _ClassVar[Reason]
    WRONG_SHARD: _ClassVar[Reason]
    WRONG_SIZE: _ClassVar[Reason]
    WRONG_ORDER: _ClassVar[Reason]
    FENCED: _ClassVar[Reason]
    OUT_OF_ORDER: _ClassVar[Reason]
    NOT_FINITE: _ClassVar[Reason]
    FROZEN: _ClassVar[Reason]
    NOT_CONFIGURED: _ClassVar[Reason]
    NO_CARRIER: _ClassVar[Reason]
    ROUND_OVER: _ClassVar[Reason]
PULL: Operation
PUSH: Operation
PUSH_PULL: Operation
WRITE: Operation
CONTRIBUTE: Operation
UNKNOWN: Reason
WRONG_CLUSTER: Reason
WRONG_EPOCH: Reason
WRONG_SHARD: Reason
WRONG_SIZE: Reason
WRONG_ORDER: Reason
FENCED: Reason
OUT_OF_ORDER: Reason
NOT_FINITE: Reason
FROZEN: Reason
NOT_CONFIGURED: Reason
NO_CARRIER: Reason
ROUND_OVER: Reason

class FromWorker(_message.Message):
    __slots__ = ("hello", "heartbeat", "reached", "unreachable", "prepared", "initialised", "report", "evaluated", "failed", "drained", "claimed", "ticked")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    INITIALISED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_FIELD_NUMBER: _ClassVar[int]
    TICKED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    reached: Reached
    unreachable: Unreachable
    prepared: Prepared
    initialised: Initialised
    report: Report
    evaluated: Evaluated
    failed: WorkerFailed
    drained: Drained
    claimed: Claimed
    ticked: Ticked
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., reached: _Optional[_Union[Reached, _Mapping]] = ..., unreachable: _Optional[_Union[Unreachable, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., initialised: _Optional[_Union[Initialised, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ..., failed: _Optional[_Union[WorkerFailed, _Mapping]] = ..., drained: _Optional[_Union[Drained, _Mapping]] = ..., claimed: _Optional[_Union[Claimed, _Mapping]] = ..., ticked: _Optional[_Union[Ticked, _Mapping]] = ...) -> None: ...

class FromCoordinator(_message.Message):
    __slots__ = ("welcome", "heartbeat", "servers", "lease", "prepare", "initialise", "start", "grant", "evaluate", "drain", "run_over", "work", "accept", "late", "advance")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    INITIALISE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RUN_OVER_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    ADVANCE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    heartbeat: Heartbeat
    servers: Servers
    lease: Lease
    prepare: Prepare
    initialise: Initialise
    start: Start
    grant: Grant
    evaluate: Evaluate
    drain: Drain
    run_over: RunOver
    work: Work
    accept: Accept
    late: Late
    advance: Advance
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., servers: _Optional[_Union[Servers, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., initialise: _Optional[_Union[Initialise, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., run_over: _Optional[_Union[RunOver, _Mapping]] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., late: _Optional[_Union[Late, _Mapping]] = ..., advance: _Optional[_Union[Advance, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("cluster_id", "worker")
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    cluster_id: str
    worker: int
    def __init__(self, cluster_id: _Optional[str] = ..., worker: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    def __init__(self, incarnation: _Optional[int] = ...) -> None: ...

class Servers(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Reached(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Unreachable(_message.Message):
    __slots__ = ("server", "address", "why", "kind")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    server: int
    address: str
    why: str
    kind: str
    def __init__(self, server: _Optional[int] = ..., address: _Optional[str] = ..., why: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("epoch", "run_id", "seed", "train_json", "workers", "channel_json")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TRAIN_JSON_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_JSON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    run_id: str
    seed: int
    train_json: str
    workers: int
    channel_json: str
    def __init__(self, epoch: _Optional[int] = ..., run_id: _Optional[str] = ..., seed: _Optional[int] = ..., train_json: _Optional[str] = ..., workers: _Optional[int] = ..., channel_json: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("epoch", "tensors", "dtype", "examples", "digest", "data_digest", "held_out", "classes", "columns", "label")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    dtype: str
    examples: int
    digest: str
    data_digest: str
    held_out: int
    classes: _containers.RepeatedScalarFieldContainer[str]
    columns: _containers.RepeatedScalarFieldContainer[str]
    label: str
    def __init__(self, epoch: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., dtype: _Optional[str] = ..., examples: _Optional[int] = ..., digest: _Optional[str] = ..., data_digest: _Optional[str] = ..., held_out: _Optional[int] = ..., classes: _Optional[_Iterable[str]] = ..., columns: _Optional[_Iterable[str]] = ..., label: _Optional[str] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("tensors", "dtype", "servers", "max_block_bytes", "examples")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    dtype: str
    servers: int
    max_block_bytes: int
    examples: int
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., dtype: _Optional[str] = ..., servers: _Optional[int] = ..., max_block_bytes: _Optional[int] = ..., examples: _Optional[int] = ...) -> None: ...

class Initialise(_message.Message):
    __slots__ = ("epoch", "cut")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    cut: Cut
    def __init__(self, epoch: _Optional[int] = ..., cut: _Optional[_Union[Cut, _Mapping]] = ...) -> None: ...

class Initialised(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("epoch", "cut")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    cut: Cut
    def __init__(self, epoch: _Optional[int] = ..., cut: _Optional[_Union[Cut, _Mapping]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "start", "stop")
    ID_FIELD_NUMBER: _ClassVar[int]
    PASS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    id: int
    start: int
    stop: int
    def __init__(self, id: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., **kwargs) -> None: ...

class Grant(_message.Message):
    __slots__ = ("epoch", "task")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    task: Task
    def __init__(self, epoch: _Optional[int] = ..., task: _Optional[_Union[Task, _Mapping]] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("epoch", "task", "round", "part", "needs", "fetch")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    task: Task
    round: int
    part: int
    needs: int
    fetch: bool
    def __init__(self, epoch: _Optional[int] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., round: _Optional[int] = ..., part: _Optional[int] = ..., needs: _Optional[int] = ..., fetch: _Optional[bool] = ...) -> None: ...

class Claimed(_message.Message):
    __slots__ = ("epoch", "task")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    task: int
    def __init__(self, epoch: _Optional[int] = ..., task: _Optional[int] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("epoch", "task", "round", "part")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    task: int
    round: int
    part: int
    def __init__(self, epoch: _Optional[int] = ..., task: _Optional[int] = ..., round: _Optional[int] = ..., part: _Optional[int] = ...) -> None: ...

class Late(_message.Message):
    __slots__ = ("epoch", "task")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    task: int
    def __init__(self, epoch: _Optional[int] = ..., task: _Optional[int] = ...) -> None: ...

class Advance(_message.Message):
    __slots__ = ("epoch", "limit")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    limit: int
    def __init__(self, epoch: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class Ticked(_message.Message):
    __slots__ = ("epoch", "clock")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    clock: int
    def __init__(self, epoch: _Optional[int] = ..., clock: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Drained(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("epoch", "evaluation", "best", "keep", "kept")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    evaluation: int
    best: float
    keep: bool
    kept: int
    def __init__(self, epoch: _Optional[int] = ..., evaluation: _Optional[int] = ..., best: _Optional[float] = ..., keep: _Optional[bool] = ..., kept: _Optional[int] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("epoch", "evaluation", "metrics", "kept")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    evaluation: int
    metrics: _containers.ScalarMap[str, float]
    kept: Kept
    def __init__(self, epoch: _Optional[int] = ..., evaluation: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., kept: _Optional[_Union[Kept, _Mapping]] = ...) -> None: ...

class Kept(_message.Message):
    __slots__ = ("path", "bytes", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    bytes: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("epoch", "task", "done_upto", "steps", "examples", "loss_sum", "loss_count", "staleness", "dropped", "round", "shard_bytes", "pull_s", "compute_s", "push_s", "nonfinite_streak", "nonfinite_where")
    class StalenessEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    DONE_UPTO_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    LOSS_COUNT_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PUSH_S_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_STREAK_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_WHERE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    task: int
    done_upto: int
    steps: int
    examples: int
    loss_sum: float
    loss_count: int
    staleness: _containers.ScalarMap[int, int]
    dropped: int
    round: int
    shard_bytes: _containers.RepeatedScalarFieldContainer[int]
    pull_s: float
    compute_s: float
    push_s: float
    nonfinite_streak: int
    nonfinite_where: str
    def __init__(self, epoch: _Optional[int] = ..., task: _Optional[int] = ..., done_upto: _Optional[int] = ..., steps: _Optional[int] = ..., examples: _Optional[int] = ..., loss_sum: _Optional[float] = ..., loss_count: _Optional[int] = ..., staleness: _Optional[_Mapping[int, int]] = ..., dropped: _Optional[int] = ..., round: _Optional[int] = ..., shard_bytes: _Optional[_Iterable[int]] = ..., pull_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., push_s: _Optional[float] = ..., nonfinite_streak: _Optional[int] = ..., nonfinite_where: _Optional[str] = ...) -> None: ...

class WorkerFailed(_message.Message):
    __slots__ = ("epoch", "error", "traceback", "kind")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    error: str
    traceback: str
    kind: str
    def __init__(self, epoch: _Optional[int] = ..., error: _Optional[str] = ..., traceback: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class RunOver(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("cluster_id", "epoch", "shard", "worker", "incarnation", "seq", "operation", "tag")
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    cluster_id: str
    epoch: int
    shard: int
    worker: int
    incarnation: int
    seq: int
    operation: Operation
    tag: int
    def __init__(self, cluster_id: _Optional[str] = ..., epoch: _Optional[int] = ..., shard: _Optional[int] = ..., worker: _Optional[int] = ..., incarnation: _Optional[int] = ..., seq: _Optional[int] = ..., operation: _Optional[_Union[Operation, str]] = ..., tag: _Optional[int] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("index", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("header", "blocks", "last", "since")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    header: Header
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    last: bool
    since: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ..., last: _Optional[bool] = ..., since: _Optional[_Iterable[int]] = ...) -> None: ...

class FreshBlock(_message.Message):
    __slots__ = ("index", "version", "applied_incarnation", "applied_seq", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_SEQ_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    version: int
    applied_incarnation: int
    applied_seq: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., version: _Optional[int] = ..., applied_incarnation: _Optional[int] = ..., applied_seq: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ExchangeReply(_message.Message):
    __slots__ = ("blocks", "last", "refusal")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[FreshBlock]
    last: bool
    refusal: Refusal
    def __init__(self, blocks: _Optional[_Iterable[_Union[FreshBlock, _Mapping]]] = ..., last: _Optional[bool] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message", "block")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    reason: Reason
    message: str
    block: int
    def __init__(self, reason: _Optional[_Union[Reason, str]] = ..., message: _Optional[str] = ..., block: _Optional[int] = ...) -> None: ...

class OpenChannelRequest(_message.Message):
    __slots__ = ("kind", "header", "size_bytes", "block_bytes", "plain", "host")
    KIND_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PLAIN_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    kind: str
    header: Header
    size_bytes: int
    block_bytes: int
    plain: bool
    host: str
    def __init__(self, kind: _Optional[str] = ..., header: _Optional[_Union[Header, _Mapping]] = ..., size_bytes: _Optional[int] = ..., block_bytes: _Optional[int] = ..., plain: _Optional[bool] = ..., host: _Optional[str] = ...) -> None: ...

class OpenChannelReply(_message.Message):
    __slots__ = ("refusal", "tcp", "shm")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    tcp: TcpTicket
    shm: ShmTicket
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., tcp: _Optional[_Union[TcpTicket, _Mapping]] = ..., shm: _Optional[_Union[ShmTicket, _Mapping]] = ...) -> None: ...

class TcpTicket(_message.Message):
    __slots__ = ("port", "ticket", "key_up", "key_down")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    KEY_UP_FIELD_NUMBER: _ClassVar[int]
    KEY_DOWN_FIELD_NUMBER: _ClassVar[int]
    port: int
    ticket: bytes
    key_up: bytes
    key_down: bytes
    def __init__(self, port: _Optional[int] = ..., ticket: _Optional[bytes] = ..., key_up: _Optional[bytes] = ..., key_down: _Optional[bytes] = ...) -> None: ...

class ShmTicket(_message.Message):
    __slots__ = ("socket", "ticket", "host")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    socket: str
    ticket: bytes
    host: str
    def __init__(self, socket: _Optional[str] = ..., ticket: _Optional[bytes] = ..., host: _Optional[str] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("cluster_id", "shard", "epoch")
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    cluster_id: str
    shard: int
    epoch: int
    def __init__(self, cluster_id: _Optional[str] = ..., shard: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("epoch", "run_id", "start", "stop", "block_elements", "dtype", "optimizer", "options_json", "fences", "algorithm_json", "steps_per_update", "steps_per_epoch")
    class FencesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_JSON_FIELD_NUMBER: _ClassVar[int]
    FENCES_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_JSON_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_UPDATE_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    run_id: str
    start: int
    stop: int
    block_elements: int
    dtype: str
    optimizer: str
    options_json: str
    fences: _containers.ScalarMap[int, int]
    algorithm_json: str
    steps_per_update: float
    steps_per_epoch: float
    def __init__(self, epoch: _Optional[int] = ..., run_id: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., block_elements: _Optional[int] = ..., dtype: _Optional[str] = ..., optimizer: _Optional[str] = ..., options_json: _Optional[str] = ..., fences: _Optional[_Mapping[int, int]] = ..., algorithm_json: _Optional[str] = ..., steps_per_update: _Optional[float] = ..., steps_per_epoch: _Optional[float] = ...) -> None: ...

class ConfigureReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("epoch", "worker", "incarnation")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker: int
    incarnation: int
    def __init__(self, epoch: _Optional[int] = ..., worker: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class FenceReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FreezeRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class FreezeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ThawRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ThawReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("epoch", "run_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    run_id: str
    def __init__(self, epoch: _Optional[int] = ..., run_id: _Optional[str] = ...) -> None: ...

class ExportReply(_message.Message):
    __slots__ = ("path", "bytes", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    bytes: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("epoch", "round", "parts", "scale")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    round: int
    parts: int
    scale: float
    def __init__(self, epoch: _Optional[int] = ..., round: _Optional[int] = ..., parts: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ("epoch", "round", "parts", "scale")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    round: int
    parts: int
    scale: float
    def __init__(self, epoch: _Optional[int] = ..., round: _Optional[int] = ..., parts: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class MeasureReply(_message.Message):
    __slots__ = ("squares",)
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    squares: float
    def __init__(self, squares: _Optional[float] = ...) -> None: ...

class OperateRequest(_message.Message):
    __slots__ = ("epoch", "number", "ops_json")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OPS_JSON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    number: int
    ops_json: str
    def __init__(self, epoch: _Optional[int] = ..., number: _Optional[int] = ..., ops_json: _Optional[str] = ...) -> None: ...

class OperateReply(_message.Message):
    __slots__ = ("numbers",)
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, numbers: _Optional[_Iterable[float]] = ...) -> None: ...

class SetRateRequest(_message.Message):
    __slots__ = ("epoch", "factor")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    factor: float
    def __init__(self, epoch: _Optional[int] = ..., factor: _Optional[float] = ...) -> None: ...

class SetRateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class RenewLeaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
