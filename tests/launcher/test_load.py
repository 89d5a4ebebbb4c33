"""Loading: every mistake with its place, at once, once; nothing but SpecError comes out."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.launcher import nodes
from dsgd_cli.launcher.load import Loaded, load, local_spec

HEAD = re.compile(r"(.+):(\d+):(\d+)  (.+)")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(text: str, *overrides: str) -> Loaded:
    Path("cluster.yaml").write_text(text)
    return load(Path("cluster.yaml"), overrides)


def refused(text: str | bytes, *overrides: str) -> SpecError:
    Path("cluster.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        load("cluster.yaml", overrides)
    return caught.value


def heads(error: SpecError) -> list[str]:
    """The lines with a place, without the text and the carets."""
    return [line for line in error.details if HEAD.fullmatch(line)]


def mistakes(text: str | bytes, *overrides: str) -> list[str]:
    return heads(refused(text, *overrides))


TWELVE = """\
name: Digits Lab
sede: 1
hosts:
  - gpu[4-1]
  - {address: big1, prot: 22}
servers: two
workers: {count: 8, env: &env {A: x}}
lease: 22:30
train:
  model: mpl
  optimizer: {adagrad: {learning_rate: -1}}
  batch_size: 1_000
  data: *data
train: {}
"""
TWELVE_LINES = """\
cluster.yaml:1:7  'Digits Lab' is not a name – use a-z, 0-9 and '-', such as 'digits-lab'
    1 | name: Digits Lab
      |       ^^^^^^^^^^
cluster.yaml:2:1  unknown key 'sede' – did you mean 'seed'?
    2 | sede: 1
      | ^^^^
cluster.yaml:4:5  'gpu[4-1]' is a range that goes backwards – write [1-4]
    4 |   - gpu[4-1]
      |     ^^^^^^^^
cluster.yaml:5:21  unknown key 'prot' – did you mean 'port'?
    5 |   - {address: big1, prot: 22}
      |                     ^^^^
cluster.yaml:6:10  expected how many servers, found 'two' – write 2 or {count: 2}
    6 | servers: two
      |          ^^^
cluster.yaml:7:26  anchor '&env' – remove it, dsgd takes no aliases
    7 | workers: {count: 8, env: &env {A: x}}
      |                          ^^^^
cluster.yaml:8:8  '22:30' is not a duration – write 22m30s, or 22h30m for hours
    8 | lease: 22:30
      |        ^^^^^
cluster.yaml:10:10  unknown model 'mpl' – did you mean 'mlp'? (your own: path/to/model.py)
   10 |   model: mpl
      |          ^^^
cluster.yaml:11:40  -1 is out of range – it must be more than 0
   11 |   optimizer: {adagrad: {learning_rate: -1}}
      |                                        ^^
cluster.yaml:12:15  expected a whole number, found '1_000' – write 1000
   12 |   batch_size: 1_000
      |               ^^^^^
cluster.yaml:13:9  alias '*data' – write the value out, or put it in quotes if it is text
   13 |   data: *data
      |         ^^^^^
cluster.yaml:14:1  duplicate key 'train' (first at line 9) – remove one; YAML would silently keep \
the last
   14 | train: {}
      | ^^^^^
"""


def test_twelve_mistakes_are_twelve_lines() -> None:
    error = refused(TWELVE)
    assert error.exit_code == 3
    assert error.message == "12 errors in cluster.yaml"
    assert "\n".join(error.details) + "\n" == TWELVE_LINES
    assert len(heads(error)) == 12


def test_without_libyaml_the_words_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOADER", yaml.SafeLoader)
    assert "\n".join(refused(TWELVE).details) + "\n" == TWELVE_LINES


# ── YAML 1.1 ───────────────────────────────────────────────────────────────────────────────────


def test_numbers_are_those_of_yaml_1_2() -> None:
    made = loaded(
        "seed: 022\ntrain: {optimizer: {sgd: {learning_rate: 1e-3}}, model: {mlp: {l2: 1e3}}}"
    )
    assert made.spec.seed == 22
    assert made.spec.train.optimizer.options["learning_rate"] == 0.001
    assert made.spec.train.model.options["l2"] == 1000.0
    assert list(made.notes) == [
        "cluster.yaml:1:7  '022' is 18 in YAML 1.1 – read as the number 22",
        "cluster.yaml:2:42  '1e-3' is text in YAML 1.1 – read as the number 0.001",
        "cluster.yaml:2:68  '1e3' is text in YAML 1.1 – read as the number 1000",
    ]


def test_words_are_those_of_yaml_1_2() -> None:
    made = loaded("name: no\nworkers: {count: 2, on: [off]}\nhosts: [off]\nseed: 0o17\n")
    assert made.spec.name == "no"
    assert made.spec.workers.on == ("off",)
    assert made.spec.seed == 15
    assert [note.partition("  ")[2] for note in made.notes] == [
        "'no' is false in YAML 1.1 – read as text",
        "'off' is false in YAML 1.1 – read as text",
        "'off' is false in YAML 1.1 – read as text",
        "'0o17' is text in YAML 1.1 – read as the number 15",
    ]


def test_no_notes_without_surprises() -> None:
    assert (
        loaded("name: a\nseed: 0\ntrain: {optimizer: {sgd: {learning_rate: 1.0e-3}}}").notes == ()
    )
    assert loaded('name: "no"\nworkers: {env: {A: 022, B: no, C: 1e-3}}\n').notes == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1_000", "1:7  expected a whole number, found '1_000' – write 1000"),
        ("seed: 1e3", "1:7  expected a whole number, found 1000.0 – write 1000"),
        ("seed: '3'", "1:7  expected a whole number, found '3' – write 3"),
        ("lease: 22:30", "1:8  '22:30' is not a duration – write 22m30s, or 22h30m for hours"),
        ("seed: true", "1:7  expected a whole number, found true"),
        ("name: 2024", "1:7  expected text, found 2024 – put it in quotes: '2024'"),
        ("name: true", "1:7  expected text, found true – put it in quotes: 'true'"),
        (
            "train: {optimizer: {momentum: {nesterov: on}}}",
            "1:42  expected true or false, found 'on' – write true",
        ),
        ("lease: .inf", "1:8  inf is out of range – it must be between 1s and 1d"),
        ("train: {until: {loss: .nan}}", "1:23  expected a finite number, found nan"),
    ],
)
def test_what_yaml_1_1_would_have_read(text: str, said: str) -> None:
    assert mistakes(text) == [f"cluster.yaml:{said}"]


def test_the_values_of_variables_are_the_text_that_was_written() -> None:
    made = loaded("workers: {env: {A: 022, B: yes, C: 1.50, D: ~, E: '', F: 1:30, G: \"a\\nb\"}}")
    assert made.spec.workers.env == {
        "A": "022",
        "B": "yes",
        "C": "1.50",
        "D": "~",
        "E": "",
        "F": "1:30",
        "G": "a\nb",
    }


# ── what YAML allows and dsgd does not ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hosts: &h [a]\n", ["1:8  anchor '&h' – remove it, dsgd takes no aliases"]),
        (
            "ssh: &s {user: a}\nlease: *s\n",
            ["2:8  alias '*s' – write the value out, or put it in quotes if it is text"],
        ),
        (
            "hosts: *h\nservers: {count: 1, on: [gpu1]}\n",
            ["1:8  alias '*h' – write the value out, or put it in quotes if it is text"],
        ),
        (
            "ssh: &s {user: a}\nworkers:\n  <<: *s\n",
            ["3:7  alias '*s' – write the value out, or put it in quotes if it is text"],
        ),
        (
            "seed: !!python/object/apply:os.system [id]\n",
            [
                "1:7  tag 'tag:yaml.org,2002:python/object/apply:o…'"
                " – remove it, dsgd takes plain values only"
            ],
        ),
        ("seed: !!int '3'\n", ["1:7  tag 'tag:yaml.org,2002:int' – remove it, dsgd takes plain "]),
        (
            "seed: 1\n---\nseed: 2\n",
            ["2:1  a second document – one cluster is one document: remove '---'"],
        ),
        ("{[a]: 1}\n", ["1:2  a key that is not text – write `key: value`"]),
        ("1: 2\n", ["1:1  unknown key '1' – known: name, seed,"]),
        ("~: 2\n", ["1:1  unknown key '~' – known: name, seed,"]),
        ("'': 2\n", ["1:1  unknown key '' – known: name, seed,"]),
        ("- a\n", ["1:1  expected fields, found a list – `dsgd init` writes a file to start from"]),
        ("hello\n", ["1:1  expected fields, found 'hello'"]),
        ("", ["1:1  the file is empty – `dsgd init` writes one to start from"]),
        ("# nothing\n\n", ["1:1  the file is empty – `dsgd init` writes one to start from"]),
        ("seed:\n", ["1:6  'seed' has no value – give it one, or remove the line"]),
        ("train:\n", ["1:7  'train' has no value – give it one, or remove the line"]),
        ("ssh:\n\tuser: a\n", ["2:1  a tab – indent with spaces"]),
        ("hosts: [gpu[1-4]]\n", ["1:12  a '[' inside a list – put the range in quotes: "]),
        ("hosts: [a\n", ["1:10  a list that is never closed, or a missing comma – close it with"]),
        ("name: 'a\n", ["1:9  a quote that is never closed – close it"]),
        ("name: a: b\n", ["1:8  a second ':' on one line – put the text in quotes, or start a"]),
        ("seed: 1\n  lease: 3s\n", ["2:8  a second ':' on one line – put the text in quotes"]),
        ("workers:\n  on: *\n", ["2:7  '*' and '&' have a meaning in YAML – put the text in quo"]),
        ("name: @a\n", ["1:7  '@' cannot start a value – put the text in quotes"]),
        ("[" * 40, ["1:33  nested deeper than 32 – dsgd needs no such depth"]),
    ],
)
@pytest.mark.parametrize("loader", ["fast", "pure"])
def test_refused_with_place(
    text: str, said: list[str], loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loader == "pure":
        monkeypatch.setattr(nodes, "LOADER", yaml.SafeLoader)
    found = mistakes(text)
    assert len(found) == len(said), found
    for line, start in zip(found, said, strict=True):
        place, _, words = start.partition("  ")
        if loader == "fast" or "closed" not in words:  # the two see the end at other places
            assert line.startswith(f"cluster.yaml:{place}  {words}"), line
        else:
            assert f"  {words}" in line


# ── what an algorithm asks of the rest ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (
            "{synchronous: {backup_workers: 3}}",
            "2:51  3 backup workers of 3 workers: no gradient is left to wait for"
            " – use at most 2, or more than 3 workers",
        ),
        (
            "{name: synchronous, backup_workers: 4}",
            "2:56  4 backup workers of 3 workers: no gradient is left to wait for",
        ),
        (
            "{synchronous: {backups: 1}}",
            "2:35  unknown key 'backups' – did you mean 'backup_workers'?",
        ),
        ("{downpour: {bound: 1}}", "2:32  unknown key 'bound' – known: push_every, fetch_every, "),
        ("hogwild", "2:20  unknown algorithm 'hogwild' – known: downpour, synchronous, "),
        (
            "{downpour: {max_staleness: -1}}",
            "2:47  -1 is out of range – it must be at least 0",
        ),
        ("sandblaster, batch_size: 32", "2:45  sandblaster computes the gradient of all examples"),
        (
            "downpour, optimizer: {sgd: {decay: {cosine: {floor: -0.1}}}}",
            "2:72  -0.1 is out of range – it must be at least 0",
        ),
        (
            "downpour, optimizer: {sgd: {decay: {step: {factor: -0.1}}}}",
            "2:71  -0.1 is out of range – it must be more than 0",
        ),
        (
            "downpour, optimizer: {sgd: {warm_up: 10s}}",
            "2:57  a learning rate knows no clock – write 5 epochs or 500 steps",
        ),
        (
            "{downpour: {warm_start: {}}}, data: {npz: 'host:/a', per_host: true}",
            "2:44  one worker begins alone, but it has the examples of its own host only",
        ),
    ],
)
def test_what_an_algorithm_cannot_do(algorithm: str, said: str) -> None:
    [line] = mistakes(f"workers: 3\ntrain: {{algorithm: {algorithm}}}\n")
    assert line.startswith(f"cluster.yaml:{said}"), line


def test_a_host_whose_examples_nobody_has_is_a_note() -> None:
    data = "train: {data: {npz: 'host:/a', per_host: true}}"
    (note,) = loaded(f"hosts: ['a[1-3]']\nworkers: 2\n{data}\n").notes
    assert note == (
        "cluster.yaml:2:10  2 workers on 3 hosts that may have one: with `per_host`, the examples"
        " of hosts without a worker are not used – use at least 3 workers, or name those hosts in"
        " `workers.on`"
    )
    for hosts, workers in (("['a[1-3]']", "3"), ("['a[1-3]']", "{count: 2, on: ['a[1-2]']}")):
        assert loaded(f"hosts: {hosts}\nworkers: {workers}\n{data}\n").notes == ()


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("{synchronous: {backup_workers: 2}}", None),
        ("{downpour: {max_staleness: 3}}", None),
        ("downpour, optimizer: adam", None),
        (
            "{downpour: {max_staleness: 1}}",
            "cluster.yaml:2:47  with 3 workers a push comes about 2 late: a bound of 1 will drop"
            " many – use at least 3, or stale_synchronous, which waits instead",
        ),
        (
            "sandblaster, optimizer: adam",
            "cluster.yaml:2:33  sandblaster uses no optimizer: its method finds direction and step"
            " – remove it",
        ),
    ],
)
def test_what_hardly_helps_is_a_note(algorithm: str, said: str | None) -> None:
    notes = loaded(f"workers: 3\ntrain: {{algorithm: {algorithm}}}\n").notes
    assert notes == (() if said is None else (said,))


def test_of_one_worker_no_push_is_late() -> None:
    text = "workers: 1\ntrain: {algorithm: {downpour: {max_staleness: 0}}}\n"
    assert loaded(text).notes == ()


def test_nothing_is_said_of_a_number_of_workers_that_is_wrong() -> None:
    [line] = mistakes("workers: none\ntrain: {algorithm: {synchronous: {backup_workers: 3}}}\n")
    assert line.startswith("cluster.yaml:1:10  ")


def test_one_cause_is_one_mistake() -> None:
    assert len(mistakes("hosts: [gpu[1-]\n")) == 1
    # the hosts are wrong: that `on` matches none of them is not a second mistake
    assert mistakes("hosts:\n- gpu[1-\nworkers: {count: 9, on: [gpu*]}\n") == [
        "cluster.yaml:2:3  'gpu[1-' has no ']' – write a range as gpu[1-4]"
    ]
    # a range with a wrong port is one mistake, not four
    assert mistakes("hosts: [{address: 'gpu[1-4]', port: 0}]") == [
        "cluster.yaml:1:37  0 is out of range – it must be at least 1"
    ]


def test_mistakes_in_different_sections_do_not_hide_each_other() -> None:
    assert mistakes("hosts: [a, b, a]\nseed: -1\nservers: {count: 1, on: c}\n") == [
        "cluster.yaml:1:15  host 'a' is listed twice – remove one, or give it another name",
        "cluster.yaml:2:7  -1 is out of range – it must be at least 0",
        "cluster.yaml:3:25  no host matches 'c' – known: a, b, a",
    ]


def test_carets_stay_below_long_and_odd_lines() -> None:
    error = refused("seed: 0\nhosts: ['" + "a" * 300 + "', '\u202e-rf']\n")
    shown = [line for line in error.details if " | " in line]
    assert all(len(line) < 120 and line.isprintable() for line in error.details)
    for text, caret in zip(shown[::2], shown[1::2], strict=True):
        assert len(caret.rstrip()) <= len(text) + 1


def test_a_thousand_mistakes_are_cut() -> None:
    error = refused("".join(f"k{i}: 1\n" for i in range(1000)))
    assert len(heads(error)) == 100
    assert error.details[-1].startswith("… and ")


# ── files ──────────────────────────────────────────────────────────────────────────────────────


def test_files_that_are_none(here: Path) -> None:
    for path, said in (
        ("absent.yaml", "absent.yaml: no such file"),
        (".", ".: is a directory"),
        ("a\0b", "a b: embedded null byte"),
    ):
        with pytest.raises(SpecError) as caught:
            load(path)
        assert caught.value.message == said
        assert caught.value.exit_code == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(here: Path) -> None:
    (here / "x.yaml").write_text("seed: 1")
    (here / "x.yaml").chmod(0)
    with pytest.raises(SpecError, match="permission denied"):
        load("x.yaml")


def test_what_is_not_text() -> None:
    assert mistakes(b"seed: 1\nname: \xff\n") == [
        "cluster.yaml:2:7  not UTF-8 text (byte 0xff) – save the file as plain UTF-8 text"
    ]
    assert mistakes(b"\x7fELF\x00\x01") == [
        "cluster.yaml:1:1  a control character (0x7f) – save the file as plain UTF-8 text"
    ]
    assert mistakes("seed: 1".encode("utf-16"))[0].startswith("cluster.yaml:1:1  not UTF-8 text")
    assert refused(b"#" * 1_000_001).message == "cluster.yaml: larger than 1 MB: not a description"
    assert load_bytes("\ufeffseed: 3".encode()).spec.seed == 3


def load_bytes(raw: bytes) -> Loaded:
    Path("cluster.yaml").write_bytes(raw)
    return load("cluster.yaml")


def test_paths_start_at_the_folder_of_the_file(here: Path) -> None:
    folder = here / "lab"
    folder.mkdir()
    (folder / "m.py").touch()
    (here / "other.py").touch()
    (folder / "c.yaml").write_text(
        "hosts: [{address: a, identity_file: k}]\ntrain: {model: ./m.py, data: host:/srv/d.npz}\n"
        "ssh: {identity_file: ~/.ssh/id}"
    )
    made = load("lab/c.yaml")
    assert made.base_dir == folder
    assert made.spec.train.model.path == str(folder / "m.py")
    assert (made.spec.train.data.path, made.spec.train.data.on_host) == ("/srv/d.npz", True)
    assert made.spec.hosts[0].identity_file == str(folder / "k")
    assert made.spec.ssh.identity_file == str(Path.home() / ".ssh/id")
    # what is typed on the command line starts where one is
    assert load("lab/c.yaml", ["train.model=other.py"]).spec.train.model.path == str(
        here / "other.py"
    )


def test_files_of_the_user_must_be_there(here: Path) -> None:
    (here / "folder.py").mkdir()
    assert mistakes("train:\n  model: absent.py\n  data: {csv: absent.csv, label: 3}\n") == [
        f"cluster.yaml:2:10  '{here}/absent.py': no such file"
        " – a path in the file starts at its folder",
        f"cluster.yaml:3:15  '{here}/absent.csv': no such file"
        " – a path in the file starts at its folder",
    ]
    assert "is a folder, not a file" in mistakes("train: {model: folder.py}\n")[0]
    (here / "file").touch()
    os.mkfifo(here / "pipe")
    for data, what in (
        ("{csv: pipe}", "is not a regular file"),
        ("{csv: folder.py}", "is a folder, not a file"),
        ("{csv: file/x}", "no such file"),
        ("{idx: absent}", "no such folder"),
        ("{idx: file}", "is a file, not a folder"),
    ):
        assert what in mistakes(f"train: {{data: {data}}}\n")[0]
    made = load_bytes(b"train: {data: {idx: folder.py}}")
    assert made.spec.train.data.path == str(here / "folder.py")


# ── --set ──────────────────────────────────────────────────────────────────────────────────────

BASE = "hosts: [a, {address: b, slots: 3}]\nservers: 2\nworkers: 4\ntrain: {model: mlp}\n"


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["train.batch_size=64"], "train.batch_size", 64),
        (["train.batch_size=64", "train.batch_size=65"], "train.batch_size", 65),
        (["servers=3"], "servers.count", 3),
        (["servers.count=3"], "servers.count", 3),
        (["servers.on=[a]"], "servers.count", 2),
        (["workers.threads=2"], "workers.count", 4),
        (["workers.env.A=022"], "workers.env", {"A": "022"}),
        (["workers.env={A: x=y, B: 'c d'}"], "workers.env", {"A": "x=y", "B": "c d"}),
        (["train.model.mlp.hidden=[3, 4]"], "train.model.options", {"hidden": [3, 4], "l2": 0.0}),
        (["train.model=softmax"], "train.model.name", "softmax"),
        (["train.model.softmax.l2=1e-3"], "train.model.options", {"l2": 0.001}),
        (["train.optimizer.sgd.learning_rate=.5"], "train.optimizer.name", "sgd"),
        (
            ["train.optimizer.adam.beta1=.5", "train.optimizer.adam.beta2=.6"],
            "train.optimizer.options",
            {
                "decay": {"name": "constant", "options": {}},
                "warm_up": None,
                "l2": 0.0,
                "clip_norm": None,
                "learning_rate": 0.001,
                "beta1": 0.5,
                "beta2": 0.6,
                "epsilon": 1e-8,
            },
        ),
        (["channel=grpc"], "channel.name", "grpc"),
        (
            ["channel.tcp.encrypt=false"],
            "channel.options",
            {"encrypt": False, "force": False},
        ),
        (["train.until.accuracy=0.9"], "train.until.accuracy", 0.9),
        (["train.evaluate.every=2 epochs"], "train.evaluate.every.count", 2.0),
        (["lease=3s"], "lease", 3.0),
        (["hosts=gpu[1-3]", "workers.on=gpu*"], "hosts.2.name", "gpu3"),
        (["hosts=[x, y]"], "hosts.1.name", "y"),
        (["hosts.0.user=ml"], "hosts.0.user", "ml"),
        (["hosts.1.slots=9"], "hosts.1.slots.count", 9),
        (["hosts.1.slots={gpu: 2}"], "hosts.1.slots.gpu", 2),
        (["hosts.0=c"], "hosts.0.address", "c"),
        (["ssh.user=ml"], "hosts.1.user", "ml"),
    ],
)
def test_set_overrides_anything(overrides: list[str], path: str, value: object) -> None:
    here: Any = loaded(BASE, *overrides).spec.model_dump(mode="json")
    for part in path.split("."):
        here = here[int(part) if part.isdigit() else part]
    assert here == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=x", "1:18  expected a whole number, found 'x'"),
        ("trian.batch_size=1", "1:1  unknown key 'trian' – did you mean 'train'?"),
        ("train.batch_sise=1", "1:7  unknown key 'batch_sise' – did you mean 'batch_size'?"),
        ("servers", "1:1  not an override – write --set key=value, such as servers=2"),
        ("=3", "1:1  not an override – write --set key=value, such as servers=2"),
        ("a..b=3", "1:1  not an override – write --set key=value, such as servers=2"),
        ("hosts.7.user=ml", "1:7  'hosts' has no element '7' – it has 2, counted from 0"),
        ("hosts.-1.user=ml", "1:7  'hosts' has no element '-1' – it has 2, counted from 0"),
        ("seed=", "1:6  'seed' has no value – give it one, or remove the line"),
        ("lease=[", "1:8  a value is missing here – write it, or put text in quotes"),
        ("lease=*x", "1:7  alias '*x' – write the value out, or put it in quotes if it is text"),
        ("train.model=absent.py", "1:13  "),
    ],
)
def test_mistakes_in_set_are_placed_there(override: str, said: str) -> None:
    (line,) = mistakes(BASE, override)
    assert line.startswith(f"--set {override}:{said}")


def test_overrides_and_the_file_are_judged_together() -> None:
    error = refused("seed: -1\n", "lease=x", "servers=0")
    assert [line.partition(":")[0] for line in heads(error)] == [
        "cluster.yaml",
        "--set lease=x",
        "--set servers=0",
    ]
    assert error.message == "3 errors in cluster.yaml"


def test_an_override_repairs_the_file() -> None:
    assert loaded("seed: -1\nservers: two\n", "seed=1", "servers=2").spec.seed == 1


def test_local_needs_no_file() -> None:
    spec = local_spec("1x2", "mlp", "digits", ["train.until.max_epochs=3"]).spec
    assert (spec.servers.count, spec.workers.count, spec.train.until.max_epochs) == (1, 2, 3)
    assert [host.transport for host in spec.hosts] == ["local"]
    for shape in ("2", "1x", "axb", "1x2x3", "-1x2", ""):
        with pytest.raises(SpecError, match="expected servers x workers"):
            local_spec(shape)
    with pytest.raises(SpecError) as caught:
        local_spec("0x2", "mpl")
    assert len(heads(caught.value)) == 2


# ── bombs and noise ────────────────────────────────────────────────────────────────────────────


def bomb() -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    names = "abcdefghi"
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "? " * 50_000,
        "[" + "a," * 400_000 + "]",
        "hosts: [" + "'g[1-9999]'," * 1000 + "]",
        "hosts: ['" + "g[1-9]" * 1000 + "']",
        "hosts: [" + "a," * 9_000 + "]",
        "workers: {on: [" + "g*," * 9_000 + "]}",
        "workers: {env: {" + ",".join(f"{i}: x" for i in range(20_000)) + "}}",
        "seed: " + "9" * 500_000,
        "name: " + "a " * 400_000,
        "lease: " + "1s" * 400_000,
        "x" * 900_000,
        "".join(f"k{i}: 1\n" for i in range(20_000)),
        "a: 1\n" * 24_000,
        '"' + "\\" * 500_000,
        "train: {model: {mlp: {hidden: [" + "0," * 45_000 + "]}}}",
    ],
    ids=lambda text: text[:12],
)
def test_bombs_cost_less_than_a_second(text: str) -> None:
    began = time.process_time()
    error = refused(text)
    assert time.process_time() - began < 1.0
    assert len(error.details) <= 3 * 100 + 1


def only_spec_error(raw: bytes, *overrides: str) -> None:
    Path("fuzz.yaml").write_bytes(raw)
    began = time.process_time()
    try:
        load("fuzz.yaml", overrides)
    except SpecError as error:
        assert error.message.isprintable()
        for line in error.details:
            assert line.isprintable(), line
        assert error.message.endswith("in fuzz.yaml") == bool(error.details)
    assert time.process_time() - began < 1.0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60))
@example("? [a]")
@example("&a")
@example("%YAML 1.1\n---\nseed: 1")
@example("a: |\n  b\n c")
def test_any_text(text: str | bytes) -> None:
    only_spec_error(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


WORDS = st.sampled_from(
    [
        "name",
        "seed",
        "hosts",
        "ssh",
        "servers",
        "workers",
        "train",
        "model",
        "data",
        "optimizer",
        "until",
        "evaluate",
        "every",
        "count",
        "on",
        "env",
        "lease",
        "user",
        "port",
        "address",
        "digits",
        "mlp",
        "adagrad",
        "gpu[1-3]",
        "local",
        "kind",
        "builtin",
        "file",
        "options",
        "1e-3",
        "022",
        "yes",
        "22:30",
        "-1",
        "0",
        "~",
        ".inf",
        ".nan",
        "1_0",
        "*a",
        "&a",
        "!!int",
        "{}",
        "[]",
        "''",
        "$(id)",
        "../x",
        "-rf",
    ]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    WORDS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_any_structure(value: Any) -> None:
    only_spec_error(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace"))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_any_mutation_of_a_description(seed: int) -> None:
    chance = random.Random(seed)
    text = list(TWELVE + BASE if chance.random() < 0.2 else BASE)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(text))
        match chance.randrange(3):
            case 0:
                text[at] = chance.choice("[]{}:,-&*!|>'\"%@`#?\t\n \0\x85\u2028é0")
            case 1:
                del text[at : at + chance.randint(1, 8)]
                text += " "
            case _:
                text[at:at] = text[chance.randrange(len(text)) :][:9]
    only_spec_error("".join(text).encode())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(WORDS | st.text(max_size=5), min_size=1, max_size=4),
    WORDS | st.text(max_size=12),
)
def test_any_override(parts: list[str], value: str) -> None:
    only_spec_error(BASE.encode(), f"{'.'.join(parts)}={value}", "servers.count=2")


HOSTILE = ["$(touch canary)", "`touch canary`", "'; touch canary; '", "-rf", "../../x", "a\nb"]
TEXT_FIELDS = [
    "name",
    "hosts",
    "hosts.0.name",
    "hosts.0.address",
    "hosts.0.user",
    "hosts.0.identity_file",
    "hosts.0.host_key",
    "hosts.0.python",
    "hosts.0.advertise",
    "ssh.user",
    "ssh.python",
    "ssh.host_keys",
    "env",
    "workers.on",
    "workers.env.A",
    "train.model",
    "train.data",
    "train.data.npz",
    "train.optimizer",
    "train.dtype",
]


@pytest.mark.parametrize("field", TEXT_FIELDS)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_refused_or_carried(field: str, text: str) -> None:
    quoted = yaml.safe_dump(text, default_style='"').strip()
    try:
        made = loaded("hosts: [{address: gpu1}]\n", f"{field}={quoted}")
    except SpecError as error:
        assert all(line.isprintable() for line in error.details)
    else:
        assert field in ("hosts.0.identity_file", "workers.env.A") or (
            text == "../../x" and field.endswith("python")
        )
        assert made.spec.workers.env.get("A", text) == text
    assert not Path("canary").exists()


def test_two_hundred_hosts_are_checked_without_anything_heavy(here: Path) -> None:
    """How fast it is, `make bench` measures; here only that nothing slow is imported."""
    rows = (f"  - {{address: gpu{i}.lab, name: gpu{i}, user: ml, slots: 8}}\n" for i in range(200))
    Path("big.yaml").write_text("hosts:\n" + "".join(rows) + "servers: 20\nworkers: 800\n")
    code = (
        "import sys\n"
        "from dsgd_cli.launcher.load import load\n"
        "from dsgd_cli.launcher.placement import place\n"
        "assert len(place(load('big.yaml').spec)) == 821\n"
        "heavy = {'numpy', 'grpc', 'paramiko', 'importlib.metadata', 'cryptography'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == "[]"
