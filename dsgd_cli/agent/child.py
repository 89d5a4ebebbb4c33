"""One life of one process: its start, its channel (JSON lines both ways), its output, its end.

Never blocks: what the child does not read waits in a bounded buffer. The child leads its own
session; as long as it is not reaped its pid is the number of its group, so the group can be killed
without a doubt about whose it is. Reaping is therefore the last thing that happens to a life.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsgd_cli.agent import framing, names, oom, processes
from dsgd_cli.agent.framing import Message, Refused
from dsgd_cli.agent.life import Exit, Plan
from dsgd_cli.agent.logfile import LineDecoder, LogFile

CHANNEL_BYTES = 16 * 1024 * 1024
READ_BYTES = 64 * 1024
LAST_WORDS_BYTES = 4 * 1024 * 1024  # read after the end; more than any pipe holds
TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Hearing:
    """Who listens to a child."""

    message: Callable[[str, Message], None]  # process, message
    lines: Callable[[str, str, list[str]], None]  # process, stream, lines


class Child:
    """A started process, until `finish`."""

    def __init__(
        self,
        plan: Plan,
        life: str,
        run_dir: Path,
        selector: selectors.BaseSelector,
        hearing: Hearing,
    ) -> None:
        self.process = plan.process
        self.life = life
        self.started_at = time.time()
        self._selector, self._hearing = selector, hearing
        self._oom_kills = oom.kills()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._channel, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = _spawn(plan, life, run_dir, theirs.fileno())
            except (OSError, ValueError) as error:  # ValueError: a zero byte, a bad name
                self._channel.close()
                raise Refused("unfit", f"cannot start {plan.process}: {error}") from None
        self.pid = self._popen.pid
        self.start_time = processes.start_time(self.pid)
        self._inbox, self._outbox = bytearray(), bytearray()
        self._channel.setblocking(False)
        self._log = LogFile(run_dir / "logs" / f"{names.file_stem(plan.process)}.log")
        self._outputs: dict[str, tuple[int, LineDecoder]] = {}
        selector.register(self._channel, selectors.EVENT_READ, self._on_channel)
        for stream, pipe in (("stdout", self._popen.stdout), ("stderr", self._popen.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._outputs[stream] = pipe.fileno(), LineDecoder()
            selector.register(pipe, selectors.EVENT_READ, lambda _, s=stream: self._on_output(s))

    def tell(self, message: Message, *, droppable: bool = False) -> None:
        """One line to the child. Refused("busy") when it has not read for megabytes."""
        if self._channel.fileno() < 0 or (droppable and self._outbox):
            return
        if len(self._outbox) > CHANNEL_BYTES:
            raise Refused("busy", f"{self.process} does not read what it is told")
        self._outbox += framing.encode(message)
        self._write()

    def signal(self, number: signal.Signals) -> None:
        """To its whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended; it is not reaped yet."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def finish(self) -> Exit:
        """Kill what is left of its group, hear its last words, reap it."""
        self.signal(signal.SIGKILL)
        code = self._popen.wait()
        deadline = LAST_WORDS_BYTES
        while deadline > 0 and self._channel.fileno() >= 0 and (size := self._on_channel(1)):
            deadline -= size
        for stream in list(self._outputs):
            deadline = LAST_WORDS_BYTES
            while deadline > 0 and stream in self._outputs and (size := self._on_output(stream)):
                deadline -= size
            self._close_output(stream)
        self._close_channel()
        self._log.close()
        number = -code if code < 0 else None
        return Exit(
            self.pid,
            code if code >= 0 else None,
            _signal_name(number) if number else None,
            number == signal.SIGKILL and oom.kills() > self._oom_kills,
            tuple(self._tail),
            time.time(),
        )

    def _on_channel(self, mask: int) -> int:
        """The number of bytes read."""
        if mask & selectors.EVENT_WRITE:
            self._write()
        if not mask & selectors.EVENT_READ or self._channel.fileno() < 0:
            return 0
        try:
            data = self._channel.recv(READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        if not data or len(self._inbox) > framing.LINE_MAX_BYTES:
            self._close_channel()
            return 0
        for line in framing.split_lines(self._inbox, data):
            with contextlib.suppress(Refused):  # a line that is not ours does no harm
                self._hearing.message(self.process, framing.decode(line))
        return len(data)

    def _write(self) -> None:
        try:
            del self._outbox[: self._channel.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()  # it has closed its end; its exit tells the rest
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.modify(self._channel, mask, self._on_channel)

    def _on_output(self, stream: str) -> int:
        """The number of bytes read."""
        descriptor, decoder = self._outputs[stream]
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        if data:
            self._hear(stream, decoder.feed(data))
        else:
            self._close_output(stream)
        return len(data)

    def _hear(self, stream: str, lines: list[str]) -> None:
        if lines:
            self._log.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
            if stream == "stderr":
                self._tail.extend(lines)
            self._hearing.lines(self.process, stream, lines)

    def _close_output(self, stream: str) -> None:
        if stream in self._outputs:
            _, decoder = self._outputs.pop(stream)
            pipe = self._popen.stdout if stream == "stdout" else self._popen.stderr
            assert pipe is not None
            self._selector.unregister(pipe)
            pipe.close()
            self._hear(stream, decoder.feed(b"", final=True))

    def _close_channel(self) -> None:
        if self._channel.fileno() >= 0:
            self._selector.unregister(self._channel)
            self._channel.close()


def _spawn(plan: Plan, life: str, run_dir: Path, channel: int) -> subprocess.Popen[bytes]:
    environment = {**plan.env, "DSGD_AGENT_FD": str(channel)}
    environment |= {processes.PROCESS: plan.process, processes.LIFE: life}
    for name in (processes.CLUSTER, processes.CLUSTER_ID, processes.RUN_DIR):
        environment[name] = os.environ[name]  # whatever `env` says: the sweep relies on them
    return subprocess.Popen(
        plan.argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, **environment},
        cwd=run_dir,
        pass_fds=(channel,),
        start_new_session=True,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
