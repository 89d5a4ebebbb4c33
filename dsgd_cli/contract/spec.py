"""The specification of a cluster: one frozen tree, from which everything else derives.

YAML, `--set`, the JSON Schema, README's table and the JSON on the wire are views of these classes.
Short forms (`servers: 2`, `model: mlp`) are made long here, and the dump of a tree is valid input
again and gives an equal tree. Durations are written `15s`, `10m`, `1h` or as plain seconds; in
code they are seconds, with `_s` in the name. Nothing here touches a file or a host: whether a path
exists is for `launcher.load` to say.
"""

# No `from __future__ import annotations`: pydantic would compile each annotation once more.

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    model_validator,
)

from dsgd_cli.contract.mistakes import (
    MAX_MISTAKES,
    Mistake,
    mistake,
    mistakes,
    show,
)
from dsgd_cli.contract.options import (
    ALGORITHMS,
    CHANNELS,
    OPTIMIZERS,
    Downpour,
    Plateau,
    Sandblaster,
    StaleSynchronous,
    Synchronous,
)
from dsgd_cli.contract.references import DataRef, ModelRef
from dsgd_cli.contract.texts import (
    ADDRESS,
    ENV_NAME,
    Address,
    HostKey,
    HostName,
    Name,
    Port,
    Python,
    Seconds,
    Text,
    Tree,
    User,
)
from dsgd_cli.contract.values import (
    Every,
    Number,
    Whole,
    checked,
    choice,
    chosen,
    known,
)

MAX_SERVERS = 1_000
MAX_WORKERS = 10_000
MAX_HOSTS = 10_000
MAX_PATTERNS = 100
DAY_S = 86_400.0
DEFAULT_MAX_EPOCHS = 100
DEFAULT_BATCH_SIZE = 32


# ── hosts ──────────────────────────────────────────────────────────────────────────────────────


class Slots(Tree):
    """How many workers a host takes at most."""

    count: Annotated[int, Field(strict=True, ge=0, le=MAX_WORKERS)] | None = Field(
        default=None, description="so many, without a GPU"
    )
    gpu: Annotated[int, Field(strict=True, ge=1, le=1_024)] | None = Field(
        default=None, description="so many, each with a GPU of its own (models of torch's)"
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"count": value}
        if not isinstance(value, Mapping):
            raise mistake(f"expected how many workers, found {show(value)}", "write 8 or {gpu: 2}")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> "Slots":
        if (self.count is None) == (self.gpu is None):
            raise mistake("expected one number of slots", "write 8 or {gpu: 2}")
        return self

    @property
    def limit(self) -> int:
        return (self.gpu if self.count is None else self.count) or 0


class Host(Tree):
    """A machine. What is not given here comes from `ssh`."""

    name: HostName = Field(default="", description="how dsgd calls it; default: its address")
    transport: Literal["local", "ssh"] = Field(
        default="ssh", description="how it is reached; `local` is this machine, without SSH"
    )
    address: Address = Field(default="localhost", description="host name or IP address")
    user: User | None = Field(default=None, description="user there; default: `ssh.user`")
    port: Port | None = Field(
        default=None, description="port of its SSH server; default: `ssh.port`"
    )
    identity_file: Text | None = Field(
        default=None, description="private key on this machine; default: `ssh.identity_file`"
    )
    host_key: HostKey | None = Field(
        default=None, description="fingerprint (SHA256:…) of its only accepted key"
    )
    slots: Slots | None = Field(
        default=None, description="workers it takes at most: `8`, `{gpu: 2}`; default: no limit"
    )
    python: Python | None = Field(default=None, description="python there; default: `ssh.python`")
    advertise: Address | None = Field(
        default=None,
        description="address the others reach it by; default: the one dsgd reached it by",
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"address": value}
        if not isinstance(value, Mapping):
            raise mistake(f"expected a host, found {show(value)}", "write gpu1 or {address: gpu1}")
        host = dict(value)
        address = host.get("address", host.get("name", "local"))
        if address == "local":
            host.setdefault("transport", "local")
        if host.get("transport") == "local" and address in ("local", host.get("name")):
            host["address"] = "localhost"
            host.setdefault("name", "local")
        elif isinstance(address, str) and ADDRESS.fullmatch(address):
            host.setdefault("address", address)
            host.setdefault("name", address)
        return host


class Ssh(Tree):
    """What holds for every host that does not say otherwise."""

    user: User | None = Field(
        default=None, description="user on the hosts; default: who you are here"
    )
    port: Port = Field(default=22, description="port of the SSH servers")
    identity_file: Text | None = Field(
        default=None, description="private key; default: those of the agent and ~/.ssh"
    )
    python: Python = Field(default="python3", description="python on the hosts, 3.10 or newer")
    host_keys: Literal["strict", "accept-new"] = Field(
        default="strict", description="unknown host keys: refuse, or accept and print them"
    )
    connect_timeout: Annotated[float, Seconds(0.1, 600)] = Field(
        default=10.0, description="how long connecting to a host may take"
    )

    @property
    def connect_timeout_s(self) -> float:
        return self.connect_timeout


# ── processes ──────────────────────────────────────────────────────────────────────────────────


def _patterns(value: object) -> object:
    return (value,) if isinstance(value, str) else value


On = Annotated[tuple[Text, ...], Field(max_length=MAX_PATTERNS), BeforeValidator(_patterns)]


def _count_form(value: object, what: str) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"count": value}
    if isinstance(value, Mapping):
        return value
    raise mistake(f"expected how many {what}, found {show(value)}", "write 2 or {count: 2}")


def _env(value: object) -> object:
    if not isinstance(value, Mapping):
        raise mistake(f"expected a mapping, found {show(value)}", "write {KEY: value}")
    wrong = list(itertools.islice(_wrong_variables(value), MAX_MISTAKES))
    if wrong:
        raise mistakes(wrong)
    return value


def _wrong_variables(env: Mapping[object, object]) -> Iterator[Mistake]:
    for key, text in env.items():
        if not isinstance(key, str) or re.fullmatch(ENV_NAME, key) is None:
            hint = "use letters, digits and '_'"
            yield Mistake((str(key),), f"{show(key)} is not a variable's name", hint, key=True)
        elif key.startswith("DSGD_"):
            yield Mistake((key,), f"{show(key)} is dsgd's own", "use another name", key=True)
        elif isinstance(text, str) and "\0" in text:
            yield Mistake((key,), "a NUL character in a variable", "remove it")


class Servers(Tree):
    """The parameter servers; each holds one shard of the parameters."""

    count: Annotated[int, Field(strict=True, ge=1, le=MAX_SERVERS)] = Field(
        default=1, description="how many servers share the parameters"
    )
    on: On = Field(default=(), description="hosts they run on, with globs (`gpu*`); default: all")

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        return _count_form(value, "servers")


class Workers(Tree):
    """The workers; each computes gradients."""

    count: Annotated[int, Field(strict=True, ge=1, le=MAX_WORKERS)] = Field(
        default=2, description="how many workers compute gradients"
    )
    on: On = Field(default=(), description="hosts they run on, with globs (`gpu*`); default: all")
    threads: Annotated[int, Field(strict=True, ge=1, le=1_024)] = Field(
        default=1, description="threads of each worker's linear algebra"
    )
    env: Annotated[dict[str, str], BeforeValidator(_env)] = Field(
        default={}, description="environment variables of the workers"
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        return _count_form(value, "workers")


# ── training ───────────────────────────────────────────────────────────────────────────────────


class Optimizer(Tree):
    """The rule by which the servers apply gradients."""

    name: Literal["sgd", "momentum", "adagrad", "adam"] = Field(
        default="adagrad", description="the rule"
    )
    options: dict[str, Any] = Field(default={}, description="its options")

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        return chosen(OPTIMIZERS, value, "optimizer")


def _algorithm(value: object) -> object:
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, Mapping) and "name" in value:
        name = known(ALGORITHMS, value["name"], "algorithm", ("name",), key=False)
        return checked(ALGORITHMS, name, value, ())
    return choice(ALGORITHMS, value, "algorithm")[1]


Algorithm = Annotated[
    Downpour | Synchronous | StaleSynchronous | Sandblaster, Field(discriminator="name")
]


class Evaluate(Tree):
    """When the held-out examples are evaluated."""

    every: Every = Field(
        default="1 epoch",
        validate_default=True,
        description="how often: `1 epoch`, `500 steps`, `30s`",
    )
    training: bool = Field(
        default=False,
        strict=True,
        description="and as many training examples: `training_accuracy`, …",
    )


class Until(Tree):
    """When a run ends: all targets hold at once, or one limit is reached."""

    loss: Number | None = Field(default=None, description="target: held-out loss at most this")
    accuracy: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="target: held-out accuracy at least this"
    )
    max_epochs: Annotated[Whole, Field(ge=1, le=10**9)] | None = Field(
        default=None,
        description="limit: epochs; default: 100 when neither max_steps nor max_time is given",
    )
    max_steps: Annotated[Whole, Field(ge=1, le=10**15)] | None = Field(
        default=None, description="limit: steps of all workers together"
    )
    max_time: Annotated[float, Seconds(0.1, 365 * DAY_S)] = Field(
        default=DAY_S, description="limit: time since the first worker started"
    )
    plateau: Plateau | None = Field(
        default=None, description="the end when the held-out metric stops improving"
    )

    @model_validator(mode="before")
    @classmethod
    def _limits(cls, value: object) -> object:
        if isinstance(value, Mapping) and not {"max_epochs", "max_steps", "max_time"} & set(value):
            return {**value, "max_epochs": DEFAULT_MAX_EPOCHS}
        return value

    @property
    def max_time_s(self) -> float:
        return self.max_time

    @property
    def target(self) -> dict[str, float]:
        """What the held-out metrics must reach, by name, the most telling first."""
        given = {"accuracy": self.accuracy, "loss": self.loss}
        return {name: level for name, level in given.items() if level is not None}

    @property
    def has_target(self) -> bool:
        return bool(self.target)


class Train(Tree):
    """One run."""

    model: ModelRef = Field(
        default="mlp",
        validate_default=True,
        description="`mlp`, `softmax`, `cnn`, `{mlp: {hidden: [128]}}`, `path/to/model.py`,"
        " `package.module`, `{torch: path/to/net.py:Net}`",
    )
    data: DataRef = Field(
        default="digits",
        validate_default=True,
        description="`digits`, `{npz: path}`, `{csv: path}`, `{svmlight: path}`,"
        " `{idx: folder}`, `{images: folder}`, `path/to/data.py`; a path is on this machine and is"
        " sent along, `host:/path` is on the hosts already",
    )
    algorithm: Annotated[Algorithm, BeforeValidator(_algorithm)] = Field(
        default="downpour",
        validate_default=True,
        description="`downpour`, `synchronous`, `stale_synchronous`, `sandblaster`,"
        " `{downpour: {push_every: 4}}`",
    )
    optimizer: Optimizer = Field(
        default="adagrad",
        validate_default=True,
        description="`sgd`, `momentum`, `adagrad`, `adam`, `{adagrad: {learning_rate: 0.05}}`",
    )
    batch_size: Annotated[int, Field(strict=True, ge=1, le=2**24)] | None = Field(
        default=None,
        description="examples in each gradient; default: 32, and all of them with `sandblaster`",
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="type of the parameters"
    )
    evaluate: Evaluate = Field(
        default={}, validate_default=True, description="when the held-out examples are evaluated"
    )
    until: Until = Field(default={}, validate_default=True, description="when the run ends")
    tensorboard: bool = Field(
        default=False, strict=True, description="also write scalars for TensorBoard"
    )

    @model_validator(mode="after")
    def _batch(self) -> "Train":
        if self.algorithm.name == "sandblaster":
            if self.batch_size is not None:
                raise mistake(
                    "sandblaster computes the gradient of all examples, not of a batch",
                    "remove batch_size, or choose another algorithm",
                    ("batch_size",),
                )
        elif self.batch_size is None:
            object.__setattr__(self, "batch_size", DEFAULT_BATCH_SIZE)
        return self


class Channel(Tree):
    """What carries gradients and parameters between workers and servers."""

    name: Literal["auto", "shm", "tcp", "grpc"] = Field(default="auto", description="which one")
    options: dict[str, Any] = Field(default={}, description="its options")

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        return chosen(CHANNELS, value, "channel")


# ── the cluster ────────────────────────────────────────────────────────────────────────────────


class Env(Tree):
    """Where the hosts' Python packages come from."""

    packages: Literal["ship", "existing"] = Field(
        default="ship", description="send what is missing, or use what is there"
    )
    requirements: Text | None = Field(
        default=None,
        description="a file as pip reads it, of what the model imports besides: its wheels are"
        " sent, too; on this machine they must be installed",
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"packages": value}
        if not isinstance(value, Mapping):
            hint = "write ship, existing or {requirements: requirements.txt}"
            raise mistake(f"expected where packages come from, found {show(value)}", hint)
        if value.get("packages") == "existing" and value.get("requirements") is not None:
            hint = "remove them, or `packages: existing`"
            raise mistake("with `existing` no requirements are sent", hint, ("requirements",))
        return value


def _host_list(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and not value:
        raise mistake("an empty list of hosts", "write [local] for this machine")
    return value


class ClusterSpec(Tree):
    """A cluster and what it trains."""

    name: Name = Field(default="dsgd", description="name of the cluster, one word")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = Field(
        default=0, description="what all randomness derives from"
    )
    hosts: Annotated[tuple[Host, ...], BeforeValidator(_host_list)] = Field(
        default=("local",),
        validate_default=True,
        description="`local`, `gpu1`, `gpu[01-16]`, or mappings with the fields below",
    )
    ssh: Ssh = Field(default={}, validate_default=True, description="defaults for all hosts")
    env: Env = Field(
        default="ship",
        validate_default=True,
        description="Python packages: `ship`, `existing`, `{requirements: requirements.txt}`",
    )
    servers: Servers = Field(default={}, validate_default=True, description="a number or a mapping")
    workers: Workers = Field(default={}, validate_default=True, description="a number or a mapping")
    channel: Channel = Field(
        default="auto",
        validate_default=True,
        description="what carries gradients and parameters: `auto`, `shm`, `tcp`, `grpc`,"
        " `{tcp: {encrypt: false}}`",
    )
    lease: Annotated[float, Seconds(1, DAY_S)] = Field(
        default=15.0, description="a launcher that is silent for so long is gone, and its run stops"
    )
    idle_timeout: Annotated[float, Seconds(1, 30 * DAY_S)] = Field(
        default=3600.0, description="after `up`, an idle cluster takes itself down after this"
    )
    train: Train = Field(default={}, validate_default=True, description="what to train")

    @property
    def lease_s(self) -> float:
        return self.lease

    @property
    def idle_timeout_s(self) -> float:
        return self.idle_timeout
