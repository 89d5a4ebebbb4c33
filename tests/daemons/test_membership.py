"""Who is in, who is out, who hears of it: daemons as real processes."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsgd_cli.launcher.identity import make_authority, new_cluster_id
from tests.daemons import models
from tests.daemons.agent import Child, Cluster
from tests.freezing import freeze

NewCluster = Callable[..., Cluster]


def gone(child: Child, timeout_s: float = 5.0) -> int:
    return child.popen.wait(timeout_s)


@pytest.mark.parametrize("process", ["coordinator/0", "server/0", "worker/0"])
def test_a_daemon_is_ready_at_once(new_cluster: NewCluster, process: str) -> None:
    made = new_cluster(form=False)
    child = made.start(process)
    ready = child.wait_for("ready")
    assert ready["pid"] == child.popen.pid
    assert (ready["port"] is None) == (process == "worker/0")


@pytest.mark.parametrize("process", ["coordinator/0", "server/0", "worker/0"])
def test_a_daemon_dies_with_its_agent(new_cluster: NewCluster, process: str) -> None:
    made = new_cluster(form=False)
    child = made.start(process)
    child.wait_for("ready")
    child.hang_up()
    assert gone(child) == -signal.SIGKILL


def test_what_user_code_started_dies_with_the_agent_too(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    made = new_cluster(servers=1, workers=1)
    (tmp_path / "data.py").write_text(
        "import pathlib, subprocess, time\n"
        "def load():\n"
        "    child = subprocess.Popen(['sleep', '100'])\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(child.pid))\n"
        "    print('started', flush=True)\n"
        "    time.sleep(100)\n"
    )
    made.run({"model": "softmax", "data": str(tmp_path / "data.py")})
    child = made.children["worker/0"]
    eventually(lambda: "started" in child.tail())
    sleeper = Path("/proc") / (tmp_path / "pid").read_text()
    assert sleeper.exists()
    child.hang_up()
    assert gone(child) == -signal.SIGKILL
    eventually(lambda: not sleeper.exists() or "(sleep) Z" in (sleeper / "stat").read_text())


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("way", ["SIGTERM", "stop"])
@pytest.mark.parametrize("process", ["coordinator/0", "server/0", "worker/0"])
def test_a_daemon_leaves_when_asked(new_cluster: NewCluster, process: str, way: str) -> None:
    made = new_cluster(form=False)
    child = made.start(process)
    child.wait_for("ready")
    if way == "stop":
        child.tell({"type": "stop"})
    else:
        child.popen.terminate()
    assert gone(child) == 0


def test_a_worker_in_endless_user_code_leaves_when_asked(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    made = new_cluster(servers=1, workers=1)
    (tmp_path / "data.py").write_text(
        "def load():\n    print('stuck', flush=True)\n    while True: pass\n"
    )
    made.run({"model": "softmax", "data": str(tmp_path / "data.py")})
    child = made.children["worker/0"]
    eventually(lambda: "stuck" in child.tail())
    child.popen.terminate()
    assert gone(child) == 0


def test_a_daemon_that_cannot_start_says_why(new_cluster: NewCluster) -> None:
    made = new_cluster(form=False)
    setup = made.setup("server/0", made.authority.issue("server/0"))
    child = Child("server/0", {**setup, "bind": "192.0.2.1"})
    try:
        failed = child.wait_for("failed")
        assert "server/0 cannot bind 192.0.2.1" in failed["error"]
        assert "Traceback" in failed["traceback"]
        assert gone(child) == 1
    finally:
        child.kill()


def test_a_worker_of_another_cluster_is_told_so_and_does_not_try_again(
    new_cluster: NewCluster,
) -> None:
    made = new_cluster(form=False, servers=1, workers=1)
    made.start("coordinator/0")
    child = made.start("worker/0", authority=make_authority(new_cluster_id()))
    child.wait_for("ready")
    began_s = time.monotonic()
    made.join(0)
    failed = child.wait_for("failed", 5)
    assert time.monotonic() - began_s < 5
    assert failed["kind"] == "identity"
    assert "coordinator/0 at 127.0.0.1:" in failed["error"]
    assert "another cluster" in failed["error"]
    assert gone(child) == 1


def test_a_server_of_another_cluster_is_named_by_the_coordinator(new_cluster: NewCluster) -> None:
    made = new_cluster(form=False, servers=1, workers=0)
    made.start("coordinator/0")
    made.start("server/0", authority=make_authority(new_cluster_id()))
    made.announce()
    lost = made.coordinator.wait_for("unreachable", 5)
    assert (lost["process"], lost["to"]) == ("coordinator/0", "server/0")
    assert lost["address"] == made.address("server/0")
    assert lost["kind"] == "identity"
    assert not made.coordinator.all("formed")


def test_formed_means_that_every_worker_reached_every_server(new_cluster: NewCluster) -> None:
    made = new_cluster()
    assert len(made.coordinator.all("formed")) == 1
    said = len(made.coordinator.messages)
    made.announce()
    made.coordinator.wait_for("formed", 5, after=said)


def test_formed_is_said_again_only_when_every_worker_is_there(new_cluster: NewCluster) -> None:
    made = new_cluster()
    made.children["worker/1"].kill()
    a_second_passes(made)
    made.announce()
    a_second_passes(made)
    a_second_passes(made)
    assert len(made.coordinator.all("formed")) == 1
    said = len(made.coordinator.messages)
    made.restart(1)
    made.coordinator.wait_for("formed", 10, after=said)


def a_second_passes(made: Cluster) -> None:
    """For the coordinator, at least."""
    made.coordinator.wait_for("alive", 5, after=len(made.coordinator.messages))


def test_a_frozen_server_is_found_when_the_cluster_is_formed_again(
    new_cluster: NewCluster,
) -> None:
    made = new_cluster()
    frozen = made.children["server/1"]
    freeze(frozen.popen.pid)
    said = len(made.coordinator.messages)
    made.announce()
    lost = made.coordinator.wait_for("unreachable", 9, after=said)
    assert (lost["process"], lost["to"]) == ("coordinator/0", "server/1")
    assert lost["kind"] == "unreachable"
    assert len(made.coordinator.all("formed")) == 1
    frozen.popen.send_signal(signal.SIGCONT)
    said = len(made.coordinator.messages)
    made.announce()
    made.coordinator.wait_for("formed", 10, after=said)


def test_the_coordinator_gives_signs_of_life(new_cluster: NewCluster) -> None:
    made = new_cluster(form=False, servers=1, workers=0)
    ready = made.start("coordinator/0").wait_for("ready")
    made.coordinator.wait_for("alive", 5)
    eventually(lambda: len(made.coordinator.all("alive")) >= 4)
    times = [ready["at_s"], *(message["at_s"] for message in made.coordinator.all("alive"))]
    assert max(after - before for before, after in itertools.pairwise(times)) < 2
    assert made.coordinator.messages[0]["type"] == "ready"


def test_a_lease_is_passed_on_to_every_process(new_cluster: NewCluster) -> None:
    made = new_cluster()
    made.coordinator.tell({"type": "lease", "holder": "mia@laptop", "seconds": 15.0})
    for name, child in made.children.items():
        if name != "coordinator/0":
            assert child.wait_for("lease", 5)["seconds"] == pytest.approx(15.0)
    late = made.restart(1)
    remaining_s = late.wait_for("lease", 5)["seconds"]
    assert 0 < remaining_s < 15.0


def test_a_worker_that_loses_its_coordinator_says_so_and_ends(new_cluster: NewCluster) -> None:
    made = new_cluster(servers=1, workers=1)
    made.coordinator.kill()
    failed = made.children["worker/0"].wait_for("failed", 10)
    assert failed["kind"] == "unreachable"
    assert "worker/0 is no member any more: coordinator/0 at 127.0.0.1:" in failed["error"]
    assert gone(made.children["worker/0"]) == 1


def test_a_frozen_worker_is_lost_and_learns_it_when_it_wakes(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    """6 s of silence are too many; 7 s of computing, by the other one meanwhile, are not."""
    made = new_cluster()
    model = tmp_path / "model.py"
    model.write_text(models.BUSY)
    run = made.run({"model": str(model), "until": {"max_epochs": 1}, "batch_size": 16})
    made.coordinator.wait_for("progress", where=lambda m: m["step"] > 3)
    frozen = made.children["worker/1"]
    freeze(frozen.popen.pid)
    began_s = time.monotonic()
    lost = made.coordinator.wait_for(
        "record", 10, where=lambda m: m["record"].get("event") == "lost"
    )
    assert lost["record"]["process"] == "worker/1"
    assert 4 < time.monotonic() - began_s < 9
    frozen.popen.send_signal(signal.SIGCONT)
    assert "no member any more" in frozen.wait_for("failed", 10)["error"]
    assert gone(frozen) == 1
    made.restart(1)
    finished = made.finished(run)
    assert finished["outcome"] == "finished"
    assert [epoch["distinct"] for epoch in made.records("epoch")] == [1437]
    events = [(r["event"], r["process"], r["incarnation"]) for r in made.records("event")]
    assert ("lost", "worker/1", 1) in events
    assert [what for what, process, _ in events if process == "worker/0"] == ["joined"]


def test_a_run_without_a_formed_cluster_fails_at_once(new_cluster: NewCluster) -> None:
    made = new_cluster(form=False, servers=1, workers=0)
    made.start("coordinator/0").wait_for("ready")
    finished = made.finished(made.run({"model": "softmax"}), 5)
    assert finished["outcome"] == "failed"
    assert "not formed" in made.coordinator.wait_for("run_error", 5)["error"]


def test_a_second_session_of_a_worker_replaces_the_first(new_cluster: NewCluster) -> None:
    """Two processes with one name: the newer one is the worker, the older one ends."""
    made = new_cluster(servers=1, workers=1)
    older = made.children["worker/0"]
    made.restart(0)
    assert "newer session of this worker" in older.wait_for("failed", 3)["error"]
    train = {"model": "softmax", "until": {"max_steps": 30}}
    assert made.finished(made.run(train))["outcome"] == "finished"
