"""What derives from the tree: JSON Schema, the table of fields, resolved YAML, the first file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.describe import fields_table, initial_file, json_schema, resolved_yaml
from dsgd_cli.launcher.load import load, local_spec

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "cluster_templates").glob("*.yaml"))
SCHEMA: dict[str, Any] = json.loads(json_schema())

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
KNOWN = {"type", "enum", "const", "anyOf", "$ref", "properties", "required", "items", "pattern"}
KNOWN |= {"additionalProperties", "minItems", "maxItems", "minimum", "maximum", "title", "default"}
KNOWN |= {"exclusiveMinimum", "exclusiveMaximum", "description", "$defs", "$schema", "allOf"}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """As much of JSON Schema as the schema uses; an unknown word is an error, not ignored."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    if "anyOf" in schema and not any(fits(value, option) for option in schema["anyOf"]):
        return False
    if not all(fits(value, part) for part in schema.get("allOf", [])):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "type" in schema and not any(_is(value, name) for name in _listed(schema["type"])):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, int | float):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and not value <= schema.get("exclusiveMinimum", value - 1)
            and not value >= schema.get("exclusiveMaximum", value + 1)
        )
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        return all(fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        others = schema.get("additionalProperties", {})
        for key, inner in value.items():
            rule = schema.get("properties", {}).get(key, others)
            if rule is False or (isinstance(rule, dict) and not fits(inner, rule)):
                return False
        return set(schema.get("required", ())) <= value.keys()
    return True


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name])


VALID: list[dict[str, Any]] = [
    {},
    {"hosts": "gpu[1-4]", "servers": 2, "workers": 3},
    {"hosts": ["local", {"address": "a", "port": 22, "slots": 2, "identity_file": "k"}]},
    {"hosts": [{"address": "a", "slots": {"gpu": 2}}]},
    {"workers": {"count": 8, "on": "a*", "threads": 2, "env": {"A": "x"}}},
    {"servers": {"count": 2, "on": ["a", "b"]}},
    {"env": "existing"},
    {"env": {"requirements": "requirements.txt"}},
    {"lease": "15s", "idle_timeout": 60, "ssh": {"connect_timeout": "1.5s"}},
    {"train": {"model": "softmax", "data": "x/data.py", "optimizer": "sgd"}},
    {"train": {"model": {"mlp": {"hidden": [1, 2]}}, "data": {"csv": "x", "label": "y"}}},
    {"train": {"model": {"cnn": {"filters": [8], "kernel": 5}}}},
    {"train": {"model": {"torch": "nets/net.py:Net"}}},
    {"train": {"model": {"torch": "host:/nets/net.py:Net"}}},
    {"train": {"model": {"mlp": None}, "data": {"npz": "host:/x", "test_fraction": 0.1}}},
    {"train": {"model": "lab.nets", "data": "host:/data.npz"}},
    {"train": {"data": {"svmlight": "a9a", "features": 123}}},
    {"train": {"data": "a.libsvm"}},
    {"train": {"data": {"images": "photos", "size": [32, 48], "grey": True}}},
    {"train": {"data": {"idx": "host:/srv/mnist"}}},
    {"train": {"data": {"idx": "host:/srv/mnist", "per_host": True}}},
    {"train": {"data": {"load": "data.py", "per_host": True}}},
    {"train": {"evaluate": {"every": "30s", "training": True}}},
    {"train": {"data": {"csv": "host:/data.csv", "ignore": ["id", 3], "label": "kind"}}},
    {"train": {"optimizer": {"adam": {"beta1": 0.5}}, "algorithm": "downpour"}},
    {"train": {"algorithm": {"downpour": {"push_every": 2}}, "evaluate": {"every": "2 epochs"}}},
    {"train": {"until": {"accuracy": 0.9, "max_time": "10m", "max_steps": 5}}},
    {"train": {"until": {"plateau": {"patience": 3, "metric": "loss"}}}},
    {"train": {"algorithm": {"synchronous": {"backup_workers": 1}}}, "workers": 3},
    {"train": {"algorithm": {"stale_synchronous": {"bound": 2}}}},
    {"train": {"algorithm": {"sandblaster": {"method": "conjugate_gradient"}}}},
    {"train": {"algorithm": {"downpour": {"warm_start": {"until": "1 epoch"}}}}},
    {"train": {"optimizer": {"sgd": {"decay": "cosine", "warm_up": "500 steps"}}}},
    {"train": {"optimizer": {"adam": {"decay": {"step": {"every": "2 epochs"}}, "l2": 1e-4}}}},
    {"train": {"optimizer": {"adam": {"decay": {"plateau": {"factor": 0.5}}, "clip_norm": 1}}}},
]


@pytest.mark.parametrize("fields", VALID)
def test_what_the_models_take_the_schema_takes(fields: dict[str, Any]) -> None:
    assert fits(fields, SCHEMA)
    made = ClusterSpec.model_validate({**fields, "hosts": "a"} if "hosts" in fields else fields)
    assert fits(made.model_dump(mode="json"), SCHEMA)


@pytest.mark.parametrize(
    "fields",
    [
        {"sede": 1},
        {"servers": 0},
        {"servers": "two"},
        {"lease": "22:30"},
        {"env": "shipp"},
        {"hosts": []},
        {"hosts": [{"prot": 22}]},
        {"train": {"model": "mpl"}},
        {"train": {"model": {"mpl": {}}}},
        {"train": {"optimizer": {"adagrad": {"learning_rate": -1}}}},
        {"train": {"data": {"csv": "x", "lable": "y"}}},
        {"train": {"data": {"images": "x", "size": [0, 5]}}},
        {"train": {"data": {"load": "data"}}},
        {"train": {"data": {"npz": "x", "per_host": 1}}},
        {"train": {"until": {"accuracy": 97}}},
    ],
)
def test_what_the_models_refuse_the_schema_refuses(fields: dict[str, Any]) -> None:
    assert not fits(fields, SCHEMA)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_the_schema_takes_the_templates(path: Path) -> None:
    assert fits(yaml.safe_load(re.sub(r"\bon:", "'on':", path.read_text())), SCHEMA)


def test_the_first_file_is_valid_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(initial_file())
    made = load(file)
    assert made.notes == ()
    assert (made.spec.name, made.spec.servers.count) == ("digits", 2)
    assert initial_file().startswith("# yaml-language-server: $schema=")
    assert fits(yaml.safe_load(initial_file()), SCHEMA)
    # what is commented out is valid as well
    hosts = [line[2:] for line in initial_file().splitlines() if re.match(r"# (hosts:|  - )", line)]
    file.write_text("\n".join(hosts))
    assert [host.name for host in load(file).spec.hosts] == ["gpu1", "gpu2", "gpu3", "gpu4", "big1"]


def test_the_resolved_file_gives_the_same_specification(tmp_path: Path) -> None:
    (tmp_path / "m.py").touch()
    (tmp_path / "data.csv").touch()
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "hosts: ['a[1-2]', {address: g, slots: {gpu: 2}}, {address: b, host_key: 'SHA256:"
        + "A" * 43
        + "'}]\n"
        "ssh: {user: '1e-3', connect_timeout: 1.5s}\n"
        "workers: {count: 2, on: [a*], env: {A: '022', B: \"x\\ny: '\", C: '~', D: 'on'}}\n"
        "lease: 1.2345\n"
        "train:\n  model: m.py\n  data: {csv: data.csv, label: '1'}\n"
        "  optimizer: {momentum: {nesterov: true}}\n  evaluate: {every: 2.5s}\n"
        "  until: {max_time: 90s}\n"
    )
    made = load(file).spec
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(made))
    assert load(again).spec == made
    assert load(again).notes == ()
    file.write_text("env: {requirements: m.py}\ntrain:\n  model: {torch: m.py:Net}\n")
    made = load(file).spec
    assert made.env.requirements == str(tmp_path / "m.py")
    assert made.train.model.path == str(tmp_path / "m.py")
    again.write_text(resolved_yaml(made))
    assert load(again).spec == made
    for data in ("{load: m.py, per_host: true}", "{csv: 'host:/a', per_host: true}"):
        file.write_text(f"train: {{data: {data}}}\n")
        made = load(file).spec
        assert made.train.data.per_host
        again.write_text(resolved_yaml(made))
        assert load(again).spec == made
    sandblaster = local_spec("1x1", "mlp", "digits", ["train.algorithm=sandblaster"]).spec
    for spec in (local_spec("2x3").spec, local_spec("1x1", "softmax").spec, sandblaster):
        again.write_text(resolved_yaml(spec))
        assert load(again).spec == spec
        assert load(again).notes == ()


def test_the_table_names_every_field() -> None:
    rows = fields_table().splitlines()
    assert len({row.count("|") for row in rows}) == 1
    for name in ("name", "hosts[].address", "ssh.host_keys", "workers.env", "train.until.accuracy"):
        assert any(row.startswith(f"| `{name}` |") for row in rows), name
    assert "| `train.optimizer.adagrad.learning_rate` | `0.05` | step size |" in rows
    assert "| `lease` | `15s` |" in fields_table()


def test_every_key_of_the_table_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("hosts: [{address: a}]\n")
    for row in fields_table().splitlines()[2:]:
        key = row.split("`")[1].replace("[]", ".0")
        if ":" not in key:
            with pytest.raises(SpecError) as caught:
                load(file, [f"{key}=[[]]"])
            assert "unknown key" not in caught.value.details[0], caught.value.details
