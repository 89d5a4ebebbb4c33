"""Every way in which a cluster ends on a host, and that nothing is left after any of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.agent import launch, paths, processes, runs, teardown
from dsgd_cli.contract.errors import ConnectFailed
from tests.agent.client import ID, Host, Lines, Refusal, alive, eventually, start, started
from tests.freezing import freeze

IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
RUNAWAY = (
    "g = subprocess.Popen(['/bin/sh', '-c', 'trap \"\" TERM; sleep 300; sleep 300'],"
    " start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
    " send(type='runaway', pid=g.pid)"
)
CLEAN = {"left": [], "files": [], "results": []}


def verify(host: Host) -> dict[str, Any]:
    """From a fresh bootstrap, as `down` does."""
    return host.connect().call("verify", cluster="lab")


def assert_nothing_left(host: Host, *pids: int) -> None:
    assert not [pid for pid in pids if alive(pid)]
    assert teardown.verify("lab") == CLEAN
    assert host.members() == []
    assert not paths.state().exists()
    assert not paths.socket_path(host.run_dir()).exists()


def three(host: Host) -> tuple[Lines, list[int]]:
    """An agent with a good child, a deaf one, and one with a deaf grandchild in its own session."""
    link = host.agent()
    pids = [link.call("hello")["pid"], started(link, "server/0")]
    pids.append(started(link, "worker/0", IGNORE_TERM))
    pids.append(start(link, "worker/1", RUNAWAY))
    pids.append(link.child("worker/1", "runaway")["pid"])
    link.child("worker/1", "ready")
    assert all(alive(pid) for pid in pids)
    seen = processes.stat(pids[-1])
    assert seen is not None and seen.session == seen.group == pids[-1], "out of its group"
    return link, pids


def wait_frozen(pid: int) -> None:
    freeze(pid)
    eventually(lambda: (seen := processes.stat(pid)) is not None and seen.state == "T")


def test_teardown_of_a_living_agent(host: Host) -> None:
    _, pids = three(host)
    before = time.monotonic()
    said = host.connect().call("teardown", cluster="lab", grace_s=0.3)
    assert said == {"stopped": 3, "killed": 1}
    assert time.monotonic() - before < 6
    assert_nothing_left(host, *pids)


def test_teardown_twice_and_of_nothing(host: Host) -> None:
    remote = host.connect()
    assert remote.call("teardown", cluster="lab", grace_s=1) == {"stopped": 0, "killed": 0}
    link = host.agent()
    started(link, "worker/0")
    assert remote.call("teardown", cluster="lab", grace_s=5) == {"stopped": 1, "killed": 0}
    assert remote.call("teardown", cluster="lab", grace_s=5) == {"stopped": 0, "killed": 0}
    assert_nothing_left(host)


def test_teardown_without_any_grace(host: Host) -> None:
    _, pids = three(host)
    before = time.monotonic()
    assert host.connect().call("teardown", cluster="lab", grace_s=0)["stopped"] == 3
    assert time.monotonic() - before < 4
    assert_nothing_left(host, *pids)


def test_teardown_of_a_frozen_agent(host: Host) -> None:
    _, pids = three(host)
    wait_frozen(pids[0])
    before = time.monotonic()
    said = host.connect().call("teardown", cluster="lab", grace_s=0.1)
    assert said["stopped"] == 3 and said["killed"] >= 1
    assert time.monotonic() - before < 10, "no wait for an answer that cannot come"
    assert_nothing_left(host, *pids)


def test_teardown_of_an_agent_that_does_not_answer(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is somebody else's, who never answers."""
    monkeypatch.setattr(teardown, "REPLY_MARGIN_S", 0.3)
    monkeypatch.setattr(teardown, "LATE_GRACE_S", 0.1)
    _, pids = three(host)
    path = paths.socket_path(host.run_dir())
    path.unlink()
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        assert teardown.teardown("lab", 0.2)["stopped"] == 3
    assert_nothing_left(host, *pids)


def test_teardown_after_the_agent_was_killed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pids = three(host)
    wait_frozen(pids[2])  # it cannot see that its agent is gone
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: not alive(pids[0]) and not alive(pids[1]), "children end with their agent")
    seen = host.connect().call("observe", cluster="lab")
    assert seen["agent"]["alive"] is False
    assert {name: p["alive"] for name, p in seen["processes"].items()} == {
        "server/0": False,
        "worker/0": True,
        "worker/1": False,
    }
    assert {pids[2], pids[4]} <= {process["pid"] for process in seen["leftovers"]}
    left = verify(host)
    assert {pids[2], pids[4]} <= {process["pid"] for process in left["left"]}
    assert [p["process"] for p in left["left"] if p["pid"] == pids[2]] == ["worker/0"]
    assert set(left["files"]) == {
        str(host.run_dir()),
        str(paths.socket_path(host.run_dir())),
    }
    monkeypatch.setattr(teardown, "LATE_GRACE_S", 0.1)
    said = teardown.teardown("lab", 0.1)
    assert said["stopped"] == 2  # the daemons that were still there, one of them as its grandchild
    assert_nothing_left(host, *pids)


def test_teardown_without_the_run_directory(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is known is what processes carry in their environment."""
    _, pids = three(host)
    os.kill(pids[0], signal.SIGKILL)
    shutil.rmtree(host.run_dir())
    eventually(lambda: not alive(pids[1]))
    assert pids[4] in {process["pid"] for process in verify(host)["left"]}
    monkeypatch.setattr(teardown, "LATE_GRACE_S", 0.1)
    teardown.teardown("lab", 0.1)
    assert_nothing_left(host, *pids)


def test_a_dead_agent_is_replaced(host: Host) -> None:
    _, pids = three(host)
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: not alive(pids[0]))
    new = host.start_agent(cluster_id="f" * 16)
    assert new != pids[0]
    assert not [pid for pid in pids if alive(pid)], "what the old one left is gone"
    assert host.attach().call("hello")["processes"] == {}
    seen = host.connect().call("observe", cluster="lab")
    assert (seen["agent"]["cluster_id"], seen["processes"]) == ("f" * 16, {})
    host.connect().call("teardown", cluster="lab", grace_s=1)
    assert_nothing_left(host, new)


def test_a_run_directory_of_another_boot_kills_nobody(host: Host) -> None:
    """Its pids are those of strangers now; the same holds for a start time that differs."""
    with subprocess.Popen(["/bin/sleep", "300"], start_new_session=True) as stranger:
        try:
            run_dir = host.run_dir()
            for boot_id, late in (("another boot", 0), (processes.boot_id(), 1)):
                run_dir.mkdir(parents=True)
                started = processes.start_time(stranger.pid) + late
                entry = {"pid": stranger.pid, "pgid": stranger.pid, "start_time": started}
                agent = {**entry, "boot_id": boot_id, "cluster": "lab", "cluster_id": ID}
                (run_dir / "agent.json").write_text(json.dumps(agent))
                (run_dir / "processes.json").write_text(json.dumps({"worker/0": entry}))
                remote = host.connect()
                seen = remote.call("observe", cluster="lab")
                assert seen["agent"]["alive"] is False
                assert seen["processes"]["worker/0"]["alive"] is False
                assert verify(host)["left"] == []
                said = remote.call("teardown", cluster="lab", grace_s=0.1)
                assert said == {"stopped": 0, "killed": 0}
                assert stranger.poll() is None
                assert_nothing_left(host)
            run_dir.mkdir(parents=True)
            (run_dir / "agent.json").write_text(json.dumps(agent))
            assert alive(host.start_agent())
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_signal_never_reaches_a_later_process_with_that_pid() -> None:
    with subprocess.Popen(["/bin/sleep", "300"]) as child:
        started = processes.start_time(child.pid)
        impostor = processes.Target(child.pid, started + 1)
        impostor.send(signal.SIGKILL)
        assert impostor.gone and child.poll() is None
        target = processes.Target(child.pid, started)
        assert not target.gone
        target.send(signal.SIGKILL)
        assert processes.wait_gone([target], 5)
        assert child.wait(5) == -signal.SIGKILL
        for each in (target, impostor):
            each.close()


def test_broken_files_do_not_stop_a_teardown(host: Host) -> None:
    link = host.agent()
    pid = started(link, "worker/0")
    for name in ("agent.json", "processes.json", "spec.json"):
        (host.run_dir() / name).write_text("{")
    seen = host.connect().call("observe", cluster="lab")
    assert (seen["agent"], seen["processes"]) == (None, {})
    assert host.connect().call("teardown", cluster="lab", grace_s=2)["stopped"] == 1
    assert_nothing_left(host, pid)


def test_other_clusters_and_other_folders_are_left_alone(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = started(host.agent(), "worker/0")
    host.start_agent(cluster="other")
    neighbour = host.attach("other")
    safe = started(neighbour, "worker/0")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    host.start_agent()
    twin = started(host.attach(), "worker/0")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    said = host.connect().call("teardown", cluster="lab", grace_s=2)
    assert said == {"stopped": 1, "killed": 0}
    assert not alive(pid) and alive(safe) and alive(twin)
    assert verify(host) == CLEAN


def renamed(host: Host, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An agent that was started when this machine had another name; its run directory."""
    with monkeypatch.context() as before:
        before.setattr(paths, "host_id", lambda: "old-name-12345678")
        run_dir = host.run_dir()
        request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": {"a": 1}}
        launch.start_agent({**request, "lease_s": 60})
    assert run_dir != host.run_dir()
    assert not host.run_dir().exists()
    return run_dir


def test_a_machine_that_was_renamed_knows_its_cluster(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = renamed(host, monkeypatch)
    link = host.attach()
    agent, pid = link.call("hello")["pid"], started(link, "worker/0")
    remote = host.connect()
    seen = remote.call("observe", cluster="lab")
    assert seen["agent"]["alive"] and seen["run_dir"] == str(run_dir) and seen["spec"] == {"a": 1}
    assert seen["processes"]["worker/0"]["alive"] and seen["leftovers"] == []
    request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": None, "lease_s": 60}
    assert remote.call("start_agent", **request) == {"pid": agent, "already": True}
    with pytest.raises(Refusal) as refusal:
        remote.call("start_agent", **{**request, "cluster_id": "f" * 16})
    assert refusal.value.kind == "busy"
    assert remote.call("hold", cluster="lab", owner={"user": "mia"}) == {}
    assert (run_dir / "launcher.lock").exists()
    left = verify(host)
    assert {process["pid"] for process in left["left"]} == {agent, pid}
    assert left["files"] == [str(run_dir), str(paths.socket_path(run_dir))]
    said = host.connect().call("teardown", cluster="lab", grace_s=5)
    assert said == {"stopped": 1, "killed": 0}
    remote.close()
    assert_nothing_left(host, agent, pid)
    assert not paths.socket_path(run_dir).exists()


def test_what_a_killed_agent_left_under_another_name(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = renamed(host, monkeypatch)
    link = host.attach()
    agent, pid = link.call("hello")["pid"], started(link, "worker/0")
    wait_frozen(pid)
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: not alive(agent))
    seen = host.connect().call("observe", cluster="lab")
    assert [process["pid"] for process in seen["leftovers"]] == [pid]
    assert {process["pid"] for process in verify(host)["left"]} == {pid}
    assert host.connect().call("teardown", cluster="lab", grace_s=0.1)["stopped"] == 1
    assert_nothing_left(host, agent, pid)
    assert not run_dir.exists() and not paths.socket_path(run_dir).exists()


@pytest.mark.parametrize("differs", ["boot_id", "machine_id", "pid_namespace", "unknown", "all"])
def test_what_is_another_hosts_is_not_touched(host: Host, differs: str) -> None:
    """On a home that hosts share: whatever the pids in its files are here."""
    run_dir = host.run_dir().with_name("lab@other-87654321")
    run_dir.mkdir(parents=True)
    with subprocess.Popen(["/bin/sleep", "300"], start_new_session=True) as stranger:
        try:
            entry = {"pid": stranger.pid, "start_time": processes.start_time(stranger.pid)}
            agent = {**entry, **runs.identity(), "cluster": "lab", "cluster_id": ID}
            agent |= {differs: "another"} if differs in agent else {}
            if differs == "unknown":
                del agent["pid_namespace"]
            if differs != "all":
                (run_dir / "agent.json").write_text(json.dumps(agent))
            (run_dir / "processes.json").write_text(json.dumps({"worker/0": entry}))
            before = {path: path.read_bytes() for path in run_dir.iterdir()}
            remote = host.connect()
            assert remote.call("observe", cluster="lab")["agent"] is None
            assert remote.call("verify", cluster="lab") == CLEAN
            said = remote.call("teardown", cluster="lab", grace_s=0)
            assert said == {"stopped": 0, "killed": 0}
            assert stranger.poll() is None
            assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
        finally:
            stranger.kill()


def test_who_carries_the_name_alone_is_a_stranger(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that a user exported in a shell, or a container's process that we can see."""
    marks = {processes.CLUSTER: "lab", processes.CLUSTER_ID: ID}
    beside = {**marks, processes.RUN_DIR: str(host.run_dir().with_name("lab@other-87654321"))}
    elsewhere = {**marks, processes.RUN_DIR: str(host.root / host.run_dir().name)}
    sleep = ["/bin/sleep", "300"]
    with contextlib.ExitStack() as stack:
        children = []
        for environment in (marks, beside, elsewhere):
            child = stack.enter_context(subprocess.Popen(sleep, env=environment))
            stack.callback(child.kill)
            children.append(child)
            eventually(lambda: processes.cmdline(child.pid).startswith("/bin/sleep"))  # noqa: B023
        monkeypatch.setattr(processes, "namespace", lambda pid: str(pid))
        assert processes.sweep(host.run_dir()) == []
        monkeypatch.undo()
        monkeypatch.setenv("XDG_STATE_HOME", str(host.root / "state"))
        assert [process["pid"] for process in verify(host)["left"]] == [children[1].pid]
        host.connect().call("teardown", cluster="lab", grace_s=1)
        assert [child.poll() for child in children] == [None, -signal.SIGTERM, None]


def test_an_unheard_agent_ends_everything(host: Host) -> None:
    """A frozen child, too, and one that hears no TERM."""
    link, pids = three(host)
    wait_frozen(pids[2])
    link.call("lease", holder="me", seconds=0.3)
    before = time.monotonic()
    link.event("lapsed")
    eventually(lambda: not alive(pids[0]), "the agent has ended, as the last one")
    assert 1.5 < time.monotonic() - before < 2 + 5
    assert_nothing_left(host, *pids)


def test_renewals_come_from_the_launcher_and_through_children(host: Host) -> None:
    link = host.agent(lease_s=20)
    started(link, "worker/0")
    assert 15 < link.call("hello")["lease"]["remaining_s"] <= 20
    assert 9 < link.call("lease", holder="mia", seconds=10)["remaining_s"] <= 10, "may be shorter"
    told = link.child("worker/0", "echo")["got"]
    assert told == {"type": "lease", "holder": "mia", "seconds": 10}

    def relay(seconds: float) -> float:
        code = f"send(type='lease', seconds={seconds}); send(type='sent')"
        link.call("tell", process="worker/0", message={"type": "do", "code": code})
        link.child("worker/0", "sent")
        lease = link.call("hello")["lease"]
        assert lease["holder"] == "mia"
        remaining_s: float = lease["remaining_s"]
        return remaining_s

    assert 45 < relay(50) <= 50
    assert 45 < relay(5) <= 50, "a relay never shortens it"


def test_the_lease_is_kept_by_renewals(host: Host) -> None:
    link = host.agent()
    pid = started(link, "worker/0")
    end = time.monotonic() + 1.2  # more than one lease
    while time.monotonic() < end:
        link.call("lease", holder="me", seconds=0.8)
        time.sleep(0.05)
    assert alive(pid)
    link.event("lapsed")
    assert time.monotonic() - end > 0.4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_is_a_shutdown(host: Host, number: signal.Signals) -> None:
    link = host.agent()
    agent, pid = link.call("hello")["pid"], started(link, "worker/0", restart=True)
    os.kill(agent, number)
    gone = link.event("exited")
    assert gone["signal"] == "SIGTERM" and gone["restart_in_s"] is None
    eventually(lambda: not alive(agent))
    assert_nothing_left(host, agent, pid)


def test_a_hangup_is_nothing_to_an_agent(host: Host) -> None:
    link = host.agent()
    os.kill(link.call("hello")["pid"], signal.SIGHUP)
    assert link.call("hello")["ending"] is False


def test_shutdown_answers_when_all_is_gone(host: Host) -> None:
    link, pids = three(host)
    said = link.call("shutdown", grace_s=0.3)
    assert (said["stopped"], said["killed_processes"]) == (3, ["worker/0"])
    assert not [pid for pid in pids[1:] if alive(pid)]
    assert not host.run_dir().exists()
    assert link.stream.wait(5) == 0, "and the bridge ends"
    eventually(lambda: not alive(pids[0]))
    assert_nothing_left(host, *pids)


def test_an_end_with_nothing_to_end_is_quick(host: Host) -> None:
    """The loop's longest wait is a second; once in a few times it must not be slept through."""
    took_s = []
    for _ in range(3):
        link = host.agent()
        before = time.monotonic()
        assert link.call("shutdown", grace_s=5)["stopped"] == 0
        took_s.append(time.monotonic() - before)
        if took_s[-1] < 0.7:
            return
    raise AssertionError(took_s)


def test_a_second_shutdown_can_only_be_quicker(host: Host) -> None:
    first, pids = three(host)
    second = host.attach()
    number = first.ask("shutdown", grace_s=60)
    first.event("exited", process="server/0")
    with pytest.raises(Refusal) as refusal:
        start(second, "worker/7")
    assert refusal.value.kind == "busy"
    assert second.call("shutdown", grace_s=0.1)["stopped"] == 3
    assert first.reply(number)["stopped"] == 3
    eventually(lambda: not alive(pids[0]))
    assert_nothing_left(host, *pids)


def test_children_that_die_during_the_shutdown_are_not_restarted(host: Host) -> None:
    link = host.agent()
    for n in range(4):
        started(link, f"worker/{n}", restart=True, backoff_s=0.01)
    number = link.ask("shutdown", grace_s=5)
    agent = host.members()
    assert link.reply(number)["stopped"] == 4
    eventually(lambda: not any(map(alive, agent)))
    assert not [event for event in link.events if event["event"] == "started"]
    assert_nothing_left(host)


def test_the_agent_and_its_children_outlive_the_connection(host: Host) -> None:
    remote = host.connect()
    request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": None, "lease_s": 60}
    agent = remote.call("start_agent", **request)["pid"]
    remote.call("attach", cluster="lab")
    remote.call("subscribe", logs=True)
    pid = start(remote, "worker/0")
    remote.kill()
    assert alive(agent)
    assert host.attach().call("hello")["processes"]["worker/0"]["pid"] == pid
    assert alive(pid)


def test_an_agent_with_a_bug_leaves_nothing_either(host: Host, tmp_path: Path) -> None:
    """The loop raises: the children are killed, the files removed, the status is not 0."""
    code = (
        "import json, sys\n"
        "from dsgd_cli.agent import supervisor, fleet\n"
        "turns = []\n"
        "def tick(self, now_s):\n"
        "    turns.append(now_s)\n"
        "    if len(self.running) == 1 and len(turns) > 20: raise RuntimeError('planted')\n"
        "fleet.Fleet.tick = tick\n"
        "supervisor.main()\n"
    )
    run_dir = host.run_dir()
    run_dir.mkdir(parents=True)
    lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    environment = {
        **os.environ,
        processes.CLUSTER: "lab",
        processes.CLUSTER_ID: ID,
        processes.RUN_DIR: str(run_dir),
        "PYTHONPATH": str(Path(paths.__file__).parents[2]),
    }
    config = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": 1, "lease_s": 60}
    config |= {"run_dir": str(run_dir), "lock": lock}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(config).encode() + b"\n",
        capture_output=True,
        env=environment,
        pass_fds=(lock,),
        check=True,
        timeout=30,
    )
    os.close(lock)
    agent = json.loads(done.stdout)["ok"]["pid"]
    with (run_dir / "logs/agent.log").open() as log:
        link = host.attach()
        pid = start(link, "worker/0")
        with contextlib.suppress(EOFError, ConnectFailed):
            for _ in range(20):
                link.call("hello")
        eventually(lambda: not alive(agent), "the agent ends")
        assert "planted" in log.read()
    assert "RuntimeError: planted" in link.event("crashed")["traceback"]
    assert_nothing_left(host, agent, pid)


def test_an_empty_socket_folder_goes_and_a_used_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sockets"
    monkeypatch.setattr(paths, "socket_dir", lambda: folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    paths.make_socket_dir()
    (folder / "another.sock").touch()
    paths.remove_run(paths.run_dir("lab"))
    assert folder.exists()
    (folder / "another.sock").unlink()
    paths.remove_run(paths.run_dir("lab"))
    assert not folder.exists()


def test_what_a_killed_removal_left_is_found_and_removed(host: Host) -> None:
    doomed = host.run_dir().with_name(host.run_dir().name + ".gone-123")
    doomed.mkdir(parents=True)
    assert verify(host)["files"] == [str(doomed)]
    host.connect().call("teardown", cluster="lab", grace_s=0)
    assert_nothing_left(host)


def test_a_sweep_does_not_find_who_looks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher started from inside a daemon does not end itself."""
    monkeypatch.setenv(processes.CLUSTER, "lab")
    monkeypatch.setenv(processes.RUN_DIR, str(host.run_dir()))
    shell = ["/bin/sh", "-c", '"$@"; true', "sh"]
    script = (
        "import os\nfrom pathlib import Path\nfrom dsgd_cli.agent import processes\n"
        "print(os.environ['DSGD_CLUSTER'], "
        "[m.pid for m in processes.sweep(Path(os.environ['DSGD_RUN_DIR']))])"
    )
    done = subprocess.run(
        [*shell, sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "lab []\n"
