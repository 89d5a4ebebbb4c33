"""The tree of models: short forms, defaults, and a dump that is valid input again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dsgd_cli.contract.mistakes import explain, model_of
from dsgd_cli.contract.spec import ClusterSpec, Train


def spec(**fields: Any) -> ClusterSpec:
    return ClusterSpec.model_validate(fields)


def train(**fields: Any) -> Train:
    return Train.model_validate(fields)


def said(**fields: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    return [str(mistake) for mistake in explain(ClusterSpec, caught.value)]


# of every optimizer
COMMON = {
    "decay": {"name": "constant", "options": {}},
    "warm_up": None,
    "l2": 0.0,
    "clip_norm": None,
}


def test_everything_has_a_default() -> None:
    made = spec()
    assert [host.transport for host in made.hosts] == ["local"]
    assert (made.servers.count, made.workers.count, made.workers.threads) == (1, 2, 1)
    assert (made.lease_s, made.idle_timeout_s, made.ssh.connect_timeout_s) == (15.0, 3600.0, 10.0)
    assert (made.train.model.kind, made.train.model.name) == ("builtin", "mlp")
    own = {"learning_rate": 0.05, "initial": 0.1, "epsilon": 1e-7}
    assert made.train.optimizer.options == COMMON | own


def test_no_run_goes_on_for_ever() -> None:
    until = train(until={"accuracy": 0.97}).until
    assert (until.max_epochs, until.max_steps, until.max_time_s) == (100, None, 86_400.0)
    assert train(until={"max_steps": 7}).until.max_epochs is None
    assert train(until={"max_time": "10m"}).until.max_epochs is None
    assert train(until={"max_epochs": 7}).until.max_time_s == 86_400.0
    assert not train().until.has_target


def test_counts_and_mappings_are_the_same() -> None:
    assert spec(servers=2) == spec(servers={"count": 2})
    long = spec(workers={"count": 8, "on": "gpu*", "env": {"A": "b"}}, hosts=["gpu1"])
    assert long == spec(workers={"count": 8, "on": ["gpu*"], "env": {"A": "b"}}, hosts="gpu1")


def test_hosts() -> None:
    local, plain, full = spec(
        hosts=["local", "gpu1", {"name": "big", "address": "10.0.0.2", "slots": 3}]
    ).hosts
    assert (local.name, local.transport, local.address) == ("local", "local", "localhost")
    assert (plain.name, plain.transport, plain.address) == ("gpu1", "ssh", "gpu1")
    assert (full.name, full.address) == ("big", "10.0.0.2")
    assert full.slots is not None and full.slots.limit == 3
    assert spec(hosts=[{"name": "gpu1"}]).hosts == (plain,)
    assert spec(hosts=[{"address": "local", "slots": 2}]).hosts[0].transport == "local"
    assert spec(hosts=["localhost"]).hosts[0].transport == "ssh"
    assert spec(hosts=["fe80::1"]).hosts[0].address == "fe80::1"


@pytest.mark.parametrize(
    ("model", "kind", "name", "path", "on_host"),
    [
        ("softmax", "builtin", "softmax", "", False),
        ({"mlp": None}, "builtin", "mlp", "", False),
        ("my/model.py", "file", "", "my/model.py", False),
        ("model.py", "file", "", "model.py", False),
        ("host:/srv/model.py", "file", "", "/srv/model.py", True),
        ("lab.nets", "module", "lab.nets", "", False),
        ({"torch": "my/net.py:Net"}, "torch", "Net", "my/net.py", False),
        ({"torch": "host:/srv/net.py:Net"}, "torch", "Net", "/srv/net.py", True),
    ],
)
def test_models(model: Any, kind: str, name: str, path: str, on_host: bool) -> None:
    ref = train(model=model).model
    assert (ref.kind, ref.name, ref.path, ref.on_host) == (kind, name, path, on_host)


@pytest.mark.parametrize(
    ("data", "kind", "path", "on_host"),
    [
        ("digits", "builtin", "", False),
        ({"npz": "a.npz"}, "npz", "a.npz", False),
        ("a.npz", "npz", "a.npz", False),
        ({"npz": "host:/srv/a"}, "npz", "/srv/a", True),
        ({"csv": "a.txt", "label": "y"}, "csv", "a.txt", False),
        ({"svmlight": "a9a"}, "svmlight", "a9a", False),
        ("a.svm", "svmlight", "a.svm", False),
        ("host:/srv/a9a.libsvm", "svmlight", "/srv/a9a.libsvm", True),
        ({"idx": "mnist"}, "idx", "mnist", False),
        ({"images": "host:/srv/photos", "size": [32, 32]}, "images", "/srv/photos", True),
        ("my/data.py", "file", "my/data.py", False),
        ("host:/srv/data.py", "file", "/srv/data.py", True),
    ],
)
def test_data(data: Any, kind: str, path: str, on_host: bool) -> None:
    ref = train(data=data).data
    assert (ref.kind, ref.path, ref.on_host) == (kind, path, on_host)


@pytest.mark.parametrize(
    ("data", "kind", "where"),
    [
        ({"npz": "host:/srv/a", "per_host": True}, "npz", "/srv/a"),
        ({"csv": "host:/srv/a", "label": "y", "per_host": True}, "csv", "/srv/a"),
        ({"load": "my/data.py", "per_host": True}, "file", "my/data.py"),
        ({"load": "host:/srv/data.py", "per_host": True}, "file", "/srv/data.py"),
        ({"load": "lab.data", "per_host": True}, "module", "lab.data"),
    ],
)
def test_data_of_each_host(data: dict[str, Any], kind: str, where: str) -> None:
    ref = train(data=data).data
    assert (ref.kind, ref.path or ref.name, ref.per_host) == (kind, where, True)
    alike = train(data={key: data[key] for key in data if key != "per_host"}).data
    assert alike == ref.model_copy(update={"per_host": False})


def test_options_are_complete() -> None:
    assert train(model={"mlp": {"hidden": [3, 4]}}).model.options == {"hidden": [3, 4], "l2": 0.0}
    assert train(data={"csv": "a.csv", "label": 0}).data.options["label"] == 0
    images = {"size": [64, 64], "grey": False, "test_fraction": 0.2}
    assert train(data={"images": "photos"}).data.options == images
    algorithm = train(algorithm={"downpour": {"push_every": 4}}).algorithm
    assert (algorithm.name, algorithm.push_every, algorithm.fetch_every) == ("downpour", 4, 1)
    assert train(optimizer="sgd").optimizer.options == COMMON | {"learning_rate": 0.01}


@pytest.mark.parametrize(
    ("written", "name", "options"),
    [
        ("auto", "auto", {"encrypt": True, "force": False}),
        ("shm", "shm", {}),
        ("grpc", "grpc", {}),
        ("tcp", "tcp", {"encrypt": True, "force": False}),
        ({"tcp": {"encrypt": False}}, "tcp", {"encrypt": False, "force": False}),
        ({"auto": {"encrypt": False}}, "auto", {"encrypt": False, "force": False}),
        ({"name": "tcp", "options": {"force": True}}, "tcp", {"encrypt": True, "force": True}),
    ],
)
def test_channels(written: Any, name: str, options: dict[str, Any]) -> None:
    made = spec(channel=written)
    assert (made.channel.name, made.channel.options) == (name, options)
    assert spec(channel=made.channel.model_dump(mode="json")).channel == made.channel
    assert spec().channel.name == "auto"


def test_intervals() -> None:
    every = train(evaluate={"every": "5 epochs"}).evaluate.every
    assert (every.count, every.unit) == (5.0, "epoch")
    assert train(evaluate={"every": 30}).evaluate.every.unit == "s"


TREES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
        "seed": st.integers(0, 2**63 - 1),
        "hosts": st.lists(st.sampled_from(["local", "gpu1", {"address": "b", "port": 22}])).filter(
            bool
        ),
        "servers": st.integers(1, 9) | st.fixed_dictionaries({"count": st.integers(1, 9)}),
        "workers": st.fixed_dictionaries(
            {},
            optional={
                "env": st.dictionaries(
                    st.sampled_from("AB"),
                    st.text(st.characters(exclude_characters="\0", codec="utf-8")),
                )
            },
        ),
        "lease": st.sampled_from(["15s", 3, 2.5]),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "model": st.sampled_from(
                    ["mlp", "softmax", "a.py", "a.b", "host:/a.py", {"torch": "a.py:A"}]
                ),
                "data": st.sampled_from(["digits", {"csv": "x", "label": "y"}, "a.npz"]),
                "optimizer": st.sampled_from(["sgd", {"adam": {"beta1": 0.5}}, "momentum"]),
                "algorithm": st.sampled_from(["downpour", {"downpour": {"fetch_every": 2}}]),
                "evaluate": st.sampled_from([{}, {"every": "2 epochs"}, {"every": 1.5}]),
                "until": st.sampled_from([{}, {"loss": 1}, {"max_steps": 1}, {"max_time": "1h"}]),
            },
        ),
    },
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_the_dump_is_valid_input_again(fields: dict[str, Any]) -> None:
    made = ClusterSpec.model_validate(fields)
    wire = json.loads(json.dumps(made.model_dump(mode="json")))
    assert ClusterSpec.model_validate(wire) == made
    assert Train.model_validate(wire["train"]) == made.train


@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        ({"servers": True}, "expected how many servers, found true – write 2 or {count: 2}"),
        ({"servers": 0}, "0 is out of range – it must be at least 1"),
        ({"servers": "2"}, "expected how many servers, found '2' – write 2 or {count: 2}"),
        ({"seed": 1.0}, "expected a whole number, found 1.0 – write 1"),
        ({"seed": "abc"}, "expected a whole number, found 'abc'"),
        ({"seed": None}, "'seed' has no value – give it one, or remove the line"),
        ({"lease": True}, "expected a duration, found true – write 15s, 10m or 1h"),
        ({"lease": "0s"}, "'0s' is out of range – it must be between 1s and 1d"),
        ({"lease": float("nan")}, "nan is out of range – it must be between 1s and 1d"),
        ({"env": "exists"}, "unknown value 'exists' – did you mean 'existing'?"),
        (
            {"env": 3},
            "expected where packages come from, found 3"
            " – write ship, existing or {requirements: requirements.txt}",
        ),
        (
            {"env": {"requirement": "r.txt"}},
            "unknown key 'requirement' – did you mean 'requirements'?",
        ),
        (
            {"env": {"packages": "existing", "requirements": "r.txt"}},
            "with `existing` no requirements are sent – remove them, or `packages: existing`",
        ),
        ({"hosts": []}, "an empty list of hosts – write [local] for this machine"),
        ({"hosts": ["ml@gpu1"]}, "'ml@gpu1' is not an address – write {address: gpu1, user: ml}"),
        ({"hosts": ["gpu1:22"]}, "'gpu1:22' is not an address – write {address: gpu1, port: 22}"),
        ({"hosts": [["a"]]}, "expected a host, found a list – write gpu1 or {address: gpu1}"),
        ({"name": "../x"}, "'../x' is not a name – use a-z, 0-9 and '-', such as 'x'"),
        (
            {"train": {"model": "net.py:Net"}},
            "'net.py:Net' is not a model – write {torch: 'net.py:Net'}",
        ),
        (
            {"train": {"model": {"torch": "net.py"}}},
            "'net.py' is not a file and a class in it – write path/to/net.py:Net",
        ),
        (
            {"train": {"model": {"torch": "host:net.py:Net"}}},
            "'host:net.py:Net' is not absolute – write host:/path",
        ),
        (
            {"train": {"model": {"torch": "net.py:Net", "hidden": 3}}},
            "unknown key 'hidden' – torch takes no options",
        ),
        (
            {"train": {"model": {"kind": "torch", "path": "net.py", "name": "a b"}}},
            "'a b' is not the name of a class – write a name in the file",
        ),
        (
            {"hosts": [{"address": "a", "slots": "8"}]},
            "expected how many workers, found '8' – write 8 or {gpu: 2}",
        ),
        (
            {"hosts": [{"address": "a", "slots": {"gpu": 1, "count": 2}}]},
            "expected one number of slots – write 8 or {gpu: 2}",
        ),
        (
            {"hosts": [{"address": "a", "slots": {"gpus": 1}}]},
            "unknown key 'gpus' – did you mean 'gpu'?",
        ),
        (
            {"hosts": [{"address": "a", "slots": {"gpu": 0}}]},
            "0 is out of range – it must be at least 1",
        ),
        ({"train": {"model": 3}}, "expected a model, found 3 – write mlp or path/to/model.py"),
        (
            {"train": {"model": "a/b.txt"}},
            "'a/b.txt' is not a model – its name must end with .py",
        ),
        ({"train": {"data": "host:a.py"}}, "'host:a.py' is not absolute – write host:/path"),
        (
            {"train": {"data": {"npz": "host:a"}}},
            "'host:a' is not absolute – write host:/path",
        ),
        (
            {"train": {"data": {"npz": "a.npz", "per_host": True}}},
            "a path on this machine is the same for every host – write host:/path, or remove"
            " `per_host`",
        ),
        (
            {"train": {"data": {"digits": {}, "per_host": True}}},
            "what is built in is the same on every host – remove `per_host`",
        ),
        (
            {"train": {"data": {"npz": "host:/a", "per_host": "yes"}}},
            "expected true or false, found 'yes' – write true",
        ),
        (
            {"train": {"data": {"load": "digits", "per_host": True}}},
            "'digits' is not a file or a module – write path/to/data.py",
        ),
        (
            {"train": {"data": {"npz": "host:/a", "per_hots": True}}},
            "unknown key 'per_hots' – did you mean 'per_host'?",
        ),
        (
            {"train": {"data": {"npz": "a", "images": "b"}}},
            "expected one kind of data, found npz, images – name one of them",
        ),
        (
            {"train": {"data": {"load": "a.py", "per_hots": True}}},
            "unknown key 'per_hots' – did you mean 'per_host'?",
        ),
        ({"channel": "tpc"}, "unknown channel 'tpc' – did you mean 'tcp'?"),
        (
            {"channel": {"tcp": {"encrypt": "no"}}},
            "expected true or false, found 'no' – write false",
        ),
        (
            {"train": {"optimizer": {"sgd": {}, "adam": {}}}},
            "expected one optimizer, found 'sgd', 'adam' – name a single optimizer",
        ),
        (
            {"train": {"optimizer": {"sgd": {}, "decay": "constant"}}},
            "expected one optimizer, found 'sgd', 'decay' – write {sgd: {decay: …}}",
        ),
        (
            {"train": {"data": {"images": "a", "size": [32]}}},
            "too few entries – at least 2",
        ),
        (
            {"train": {"until": {"plateau": 5}}},
            "expected a mapping, found 5 – write {patience: …}",
        ),
        (
            {"train": {"optimizer": {"momentum": {"nesterov": "yes"}}}},
            "expected true or false, found 'yes' – write true",
        ),
        (
            {"train": {"model": {"mlp": {"hidden": [0]}}}},
            "0 is out of range – it must be at least 1",
        ),
        ({"workers": {"env": {"DSGD_X": "1"}}}, "'DSGD_X' is dsgd's own – use another name"),
        ({"workers": {"env": {"A": "\0"}}}, "a NUL character in a variable – remove it"),
    ],
)
def test_a_mistake_is_one_sentence_in_plain_words(fields: dict[str, Any], mistake: str) -> None:
    assert said(**fields) == [mistake]


HOSTILE = [
    "$(touch canary)",
    "`id`",
    "a\nb",
    "-rf",
    "../../x",
    "'; rm -rf /",
    'a"b',
    "a\0b",
    "\x1b]52",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", ["name", "address", "user", "python", "host_key", "advertise"])
def test_hostile_text_never_becomes_a_host(field: str, text: str) -> None:
    if field == "python" and text == "../../x":
        return  # a path like any other; it is one argument, never a shell's word
    fields = {"address": "gpu1", field: text}
    (mistake,) = said(hosts=[fields])
    assert mistake.isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_variable_may_be_any_text_but_nul(text: str) -> None:
    if "\0" not in text:
        assert spec(workers={"env": {"A": text}}).workers.env == {"A": text}


def test_the_tree_is_frozen() -> None:
    made = spec()
    with pytest.raises(ValidationError):
        made.seed = 3  # type: ignore[misc]


def test_every_field_is_described() -> None:
    todo: list[type[BaseModel]] = [ClusterSpec]
    seen = set()
    while todo:
        model = todo.pop()
        seen.add(model.__name__)
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert not field.is_required(), f"{model.__name__}.{name}"
            inner = model_of(field.annotation)
            todo += [inner] if inner is not None else []
    assert {"Host", "Ssh", "Every", "Downpour", "DataRef"} <= seen
