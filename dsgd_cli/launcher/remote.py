"""The launcher's side of a host: `Remote` talks to a bootstrap, `AgentLink` to an agent.

Both speak JSON lines: `{"id": 1, "do": verb, ...}` out, `{"id": 1, "ok": {...}}` or
`{"id": 1, "error": {"kind", "message"}}` back. A link also receives events, which a reader thread
hands to a queue. Every wait has a deadline. What a host says is data: it is never evaluated.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from dsgd_cli.agent import payload
from dsgd_cli.contract.errors import (
    ClusterHeld,
    ConnectFailed,
    DeadlinePassed,
    DsgdError,
    HostError,
    HostUnfit,
)
from dsgd_cli.transport.base import Stream, Transport

Message = dict[str, Any]
READY = b"DSGD-READY "
NOISE_MAX_BYTES = 64 * 1024
LINE_MAX_BYTES = 64 * 1024 * 1024
START_TIMEOUT_S = 20.0
CALL_TIMEOUT_S = 30.0


class Missing(HostError):
    """The host does not have what was asked for."""


class Lines:
    """Splits a stream into lines, and hands out raw bytes where a reply announces them."""

    def __init__(self, stream: Stream, host: str) -> None:
        self._stream = stream
        self._host = host
        self._buffer = bytearray()

    def line(self, timeout_s: float | None) -> bytes | None:
        """The next line without its end; None at EOF. Raises TimeoutError."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        scanned = 0
        while True:
            newline = self._buffer.find(b"\n", scanned)
            if newline >= 0:
                line = bytes(self._buffer[:newline])
                del self._buffer[: newline + 1]
                return line
            scanned = len(self._buffer)
            if scanned > LINE_MAX_BYTES:
                raise HostError(self._host, "sent a line without end")
            if not self._fill(end):
                return None

    def exactly(self, size: int, timeout_s: float) -> Iterator[bytes]:
        """`size` raw bytes, in chunks; `timeout_s` is for each chunk (progress-based)."""
        while size:
            if not self._buffer and not self._fill(time.monotonic() + timeout_s):
                raise ConnectFailed(self._host, f"the connection ended {size} bytes too early")
            chunk = bytes(self._buffer[:size])
            del self._buffer[: len(chunk)]
            size -= len(chunk)
            yield chunk

    def _fill(self, end: float | None) -> bool:
        left = None if end is None else max(0.0, end - time.monotonic())
        data = self._stream.read(256 * 1024, left)
        self._buffer += data
        return bool(data)


class Remote:
    """One bootstrap process on a host: requests and replies, one after the other."""

    def __init__(self, transport: Transport, python: str) -> None:
        self.host = transport.host
        self._stream = transport.open([python, "-I", "-u", "-c", payload.STUB])
        self._lines = Lines(self._stream, self.host)
        self._next_id = 0
        try:
            self._stream.write(payload.payload("serve"))
            self._await_ready(python)
        except BaseException:
            self._stream.close()
            raise

    def _await_ready(self, python: str) -> None:
        noise = b""
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                line = self._lines.line(max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise DeadlinePassed(
                    "the bootstrap",
                    self.host,
                    START_TIMEOUT_S,
                    details=_last_lines(noise + self._stream.stderr_tail().encode()),
                ) from None
            if line is None:
                raise self._no_python(python, noise)
            if line.startswith(READY):
                return
            if line.startswith(b'{"error"'):
                raise HostUnfit(
                    self.host,
                    str(json.loads(line)["error"]["message"]),
                    remedy="set `python:` for this host to a python3 of version 3.10 or newer",
                )
            noise += line + b"\n"
            if len(noise) > NOISE_MAX_BYTES:
                raise HostUnfit(
                    self.host, "its login shell prints more than 64 KiB", remedy="quieten it"
                )

    def _no_python(self, python: str, noise: bytes) -> HostUnfit:
        try:
            status = f"exit status {self._stream.wait(5.0)}"
        except DsgdError:
            status = "no exit status"
        said = _last_lines(noise + self._stream.stderr_tail().encode())
        return HostUnfit(
            self.host,
            f"{python!r} did not start there ({status})",
            details=said,
            remedy="install python3 (3.10 or newer) there, or set `python: /path/to/python3`",
        )

    def call(self, do: str, *, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any) -> Message:
        """Send one request and wait for its reply."""
        self.request(do, **arguments)
        return self.reply(do, timeout_s)

    def request(self, do: str, **arguments: Any) -> None:
        self._next_id += 1
        self._stream.write(_encode({"id": self._next_id, "do": do, **arguments}))

    def reply(self, do: str, timeout_s: float) -> Message:
        message = self._message(do, timeout_s)
        if "error" in message:
            raise refusal(self.host, do, message["error"])
        ok: Message = message["ok"]
        return ok

    def _message(self, do: str, timeout_s: float | None) -> Message:
        try:
            line = self._lines.line(timeout_s)
        except TimeoutError:
            assert timeout_s is not None
            raise DeadlinePassed(do, self.host, timeout_s) from None
        if line is None:
            raise ConnectFailed(
                self.host,
                f"the connection ended during {do!r}",
                details=_last_lines(self._stream.stderr_tail().encode()),
            )
        try:
            message: Message = json.loads(line)
        except ValueError:
            raise HostError(self.host, f"{do}: sent {line[:80]!r} instead of JSON") from None
        return message

    def write(self, data: bytes) -> None:
        """Raw bytes after a request that announced them."""
        self._stream.write(data)

    def raw(self, size: int, timeout_s: float = CALL_TIMEOUT_S) -> Iterator[bytes]:
        """Raw bytes that a reply announced."""
        return self._lines.exactly(size, timeout_s)

    def log_lines(self, **arguments: Any) -> Iterator[Message]:
        """The `logs` verb: {"process", "line"} until its end (for ever with follow=True)."""
        self.request("logs", **arguments)
        while True:
            message = self._message("logs", None if arguments.get("follow") else CALL_TIMEOUT_S)
            if "log" not in message:
                if "error" in message:
                    raise refusal(self.host, "logs", message["error"])
                return
            yield message["log"]

    def attach(self, cluster: str, events: queue.SimpleQueue[tuple[str, Message]]) -> AgentLink:
        """Turn this connection into a bridge to the cluster's agent there."""
        self.call("attach", cluster=cluster)
        return AgentLink(self.host, self._stream, self._lines, events)

    def close(self) -> None:
        self._stream.close()


class AgentLink:
    """A connection to the agent of one host; its events go to `events` as (host, event).

    When the connection ends, a last event {"event": "lost"} is put there, and calls that wait
    raise ConnectFailed. Calls may come from several threads.
    """

    def __init__(
        self,
        host: str,
        stream: Stream,
        lines: Lines,
        events: queue.SimpleQueue[tuple[str, Message]],
    ) -> None:
        self.host = host
        self._stream = stream
        self._lines = lines
        self._events = events
        self._lock = threading.Lock()
        self._next_id = 0
        self._waiting: dict[int, queue.Queue[Message]] = {}
        self._lost = False
        threading.Thread(target=self._read, name=f"events {host}", daemon=True).start()

    def call(self, do: str, *, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any) -> Message:
        """Send one command and wait for its reply."""
        answer: queue.Queue[Message] = queue.Queue()
        with self._lock:
            if self._lost:
                raise ConnectFailed(self.host, "the connection to its agent is lost")
            self._next_id += 1
            number = self._next_id
            self._waiting[number] = answer
            self._stream.write(_encode({"id": number, "do": do, **arguments}))
        try:
            message = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlinePassed(do, self.host, timeout_s) from None
        finally:
            self._waiting.pop(number, None)
        if "error" in message:
            raise refusal(self.host, do, message["error"])
        ok: Message = message["ok"]
        return ok

    def _read(self) -> None:
        try:
            while (line := self._lines.line(None)) is not None:
                self._dispatch(json.loads(line))
        except (DsgdError, OSError, ValueError):
            pass  # a broken connection and a garbled one end the same way
        with self._lock:
            self._lost = True
        for waiting in list(self._waiting.values()):
            waiting.put({"error": {"kind": "lost", "message": "the connection was lost"}})
        self._events.put((self.host, {"event": "lost"}))

    def _dispatch(self, message: Message) -> None:
        if "event" in message:
            self._events.put((self.host, message))
        elif (waiting := self._waiting.get(message.get("id", -1))) is not None:
            waiting.put(message)

    def close(self) -> None:
        self._stream.close()


def refusal(host: str, do: str, error: Message) -> DsgdError:
    """The exception for an `error` reply."""
    kind, message = str(error.get("kind")), str(error.get("message"))
    if kind == "held":
        owner = error.get("owner") or {}
        who = "{user}@{host} (pid {pid})".format(
            **{key: owner.get(key, "?") for key in ("user", "host", "pid")}
        )
        return ClusterHeld(
            f"the cluster is held by {who} since {owner.get('since', '?')}",
            remedy="wait for it, stop it there, or take it down with `dsgd down --force`",
        )
    if kind == "lost":
        return ConnectFailed(host, f"{do}: {message}")
    if kind == "missing":
        return Missing(host, message)
    if kind in ("unfit", "busy"):
        return HostUnfit(host, message)
    return HostError(host, f"{do}: {message}")


def _encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _last_lines(data: bytes, count: int = 20) -> list[str]:
    return [f"  {line}" for line in data.decode("utf-8", "replace").splitlines()[-count:]]
