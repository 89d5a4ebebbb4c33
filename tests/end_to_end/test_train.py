"""`dsgd train` on this machine, from the command to the prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsgd_cli.learning.datasets import SPLIT_SEED, digits
from tests.end_to_end.conftest import User

DIGITS = """
name: NAME
servers: 2
workers: 2
train:
  model: mlp
  data: digits
  until: {accuracy: 0.97, max_epochs: 100}
"""


def test_the_demo_converges_and_the_model_that_came_home_has_the_accuracy_it_claims(
    user: User,
) -> None:
    user.write(DIGITS)
    run = user.dsgd("train", "cluster.yaml", "--json")
    assert run.code == 0, run.err
    assert run.lines[0] == {"type": "version", "schema": "dsgd/1"}
    summary = run.summary
    assert summary == run.lines[-1]
    assert summary["outcome"] == "converged"
    assert summary["value"] >= 0.97
    assert (summary["workers"], summary["servers"], summary["stopped"]) == (2, 2, 5)
    assert summary["left"] == 0
    assert set(summary["phases"]) == {"check", "ship", "up", "train", "collect", "down"}
    user.assert_nothing_left()

    home = user.folder / summary["run_dir"]
    assert json.loads((home / "summary.json").read_text()) == summary
    params = load_file(home / "model.safetensors")
    with np.load("dsgd_cli/learning/data/digits.npz") as digits:
        images, labels = digits["x"], digits["y"]
    assert accuracy(params, images, labels) == pytest.approx(summary["value"], abs=1e-9)


def accuracy(params: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
    """A two-layer ReLU network by hand, on the held-out fifth, without dsgd's code."""
    from dsgd_cli.learning.datasets import digits  # only to know which images are held out

    held_out = digits()
    assert len(images) == len(labels) == 1797
    x, y = held_out.x_test.reshape(len(held_out.x_test), -1), held_out.y_test
    first, second = sorted(name for name in params if params[name].ndim == 2)
    biases = sorted(name for name in params if params[name].ndim == 1)
    hidden = np.maximum(x @ params[first] + params[biases[0]], 0)
    scores = hidden @ params[second] + params[biases[1]]
    return float((scores.argmax(axis=1) == y).mean())


def test_every_epoch_uses_every_example_exactly_once(user: User) -> None:
    user.write(DIGITS)
    summary = user.dsgd("train", "--json", "cluster.yaml").summary
    epochs = [r for r in user.metrics(summary["run_dir"]) if r["kind"] == "epoch"]
    assert len(epochs) >= 3
    assert all(r["examples"] == r["distinct"] == r["n"] == 1437 for r in epochs)
    assert [r["epoch"] for r in epochs] == list(range(1, len(epochs) + 1))


def test_metrics_tell_where_the_time_went(user: User) -> None:
    user.write(DIGITS)
    summary = user.dsgd("train", "--json", "cluster.yaml").summary
    reports = [r for r in user.metrics(summary["run_dir"]) if r["kind"] == "report"]
    assert {r["worker"] for r in reports} == {0, 1}
    for report in reports:
        keys = (
            "step",
            "time",
            "epoch",
            "loss",
            "staleness",
            "bytes",
            "shard_bytes",
            "pull_s",
            "compute_s",
            "push_s",
        )
        assert all(key in report for key in keys)
    assert sum(r["steps"] for r in reports) == summary["steps"]
    evaluations = [r for r in user.metrics(summary["run_dir"]) if r["kind"] == "evaluate"]
    assert evaluations[-1]["frozen"]
    assert evaluations[-1]["accuracy"] == summary["value"]


def test_training_examples_are_evaluated_too_if_that_is_wanted(user: User) -> None:
    user.write(DIGITS)
    wanted = ("--set", "train.evaluate.training=true")
    target = ("--set", "train.until.accuracy=0.9")
    run = user.dsgd("train", "--json", "--set", "train.model=softmax", *target, *wanted)
    assert run.code == 0, run.err
    home = run.summary["run_dir"]
    evaluations = [r for r in user.metrics(home) if r["kind"] == "evaluate"]
    names = ["accuracy", "loss", "training_accuracy", "training_loss"]
    assert evaluations and all([n for n in r if n in names] == names for r in evaluations)
    params, data = load_file(user.folder / home / "model.safetensors"), digits()
    some = np.random.RandomState(SPLIT_SEED).permutation(1437)[:360]  # as many as are held out
    scores = data.x[some] @ params["W1"] + params["b1"]
    right = np.mean(scores.argmax(axis=1) == data.y[some])
    assert evaluations[-1]["training_accuracy"] == pytest.approx(right, abs=1e-9)
    page = (user.folder / home / "report.html").read_text()
    assert "Accuracy on the held-out examples" not in page


def test_without_a_file(user: User) -> None:
    run = user.dsgd(
        *("train", "--local", "1x2", "--model", "softmax", "--data", "digits"),
        *("--set", "train.until.accuracy=0.9", "--set", f"name={user.name}", "--json"),
    )
    assert run.code == 0, run.err
    assert (run.summary["servers"], run.summary["workers"]) == (1, 2)
    user.assert_nothing_left()


@pytest.mark.parametrize("optimizer", ["{sgd: {learning_rate: 0.2}}", "momentum", "adam"])
@pytest.mark.parametrize("dtype", ["float64"])
def test_other_optimizers_and_dtypes(user: User, optimizer: str, dtype: str) -> None:
    path = user.write(DIGITS)
    run = user.dsgd(
        *("train", str(path), "--json", "--set", f"train.optimizer={optimizer}"),
        *("--set", f"train.dtype={dtype}", "--set", "train.algorithm={downpour: {push_every: 2}}"),
    )
    assert run.code == 0, run.err
    params = load_file(user.folder / run.summary["run_dir"] / "model.safetensors")
    assert {array.dtype.name for array in params.values()} == {dtype}


def test_a_limit_before_the_target_is_11_and_0_when_allowed(user: User) -> None:
    user.write(DIGITS.replace("max_epochs: 100", "max_epochs: 1"))
    run = user.dsgd("train", "--json", "cluster.yaml")
    assert (run.code, run.summary["outcome"]) == (11, "stopped")
    assert run.lines[-1] == run.summary  # the last line, whatever the exit code
    assert (user.folder / run.summary["run_dir"] / "model.safetensors").exists()
    assert user.dsgd("train", "--json", "--allow-unconverged", "cluster.yaml").code == 0
    user.assert_nothing_left()


@pytest.mark.parametrize(
    ("algorithm", "until"),
    [
        ("downpour", "{max_epochs: 1}"),
        ("downpour", "{plateau: {patience: 1, min_delta: 1.0}}"),
        ("{sandblaster: {tolerance: 0.1}}", "{max_epochs: 50}"),  # ends by itself
    ],
)
def test_without_a_target_a_run_is_finished_and_that_is_0(
    user: User, algorithm: str, until: str
) -> None:
    settings = ("--set", f"train.algorithm={algorithm}", "--set", f"train.until={until}")
    run = user.dsgd("train", "--local", "1x1", "--set", f"name={user.name}", *settings, "--json")
    assert (run.code, run.summary["outcome"]) == (0, "finished"), run.summary["reason"]
    text = (user.folder / run.summary["run_dir"] / "summary.json").read_text()
    assert json.loads(text)["outcome"] == "finished"


def test_text_output_ends_with_the_receipt(user: User) -> None:
    user.write(DIGITS)
    run = user.dsgd("train")
    assert run.code == 0
    lines = run.out.splitlines()
    assert lines[0].startswith("converged  accuracy 0.9")
    assert lines[-1] == "stopped 5/5, 0 left"
    assert "step " in run.err


def test_the_same_seed_with_one_worker_gives_the_same_model(user: User) -> None:
    user.write(
        DIGITS.replace("workers: 2", "workers: 1").replace("max_epochs: 100", "max_epochs: 2")
    )
    blocking = "train.algorithm={downpour: {overlap: false}}"
    models = []
    for _ in range(2):
        run = user.dsgd("train", "--json", "--allow-unconverged", "--set", blocking)
        models.append(load_file(user.folder / run.summary["run_dir"] / "model.safetensors"))
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])


def test_a_sweep_trains_every_combination_and_tells_them_apart(user: User) -> None:
    user.write("name: NAME\n")
    budget = ("--set", "train.until={max_epochs: 3}")
    run = user.dsgd("sweep", "cluster.yaml", "workers=1,2,4", *budget, "--json")
    assert run.code == 0, run.err
    summaries = [line for line in run.lines if line["type"] == "summary"]
    assert [line["sweep"] for line in summaries] == [{"workers": n} for n in ("1", "2", "4")]
    assert [line["workers"] for line in summaries] == [1, 2, 4]
    assert [line["epochs"] for line in summaries] == [3, 3, 3]
    assert {line["outcome"] for line in summaries} == {"finished"}
    folders = [user.folder / line["run_dir"] for line in summaries]
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    assert len({folder.parent for folder in folders}) == 1
    kept = json.loads((folders[0].parent / "sweep.json").read_text())
    assert [line["run_dir"] for line in kept] == [line["run_dir"] for line in summaries]
    page = (folders[0].parent / "report.html").read_text()
    assert all(folder.name in page for folder in folders)
    again = user.dsgd("report", str(folders[0].parent), "-o", "again.html")
    assert again.code == 0, again.err
    for text in (page, (user.folder / "again.html").read_text()):
        assert "Seconds to the target by workers" in text and "Speed-up by workers" in text
    user.assert_nothing_left()


def test_a_sweep_ends_at_its_timeout_with_what_there_is(user: User) -> None:
    user.write("name: NAME\n")
    endless = ("--set", "train.until={max_time: 1h}")
    run = user.dsgd("sweep", "cluster.yaml", "workers=1,2", *endless, "--timeout", "4", "--json")
    assert run.code == 124, run.err
    assert [line["outcome"] for line in run.lines if line["type"] == "summary"] == ["timeout"]
    user.assert_nothing_left()


def test_each_worker_is_told_its_gpu_and_a_server_none(user: User) -> None:
    """There need not be one: it is an environment variable, which models of torch's look at."""
    user.write(
        "import os\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "def init(rng, example):\n"
        "    return {'w': np.zeros(1)}\n"
        "def predict(params, x):\n"
        "    return np.zeros((len(x), 1))\n"
        "def gradients(params, x, y):\n"
        "    print('GPU', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)\n"
        "    return 1.0, {'w': np.zeros(1)}\n",
        "model.py",
    )
    user.write(
        "name: NAME\n"
        "hosts: [{address: local, slots: {gpu: 2}}]\n"
        "train: {model: model.py, until: {max_epochs: 1}}\n"
    )
    run = user.dsgd("train", "--json", "--allow-unconverged")
    assert run.code == 0, run.err
    logs = user.folder / run.summary["run_dir"] / "logs"
    for worker in (0, 1):
        (log,) = logs.rglob(f"*worker*{worker}*")
        said = {line for line in log.read_text().splitlines() if "GPU" in line}
        assert {line.rpartition(" ")[2] for line in said} == {str(worker)}
