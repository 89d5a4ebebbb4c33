"""Events of agents -> messages, notes, verdicts."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from dsgd_cli.contract.errors import ProcessDied
from dsgd_cli.launcher.watch import Watch


class Screen:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def log_line(self, process: str, host: str, line: str, stream: str) -> None:
        self.lines.append(f"{process}@{host} {stream}: {line}")


def watch(*events: dict[str, Any], host: str = "a") -> tuple[Watch, Screen]:
    events_queue: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    for event in events:
        events_queue.put((host, event))
    screen = Screen()
    return Watch(events_queue, screen, "a"), screen


def exited(process: str, **changes: Any) -> dict[str, Any]:
    return {
        "event": "exited",
        "process": process,
        "pid": 7,
        "status": None,
        "signal": "SIGKILL",
        "oom": False,
        "restart_in_s": None,
        "restarts": 0,
        "tail": ["the last line"],
        **changes,
    }


def test_messages_come_in_order_and_log_lines_are_shown() -> None:
    seen, screen = watch(
        {"event": "log", "process": "worker/0", "stream": "stdout", "line": "hi", "t": 0},
        {"event": "child", "process": "worker/0", "message": {"type": "ready"}},
        {"event": "child", "process": "server/0", "message": {"type": "ready"}},
    )
    assert [seen.next(1).process, seen.next(1).process] == ["worker/0", "server/0"]
    assert seen.next(0.01) is None
    assert screen.lines == ["worker/0@a stdout: hi"]


def test_a_dead_server_ends_the_run_with_its_last_lines() -> None:
    seen, _ = watch(exited("server/0"))
    with pytest.raises(ProcessDied, match=r"server/0@a \(pid 7\) failed: killed by SIGKILL") as e:
        seen.next(1)
    assert e.value.details == ("its last lines:", "  the last line")
    assert e.value.exit_code == 6


def test_a_dead_worker_that_is_restarted_is_a_note() -> None:
    seen, screen = watch(
        exited("worker/1", restart_in_s=1.0),
        {"event": "started", "process": "worker/1", "pid": 9, "restarts": 1},
    )
    assert seen.next(0.01) is None
    assert "killed by SIGKILL; its agent restarts it in 1 s (1/5)" in screen.notes[0]
    assert screen.notes[1] == "worker/1@a restarted (1/5)"


def test_a_worker_that_its_agent_gave_up_on_ends_the_run_with_its_own_words() -> None:
    said = {"type": "failed", "error": "no coordinator", "traceback": "File x\nValueError: y"}
    seen, _ = watch(
        {"event": "child", "process": "worker/1", "message": said},
        exited("worker/1", status=1, signal=None),
    )
    assert seen.next(1).message == said
    with pytest.raises(ProcessDied, match="worker/1@a failed: no coordinator") as caught:
        seen.next(1)
    assert caught.value.details == ("File x", "ValueError: y")


def test_losing_the_coordinators_host_ends_the_run_and_another_host_is_a_note() -> None:
    seen, screen = watch({"event": "lost"}, host="b")
    assert seen.next(0.01) is None
    assert "connection to b is lost" in screen.notes[0]
    seen, _ = watch({"event": "lost"}, host="a")
    with pytest.raises(ProcessDied, match="connection to the coordinator's host is lost"):
        seen.next(1)


def test_deaths_are_expected_while_the_cluster_ends() -> None:
    seen, screen = watch(exited("server/0"), {"event": "lost"})
    seen.ending = True
    assert seen.next(0.01) is None
    assert screen.notes == []


def test_a_probe_that_ends_without_a_word_has_failed() -> None:
    said = {"event": "child", "process": "probe", "message": {"type": "probed"}}
    seen, _ = watch(said, exited("probe", status=0, signal=None))
    assert seen.next(0.01) is not None
    assert seen.next(0.01) is None
    seen, _ = watch(exited("probe", status=0, signal=None))
    with pytest.raises(ProcessDied, match=r"probe@a \(pid 7\) failed: exit status 0"):
        seen.next(1)
