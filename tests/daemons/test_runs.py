"""Runs on real processes: coordinator, servers, workers, over mTLS on this machine."""

from __future__ import annotations

import hashlib
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.daemons import material
from dsgd_cli.engine.layout import cut, unflatten
from dsgd_cli.learning.evaluate import evaluate
from tests.daemons import models
from tests.daemons.agent import Cluster, Message
from tests.freezing import freeze

NewCluster = Callable[..., Cluster]
EXAMPLES = 1437  # of the digits, to train on


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def exported(finished: Message) -> dict[str, np.ndarray[Any, Any]]:
    """The model, put together from the servers' slices as the launcher does."""
    parts = []
    for index, part in enumerate(finished["slices"]):
        data = Path(part["host_path"]).read_bytes()
        assert part["server"] == index
        assert len(data) == part["bytes"]
        assert hashlib.sha256(data).hexdigest() == part["sha256"]
        assert stat.S_IMODE(Path(part["host_path"]).stat().st_mode) == 0o600
        parts.append(data)
    layout = finished["layout"]
    tensors = [(name, tuple(shape)) for name, shape in layout["tensors"]]
    whole = np.frombuffer(b"".join(parts), layout["dtype"])
    return unflatten(cut(tensors, layout["dtype"], 1), whole)


def test_digits_are_learnt_and_the_slices_are_the_model(new_cluster: NewCluster) -> None:
    made = new_cluster()
    train = {"model": "mlp", "until": {"accuracy": 0.97, "max_epochs": 60}}
    finished = made.finished(made.run(train))
    assert finished["outcome"] == "converged"
    assert finished["metric"] == "accuracy"
    assert finished["value"] >= 0.97

    params = exported(finished)
    full = {**train, "dtype": "float32", "batch_size": 32, "optimizer": {}}
    full |= {
        what: {"kind": "builtin", "name": name, "path": "", "on_host": False, "options": {}}
        for what, name in (("model", "mlp"), ("data", "digits"))
    }
    found = material.load(full, 0, {})
    values = evaluate(found.model, params, found.data.x_test, found.data.y_test)
    assert values["accuracy"] == finished["value"]
    assert values["loss"] == pytest.approx(finished["loss"], rel=1e-6)

    epochs = made.records("epoch")
    assert len(epochs) == finished["epochs"] > 2
    assert {(e["examples"], e["distinct"], e["n"]) for e in epochs} == {(EXAMPLES,) * 3}
    progress = made.coordinator.all("progress")
    assert progress[-1]["step"] == finished["steps"]
    reports = made.records("report")
    assert {report["worker"] for report in reports} == {0, 1}
    assert all(report["compute_s"] > 0 for report in reports if report["steps"])
    assert sum(report["bytes"] for report in reports) > finished["steps"] * 38_000


def test_several_runs_one_after_the_other(new_cluster: NewCluster, tmp_path: Path) -> None:
    made = new_cluster()
    model = written(tmp_path, "model.py", models.SOFTMAX)
    trains = [
        {"model": "softmax", "until": {"max_steps": 150}},
        {"model": model, "dtype": "float64", "until": {"max_epochs": 2}, "optimizer": "adam"},
        {
            "model": "mlp",
            "algorithm": {"downpour": {"push_every": 3, "fetch_every": 5}},
            "optimizer": {"momentum": {"learning_rate": 0.01, "nesterov": True}},
            "until": {"max_epochs": 3},
        },
        {"model": "softmax", "until": {"max_steps": 150}},
    ]
    pids = {name: child.popen.pid for name, child in made.children.items()}
    for train in trains:
        before = len(made.records("epoch"))
        finished = made.finished(made.run(train))
        assert finished["outcome"] == "finished", finished  # no target: the limit is the goal
        assert finished["metrics"]["accuracy"] > 0.5
        assert len(exported(finished)) == (4 if train["model"] == "mlp" else 2)
        for epoch in made.records("epoch")[before:]:
            assert (epoch["examples"], epoch["distinct"]) == (EXAMPLES, EXAMPLES)
    assert {name: child.popen.pid for name, child in made.children.items()} == pids
    assert all(child.popen.poll() is None for child in made.children.values())


def test_blocks_of_64_bytes_over_many_servers(new_cluster: NewCluster) -> None:
    made = new_cluster(servers=5, workers=1)
    train = {"model": "softmax", "until": {"max_steps": 60}}
    finished = made.finished(made.run(train, max_block_bytes=64))
    assert finished["outcome"] == "finished"
    assert [part["bytes"] for part in finished["slices"]] == [576, 512, 512, 512, 488]
    assert finished["metrics"]["accuracy"] > 0.3


def test_bytes_are_counted_by_shard_and_in_proportion_to_its_size(new_cluster: NewCluster) -> None:
    made = new_cluster(servers=5, workers=1)
    train = {"model": "softmax", "until": {"max_steps": 60}}
    finished = made.finished(made.run(train, max_block_bytes=64))
    sizes = [part["bytes"] for part in finished["slices"]]
    assert sizes == [576, 512, 512, 512, 488]
    reports = made.records("report")
    assert all(report["bytes"] == sum(report["shard_bytes"]) for report in reports)
    moved = [sum(shard) for shard in zip(*(r["shard_bytes"] for r in reports), strict=True)]
    (vectors,) = {amount / size for amount, size in zip(moved, sizes, strict=True)}
    assert vectors.is_integer()
    assert 2 * finished["steps"] <= vectors <= 2 * finished["steps"] + 20  # evaluations, too
    assert made.coordinator.all("progress")[-1]["shard_bytes"] == moved


@pytest.mark.parametrize(
    "algorithm",
    [
        {"stale_synchronous": {"bound": 0}},
        {"stale_synchronous": {"bound": 2, "push_every": 3}},
        {"downpour": {"max_staleness": 0}},
        {"downpour": {"damping": "relative", "push_every": 2, "fetch_every": 3, "reduce": "mean"}},
        {"downpour": {"warm_start": {"until": "50 steps", "then_add_every": "20 steps"}}},
    ],
    ids=["lock-step", "bounded", "dropped", "damped", "warm"],
)
def test_asynchronous_runs_end_where_they_should(
    algorithm: dict[str, Any], new_cluster: NewCluster
) -> None:
    """With evaluations in between, a schedule, a warm-up, l2 and clipping."""
    made = new_cluster(workers=3)
    schedule = {"decay": {"cosine": {"over": "400 steps"}}, "warm_up": "20 steps"}
    train = {
        "model": "softmax",
        "algorithm": algorithm,
        "optimizer": {"sgd": {"learning_rate": 0.1, "l2": 1e-4, "clip_norm": 5.0, **schedule}},
        "until": {"max_steps": 400},
        "evaluate": {"every": "50 steps"},
    }
    finished = made.finished(made.run(train))
    assert (finished["outcome"], finished["steps"]) == ("finished", 400)
    assert finished["metrics"]["accuracy"] > 0.8
    staleness = finished["staleness"]
    assert sum(staleness["histogram"].values()) > 100
    if algorithm.get("downpour", {}).get("max_staleness") is None:
        assert staleness["dropped"] == 0
    if algorithm.get("stale_synchronous", {}).get("bound") == 0:
        # Nobody is two clocks ahead, so at most two pushes of each other worker come in between.
        assert max(map(int, staleness["histogram"])) <= 2 * 2


def test_a_killed_worker_comes_back_and_no_example_is_lost(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    made = new_cluster()
    model = written(tmp_path, "model.py", models.SLOW)
    run = made.run({"model": model, "until": {"max_epochs": 8}})
    made.coordinator.wait_for("progress", where=lambda m: m["step"] > 20)
    made.children["worker/1"].kill()
    assert not made.coordinator.all("finished"), "the kill was to happen mid-run"
    lost = made.coordinator.wait_for("record", where=lambda m: event(m) == "lost")
    assert lost["record"]["process"] == "worker/1"
    made.restart(1)
    made.coordinator.wait_for(
        "record",
        where=lambda m: event(m) == "joined" and m["record"]["incarnation"] == 2,
    )
    back = len(made.coordinator.messages)
    finished = made.finished(run)
    assert finished["outcome"] == "finished"
    made.coordinator.wait_for(
        "record", where=lambda m: m["record"].get("worker") == 1, after=back, timeout_s=0
    )
    assert len(of_worker(made, 1, "joined")) == 2
    epochs = made.records("epoch")
    assert len(epochs) == 8
    for epoch in epochs:
        assert epoch["distinct"] == EXAMPLES
        assert epoch["examples"] >= EXAMPLES


def event(message: Message) -> str | None:
    record = message["record"]
    return record["event"] if record["kind"] == "event" else None


def of_worker(made: Cluster, worker: int, what: str) -> list[Message]:
    return [
        message
        for message in made.coordinator.all("record")
        if event(message) == what and message["record"]["process"] == f"worker/{worker}"
    ]


def test_a_model_that_is_never_finite_diverges(new_cluster: NewCluster, tmp_path: Path) -> None:
    made = new_cluster()
    model = written(tmp_path, "model.py", models.ALL_NAN)
    finished = made.finished(made.run({"model": model, "until": {"max_epochs": 50}}))
    assert finished["outcome"] == "diverged"
    assert "tensor b" in finished["reason"]
    assert np.array_equal(exported(finished)["W"], np.zeros((64, 10)))


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        (models.RAISES_ON_IMPORT, "no such luck", "raise RuntimeError"),
        (models.RAISES_LATER, "undefined_thing", "in deeper"),
        (models.WRONG_SHAPE, "W has shape (10, 64), init made (64, 10)", None),
    ],
)
def test_what_user_code_does_wrong_ends_the_run_and_not_the_cluster(
    new_cluster: NewCluster, tmp_path: Path, text: str, says: str, line: str | None
) -> None:
    made = new_cluster()
    run = made.run({"model": written(tmp_path, "mine.py", text), "until": {"max_epochs": 50}})
    finished = made.finished(run)
    assert finished["outcome"] == "failed"
    error = made.coordinator.wait_for("run_error")
    assert error["kind"] == "user"
    assert error["process"].startswith("worker/")
    assert says in error["error"]
    if line is not None:
        assert line in error["traceback"]
        assert "mine.py" in error["traceback"]
        assert "dsgd_cli" not in error["traceback"]
    again = made.finished(made.run({"model": "softmax", "until": {"max_steps": 50}}))
    assert again["outcome"] == "finished"


def test_data_without_examples_are_an_error(new_cluster: NewCluster, tmp_path: Path) -> None:
    made = new_cluster(servers=1, workers=1)
    data = written(tmp_path, "data.py", models.EMPTY_DATA)
    finished = made.finished(made.run({"model": "softmax", "data": data}))
    assert finished["outcome"] == "failed"
    assert "no examples" in made.coordinator.wait_for("run_error")["error"]


def test_a_second_order_replaces_the_first(new_cluster: NewCluster, tmp_path: Path) -> None:
    made = new_cluster(workers=1)
    model = written(tmp_path, "model.py", models.SLOW)
    made.run({"model": model, "until": {"max_epochs": 1000}})
    made.coordinator.wait_for("progress", where=lambda m: m["step"] > 10)
    second = made.finished(made.run({"model": "softmax", "until": {"max_steps": 20}}))
    assert second["steps"] == 20
    assert len(made.coordinator.all("finished")) == 1


def test_more_servers_than_blocks_are_an_error(new_cluster: NewCluster, tmp_path: Path) -> None:
    made = new_cluster(servers=3, workers=1)
    tiny = models.SOFTMAX.replace('"W": np.zeros((x.shape[1], 10)), ', "")
    model = written(tmp_path, "model.py", tiny)
    finished = made.finished(made.run({"model": model}))
    assert finished["outcome"] == "failed"
    error = made.coordinator.wait_for("run_error")
    assert error["kind"] == "spec"
    assert "3 servers but the model has only 1 block" in error["error"]


def test_a_run_can_be_asked_to_finish(new_cluster: NewCluster, tmp_path: Path) -> None:
    made = new_cluster()
    model = written(tmp_path, "model.py", models.SLOW)
    run = made.run({"model": model, "until": {"max_epochs": 1000}})
    made.coordinator.wait_for("progress", where=lambda m: m["step"] > 10)
    made.coordinator.tell({"type": "finish", "why": "Ctrl-C"})
    finished = made.finished(run, 10)
    assert finished["outcome"] == "stopped"
    assert "Ctrl-C" in finished["reason"]
    assert np.abs(exported(finished)["W"]).max() > 0


def test_a_limit_ends_a_run_whose_worker_sleeps_for_ever(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    """It is given up, told so, ends, and comes back: in time to evaluate the model."""
    made = new_cluster(workers=1)
    model = written(tmp_path, "model.py", models.HANGS)
    run = made.run({"model": model, "until": {"max_time": "2s", "accuracy": 0.999}})
    hung = made.coordinator.wait_for("record", 15, where=lambda m: event(m) == "hung")
    assert hung["record"]["process"] == "worker/0"
    failed = made.children["worker/0"].wait_for("failed", 5)
    assert "worker/0 hangs: it did not end its batch when the run was to end" in failed["error"]
    assert made.children["worker/0"].popen.wait(5) == 1
    made.restart(0)
    finished = made.finished(run, 15)
    assert finished["outcome"] == "stopped"
    assert "max_time 2 s reached: accuracy" in finished["reason"]
    assert finished["value"] is not None
    assert len(exported(finished)) == 2


@pytest.mark.slow
def test_a_worker_that_hangs_is_started_again_and_no_example_is_lost(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    """Its session is alive all the time: its step counter tells."""
    made = new_cluster()
    model = written(tmp_path, "model.py", models.HANGS)
    run = made.run({"model": model, "until": {"max_epochs": 2}})
    made.coordinator.wait_for("record", 45, where=lambda m: event(m) == "hung")
    failed = made.children["worker/0"].wait_for("failed", 5)
    assert "worker/0 hangs: it has done nothing for 30 s" in failed["error"]
    made.restart(0)
    assert made.finished(run, 30)["outcome"] == "finished"
    assert [of_worker(made, 1, "hung"), len(of_worker(made, 0, "hung"))] == [[], 1]
    assert [epoch["distinct"] for epoch in made.records("epoch")] == [EXAMPLES] * 2


@pytest.mark.slow
def test_a_limit_ends_a_run_whose_only_worker_is_frozen(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    made = new_cluster(workers=1)
    model = written(tmp_path, "model.py", models.SLOW)
    run = made.run({"model": model, "until": {"max_time": "2s"}})
    made.coordinator.wait_for("progress", where=lambda m: m["step"] > 20)
    freeze(made.children["worker/0"].popen.pid)
    finished = made.finished(run, 40)
    assert finished["outcome"] == "stopped"
    assert "max_time 2 s reached, but no worker could evaluate" in finished["reason"]
    assert finished["value"] is None
    assert np.abs(exported(finished)["W"]).max() > 0


def test_a_run_ends_when_it_is_asked_to_whatever_its_workers_compute(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    made = new_cluster()
    model = written(tmp_path, "model.py", models.VERY_SLOW)
    run = made.run({"model": model, "until": {"max_epochs": 1000}})
    made.coordinator.wait_for("progress")
    made.coordinator.tell({"type": "finish", "why": "Ctrl-C"})
    asked_s = time.monotonic()
    finished = made.finished(run, 10)
    assert finished["at_s"] - asked_s < 7
    assert finished["outcome"] == "stopped"
    assert finished["reason"] == "Ctrl-C"
    assert (finished["value"], finished["steps"]) == (None, 0)
    assert len(exported(finished)) == 2


def test_a_dead_server_ends_the_run_with_both_ends_named(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    made = new_cluster()
    model = written(tmp_path, "model.py", models.SLOW)
    run = made.run({"model": model, "until": {"max_epochs": 1000}})
    made.coordinator.wait_for("progress", where=lambda m: m["step"] > 10)
    address = made.address("server/1")
    made.children["server/1"].kill()
    lost = made.coordinator.wait_for("unreachable", 15)
    assert (lost["to"], lost["address"]) == ("server/1", address)
    assert "nobody listens" in lost["why"]
    finished = made.finished(run, 15)
    assert finished["outcome"] == "failed"
    assert "server/1" in finished["reason"]
    assert address in finished["reason"]
    assert finished["slices"] == []
    for name in ("worker/0", "worker/1"):  # the run's end calls them back from the dead server
        made.children[name].tell({"type": "stop"})
        assert made.children[name].popen.wait(10) == 0
