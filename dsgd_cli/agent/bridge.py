"""Joins stdin and stdout to the agent's unix socket, byte for byte, until either side ends.

Buffers are bounded: a launcher that does not read stops the agent's side of this connection, and
nothing else. The end of stdin ends it at once; the agent's end first flushes what it had said.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

from dsgd_cli.agent import paths
from dsgd_cli.agent.framing import Refused

BUFFER_BYTES = 1 << 20
FLUSH_S = 5.0


def connect(run_dir: Path, timeout_s: float = 5.0) -> socket.socket:
    """A connection to the agent. Refused("missing") when there is none."""
    joined = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    joined.settimeout(timeout_s)
    try:
        joined.connect(str(paths.socket_path(run_dir)))
    except OSError as error:
        joined.close()
        name = run_dir.name.partition("@")[0]
        raise Refused("missing", f"no agent of {name} answers here ({error})") from None
    return joined


def join(agent: socket.socket, first: bytes) -> None:
    """`first` is what was already read from stdin. Returns when either side ended."""
    to_agent, to_launcher = bytearray(first), bytearray()
    agent.setblocking(False)
    os.set_blocking(1, False)
    agent_ended = False
    link = agent.fileno()
    while not (agent_ended and not to_launcher):
        poll = select.poll()
        if not agent_ended:
            poll.register(0, select.POLLIN if len(to_agent) < BUFFER_BYTES else 0)
            wanted = select.POLLIN if len(to_launcher) < BUFFER_BYTES else 0
            poll.register(link, wanted | (select.POLLOUT if to_agent else 0))
        # without POLLOUT asked for, poll still tells that stdout was closed (POLLERR)
        poll.register(1, select.POLLOUT if to_launcher else 0)
        ready = dict(poll.poll(FLUSH_S * 1000 if agent_ended else None))
        if agent_ended and not ready:
            return
        if ready.get(1, 0) & (select.POLLERR | select.POLLNVAL):
            return
        if ready.get(1, 0) & select.POLLOUT:
            with contextlib.suppress(BlockingIOError):
                del to_launcher[: os.write(1, to_launcher[:65536])]
        if ready.get(0):
            data = os.read(0, 65536)
            if not data:
                return
            to_agent += data
        agent_ended = agent_ended or not _exchange(agent, ready.get(link, 0), to_agent, to_launcher)


def _exchange(agent: socket.socket, event: int, to_agent: bytearray, heard: bytearray) -> bool:
    """Move bytes over the agent's socket. False when it ended."""
    try:
        if event & select.POLLOUT and to_agent:
            del to_agent[: agent.send(to_agent)]
        if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
            data = agent.recv(65536)
            heard += data
            return bool(data)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True
