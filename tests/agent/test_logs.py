"""Log files: bounded, whole lines, and read back without a gap or a repetition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsgd_cli.agent.logfile import LINE_MAX_BYTES, LineDecoder, LogFile
from tests.agent.client import Host, Lines, Refusal


def written(path: Path, count: int, max_bytes: int = 16 << 20, first: int = 0) -> LogFile:
    log = LogFile(path, max_bytes=max_bytes)
    for number in range(first, first + count):
        log.write(f"line {number}\n".encode())
    return log


def read(remote: Lines, **arguments: object) -> list[str]:
    number = remote.ask("logs", cluster="lab", **arguments)
    lines = []
    while True:
        message = json.loads(remote.line())
        if "log" not in message:
            assert message == {"id": number, "ok": {}}, message
            return lines
        lines.append("{process} {line}".format(**message["log"]))


@pytest.fixture
def logs(host: Host) -> Path:
    folder = host.run_dir() / "logs"
    folder.mkdir(parents=True)
    return folder


def test_files_are_bounded_and_in_order(tmp_path: Path) -> None:
    written(tmp_path / "w.log", 1000, max_bytes=1000).close()
    files = [tmp_path / name for name in ("w.log.2", "w.log.1", "w.log")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 1000 for file in files)
    numbers = [int(line.split()[1]) for file in files for line in file.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 1000))


def test_lines_are_cut_and_bytes_are_decoded_wherever_they_break() -> None:
    text = "grün 😀 ende\n" * 3
    for size in (1, 2, 3, 5, 1000):
        decoder = LineDecoder()
        data = text.encode()
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        assert [line for part in parts for line in decoder.feed(part)] == ["grün 😀 ende"] * 3
    decoder = LineDecoder()
    assert decoder.feed(b"bad \xff\xfe\r\nrest") == ["bad ��"]
    assert decoder.feed(b"\xe2\x82", final=True) == ["rest�"]
    decoder = LineDecoder()
    long = [line for _ in range(50) for line in decoder.feed("😀".encode() * 10_000)]
    long += decoder.feed(b"", final=True)
    assert "".join(long) == "😀" * 500_000
    assert all(0 < len(line.encode()) <= LINE_MAX_BYTES for line in long)


def test_the_end_of_rotated_files(host: Host, logs: Path) -> None:
    written(logs / "worker-0.log", 150, max_bytes=300).close()
    kept = sum(len(path.read_text().splitlines()) for path in logs.iterdir())
    assert 45 < kept < 120 and len(list(logs.iterdir())) == 3
    remote = host.connect()
    for tail in (0, 1, 7, 30, 31, 32, 40, kept):
        expected = [f"worker/0 line {n}" for n in range(150 - tail, 150)]
        assert read(remote, tail=tail) == expected
    everything = [f"worker/0 line {n}" for n in range(150 - kept, 150)]
    assert read(remote, tail="all") == read(remote, tail=1000) == everything


def test_long_lines_and_blocks(host: Host, logs: Path) -> None:
    lines = [str(number) * 30_000 for number in range(9)]
    (logs / "worker-0.log").write_text("".join(f"{line}\n" for line in lines))
    remote = host.connect()
    cut = [len(line) for line in read(remote, tail=2)]
    assert sum(cut) - 2 * 9 * (len(cut) // 2) == 60_000
    assert read(remote, tail=9)[0].startswith("worker/0 000")


def test_several_processes_each_in_order(host: Host, logs: Path) -> None:
    for name in ("worker-0", "server-1", "coordinator-0", "agent"):
        written(logs / f"{name}.log", 3).close()
    remote = host.connect()
    shown = [line.split()[0] for line in read(remote, tail=2)]
    assert shown == ["coordinator/0"] * 2 + ["server/1"] * 2 + ["worker/0"] * 2
    assert read(remote, tail=1, processes=["worker/0"]) == ["worker/0 line 2"]
    assert read(remote, tail=1, processes=["agent"]) == ["agent line 2"]
    assert read(remote, tail="all", processes=["worker/7"]) == []


def test_following_over_rotation_and_late_files(host: Host, logs: Path) -> None:
    log = written(logs / "worker-0.log", 30, max_bytes=300)
    remote = host.connect()
    number = remote.ask("logs", cluster="lab", tail=5, follow=True)
    seen: dict[str, list[int]] = {"worker/0": [], "server/3": []}

    def until(process: str, last: int) -> None:
        while not seen[process] or seen[process][-1] != last:
            said = json.loads(remote.line())["log"]
            seen[said["process"]].append(int(said["line"].split()[1]))

    until("worker/0", 29)
    for start in range(30, 120, 10):  # rotates at every third step
        for n in range(start, start + 10):
            log.write(f"line {n}\n".encode())
        until("worker/0", start + 9)
    late = written(logs / "server-3.log", 4)
    until("server/3", 3)
    assert seen == {"worker/0": list(range(25, 120)), "server/3": [0, 1, 2, 3]}
    next_number = remote.ask("verify", cluster="lab")
    assert json.loads(remote.line()) == {"id": number, "ok": {}}
    assert remote.reply(next_number)["left"] == []
    log.close()
    late.close()


def test_logs_of_nothing(host: Host) -> None:
    """Neither when nothing ran ever, nor when a launcher has only just begun."""
    remote = host.connect()
    for follow in (False, True):
        with pytest.raises(Refusal) as refusal:
            remote.call("logs", cluster="lab", tail=1, follow=follow)
        assert refusal.value.error == {"kind": "missing", "message": "nothing of lab runs here"}
        remote.call("hold", cluster="lab", owner={})


def test_bad_arguments(host: Host, logs: Path) -> None:
    remote = host.connect()
    bad = [{"tail": -1}, {"tail": "x"}, {"processes": "worker/0"}, {"processes": ["../x"]}]
    for arguments in bad:
        with pytest.raises(Refusal) as refusal:
            remote.call("logs", cluster="lab", **arguments)
        assert refusal.value.kind == "invalid"
