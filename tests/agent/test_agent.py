"""The agent with real children: start, talk, restart, end, and children that misbehave."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections import deque
from pathlib import Path

import pytest

from dsgd_cli.agent import launch, oom, payload, processes
from dsgd_cli.agent.framing import Refused
from dsgd_cli.agent.life import backoff_s
from dsgd_cli.agent.strays import Strays
from tests.agent.client import ID, Host, Refusal, alive, eventually, start, started
from tests.freezing import freeze

IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
# a grandchild in a session of its own; prints its pid
RUNAWAY = (
    "g = subprocess.Popen(['/bin/sleep', '300'], start_new_session=True,"
    " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); print(g.pid, flush=True)"
)


def test_it_runs_detached_and_shows_what_it_is(host: Host) -> None:
    pid = host.start_agent()
    seen = processes.stat(pid)
    assert seen is not None
    assert seen.session == seen.group == pid, "its own session"
    assert seen.session != os.getsid(0)
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    assert words[1:] == ["-I", "-u", "-c", payload.STUB, "dsgd-agent", "lab"], "no free text"
    ends = {str(Path(f"/proc/{pid}/fd/{fd}").readlink()) for fd in (0, 1, 2)}
    assert ends == {"/dev/null", str(host.run_dir() / "logs/agent.log")}
    assert {ID, "lab"} <= set(processes.environment(pid).values())


def test_a_second_agent(host: Host) -> None:
    pid = host.start_agent()
    request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": None, "lease_s": 9}
    remote = host.connect()
    assert remote.call("start_agent", **request) == {"pid": pid, "already": True}
    with pytest.raises(Refusal) as refusal:
        remote.call("start_agent", **{**request, "cluster_id": "f" * 16})
    assert refusal.value.kind == "busy"
    assert refusal.value.error["agent"]["cluster_id"] == ID
    assert alive(pid)
    assert host.start_agent(cluster="other") != pid


def test_two_that_start_an_agent_at_once(host: Host) -> None:
    """The lock decides, whatever the order: one agent, and it answers."""
    remotes = [host.connect() for _ in range(4)]
    request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": None, "lease_s": 60}
    numbers = [remote.ask("start_agent", **request) for remote in remotes]
    pids = {remote.reply(n)["pid"] for remote, n in zip(remotes, numbers, strict=True)}
    assert len(pids) == 1
    assert host.attach().call("hello")["pid"] in pids
    agents = [pid for pid in host.members() if alive(pid)]
    assert agents == list(pids)


def test_a_bad_start_leaves_nothing(host: Host) -> None:
    remote = host.connect()
    for bad in ({"lease_s": 0}, {"lease_s": "x"}, {"cluster_id": "../x"}):
        request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": None, "lease_s": 60}
        with pytest.raises(Refusal) as refusal:
            remote.call("start_agent", **{**request, **bad})
        assert refusal.value.kind == "invalid", bad
        assert not host.run_dir().exists(), bad
        assert host.members() == []


def test_a_child_gets_its_setup_and_is_described(host: Host) -> None:
    link = host.agent(logs=True)
    pid = start(link, "worker/3", "print('out'); print('grün', file=sys.stderr)", env={"X": "1"})
    event = link.event("started")
    assert event == {"event": "started", "process": "worker/3", "pid": pid, "restarts": 0}
    log = {link.event("log", process="worker/3")["line"] for _ in range(2)}
    assert log == {"out", "grün"}
    setup = link.child("worker/3", "ready")["setup"]
    assert setup == {"type": "setup", "process": "worker/3"}
    variables = processes.environment(pid)
    assert variables["DSGD_PROCESS"] == "worker/3" and variables["DSGD_CLUSTER_ID"] == ID
    described = link.call("hello")["processes"]["worker/3"]
    assert (described["pid"], described["state"], described["ready"]["port"]) == (pid, "ready", 7)
    seen = host.connect().call("observe", cluster="lab")
    assert seen["processes"]["worker/3"]["alive"] and seen["agent"]["alive"]
    assert seen["processes"]["worker/3"]["port"] == 7
    assert seen["leftovers"] == []
    again = link.call("start", process="worker/3", argv=["x"], env={}, setup={}, restart=False)
    assert again == {"pid": pid, "already": True}
    stat = processes.stat(pid)
    assert stat is not None and stat.session == pid
    assert str(Path(f"/proc/{pid}/fd/0").readlink()) == "/dev/null"


def test_messages_and_their_memory(host: Host) -> None:
    link = host.agent()
    started(link, "coordinator/0")
    link.call("tell", process="coordinator/0", message={"type": "run", "n": 1})
    assert link.child("coordinator/0", "echo")["got"] == {"type": "run", "n": 1}
    code = "send(type='progress', step=1); send(type='progress', step=2); send(type='other')"
    link.call("tell", process="coordinator/0", message={"type": "do", "code": code})
    link.child("coordinator/0", "other")
    assert host.attach().call("hello")["last"] == {
        "coordinator/0": {"progress": {"type": "progress", "step": 2}}
    }
    with pytest.raises(Refusal) as refusal:
        link.call("tell", process="worker/9", message={"type": "x"})
    assert refusal.value.kind == "missing"


def test_a_restarted_child_is_told_again(host: Host) -> None:
    link = host.agent()
    first = started(link, "worker/0", restart=True, backoff_s=0.05)
    for kind, n in (("files", 1), ("join", 1), ("files", 2), ("once", 1)):
        message = {"type": kind, "n": n}
        link.call("tell", process="worker/0", message=message, keep=kind != "once")
        assert link.child("worker/0", "echo")["got"] == message
    os.kill(first, signal.SIGKILL)
    gone = link.event("exited")
    assert (gone["pid"], gone["signal"], gone["status"]) == (first, "SIGKILL", None)
    assert gone["restart_in_s"] == 0.05 and gone["oom"] is False
    again = link.event("started")
    assert again["pid"] != first and again["restarts"] == 1
    heard = []
    while len(heard) < 3:
        event = link.event("child", process="worker/0")["message"]
        heard.append(event.get("got") or event["type"])
    assert heard == ["ready", {"type": "join", "n": 1}, {"type": "files", "n": 2}]


def test_back_off() -> None:
    """1, 2, 4 … 30 s, at most 5 within 5 minutes."""
    restarts: deque[float] = deque()
    waits = []
    now_s = 0.0
    for _ in range(6):
        waits.append(backoff_s(restarts, now_s, 1.0))
        restarts.append(now_s)
        now_s += 10
    assert waits == [1, 2, 4, 8, 16, None]
    assert backoff_s(restarts, now_s + 290, 1.0) == 1 * 2 ** len(restarts)
    assert backoff_s(deque([0.0] * 4), 1.0, 10.0) == 30


def test_a_child_that_crashes_six_times_is_given_up(host: Host) -> None:
    link = host.agent()
    behaviour = "print('about to fail', file=sys.stderr); sys.exit(3)"
    start(link, "worker/0", behaviour, restart=True, backoff_s=0.01)
    gone = [link.event("exited") for _ in range(6)]
    waits = [event["restart_in_s"] for event in gone]
    assert waits == [0.01, 0.02, 0.04, 0.08, 0.16, None]
    assert {event["status"] for event in gone} == {3}
    assert len({event["pid"] for event in gone}) == 6
    assert gone[-1]["tail"] == ["about to fail"]
    state = link.call("hello")["processes"]["worker/0"]
    assert (state["state"], state["restarts"], state["exit"]["status"]) == ("failed", 5, 3)
    again = start(link, "worker/0")
    assert link.event("started")["restarts"] == 0 and alive(again), "an order starts it anew"


def test_the_last_words_come_before_the_exit(host: Host) -> None:
    link = host.agent(logs=True)
    behaviour = "send(type='failed', error='why'); raise ValueError('x' * 100_000 + 'end')"
    start(link, "worker/0", behaviour)
    assert link.child("worker/0", "failed")["error"] == "why"
    gone = link.event("exited")
    assert gone["status"] == 1 and gone["restart_in_s"] is None
    assert "".join(gone["tail"]).endswith("end")
    assert any("Traceback" in line for line in gone["tail"])
    assert link.call("hello")["processes"]["worker/0"]["state"] == "failed"


@pytest.mark.parametrize("restart", [False, True])
def test_status_0_is_an_end_only_for_what_is_meant_to_end(host: Host, restart: bool) -> None:
    link = host.agent()
    started(link, "worker/0", restart=restart)
    link.call("tell", process="worker/0", message={"type": "stop"})
    gone = link.event("exited")
    assert gone["status"] == 0
    assert (gone["restart_in_s"] is not None) == restart  # nobody asked a worker to leave
    state = link.call("hello")["processes"]["worker/0"]["state"]
    assert state in (("restarting", "starting", "ready") if restart else ("exited",))


def test_what_cannot_be_started(host: Host) -> None:
    link = host.agent()
    for argv in (["/nonexistent/python"], [], "python", [1], ["a\0"]):
        with pytest.raises(Refusal) as refusal:
            link.call("start", process="worker/0", argv=argv, env={}, setup={}, restart=True)
        assert refusal.value.kind in ("unfit", "invalid")
    for name in ("worker", "../x", "worker/-1", "worker/01", "agent", 3, "server/1\n"):
        with pytest.raises(Refusal) as refusal:
            start(link, name)  # type: ignore[arg-type]
        assert refusal.value.kind == "invalid"
    assert link.call("hello")["ending"] is False


def test_the_end_forbids_a_restart_that_was_due(host: Host) -> None:
    link = host.agent()
    started(link, "worker/1", IGNORE_TERM)
    start(link, "worker/0", "sys.exit(1)", restart=True, backoff_s=0.3)
    assert link.event("exited")["restart_in_s"] == 0.3
    assert link.call("shutdown", grace_s=0.6)["stopped"] == 1
    assert "started" not in {event["event"] for event in link.events}


@pytest.mark.parametrize("how", ["ignores TERM", "is frozen and ignores TERM"])
def test_who_does_not_go_is_killed(host: Host, how: str) -> None:
    link = host.agent()
    pid = started(link, "worker/0", IGNORE_TERM, restart=True)
    if "frozen" in how:
        freeze(pid)
        eventually(lambda: (seen := processes.stat(pid)) and seen.state == "T")
    before = time.monotonic()
    said = link.call("shutdown", grace_s=0.5)
    assert 0.4 < time.monotonic() - before < 5
    assert said == {"stopped": 1, "killed": 1, "killed_processes": ["worker/0"]}
    assert not alive(pid)
    gone = link.event("exited")
    assert gone["signal"] == "SIGKILL" and gone["restart_in_s"] is None


def runaway_of(host: Host, process: str) -> int:
    """The pid that RUNAWAY printed before the process was ready."""
    log = (host.run_dir() / "logs" / f"{process.replace('/', '-')}.log").read_text().splitlines()
    pid = int(log[-1])
    seen = processes.stat(pid)
    assert seen is not None and seen.session == pid, "out of its process's session"
    return pid


@pytest.mark.parametrize("ending", ["status 0", "crash"])
def test_a_runaway_grandchild_goes_with_its_process(host: Host, ending: str) -> None:
    link = host.agent()
    pid = started(link, "worker/0", RUNAWAY)
    other = started(link, "worker/1", RUNAWAY)
    runaway, safe = runaway_of(host, "worker/0"), runaway_of(host, "worker/1")
    if ending == "crash":
        os.kill(pid, signal.SIGKILL)
    else:
        link.call("tell", process="worker/0", message={"type": "stop"})
    link.event("exited", pid=pid)
    eventually(lambda: not alive(runaway))
    assert alive(other) and alive(safe)


def test_a_restarted_process_keeps_its_own_grandchildren(host: Host) -> None:
    link = host.agent()
    first = started(link, "worker/0", RUNAWAY, restart=True, backoff_s=0.001)
    old = runaway_of(host, "worker/0")
    os.kill(first, signal.SIGKILL)
    link.child("worker/0", "ready")
    new = runaway_of(host, "worker/0")
    eventually(lambda: not alive(old))
    doomed = started(link, "worker/1")  # its end makes the agent look again
    os.kill(doomed, signal.SIGKILL)
    link.event("exited", pid=doomed)
    link.call("hello")
    assert alive(new)


def test_looking_for_strays_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for one that no signal ends: it is left to the verification in the end."""
    hung = processes.Member(os.getpid(), -1, "worker/0", "1", ID, "", "")  # of another start time
    monkeypatch.setattr(processes, "sweep", lambda run_dir, cluster_id: [hung])
    found = Strays(Path("/nowhere"), ID)
    before = time.monotonic()
    found.tick(0.0, ())
    assert found.due_s is None, "nothing ended, nothing to look for"
    found.suspect(100.0)
    looks = 0
    while (due_s := found.due_s) is not None:
        found.tick(due_s, ())
        looks += 1
    assert 100 < looks < 1000
    found.suspect(200.0)
    found.tick(200.0, {"1"})
    assert found.due_s is None, "it belongs to a living one"
    assert time.monotonic() - before < 0.5


def test_the_group_of_a_crashed_child_goes_with_it(host: Host) -> None:
    link = host.agent()
    behaviour = "g = subprocess.Popen(['/bin/sleep', '300'], env={}); send(type='g', pid=g.pid)"
    pid = start(link, "worker/0", behaviour)
    grandchild = link.child("worker/0", "g")["pid"]
    assert alive(grandchild) and not processes.environment(grandchild), "no marks to find it by"
    os.kill(pid, signal.SIGKILL)
    link.event("exited")
    eventually(lambda: not alive(grandchild))


def test_a_subscriber_that_never_reads_disturbs_nobody(host: Host) -> None:
    deaf, link = host.agent(logs=True), host.attach()
    flood = "for n in range(300_000): print('x' * 100, n)"
    started(link, "worker/0", flood)  # 30 MB: several times what is queued for `deaf`
    link.call("tell", process="worker/0", message={"type": "hi"})
    assert link.child("worker/0", "echo")
    logged = (host.run_dir() / "logs/worker-0.log").stat().st_size
    assert logged > 1_000_000
    seen = skipped = 0
    ready = False
    while (
        not ready or seen + skipped < 300_000
    ):  # now it reads: first what was queued, and then what it missed
        message = json.loads(deaf.line())
        if message["event"] == "log":
            seen += 1
        elif message["event"] == "skipped":
            skipped += message["lines"]
        elif message["event"] == "child" and message["message"]["type"] == "ready":
            ready = True
    assert seen + skipped == 300_000 and seen > 0 and skipped > 100_000
    status = Path(f"/proc/{link.call('hello')['pid']}/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kb < 100_000


def test_a_flood_of_64_mb_is_bounded(host: Host) -> None:
    link = host.agent(logs=True)
    behaviour = "line = 'y' * 1023 + chr(10)\nfor n in range(64): sys.stdout.write(line * 1024)"
    start(link, "worker/0", behaviour + "\nsys.stdout.flush(); os._exit(0)")
    assert link.event("exited", timeout_s=60)["status"] == 0
    files = list((host.run_dir() / "logs").glob("worker-0.log*"))
    assert len(files) == 3
    assert 32 << 20 < sum(file.stat().st_size for file in files) <= 48 << 20


def test_a_child_that_does_not_read_disturbs_nobody(host: Host) -> None:
    link = host.agent()
    start(link, "worker/0", "send(type='deaf'); time.sleep(300)")
    link.child("worker/0", "deaf")
    message = {"type": "big", "text": "x" * 1_000_000}
    with pytest.raises(Refusal) as refusal:
        for _ in range(100):
            link.call("tell", process="worker/0", message=message)
    assert refusal.value.kind == "busy"
    for _ in range(3):
        link.call("lease", holder="me", seconds=60)
    other = started(link, "worker/1")
    assert alive(other)
    assert link.call("shutdown", grace_s=5)["stopped"] == 2


def test_garbage_from_a_child_does_no_harm(host: Host) -> None:
    link = host.agent(logs=True)
    behaviour = (
        "channel.sendall(b'no json\\n[1]\\n{\"type\": [1]}\\n\\xff\\n' + b'[' * 100_000 + b'\\n')\n"
        "send(type='lease', seconds=float('nan')); send(type='lease', seconds='x')\n"
        "sys.stdout.buffer.write(b'\\xff\\xfe bytes\\n'); sys.stdout.flush()"
    )
    started(link, "worker/0", behaviour)
    assert link.call("hello")["lease"]["remaining_s"] > 30


def test_secrets_and_the_spec(host: Host) -> None:
    link = host.agent(spec={"a": 1})
    assert host.connect().call("observe", cluster="lab")["spec"] == {"a": 1}
    with pytest.raises(Refusal) as refusal:
        link.call("get_secret", name="ca.key")
    assert refusal.value.kind == "missing"
    link.call("put_secret", name="ca.key", text="PEM ü")
    assert link.call("get_secret", name="ca.key") == {"text": "PEM ü"}
    assert (host.run_dir() / "ca.key").stat().st_mode & 0o777 == 0o600
    for name in ("../x.key", "agent.json", "", None, ".key", "a/b.key"):
        with pytest.raises(Refusal) as refusal:
            link.call("put_secret", name=name, text="x")
        assert refusal.value.kind == "invalid"


def test_a_full_disk_ends_nothing(host: Host) -> None:
    """What cannot be saved is saved later. The limit makes writing fail as a full disk does."""
    link = host.agent()
    agent = link.call("hello")["pid"]
    limits = resource.prlimit(agent, resource.RLIMIT_FSIZE)
    resource.prlimit(agent, resource.RLIMIT_FSIZE, (0, limits[1]))
    pids = [start(link, f"worker/{n}") for n in range(2)]
    text = link.event("note")["text"]
    assert text == (
        f"cannot write to {host.run_dir()}: File too large; it goes on, and tries again"
    )
    link.child("worker/1", "ready")
    os.kill(pids[1], signal.SIGKILL)
    link.event("exited", pid=pids[1])
    with pytest.raises(Refusal) as refusal:
        link.call("put_secret", name="ca.key", text="x")
    assert refusal.value.kind == "unfit"
    eventually(lambda: link.call("hello")["processes"]["worker/0"]["state"] == "ready")
    assert not [event for event in link.events if event["event"] == "note"], "told once"
    known = host.run_dir() / "processes.json"
    assert json.loads(known.read_text()) == {}
    assert not list(host.run_dir().glob(".*")), "no parts of files"
    resource.prlimit(agent, resource.RLIMIT_FSIZE, limits)
    eventually(lambda: json.loads(known.read_text()))
    assert {name: p["state"] for name, p in json.loads(known.read_text()).items()} == {
        "worker/0": "ready",
        "worker/1": "failed",
    }


def test_an_agent_that_cannot_write_does_not_start(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host.run_dir() / "spec.json").mkdir(parents=True)
    (host.run_dir() / "spec.json" / "x").touch()
    monkeypatch.setattr(launch, "clear", lambda run_dir: None)
    request = {"cluster": "lab", "cluster_id": ID, "host": "h", "spec": None, "lease_s": 60}
    with pytest.raises(Refused, match=r"cannot start an agent: .*Is a directory") as refused:
        launch.start_agent(request)
    assert refused.value.error["kind"] == "unfit"
    assert host.members() == []


def test_nonsense_to_the_agent(host: Host) -> None:
    link = host.agent()
    link.stream.write(b"nonsense\n")
    assert b'"invalid"' in link.line()
    for do in ("explode", None, "_end"):
        with pytest.raises(Refusal) as refusal:
            link.call(do)  # type: ignore[arg-type]
        assert refusal.value.kind == "unknown"
    for seconds in (0, -1, "x", None, True, 1e99):
        with pytest.raises(Refusal) as refusal:
            link.call("lease", holder="me", seconds=seconds)
        assert refusal.value.kind == "invalid"


def test_the_counter_of_memory_kills(tmp_path: Path) -> None:
    assert oom.kills(tmp_path) == 0
    for name, text in {
        "proc/self/cgroup": "1:cpu:/x\n0::/user.slice/a\n",
        "proc/vmstat": "nr_free_pages 7\noom_kill 5\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom.kills(tmp_path) == 5
    group = tmp_path / "sys/fs/cgroup/user.slice/a"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert oom.kills(tmp_path) == 2
