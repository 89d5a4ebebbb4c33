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
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import core_schema

from dsgd_cli.contract import names
from dsgd_cli.contract.durations import format_duration, parse_duration
from dsgd_cli.contract.mistakes import (
    MAX_MISTAKES,
    Mistake,
    did_you_mean,
    mistake,
    mistakes,
    show,
)
from dsgd_cli.contract.options import (
    ALGORITHMS,
    CHANNELS,
    DATASETS,
    MODEL_FILES,
    MODELS,
    OPTIMIZERS,
    READERS,
    Downpour,
    Plateau,
    Sandblaster,
    Source,
    StaleSynchronous,
    Synchronous,
)
from dsgd_cli.contract.values import (
    FROZEN,
    Every,
    Number,
    Table,
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

ADDRESS = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:.]{2,45}(%[A-Za-z0-9_]{1,15})?"
)
HOST_NAME = r"[A-Za-z0-9][A-Za-z0-9._:%-]{0,252}"
USER = r"[A-Za-z0-9_][A-Za-z0-9_.@$+\\-]{0,63}"
PYTHON = r"[A-Za-z0-9._/+][A-Za-z0-9._/+-]{0,254}"
HOST_KEY = r"SHA256:[A-Za-z0-9+/]{43}=?"
ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,254}"
MODULE = r"[A-Za-z_][A-Za-z0-9_]{0,99}(\.[A-Za-z_][A-Za-z0-9_]{0,99}){0,20}"
TORCH = re.compile(r".*[^/]\.py:[A-Za-z_]\w{0,99}")  # a file, and a class or function in it
DURATION = r"^([0-9]+(\.[0-9]+)? *(ms|s|m|h|d) *)+$"  # for editors; `parse_duration` decides
LOAD = "load"  # a function of the user's, in front of its file or module
ON_HOST = "host:"  # in front of a path: it is on the hosts already
# what a path is by the end of its name
MODEL_SUFFIXES = {".py": "file"}
DATA_SUFFIXES = {
    ".py": "file",
    ".npz": "npz",
    ".csv": "csv",
    ".svm": "svmlight",
    ".svmlight": "svmlight",
    ".libsvm": "svmlight",
}


# ── kinds of text ──────────────────────────────────────────────────────────────────────────────


def _matching(pattern: str, what: str, hint: str) -> AfterValidator:
    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            if text.startswith("-"):
                raise mistake(f"{show(text)} is not {what}", "it must not start with '-'")
            raise mistake(f"{show(text)} is not {what}", hint)
        return text

    return AfterValidator(check)


def _printable(text: str) -> str:
    if not text.strip():
        raise mistake("empty text", "give it a value, or remove the line")
    if len(text) > 4096:
        raise mistake(f"{show(text)} is too long", "4096 characters at most")
    if not text.isprintable():
        raise mistake(f"{show(text)} has control characters", "write plain text on one line")
    return text


def _cluster_name(text: str) -> str:
    if names.NAME.fullmatch(text) is None:
        near = re.sub(r"[^a-z0-9]+", "-", text.lower())[:63].strip("-")
        other = f", such as '{near}'" if near else ""
        raise mistake(f"{show(text)} is not a name", f"use a-z, 0-9 and '-'{other}")
    return text


def _address(text: str) -> str:
    if ADDRESS.fullmatch(text) is not None and ".." not in text:
        return text
    what = f"{show(text)} is not an address"
    user, at, rest = text.rpartition("@")
    if at and re.fullmatch(USER, user) and ADDRESS.fullmatch(rest):
        raise mistake(what, f"write {{address: {rest}, user: {user}}}")
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and ADDRESS.fullmatch(host):
        raise mistake(what, f"write {{address: {host}, port: {port[:5]}}}")
    if text.startswith("-"):
        raise mistake(what, "it must not start with '-'")
    raise mistake(what, "write a host name or an IP address")


class Seconds:
    """A duration within bounds, written `15s` or as a number; marks its fields as durations."""

    def __init__(self, low_s: float, high_s: float) -> None:
        self.low_s = low_s
        self.high_s = high_s

    def check(self, value: object) -> object:
        seconds = value
        if isinstance(value, str):
            try:
                seconds = parse_duration(value)
            except ValueError as why:
                raise mistake(f"{show(value)} is not a duration", str(why)) from None
        if value is None:
            return value
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise mistake(f"expected a duration, found {show(value)}", "write 15s, 10m or 1h")
        if not self.low_s <= seconds <= self.high_s:
            low, high = format_duration(self.low_s), format_duration(self.high_s)
            raise mistake(f"{show(value)} is out of range", f"it must be between {low} and {high}")
        return float(seconds)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.low_s, "maximum": self.high_s}
        return {"anyOf": [number, {"type": "string", "pattern": DURATION}]}


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[str, AfterValidator(_cluster_name)]
Address = Annotated[str, AfterValidator(_address)]
HostName = Annotated[str, _matching(HOST_NAME, "a host's name", "use letters, digits, '.' and '-'")]
User = Annotated[str, _matching(USER, "a user name", "use letters, digits, '.', '_' and '-'")]
Python = Annotated[
    str, _matching(PYTHON, "a path of python", "write python3 or a path such as /usr/bin/python3")
]
HostKey = Annotated[
    str,
    _matching(HOST_KEY, "a host key", "write SHA256:… as `ssh-keygen -lf` prints it"),
]
Port = Annotated[int, Field(strict=True, ge=1, le=65_535)]


# ── hosts ──────────────────────────────────────────────────────────────────────────────────────


class Tree(BaseModel):
    """Base of the tree's nodes: frozen, nothing unknown."""

    model_config = FROZEN


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


def _reference(text: str, table: Table, suffixes: Mapping[str, str], what: str) -> dict[str, Any]:
    """A string that names a built-in, a file or a module -> the long form without options."""
    on_host = text.startswith(ON_HOST)
    path = text.removeprefix(ON_HOST)
    _printable(text)
    if on_host and not path.startswith("/"):
        raise mistake(f"{show(text)} is not absolute", "write host:/path")
    for suffix, kind in suffixes.items():
        if path.endswith(suffix) and path.rpartition("/")[2] != suffix:
            return {"kind": kind, "path": path, "on_host": on_host}
    if on_host or "/" in path or path.startswith((".", "~")):
        hint = "its name must end with .py"
        hint += " (or say what it is: {csv: path})" if len(suffixes) > 1 else ""
        raise mistake(f"{show(text)} is not a {what}", hint)
    if path in table:
        return {"kind": "builtin", "name": path}
    if "." in path and re.fullmatch(MODULE, path):
        return {"kind": "module", "name": path}
    hint = f"{did_you_mean(path, table)} (your own: path/to/{what}.py)"
    raise mistake(f"unknown {what} {show(text)}", hint)


class _Ref(Tree):
    """Where a model or the data come from."""

    name: str = Field(default="", description="name of the built-in, the module, or torch's class")
    path: str = Field(
        default="", description="the file or folder, on this machine unless `on_host`"
    )
    on_host: bool = Field(default=False, strict=True, description="it is on the hosts already")
    options: dict[str, Any] = Field(default={}, description="options of the built-in")


def _long_ref(value: Mapping[str, object], table: Table, readers: Table, what: str) -> object:
    """Checks the long form `{kind: …, name: …, path: …, options: …}`, as a dump gives it."""
    kind, name, path = value.get("kind"), value.get("name", ""), value.get("path", "")
    fields = (DataRef if what == "data" else ModelRef).model_fields
    ref = {key: value[key] for key in value if key in fields}
    if len(ref) != len(value):
        unknown = next(key for key in value if key not in ref)
        hint = did_you_mean(unknown, fields)
        raise mistake(f"unknown key {show(unknown)}", hint, (unknown,), key=True)
    if kind in ("file", "module") and value.get("options"):
        raise mistake(f"a {what} of your own takes no options", "remove them", ("options",))
    if kind == "builtin":
        name = known(table, name, what, ("name",), key=False)
        return {**ref, "options": checked(table, name, value.get("options"), ("options",))}
    if kind in readers:
        ref["options"] = checked(readers, str(kind), value.get("options"), ("options",))
    if kind == "module" and (not isinstance(name, str) or re.fullmatch(MODULE, name) is None):
        raise mistake(f"{show(name)} is not a module", "write package.module", ("name",))
    if kind != "module" and (kind == "file" or kind in readers):
        if not isinstance(path, str):
            raise mistake(f"expected a path, found {show(path)}", "", ("path",))
        _printable(path)
    return ref


class ModelRef(_Ref):
    """The model: a built-in, a file or a module with plain functions, or a module of torch's."""

    kind: Literal["builtin", "file", "module", "torch"] = Field(
        default="builtin", description="what it is"
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, str):
            if TORCH.fullmatch(value):
                raise mistake(f"{show(value)} is not a model", f"write {{torch: {show(value)}}}")
            value = _reference(value, MODELS, MODEL_SUFFIXES, "model")
        elif isinstance(value, Mapping) and "torch" in value:
            value = _torch_mapping(value)
        elif isinstance(value, Mapping) and "kind" not in value:
            name, options = choice(MODELS, value, "model")
            value = {"kind": "builtin", "name": name, "options": options}
        if not isinstance(value, Mapping):
            raise mistake(f"expected a model, found {show(value)}", "write mlp or path/to/model.py")
        ref = _long_ref(value, MODELS, MODEL_FILES, "model")
        if value.get("kind") == "torch" and not str(value.get("name")).isidentifier():
            what = f"{show(value.get('name'))} is not the name of a class"
            raise mistake(what, "write a name in the file", ("name",))
        return ref


def _torch_mapping(value: Mapping[str, object]) -> dict[str, Any]:
    """`{torch: path/to/net.py:Net}` -> the long form."""
    text = value["torch"]
    if len(value) > 1:
        other = next(key for key in value if key != "torch")
        raise mistake(f"unknown key {show(other)}", "torch takes no options", (other,), key=True)
    if not isinstance(text, str) or TORCH.fullmatch(text) is None:
        hint = "write path/to/net.py:Net"
        raise mistake(f"{show(text)} is not a file and a class in it", hint, ("torch",))
    _printable(text)
    on_host = text.startswith(ON_HOST)
    path, _, name = text.removeprefix(ON_HOST).rpartition(":")
    if on_host and not path.startswith("/"):
        raise mistake(f"{show(text)} is not absolute", "write host:/path", ("torch",))
    return {"kind": "torch", "path": path, "name": name, "on_host": on_host}


class DataRef(_Ref):
    """The data: a built-in, arrays, a table, a file or a module with a `load` function."""

    kind: Literal["builtin", "npz", "csv", "svmlight", "idx", "images", "file", "module"] = Field(
        default="builtin", description="what it is"
    )
    per_host: bool = Field(
        default=False, strict=True, description="each host has examples of its own"
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, str):
            value = _reference(value, DATASETS, DATA_SUFFIXES, "data")
        elif isinstance(value, Mapping) and "kind" not in value:
            value = _data_mapping(value)
        if not isinstance(value, Mapping):
            raise mistake(f"expected data, found {show(value)}", "write digits or {npz: path}")
        return _long_ref(value, DATASETS, READERS, "data")

    @model_validator(mode="after")
    def _sense(self) -> "DataRef":
        if self.per_host and self.kind == "builtin":
            raise mistake("what is built in is the same on every host", "remove `per_host`")
        if self.per_host and self.kind in READERS and not self.on_host:
            what = "a path on this machine is the same for every host"
            raise mistake(what, "write host:/path, or remove `per_host`", (self.kind,))
        return self


def _data_mapping(value: Mapping[str, object]) -> dict[str, Any]:
    """`{csv: path, option: …}`, `{load: data.py, …}` or `{digits: {}}` -> the long form."""
    also = {"per_host": value["per_host"]} if "per_host" in value else {}
    rest = {key: value[key] for key in value if key not in also}
    for reader in (*READERS, LOAD):
        if reader in rest:
            text = rest.pop(reader)
            if not isinstance(text, str):
                raise mistake(f"expected a path, found {show(text)}", "", (reader,))
            return {**(_load(text, rest) if reader == LOAD else _read(reader, text, rest)), **also}
    built_in: Table = {**DATASETS, **READERS}
    name, options = choice(built_in, rest, "data")
    return {"kind": "builtin", "name": name, "options": options, **also}


def _read(reader: str, path: str, options: Mapping[str, object]) -> dict[str, Any]:
    """What one of the readers reads."""
    _printable(path)
    on_host = path.startswith(ON_HOST)
    if on_host and not path.startswith(f"{ON_HOST}/"):
        raise mistake(f"{show(path)} is not absolute", "write host:/path")
    complete = checked(READERS, reader, options, ())
    path = path.removeprefix(ON_HOST)
    return {"kind": reader, "path": path, "on_host": on_host, "options": complete}


def _load(text: str, rest: Mapping[str, object]) -> dict[str, Any]:
    """A file or a module of the user's with a function `load`."""
    for other in rest:
        hint = did_you_mean(other, [LOAD, *Source.model_fields])
        raise mistake(f"unknown key {show(other)}", hint, (other,), key=True)
    if text.isidentifier():
        raise mistake(f"{show(text)} is not a file or a module", "write path/to/data.py", (LOAD,))
    return _reference(text, {}, MODEL_SUFFIXES, "data")


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
