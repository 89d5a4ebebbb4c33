"""The connections to the agent's socket: requests in, replies and events out, never blocking.

A subscriber that does not read costs bounded memory: its log lines are counted instead of queued
when 4 MB wait, and it is cut off at 64 MB of what may not be dropped.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable

from dsgd_cli.agent import framing
from dsgd_cli.agent.framing import Message, Refused

LOG_QUEUE_BYTES = 4 * 1024 * 1024
QUEUE_BYTES = 64 * 1024 * 1024


class Client:
    """One connection."""

    def __init__(
        self,
        connection: socket.socket,
        selector: selectors.BaseSelector,
        answer: Callable[[Client, Message], Message | None],
    ) -> None:
        self.open = True
        self.subscribed = False
        self.logs = False
        self._socket, self._selector, self._answer = connection, selector, answer
        self._inbox = bytearray()
        self._outbox: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._skipped: dict[str, int] = {}
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, self._on_event)

    def send(self, data: bytes) -> None:
        """Queue a line that may not be dropped."""
        if not self.open:
            return
        if not self._outbox:
            self._selector.modify(
                self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self._on_event
            )
        self._outbox.append(memoryview(data))
        self._queued_bytes += len(data)
        if self._queued_bytes > QUEUE_BYTES:
            self.close()

    @property
    def full(self) -> bool:
        return self._queued_bytes > LOG_QUEUE_BYTES or bool(self._skipped)

    def skip(self, process: str, lines: int) -> None:
        """Count log lines instead of sending them; told when there is room again."""
        self._skipped[process] = self._skipped.get(process, 0) + lines

    def reply(self, number: object, ok: Message) -> None:
        self.send(framing.encode({"id": number, "ok": ok}))

    def flush(self, timeout_s: float) -> None:
        """Blocking, for the end: what waits goes out, or not."""
        if self.open:
            self._socket.settimeout(timeout_s)
            with contextlib.suppress(OSError):
                self._socket.sendall(b"".join(self._outbox))
            self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._selector.unregister(self._socket)
            self._socket.close()
            self._outbox.clear()

    def _on_event(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._write()
            if mask & selectors.EVENT_READ:
                self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _write(self) -> None:
        while self._outbox:
            sent = self._socket.send(self._outbox[0])
            self._queued_bytes -= sent
            if sent < len(self._outbox[0]):
                self._outbox[0] = self._outbox[0][sent:]
                break
            self._outbox.popleft()
        if self._skipped and self._queued_bytes < LOG_QUEUE_BYTES // 2:
            skipped, self._skipped = self._skipped, {}
            for process, lines in skipped.items():
                event = {"event": "skipped", "process": process, "lines": lines}
                self.send(framing.encode(event))
        if not self._outbox:
            self._selector.modify(self._socket, selectors.EVENT_READ, self._on_event)

    def _read(self) -> None:
        data = self._socket.recv(framing.CHUNK_BYTES)
        if not data or len(self._inbox) > framing.LINE_MAX_BYTES:
            self.close()
            return
        for line in framing.split_lines(self._inbox, data):
            if self.open and line.strip():
                self._handle(line)

    def _handle(self, line: bytes) -> None:
        number = None
        try:
            request = framing.decode(line)
            number = request.get("id")
            ok = self._answer(self, request)
        except Refused as refusal:
            self.send(framing.encode({"id": number, "error": refusal.error}))
        except OSError as error:
            said = {"kind": "unfit", "message": str(error)}
            self.send(framing.encode({"id": number, "error": said}))
        except Exception as error:  # a bug in one command must not end a training
            text = traceback.format_exc()
            framing.complain(text)
            said = {"kind": "internal", "message": repr(error), "traceback": text}
            self.send(framing.encode({"id": number, "error": said}))
        else:
            if ok is not None:
                self.reply(number, ok)


class Clients:
    """All connections, and the socket that they come from."""

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        answer: Callable[[Client, Message], Message | None],
    ) -> None:
        self._listener, self._selector, self._answer = listener, selector, answer
        self._clients: list[Client] = []
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def emit(self, event: Message) -> None:
        """An event that no subscriber misses."""
        if subscribers := self._subscribers():
            data = framing.encode(event)
            for client in subscribers:
                client.send(data)

    def emit_lines(self, process: str, stream: str, lines: list[str]) -> None:
        """Log lines, to those who want them and keep up."""
        readers = [client for client in self._subscribers() if client.logs]
        for client in readers:
            if client.full:
                client.skip(process, len(lines))
        if takers := [client for client in readers if not client.full]:
            event: Message = {"event": "log", "process": process, "stream": stream}
            event["t"] = time.time()
            data = b"".join(framing.encode({**event, "line": line}) for line in lines)
            for client in takers:
                client.send(data)

    def close(self, flush_s: float) -> None:
        for client in self._clients:
            client.flush(flush_s)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _subscribers(self) -> list[Client]:
        return [client for client in self._clients if client.open and client.subscribed]

    def _accept(self, mask: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._clients = [client for client in self._clients if client.open]
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (os.getuid(), 0):
            connection.close()
            return
        self._clients.append(Client(connection, self._selector, self._answer))
