"""The options of what is built in: models, data sets, optimizers, algorithms.

Each table is name -> pydantic model of the options. Names and defaults equal the keyword arguments
of the factories in `engine` and `learning` (a test compares them), so that the launcher can check
options without numpy. Bounds are only here: the factories trust what passed.
"""

# No `from __future__ import annotations`: pydantic would compile each annotation once more.

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dsgd_cli.contract.mistakes import mistake, show

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]


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

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Softmax(Options):
    """Softmax regression."""

    l2: Number = Field(default=0.0, ge=0, description="the loss has l2 / 2 × weights²")


class Mlp(Options):
    """Layers of rectified linear units, then softmax."""

    hidden: tuple[Annotated[Whole, Field(ge=1, le=1_000_000)], ...] = Field(
        default=(128,), max_length=100, description="units of each hidden layer"
    )
    l2: Number = Field(default=0.0, ge=0, description="the loss has l2 / 2 × weights²")


class Digits(Options):
    """The UCI handwritten digits that come with dsgd: 1,797 images of 8x8."""


class Sgd(Options):
    """w -= learning_rate * g"""

    learning_rate: Number = Field(default=0.01, gt=0, description="step size")


class Momentum(Options):
    """Gradient descent with momentum, on request Nesterov's."""

    learning_rate: Number = Field(default=0.01, gt=0, description="step size")
    momentum: Number = Field(
        default=0.9, ge=0, lt=1, description="how much of the last step is kept"
    )
    nesterov: bool = Field(default=False, strict=True, description="look ahead along the last step")


class Adagrad(Options):
    """Step sizes per parameter, from the sum of the squared gradients."""

    learning_rate: Number = Field(default=0.05, gt=0, description="step size")
    initial: Number = Field(default=0.1, ge=0, description="where the sum of squares starts")
    epsilon: Number = Field(default=1e-7, ge=0, description="added to the root of the sum")


class Adam(Options):
    """Step sizes per parameter, from running means of the gradients and their squares."""

    learning_rate: Number = Field(default=1e-3, gt=0, description="step size")
    beta1: Number = Field(default=0.9, ge=0, lt=1, description="decay of the mean")
    beta2: Number = Field(default=0.999, ge=0, lt=1, description="decay of the mean square")
    epsilon: Number = Field(default=1e-8, gt=0, description="added to the root of the mean square")


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
    delimiter: Annotated[str, AfterValidator(_one_character)] = Field(
        default=",", description="what stands between the cells"
    )
    test_fraction: Number = Field(default=0.2, gt=0, lt=1, description="part that is held out")


class Downpour(BaseModel):
    """Asynchronous: each worker pushes and fetches at its own pace."""

    model_config = Options.model_config

    name: Literal["downpour"] = Field(default="downpour", description="the algorithm")
    push_every: Whole = Field(default=1, ge=1, le=1_000_000, description="steps between pushes")
    fetch_every: Whole = Field(default=1, ge=1, le=1_000_000, description="steps between fetches")
    overlap: bool = Field(
        default=True,
        strict=True,
        description="compute the next gradient while a push and a fetch are under way",
    )


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


MODELS: dict[str, type[BaseModel]] = {"mlp": Mlp, "softmax": Softmax}
DATASETS: dict[str, type[BaseModel]] = {"digits": Digits}
READERS: dict[str, type[BaseModel]] = {"npz": Npz, "csv": Csv}  # these take a path
OPTIMIZERS: dict[str, type[BaseModel]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "adagrad": Adagrad,
    "adam": Adam,
}
ALGORITHMS: dict[str, type[BaseModel]] = {"downpour": Downpour}
CHANNELS: dict[str, type[BaseModel]] = {"auto": Auto, "shm": Shm, "tcp": Tcp, "grpc": Grpc}
