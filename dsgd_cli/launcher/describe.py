"""What derives from the tree of models: JSON Schema, the table of fields, YAML written by dsgd.

Pure text. The short forms that `contract.spec` accepts are added to the schema here, and a test
holds the two together. Nothing here validates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dsgd_cli.contract.durations import format_duration, parse_duration
from dsgd_cli.contract.mistakes import model_of
from dsgd_cli.contract.options import (
    ALGORITHMS,
    CHANNELS,
    COMMON,
    DATASETS,
    DECAYS,
    MODEL_FILES,
    MODELS,
    OPTIMIZERS,
    READERS,
    Rule,
    Source,
)
from dsgd_cli.contract.references import (
    DATA_SUFFIXES,
    LOAD,
    MODEL_SUFFIXES,
    ON_HOST,
    DataRef,
    ModelRef,
)
from dsgd_cli.contract.spec import MAX_SERVERS, MAX_WORKERS, ClusterSpec
from dsgd_cli.contract.texts import Seconds
from dsgd_cli.contract.values import Every, Table
from dsgd_cli.launcher.nodes import resolve

Schema = dict[str, Any]
SCHEMA_FILE = "dsgd.schema.json"
# fields that nobody writes in full
SHORT = ("model", "data", "algorithm", "optimizer", "every", "channel")

TORCH: Schema = {
    "type": "object",
    "properties": {"torch": {"type": "string", "pattern": r"\.py:[A-Za-z_]\w*$"}},
    "required": ["torch"],
    "additionalProperties": False,
    "description": "A module of torch's: path/to/net.py:Net",
}

# ── JSON Schema ────────────────────────────────────────────────────────────────────────────────


def json_schema() -> str:
    """The JSON Schema of a cluster description, short forms included."""
    schema = ClusterSpec.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    for table in (MODELS, DATASETS, READERS, OPTIMIZERS, DECAYS, CHANNELS, ALGORITHMS):
        for model in table.values():
            own = model.model_json_schema()
            inner = own.pop("$defs", {})
            for name, definition in {model.__name__: own, **inner}.items():
                definitions.setdefault(name, definition)
    text: Schema = {"type": "string"}
    short: dict[str, list[Schema]] = {
        "Servers": [{"type": "integer", "minimum": 1, "maximum": MAX_SERVERS}],
        "Workers": [{"type": "integer", "minimum": 1, "maximum": MAX_WORKERS}],
        "Host": [text],
        "Slots": [{"type": "integer", "minimum": 0, "maximum": MAX_WORKERS}],
        "Env": [{"enum": ["ship", "existing"]}],
        "Every": [text, {"type": "number", "exclusiveMinimum": 0}],
        "Work": [text],
        "Decay": [{"enum": list(DECAYS)}, *_choices(DECAYS)],
        "ModelRef": [{"enum": list(MODELS)}, _path(MODEL_SUFFIXES), *_choices(MODELS), TORCH],
        "DataRef": [
            {"enum": list(DATASETS)},
            _path(DATA_SUFFIXES),
            *_choices(DATASETS),
            *_readers(definitions),
        ],
        "Optimizer": [{"enum": list(OPTIMIZERS)}, *_choices(OPTIMIZERS)],
        "Channel": [{"enum": list(CHANNELS)}, *_choices(CHANNELS)],
    }
    algorithm = definitions["Train"]["properties"]["algorithm"]
    del algorithm["discriminator"]
    long = algorithm.pop("oneOf")
    algorithm["anyOf"] = [{"enum": list(ALGORITHMS)}, *_choices(ALGORITHMS), *long]
    for name, forms in short.items():
        definitions[name] = {"anyOf": [*forms, definitions[name]]}
    fields = schema["properties"]
    fields["hosts"] = {**fields["hosts"], "type": ["array", "string"], "minItems": 1}
    for role in ("Servers", "Workers"):
        on = definitions[role]["anyOf"][-1]["properties"]["on"]
        on["type"] = ["array", "string"]
        env = definitions[role]["anyOf"][-1]["properties"].get("env", {})
        env["additionalProperties"] = {"type": ["string", "number", "boolean", "null"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "A cluster of dsgd"
    _untitled(schema)
    return json.dumps(schema, indent=2)


def _path(suffixes: Iterable[str]) -> Schema:
    """A file by the end of its name, or a module."""
    ends = "|".join(map(re.escape, suffixes))
    return {"type": "string", "pattern": rf"({ends})$|^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"}


def _choices(table: Mapping[str, type[BaseModel]]) -> Iterator[Schema]:
    """`{adagrad: {…}}` for each entry of a table."""
    for name, model in table.items():
        options = {"anyOf": [{"$ref": f"#/$defs/{model.__name__}"}, {"type": "null"}]}
        yield {
            "type": "object",
            "properties": {name: options},
            "required": [name],
            "additionalProperties": False,
            "description": _first_line(model),
        }


def _readers(definitions: Mapping[str, Schema]) -> Iterator[Schema]:
    """`{csv: path, option: …}`, `{load: path}`."""
    besides = Source.model_json_schema()["properties"]
    yield {
        "type": "object",
        "properties": {LOAD: _path(MODEL_SUFFIXES), **besides},
        "required": [LOAD],
        "additionalProperties": False,
        "description": "A file or a module of your own with a function `load`",
    }
    for name, model in READERS.items():
        options = definitions[model.__name__].get("properties", {})
        yield {
            "type": "object",
            "properties": {name: {"type": "string"}, **options, **besides},
            "required": [name],
            "additionalProperties": False,
            "description": _first_line(model),
        }


def _untitled(schema: Any) -> None:
    """Remove the titles that only repeat a field's name."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("properties", "$defs"):
                for inner in value.values():
                    inner.pop("title", None)
            _untitled(value)
    elif isinstance(schema, list):
        for value in schema:
            _untitled(value)


# ── the table of fields ────────────────────────────────────────────────────────────────────────


def fields_table() -> str:
    """All fields as a Markdown table: README's section holds exactly this."""
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in _fields()]
    return "\n".join(rows)


def _fields() -> Iterator[tuple[str, str, str]]:
    """(path, default, meaning) of every field, in the order of the tree."""
    yield from _below(ClusterSpec, "")
    tables: tuple[tuple[str, Table], ...] = (
        ("channel", CHANNELS),
        ("train.model", {**MODELS, **MODEL_FILES}),
        ("train.data", {**DATASETS, "*": Source, **READERS}),
        ("train.algorithm", ALGORITHMS),
        ("train.optimizer", {"*": Rule, **OPTIMIZERS}),
        ("train.optimizer.*.decay", DECAYS),
    )
    for field, table in tables:
        for name, model in table.items():
            yield f"{field}: {name}", "", _first_line(model)
            for option, info in model.model_fields.items():
                inherited = option in COMMON and name in OPTIMIZERS
                if option != "name" and not inherited:
                    yield f"{field}.{name}.{option}", _default(info), _meaning(info)


def _below(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, _default(info), _meaning(info)
        inner = model_of(info.annotation)
        if inner is not None and name not in SHORT:
            yield from _below(inner, f"{path}[]." if name == "hosts" else f"{path}.")


def _default(info: FieldInfo) -> str:
    value = info.default
    if value is None or value in ("", {}, ()):
        return ""
    if any(isinstance(mark, Seconds) for mark in info.metadata):
        return f"`{format_duration(value)}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _meaning(info: FieldInfo) -> str:
    return (info.description or "").replace("|", "\\|")


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].rstrip(".")


# ── YAML ───────────────────────────────────────────────────────────────────────────────────────


class _Dumper(yaml.SafeDumper):
    """Writes what our own reader reads back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if isinstance(resolve(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def resolved_yaml(spec: ClusterSpec) -> str:
    """A specification as a complete description: loading it gives an equal one."""
    data = _without_none(spec.model_dump(mode="json"))
    for holder, name in (
        (data, "lease"),
        (data, "idle_timeout"),
        (data["ssh"], "connect_timeout"),
        (data["train"]["until"], "max_time"),
    ):
        holder[name] = _duration(holder[name])
    data["channel"] = {spec.channel.name: spec.channel.options}
    train = spec.train
    data["train"] |= {
        "model": _ref(train.model),
        "data": _ref(train.data),
        "algorithm": {train.algorithm.name: _short(train.algorithm.model_dump(exclude={"name"}))},
        "optimizer": {train.optimizer.name: _short(train.optimizer.options)},
        "evaluate": data["train"]["evaluate"] | {"every": _every(train.evaluate.every)},
    }
    if train.algorithm.name == "sandblaster":
        del data["train"]["optimizer"]  # it uses none, and whoever loads this would be told so
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )


def _ref(ref: ModelRef | DataRef) -> Any:
    path = f"{ON_HOST}{ref.path}" if ref.on_host else ref.path
    also = {"per_host": True} if isinstance(ref, DataRef) and ref.per_host else {}
    if ref.kind == "builtin":
        return {ref.name: ref.options}
    if ref.kind == "torch":
        return {"torch": f"{path}:{ref.name}"}
    if ref.kind == "file" and not path.endswith(".py"):
        return ref.model_dump(mode="json")
    if ref.kind in ("file", "module"):
        where = path if ref.kind == "file" else ref.name
        return {LOAD: where, **also} if also else where
    return {ref.kind: path, **ref.options, **also}


def _short(options: Any) -> Any:
    """Options of built-ins as people write them: no defaults that mean nothing, short forms."""
    if not isinstance(options, dict):
        return options
    if options.keys() == {"name", "options"}:
        inner = _short(options["options"])
        return {options["name"]: inner} if inner else options["name"]
    if options.keys() == {"count", "unit"}:
        return _every(Every(**options))
    return {key: _short(value) for key, value in options.items() if value is not None}


def _every(every: Every) -> Any:
    if every.unit == "s" or not every.count.is_integer():
        return every.model_dump(mode="json")
    return f"{int(every.count)} {every.unit}{'s' if every.count != 1 else ''}"


def _duration(seconds: float) -> Any:
    text = format_duration(seconds)
    return text if parse_duration(text) == seconds else seconds


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def initial_file() -> str:
    """A commented description to start from; it trains on this machine as it is."""
    return INITIAL


INITIAL = f"""\
# yaml-language-server: $schema={SCHEMA_FILE}
# (`dsgd schema > {SCHEMA_FILE}` gives your editor completion and checks)
#
# A cluster and what it trains. Every field has a default: what you do not need, you may delete.
# `dsgd check` finds mistakes, `dsgd train` starts, trains, brings the model home and cleans up.

name: digits            # a-z, 0-9 and '-'; two clusters on one host need two names
seed: 0

hosts: [local]          # this machine, without SSH
# hosts:                # or machines that you reach over SSH; they need only python3
#   - gpu[1-4]          # gpu1, gpu2, gpu3, gpu4
#   - {{address: big1, user: ml, port: 22, slots: 8}}
# ssh: {{user: ml, identity_file: ~/.ssh/id_ed25519}}    # for all hosts that do not say otherwise

servers: 2              # they share the parameters
workers: 2              # they compute gradients; or {{count: 8, on: ["gpu*"], threads: 2}}

train:
  model: mlp            # or {{mlp: {{hidden: [128]}}}}, softmax, cnn, path/to/model.py
  data: digits          # or {{csv: path}}, {{images: folder}}, path/to/data.py
  algorithm: downpour   # each worker at its own pace
  optimizer: {{adagrad: {{learning_rate: 0.05}}}}    # or sgd, momentum, adam
  batch_size: 32
  evaluate: {{every: 1 epoch}}
  until: {{accuracy: 0.97, max_epochs: 50, max_time: 10m}}
"""
