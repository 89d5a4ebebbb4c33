"""`dsgd predict` says of a run's model what the run has said."""

from __future__ import annotations

import json
import os
import signal
import textwrap

import numpy as np
import pytest

from tests.end_to_end.conftest import User, wait_until

MODEL = """
import numpy as np

print("imported")

def init(rng, example):
    x, y = example
    return {"W": 0.01 * rng.standard_normal((x.shape[1], 3)), "b": np.zeros(3)}

def predict(params, x):
    return x @ params["W"] + params["b"]

def gradients(params, x, y):
    z = predict(params, x)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    p[np.arange(len(y)), y] -= 1
    return loss, {"W": x.T @ p / len(y), "b": p.mean(axis=0)}
"""
CLUSTER = """
name: NAME
workers: 2
train:
  model: model.py
  data: {csv: data.csv, label: kind, delimiter: ";"}
  until: {max_epochs: 3}
"""


def table(rows: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, rows)
    x = rng.standard_normal((rows, 4)) * 0.1
    x[np.arange(rows), kinds] += 1
    lines = [f"{kind};{';'.join(map(str, row))}" for kind, row in zip(kinds, x, strict=True)]
    return "\n".join(["kind;a;b;c;d", *lines])


def test_the_metrics_are_those_of_the_run(user: User) -> None:
    user.write(MODEL, "model.py")
    user.write(table(600, 1), "data.csv")
    user.write(CLUSTER)
    summary = user.dsgd("train", "--json").summary
    home = summary["run_dir"]

    run = user.dsgd("predict", home, "--json", "--out", "outputs.npz")
    assert run.code == 0, run.err
    assert "imported" in run.err  # what the model prints is no result
    said = run.lines[-1]
    assert (said["examples"], said["part"], said["data"]) == (120, "held-out", "data.csv")
    assert said["metrics"]["accuracy"] == summary["value"]
    assert said["metrics"]["loss"] == pytest.approx(summary["loss"], rel=1e-5)
    with np.load(user.folder / "outputs.npz") as arrays:
        assert arrays["outputs"].shape == (120, 3)
        assert arrays["classes"].shape == (120,)

    best = user.dsgd("predict", home, "--best", "--json").lines[-1]["metrics"]
    assert best["accuracy"] == summary["best"]["value"]

    # other data are read as the run's own: with its label and its delimiter
    user.write(table(50, 2), "new.csv")
    run = user.dsgd("predict", home, "--data", "new.csv", "-o", "new-outputs.csv")
    assert run.code == 0, run.err
    assert "on 50 examples of new.csv" in run.out
    assert len((user.folder / "new-outputs.csv").read_text().splitlines()) == 51

    (user.folder / "data.csv").unlink()
    run = user.dsgd("predict", home)
    assert run.code == 3
    assert "data.csv': no such file" in run.err
    assert user.dsgd("predict", home, "--data", "new.csv").code == 0

    user.write(MODEL.replace("(x.shape[1], 3)", "(x.shape[1], 7)"), "model.py")
    user.write(table(600, 1), "data.csv")
    run = user.dsgd("predict", home)
    assert run.code == 6
    assert "W has shape (4, 3) in the file, (4, 7) in the model" in run.err

    user.write(textwrap.dedent("raise RuntimeError('no luck')"), "model.py")
    run = user.dsgd("predict", home, "--json")
    assert run.code == 6
    assert "no luck" in json.dumps(run.lines[-1])

    (user.folder / "model.py").unlink()
    run = user.dsgd("predict", home)
    assert run.code == 3
    assert "model.py': no such file" in run.err
    user.assert_nothing_left()


def test_a_run_knows_what_its_classes_are_called(user: User) -> None:
    """New data without some of them are numbered as the run's were."""
    names = dict(zip("012", ("cat", "dog", "eel"), strict=True))

    def named(text: str) -> list[str]:
        head, *rows = text.splitlines()
        return [head, *(names[row[0]] + row[1:] for row in rows)]

    user.write("\n".join(named(table(600, 1))), "data.csv")
    text = CLUSTER.replace("model: model.py", "model: softmax")
    user.write(text.replace("max_epochs: 3", "max_epochs: 60"))
    run = user.dsgd("train", "--json")
    assert run.summary["classes"] == ["cat", "dog", "eel"]
    assert run.summary["columns"] == ["a", "b", "c", "d"]
    assert run.summary["label"] == "kind"
    head, *rows = named(table(60, 2))
    user.write("\n".join([head, *(row for row in rows if not row.startswith("cat"))]), "new.csv")
    run = user.dsgd("predict", run.summary["run_dir"], "--data", "new.csv", "--json", "-o", "o.csv")
    assert run.code == 0, run.err
    assert run.lines[-1]["metrics"]["accuracy"] > 0.9
    said = [line.rpartition(",")[2] for line in (user.folder / "o.csv").read_text().splitlines()]
    assert set(said[1:]) <= {"cat", "dog", "eel"} and said.count("eel") > 5

    turned = [";".join([*reversed(row.split(";")), "x"]) for row in (head, *rows)]  # and one more
    user.write("\n".join(turned), "turned.csv")
    home, before = run.lines[-1]["run"], run.lines[-1]["metrics"]
    run = user.dsgd("predict", home, "--data", "turned.csv", "--json")
    assert run.code == 0, run.err
    user.write("\n".join([head, *rows]), "new.csv")
    again = user.dsgd("predict", home, "--data", "new.csv", "--json")
    assert run.lines[-1]["metrics"] == again.lines[-1]["metrics"] != before

    features = [row.partition(";")[2] for row in (head, *rows)]  # of what nobody has labelled
    user.write("\n".join(features), "plain.csv")
    user.write("\n".join(features[1:]), "bare.csv")
    plain = user.dsgd("predict", home, "--data", "plain.csv")
    assert plain.code == 0 and "outputs of 60 examples of plain.csv" in plain.out, plain.err
    refused = user.dsgd("predict", home, "--data", "bare.csv")
    assert refused.code == 6 and "no column 'kind'" in refused.err
    assert "--no-labels" in refused.err
    out = ("-o", "bare-outputs.csv")
    run = user.dsgd("predict", home, "--data", "bare.csv", "--no-labels", "--json", *out)
    assert (run.code, run.lines[-1]["metrics"], run.lines[-1]["examples"]) == (0, None, 60)
    assert (user.folder / "bare-outputs.csv").read_text().count("cat") > 5


def test_ctrl_c_ends_it_without_a_traceback(user: User) -> None:
    user.write(MODEL, "model.py")
    user.write(table(60, 1), "data.csv")
    user.write(CLUSTER)
    home = user.dsgd("train", "--json").summary["run_dir"]
    slow = "import pathlib, time\npathlib.Path('began').touch()\ntime.sleep(60)\n"
    user.write(slow + MODEL, "model.py")
    part = user.folder / ".o.csv.part"
    part.touch()  # as if it had begun to write
    process = user.start("predict", home, "-o", "o.csv")
    wait_until((user.folder / "began").exists, 20, "the model to be imported")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    run = user.finish(process, timeout_s=10)
    assert (run.code, run.err.strip()) == (130, "error: stopped by Ctrl-C")
    assert not part.exists()


def test_what_is_no_run_and_what_is_no_format_is_2(user: User) -> None:
    run = user.dsgd("predict", ".")
    assert run.code == 2
    assert "is not the folder of a run" in run.err
    user.write("name: x", "cluster.yaml")  # such as the one that runs are started from
    run = user.dsgd("predict", ".")
    assert run.code == 2
    assert "is not the folder of a run" in run.err
    user.write("{}", "summary.json")
    run = user.dsgd("predict", ".")
    assert run.code == 2
    assert "has no model.safetensors" in run.err
    assert user.dsgd("predict", ".", "--out", "x.txt").code == 2


def test_of_hosts_with_examples_of_their_own_it_says_whose_these_are(user: User) -> None:
    user.write(table(600, 1), "data.csv")
    own = f"{{csv: 'host:{user.folder}/data.csv', label: kind, delimiter: \";\", per_host: true}}"
    text = CLUSTER.replace("model: model.py", "model: softmax")
    user.write(text.replace('{csv: data.csv, label: kind, delimiter: ";"}', own))
    run = user.dsgd("train", "--json")
    assert run.code == 0, run.err
    home = run.summary["run_dir"]
    said = user.dsgd("predict", home).out
    assert "120 held-out examples of data.csv, of this host's alone" in said
    user.write(table(50, 2), "new.csv")
    assert user.dsgd("predict", home, "--data", "new.csv").out.endswith("examples of new.csv\n")
