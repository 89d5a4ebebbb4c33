"""The verbs of the bootstrap, over a real process."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from dsgd_cli.agent import paths, processes
from tests.agent.client import Host, Lines, Refusal, eventually

HOSTILE = [
    "",
    "-rf",
    "../x",
    "a/b",
    "$(id)",
    "A",
    "a b",
    "a\n",
    "a@b",
    "ü",
    "x" * 64,
    None,
    7,
    ["a"],
]
OWNER = {"user": "mia", "host": "laptop", "pid": 4711, "since": "10:02"}


def test_observe_an_empty_host(host: Host) -> None:
    remote = host.connect()
    wanted = {"code": "ab" * 8, "env": ["cd" * 8], "files": []}
    seen = remote.call("observe", cluster="lab", wanted=wanted)
    assert seen["missing"] == {"code": True, "env": ["cd" * 8], "files": []}
    assert (seen["agent"], seen["processes"], seen["spec"]) == (None, {}, None)
    assert seen["leftovers"] == []
    assert seen["run_dir"] == str(host.run_dir())
    assert seen["libc"] is None or seen["libc"][0] in ("glibc", "musl")
    assert seen["disk_free_bytes"] > 0
    assert seen["boot_id"] == processes.boot_id()
    assert not (host.root / "state").exists(), "looking creates nothing"
    assert remote.call("observe", cluster="lab")["missing"]["code"] is False


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "verb", ["observe", "hold", "start_agent", "attach", "teardown", "verify", "purge", "logs"]
)
def test_hostile_cluster_names_are_refused(shared: Lines, verb: str, name: object) -> None:
    with pytest.raises(Refusal) as refusal:
        shared.call(verb, cluster=name, owner={}, cluster_id="0" * 16, lease_s=1)
    assert refusal.value.kind == "invalid"


def test_nonsense_is_answered_and_does_no_harm(host: Host) -> None:
    remote = host.connect()
    for line in (b"}{", b"[1]", b'"x"', b"\xff\xfe", b"null", b"[" * 100_000):
        remote.stream.write(line + b"\n")
        assert json.loads(remote.line())["error"]["kind"] == "invalid"
    with pytest.raises(Refusal) as refusal:
        remote.call("observe_all")
    assert refusal.value.kind == "unknown"
    assert remote.call("verify", cluster="lab") == {"left": [], "files": [], "results": []}


def test_one_launcher_holds_a_cluster(host: Host) -> None:
    first, second = host.connect(), host.connect()
    assert first.call("hold", cluster="lab", owner=OWNER) == {}
    assert first.call("hold", cluster="lab", owner=OWNER) == {}
    with pytest.raises(Refusal) as refusal:
        second.call("hold", cluster="lab", owner={"user": "bob"})
    assert refusal.value.kind == "held"
    assert refusal.value.error["owner"] == OWNER
    assert second.call("hold", cluster="other", owner={"user": "bob"}) == {}
    first.close()
    assert second.call("hold", cluster="lab", owner={"user": "bob"}) == {}


def test_a_killed_launcher_holds_nothing(host: Host) -> None:
    first = host.connect()
    first.call("hold", cluster="lab", owner=OWNER)
    assert host.run_dir().is_dir()
    first.hang_up()
    assert first.stream.wait(5) == 0
    assert not host.run_dir().exists(), "a hold alone leaves nothing"
    assert host.connect().call("hold", cluster="lab", owner=OWNER) == {}


def test_a_killed_bootstrap_holds_nothing(host: Host) -> None:
    first = host.connect()
    first.call("hold", cluster="lab", owner=OWNER)
    first.kill()
    assert host.connect().call("hold", cluster="lab", owner=OWNER) == {}


def test_a_bootstrap_whose_launcher_leaves_gives_back_what_it_holds(host: Host) -> None:
    first = host.connect()
    first.call("hold", cluster="lab", owner=OWNER)
    assert host.run_dir().exists()
    first.close()
    assert not host.run_dir().exists()


def test_the_folders_are_private(host: Host) -> None:
    host.start_agent()
    for path in [host.run_dir(), *host.run_dir().rglob("*"), paths.socket_dir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_foreign_socket_folder_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsgd_cli.agent.framing import Refused

    trap = host.root / "trap"
    (host.root / "elsewhere").mkdir(mode=0o700)
    trap.symlink_to(host.root / "elsewhere")
    monkeypatch.setattr(paths, "socket_dir", lambda: trap)
    with pytest.raises(Refused, match="not a private folder"):
        paths.make_socket_dir()
    trap.unlink()
    trap.mkdir(mode=0o755)
    trap.chmod(0o755)
    with pytest.raises(Refused, match="not a private folder"):
        paths.make_socket_dir()


def result_file(host: Host, text: bytes = b"weights") -> Path:
    path = paths.results_dir("lab") / "run-1" / "slice-0"
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    return path


def test_results_are_listed_sent_and_removed(host: Host) -> None:
    path = result_file(host, bytes(range(256)) * 4096)
    remote = host.connect()
    assert remote.call("verify", cluster="lab")["results"] == [
        {"path": str(path), "bytes": 1 << 20}
    ]
    size = remote.call("send", path=str(path))["size"]
    assert remote.exactly(size) == path.read_bytes()
    assert remote.call("remove", path=str(path)) == {"removed": True}
    assert not paths.state().exists(), "empty folders go, too"
    assert remote.call("remove", path=str(path)) == {"removed": False}
    with pytest.raises(Refusal) as refusal:
        remote.call("send", path=str(path))
    assert refusal.value.kind == "missing"


def test_purge_removes_what_is_not_home(host: Host) -> None:
    path = result_file(host)
    remote = host.connect()
    removed = remote.call("purge", cluster="lab")["removed"]
    assert removed == [{"path": str(path), "bytes": 7}]
    assert remote.call("purge", cluster="lab") == {"removed": []}
    assert not paths.state().exists()


def test_only_files_of_clusters_are_sent_or_removed(host: Host) -> None:
    inside = result_file(host)
    secret = host.root / "secret"
    secret.write_text("key")
    link = inside.with_name("link")
    link.symlink_to(secret)
    remote = host.connect()
    state = paths.state()
    outside = ["/etc/passwd", str(secret), str(link), f"{state}/results/../../../secret"]
    outside += [str(state), f"{state}/results", f"{state}/run", "results/x", "", None, "/x\0y"]
    for path in outside:
        for verb in ("send", "remove"):
            with pytest.raises(Refusal) as refusal:
                remote.call(verb, path=path)
            assert refusal.value.kind in ("forbidden", "invalid"), path
    assert secret.exists() and inside.exists()


def test_it_ends_with_its_input_even_while_it_follows(host: Host) -> None:
    host.start_agent()
    for verb in ("attach", "logs"):
        remote = host.connect()
        remote.call("hold", cluster="lab", owner=OWNER)
        number = remote.ask(verb, cluster="lab", follow=True)
        if verb == "attach":
            remote.reply(number)
            remote.call("hello")
        other = host.connect()
        with pytest.raises(Refusal) as refusal:
            other.call("hold", cluster="lab", owner={"user": "bob"})
        assert refusal.value.error["owner"] == OWNER
        remote.hang_up()
        assert remote.stream.wait(5) == 0
        assert other.call("hold", cluster="lab", owner={"user": "bob"}) == {}
        other.close()


def test_the_bridge_ends_with_the_agent(host: Host) -> None:
    pid = host.start_agent()
    link = host.attach()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        eventually(lambda: link.line() and None)
    assert link.stream.wait(5) == 0


def test_attach_without_an_agent(host: Host) -> None:
    remote = host.connect()
    with pytest.raises(Refusal) as refusal:
        remote.call("attach", cluster="lab")
    assert refusal.value.kind == "missing"
    assert remote.call("verify", cluster="lab")["left"] == [], "the connection still serves"
