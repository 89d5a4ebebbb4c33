"""What every transport promises. A test module subclasses `TransportContract` (as `Test…`) and
gives two fixtures: `transport` (a Transport to a host) and `python` (a python3 on that host).

Nothing here may look at the host from outside: its files and pids may be those of another machine.
"""

from __future__ import annotations

import hashlib
import threading
import time

import pytest

from dsgd_cli.contract.errors import ConnectFailed, DeadlinePassed
from dsgd_cli.transport.base import Stream, Transport

ECHO = (
    "import os, sys\n"
    "left = int(sys.argv[1])\n"
    "while left > 0:\n"
    "    data = os.read(0, 4096)\n"
    "    left -= os.write(1, data) if data else left"
)
SILENT_READER = "import sys; sys.stdin.buffer.read()"
DEAF = "import sys, time; sys.stdout.write('up'); sys.stdout.flush(); time.sleep(60)"


def read_all(stream: Stream, timeout_s: float = 20.0) -> bytes:
    parts = []
    while part := stream.read(65536, timeout_s):
        parts.append(part)
    return b"".join(parts)


def read_exactly(stream: Stream, count: int, timeout_s: float = 20.0) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.read(count - len(data), timeout_s)
        assert part, f"end after {data!r}"
        data += part
    return data


def run(transport: Transport, argv: list[str], stdin: bytes = b"") -> tuple[int, bytes]:
    stream = transport.open(argv)
    try:
        if stdin:
            stream.write(stdin)
        out = read_all(stream)
        return stream.wait(20), out
    finally:
        stream.close()


class TransportContract:
    def test_arguments_arrive_as_they_are(self, transport: Transport, python: str) -> None:
        hostile = [
            "$(touch /tmp/x)",
            "`id`",
            "a b",
            "'",
            '"',
            "\\",
            "",
            "-rf",
            "*",
            "ü\u2028",
            "a\nb",
        ]
        script = "import sys; sys.stdout.buffer.write(ascii(sys.argv[1:]).encode())"
        status, out = run(transport, [python, "-I", "-c", script, *hostile])
        assert status == 0
        assert out.decode() == ascii(hostile)

    def test_megabytes_come_back_byte_for_byte(self, transport: Transport, python: str) -> None:
        data = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(100_000))
        stream = transport.open([python, "-I", "-c", ECHO, str(len(data))])
        writer = threading.Thread(target=stream.write, args=(data,))
        writer.start()
        try:
            assert hashlib.sha256(read_all(stream)).digest() == hashlib.sha256(data).digest()
            assert stream.wait(20) == 0
        finally:
            writer.join(20)
            stream.close()

    def test_a_few_bytes_are_not_held_back(self, transport: Transport, python: str) -> None:
        stream = transport.open([python, "-I", "-u", "-c", "while True: print(input())"])
        try:
            for word in (b"one\n", b"two\n"):
                stream.write(word)
                assert read_exactly(stream, len(word)) == word
        finally:
            stream.close()

    def test_the_last_bytes_and_the_status_come(self, transport: Transport, python: str) -> None:
        script = "import sys; n = len(sys.stdin.buffer.read(5)); print(n); sys.exit(n)"
        assert run(transport, [python, "-I", "-c", script], b"12345") == (5, b"5\n")

    def test_a_read_that_timed_out_loses_nothing(self, transport: Transport, python: str) -> None:
        stream = transport.open([python, "-I", "-u", "-c", "while True: print(input())"])
        try:
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                stream.read(10, 0.2)
            assert 0.15 < time.monotonic() - started < 5
            stream.write(b"late\n")
            assert read_exactly(stream, 5) == b"late\n"
        finally:
            stream.close()

    def test_stderr_never_blocks_and_its_tail_is_kept(
        self, transport: Transport, python: str
    ) -> None:
        script = "import sys; sys.stderr.write('x' * 3_000_000 + 'the end'); print('done')"
        stream = transport.open([python, "-I", "-c", script])
        try:
            assert read_all(stream) == b"done\n"
            assert stream.wait(20) == 0
            deadline = time.monotonic() + 10
            while not stream.stderr_tail().endswith("the end"):
                assert time.monotonic() < deadline, stream.stderr_tail()[-50:]
                time.sleep(0.01)
            assert len(stream.stderr_tail()) <= 8192
        finally:
            stream.close()

    def test_a_program_that_does_not_read_meets_the_deadline(
        self, transport: Transport, python: str
    ) -> None:
        stream = transport.open([python, "-I", "-c", DEAF])
        try:
            assert read_exactly(stream, 2) == b"up"
            started = time.monotonic()
            with pytest.raises(DeadlinePassed):
                stream.write(b"x" * 50_000_000, timeout_s=0.5)
            assert time.monotonic() - started < 15
        finally:
            stream.close()

    def test_waiting_for_a_program_that_goes_on_meets_the_deadline(
        self, transport: Transport, python: str
    ) -> None:
        stream = transport.open([python, "-I", "-c", SILENT_READER])
        try:
            with pytest.raises(DeadlinePassed):
                stream.wait(0.2)
        finally:
            stream.close()

    def test_writing_to_a_program_that_ended(self, transport: Transport, python: str) -> None:
        stream = transport.open([python, "-I", "-c", "import sys; sys.exit('I will not')"])
        try:
            assert read_all(stream) == b""
            assert stream.wait(20) == 1
            with pytest.raises(ConnectFailed):
                for _ in range(100):
                    stream.write(b"x" * 65536)
        finally:
            stream.close()

    def test_a_program_that_does_not_exist(self, transport: Transport) -> None:
        stream = transport.open(["/nonexistent/python3", "-c", "pass"])
        try:
            assert read_all(stream) == b""
            assert stream.wait(20) == 127
        finally:
            stream.close()

    def test_closing_ends_a_program_that_reads(self, transport: Transport, python: str) -> None:
        script = f"import os; print(os.getpid(), flush=True); {SILENT_READER}"
        stream = transport.open([python, "-I", "-c", script])
        pid = b""
        while not pid.endswith(b"\n"):
            pid += read_exactly(stream, 1)
        stream.close()
        stream.close()
        look = f"import os; print(os.path.exists('/proc/{int(pid)}'))"
        deadline = time.monotonic() + 10
        while run(transport, [python, "-I", "-c", look]) != (0, b"False\n"):
            assert time.monotonic() < deadline, "still there"

    def test_closing_wakes_a_reader(self, transport: Transport, python: str) -> None:
        stream = transport.open([python, "-I", "-c", DEAF])
        assert read_exactly(stream, 2) == b"up"
        seen: list[bytes] = []
        waiting = threading.Event()

        def read() -> None:
            waiting.set()
            seen.append(stream.read(1, None))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert waiting.wait(10)
        stream.close()
        reader.join(10)
        assert seen == [b""]

    def test_after_closing(self, transport: Transport, python: str) -> None:
        stream = transport.open([python, "-I", "-c", ECHO, "1"])
        stream.close()
        assert stream.read(1, 1) == b""
        with pytest.raises(ConnectFailed):
            stream.write(b"x")

    def test_streams_are_independent(self, transport: Transport, python: str) -> None:
        streams = [transport.open([python, "-I", "-c", ECHO, "1"]) for _ in range(3)]
        try:
            for number, stream in enumerate(streams):
                stream.write(f"{number}".encode())
            assert [read_all(stream) for stream in reversed(streams)] == [b"2", b"1", b"0"]
        finally:
            for stream in streams:
                stream.close()

    def test_closing_the_transport_closes_its_streams(
        self, transport: Transport, python: str
    ) -> None:
        stream = transport.open([python, "-I", "-c", ECHO, "1"])
        transport.close()
        transport.close()
        assert stream.read(1, 1) == b""
