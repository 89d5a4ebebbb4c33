"""The options of what is built in: models, data sets, optimizers, algorithms.

Each table is name -> pydantic model of the options. Names and defaults equal the keyword arguments
of the factories in `engine` and `learning` (a test compares them), so that the launcher can check
options without numpy. Bounds are only here: the factories trust what passed.
"""

# No `from __future__ import annotations`: pydantic would compile each annotation once more.

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from dsgd_cli.contract.mistakes import mistake, show
from dsgd_cli.contract.values import FROZEN, Every, Number, Whole, Work, chosen


def _column(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise mistake(f"expected a column, found {show(value)}", "write its name or its position")
    return value


def _one_character(text: str) -> str:
    if len(text) != 1 or text in '"\r\n':
        raise mistake(f"{show(text)} is not a delimiter", "write one character, such as ','")
    return text


class Options(BaseModel):
    """Base of all option models: frozen, nothing unknown."""

    model_config = FROZEN


class Softmax(Options):
    """Softmax regression."""

    l2: Number = Field(default=0.0, ge=0, description="the loss has l2 / 2 × weights²")


class Mlp(Options):
    """Layers of rectified linear units, then softmax."""

    hidden: tuple[Annotated[Whole, Field(ge=1, le=1_000_000)], ...] = Field(
        default=(128,), max_length=100, description="units of each hidden layer"
    )
    l2: Number = Field(default=0.0, ge=0, description="the loss has l2 / 2 × weights²")


class Cnn(Options):
    """Convolutions with max-pooling on images, then as `mlp`."""

    filters: tuple[Annotated[Whole, Field(ge=1, le=100_000)], ...] = Field(
        default=(16, 32),
        min_length=1,
        max_length=16,
        description="of each convolution; each is followed by ReLU and max-pooling in 2x2",
    )
    kernel: Annotated[Whole, Field(ge=1, le=99)] = Field(
        default=3, description="a side of the filters; images keep their size"
    )
    hidden: tuple[Annotated[Whole, Field(ge=1, le=1_000_000)], ...] = Field(
        default=(64,), max_length=100, description="units of each hidden layer behind them"
    )
    l2: Number = Field(default=0.0, ge=0, description="the loss has l2 / 2 × weights²")


class Torch(Options):
    """A `torch.nn.Module` of your own, `path/to/net.py:Net`; torch must be on the hosts."""


class Digits(Options):
    """The UCI handwritten digits that come with dsgd: 1,797 images of 8x8."""


# ── optimizers ─────────────────────────────────────────────────────────────────────────────────


class Constant(Options):
    """The learning rate stays what it is."""


class Step(Options):
    """The learning rate is multiplied by a factor, again and again."""

    every: Work = Field(
        default="10 epochs", validate_default=True, description="how often: `10 epochs`"
    )
    factor: Number = Field(default=0.1, gt=0, le=1, description="what it is multiplied by")


class Cosine(Options):
    """The learning rate falls along half a cosine (Loshchilov and Hutter, 2017)."""

    over: Work = Field(
        default="100 epochs", validate_default=True, description="until when it falls"
    )
    floor: Number = Field(default=0.0, ge=0, le=1, description="the part of it that is left then")


class Plateau(Options):
    """When a held-out metric stops improving."""

    patience: Whole = Field(
        default=3, ge=1, le=1_000_000, description="so many evaluations in a row without a new best"
    )
    min_delta: Number = Field(default=0.0, ge=0, description="a smaller improvement is none")
    metric: Literal["accuracy", "loss"] | None = Field(
        default=None, description="which one; default: `accuracy` where there is one"
    )


class PlateauDecay(Plateau):
    """The learning rate is multiplied by a factor when a held-out metric stops improving."""

    factor: Number = Field(default=0.1, gt=0, le=1, description="what it is multiplied by")


DECAYS: dict[str, type[BaseModel]] = {
    "constant": Constant,
    "step": Step,
    "cosine": Cosine,
    "plateau": PlateauDecay,
}


class Decay(Options):
    """How the learning rate falls."""

    name: Literal["constant", "step", "cosine", "plateau"] = Field(
        default="constant", description="which schedule"
    )
    options: dict[str, Any] = Field(default={}, description="its options")

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        return chosen(DECAYS, value, "decay")


class Rule(Options):
    """What every optimizer can do besides."""

    decay: Decay = Field(
        default="constant",
        validate_default=True,
        description="`constant`, `{step: {every: 10 epochs, factor: 0.1}}`,"
        " `{cosine: {over: 50 epochs}}`, `{plateau: {factor: 0.1, patience: 3}}`",
    )
    warm_up: Work | None = Field(
        default=None, description="the learning rate rises from 0 for so long: `5 epochs`"
    )
    l2: Number = Field(default=0.0, ge=0, description="l2 × weights is added to each gradient")
    clip_norm: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="a gradient of a larger norm, over all shards, is scaled to it"
    )


COMMON = tuple(Rule.model_fields)  # options of every optimizer, which no factory takes


class Sgd(Rule):
    """w -= learning_rate * g"""

    learning_rate: Number = Field(default=0.01, gt=0, description="step size")


class Momentum(Rule):
    """Gradient descent with momentum, on request Nesterov's."""

    learning_rate: Number = Field(default=0.01, gt=0, description="step size")
    momentum: Number = Field(
        default=0.9, ge=0, lt=1, description="how much of the last step is kept"
    )
    nesterov: bool = Field(default=False, strict=True, description="look ahead along the last step")


class Adagrad(Rule):
    """Step sizes per parameter, from the sum of the squared gradients."""

    learning_rate: Number = Field(default=0.05, gt=0, description="step size")
    initial: Number = Field(default=0.1, ge=0, description="where the sum of squares starts")
    epsilon: Number = Field(default=1e-7, ge=0, description="added to the root of the sum")


class Adam(Rule):
    """Step sizes per parameter, from running means of the gradients and their squares."""

    learning_rate: Number = Field(default=1e-3, gt=0, description="step size")
    beta1: Number = Field(default=0.9, ge=0, lt=1, description="decay of the mean")
    beta2: Number = Field(default=0.999, ge=0, lt=1, description="decay of the mean square")
    epsilon: Number = Field(default=1e-8, gt=0, description="added to the root of the mean square")


# ── readers ────────────────────────────────────────────────────────────────────────────────────


class Source(Options):
    """What all that follow can do besides, and `{load: path/to/data.py}`."""

    per_host: bool = Field(
        default=False,
        strict=True,
        description="each host has examples of its own, at the same `host:/path`",
    )


class Npz(Options):
    """Arrays `x`, `y`, `x_test` and `y_test` of a numpy file."""

    test_fraction: Number = Field(
        default=0.2, gt=0, lt=1, description="held out when the file has no `x_test`"
    )


class Csv(Options):
    """One example a row; columns are numbers, but for the label."""

    label: Annotated[str | int, BeforeValidator(_column)] = Field(
        default=-1, description="name or position of the label's column; -1 is the last"
    )
    ignore: tuple[Annotated[str | int, BeforeValidator(_column)], ...] = Field(
        default=(), max_length=10_000, description="columns that are no features: `[id, name]`"
    )
    delimiter: Annotated[str, AfterValidator(_one_character)] = Field(
        default=",", description="what stands between the cells"
    )
    test_fraction: Number = Field(default=0.2, gt=0, lt=1, description="part that is held out")


class Svmlight(Options):
    """Sparse text, `label index:value …`, as SVMlight and LIBSVM have it; made dense."""

    features: Annotated[Whole, Field(ge=1, le=10**9)] | None = Field(
        default=None, description="columns; default: as many as the largest index needs"
    )
    zero_based: bool | None = Field(
        default=None,
        strict=True,
        description="indices count from 0; default: if there is an index 0, else from 1",
    )
    test_fraction: Number = Field(default=0.2, gt=0, lt=1, description="part that is held out")


class Idx(Options):
    """A folder with MNIST's four files in IDX format, as they are or as .gz."""

    test_fraction: Number = Field(
        default=0.2, gt=0, lt=1, description="held out when there are no `t10k` files"
    )


class Images(Options):
    """A folder with a folder of images for each class, as Caltech-101 has it; needs Pillow."""

    size: tuple[Annotated[Whole, Field(ge=1, le=4096)], ...] = Field(
        default=(64, 64),
        min_length=2,
        max_length=2,
        description="height and width that every image is stretched to",
    )
    grey: bool = Field(default=False, strict=True, description="one grey value instead of three")
    test_fraction: Number = Field(
        default=0.2, gt=0, lt=1, description="part of each class that is held out"
    )


# ── algorithms ─────────────────────────────────────────────────────────────────────────────────


class WarmStart(Options):
    """One worker begins; the others follow."""

    until: Every = Field(
        default="1 epoch", validate_default=True, description="how long one worker trains alone"
    )
    then_add_every: Every = Field(
        default="10s", validate_default=True, description="when each of the others follows"
    )


PushEvery = Annotated[Whole, Field(ge=1, le=1_000_000)]


class Downpour(Options):
    """Asynchronous: each worker pushes and fetches at its own pace."""

    name: Literal["downpour"] = Field(default="downpour", description="the algorithm")
    push_every: PushEvery = Field(default=1, description="steps between pushes")
    fetch_every: PushEvery = Field(default=1, description="steps between fetches")
    overlap: bool = Field(
        default=True,
        strict=True,
        description="compute the next gradient while a push and a fetch are under way",
    )
    reduce: Literal["sum", "mean"] = Field(
        default="sum", description="what is pushed of the gradients since the last push"
    )
    local_learning_rate: Annotated[Number, Field(ge=0)] | None = Field(
        default=None,
        description="of the worker's own steps between fetches, 0: none; default: the learning rate"
        " of `sgd`, none with the others",
    )
    max_staleness: Annotated[Whole, Field(ge=0, le=10**9)] | None = Field(
        default=None,
        description="a push is dropped if others have pushed more often since its fetch",
    )
    damping: Literal["none", "inverse", "relative"] = Field(
        default="none",
        description="the learning rate of a push that comes after τ others: divided by τ"
        " (`inverse`), or by how much τ is above its mean (`relative`)",
    )
    warm_start: WarmStart | None = Field(
        default=None, description="`{until: 1 epoch, then_add_every: 10s}`: begin with one worker"
    )


class Synchronous(Options):
    """All workers compute one step together, from the same parameters."""

    name: Literal["synchronous"] = Field(default="synchronous", description="the algorithm")
    backup_workers: Annotated[Whole, Field(ge=0, le=10_000)] = Field(
        default=0, description="a step does not wait for the slowest so many"
    )


class StaleSynchronous(Options):
    """Asynchronous, but no worker is further ahead of the slowest than a bound."""

    name: Literal["stale_synchronous"] = Field(
        default="stale_synchronous", description="the algorithm"
    )
    bound: Annotated[Whole, Field(ge=0, le=1_000_000)] = Field(
        default=3, description="clocks that a worker may be ahead of the slowest"
    )
    push_every: PushEvery = Field(default=1, description="steps in a clock, which ends with a push")


class Sandblaster(Options):
    """Batch methods with line search: each step is of all examples, spread over the workers."""

    name: Literal["sandblaster"] = Field(default="sandblaster", description="the algorithm")
    method: Literal["lbfgs", "conjugate_gradient", "gradient_descent"] = Field(
        default="lbfgs", description="how directions are found"
    )
    memory: Annotated[Whole, Field(ge=1, le=100)] = Field(
        default=10, description="steps that `lbfgs` remembers"
    )
    portions: Annotated[Whole, Field(ge=1, le=10_000)] = Field(
        default=20, description="of a worker's share: what is handed out at a time"
    )
    rows: Annotated[Whole, Field(ge=1, le=2**24)] = Field(
        default=1024, description="examples that a worker computes at a time"
    )
    tolerance: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=1e-5, description="the end when no gradient is larger than this"
    )
    l2: Number = Field(default=0.0, ge=0, description="the loss has l2 / 2 × weights²")


# ── channels ───────────────────────────────────────────────────────────────────────────────────


class Auto(Options):
    """shm on one host, tcp between hosts, grpc where neither works."""

    encrypt: bool = Field(
        default=True, strict=True, description="false: send tcp's blocks in clear"
    )
    force: bool = Field(
        default=False, strict=True, description="in clear even beyond private addresses"
    )


class Shm(Options):
    """Shared memory, for processes of one host."""


class Tcp(Options):
    """One socket for each worker and shard, encrypted."""

    encrypt: bool = Field(
        default=True, strict=True, description="false: authenticate only, send blocks in clear"
    )
    force: bool = Field(
        default=False, strict=True, description="in clear even beyond private addresses"
    )


class Grpc(Options):
    """On the connection that everything else uses: slower, works wherever gRPC does."""


MODELS: dict[str, type[BaseModel]] = {"mlp": Mlp, "softmax": Softmax, "cnn": Cnn}
MODEL_FILES: dict[str, type[BaseModel]] = {"torch": Torch}  # these take a path and a name in it
DATASETS: dict[str, type[BaseModel]] = {"digits": Digits}
READERS: dict[str, type[BaseModel]] = {  # these take a path
    "npz": Npz,
    "csv": Csv,
    "svmlight": Svmlight,
    "idx": Idx,
    "images": Images,
}
FOLDERS = ("idx", "images")  # these read a folder, the others a file
OPTIMIZERS: dict[str, type[BaseModel]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "adagrad": Adagrad,
    "adam": Adam,
}
ALGORITHMS: dict[str, type[BaseModel]] = {
    "downpour": Downpour,
    "synchronous": Synchronous,
    "stale_synchronous": StaleSynchronous,
    "sandblaster": Sandblaster,
}
CHANNELS: dict[str, type[BaseModel]] = {"auto": Auto, "shm": Shm, "tcp": Tcp, "grpc": Grpc}
