"""What `dsgd bench` asks of the daemons: timed exchanges, and the limits measured beside them.

A worker gets one order at a time over its agent and answers each with `benched`: `open` connects to
shards that the coordinator has just configured for the purpose, and warms up; `run` exchanges for a
while, at once, so that all who are told together run together; `limits` copies memory and echoes
over a plain socket, `gradient` times the user's model. The exchanges go through `Parameters`, as in
a training. A server offers the other end of the plain socket: for one connection that knows the
token, and only while it is asked to.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsgd_cli.daemons import material
from dsgd_cli.daemons.lifecycle import Line, Message
from dsgd_cli.daemons.parameters import DIRECT_BYTES, Parameters, open_channels
from dsgd_cli.engine.layout import cut
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Operation
from dsgd_cli.wire.channels.choose import Wanted

TENSOR = "bench"
DTYPE = "float32"
BLOCK_BYTES = 1 << 20
PATIENCE_S = 20.0
WARM_UP = 2

Shapes = Sequence[tuple[str, tuple[int, ...]]]


def tensors(size_bytes: int) -> Shapes:
    """The model whose exchange is timed: one array."""
    return [(TENSOR, (size_bytes // np.dtype(DTYPE).itemsize,))]


class Bench:
    """The worker's side."""

    def __init__(self, identity: ids.Identity, worker: int, incarnation: int) -> None:
        self._identity = identity
        self._me = (worker, incarnation)
        self._parameters: Parameters | None = None

    def obey(self, order: Message, servers: Sequence[str], files: material.Files) -> Message:
        """Carries out an order; its answer."""
        if order["do"] == "open":
            return self._open(order, servers)
        if order["do"] == "run":
            return self._run(float(order["for_s"]))
        if order["do"] == "limits":
            return _limits(order)
        return _gradient(order, files)

    def _open(self, order: Message, servers: Sequence[str]) -> Message:
        self.close()
        layout = cut(tensors(order["bytes"]), DTYPE, len(servers), order["block_bytes"])
        wanted = Wanted(order["channel"], order["options"])
        channels = open_channels(
            layout, wanted, self._identity, servers, int(order["epoch"]), self._me
        )
        self._parameters = parameters = Parameters(layout, channels)
        parameters.pull()
        rng = np.random.default_rng(0)
        gradient = rng.standard_normal(layout.size, np.float32) * np.float32(1e-3)
        for _ in range(WARM_UP):  # fills both buffers
            np.copyto(parameters.gradient.flat, gradient)
            _exchange(parameters)
        return {}

    def _run(self, for_s: float) -> Message:
        parameters = self._parameters
        assert parameters is not None
        seconds: list[float] = []
        cpu_s, began_at, began = time.process_time(), time.time(), time.perf_counter()
        while time.perf_counter() - began < for_s:
            seconds.append(_exchange(parameters))
        return {
            "count": len(seconds),
            "began_at": began_at,
            "ended_at": time.time(),
            "seconds": statistics.median(seconds),
            "cpu_s": (time.process_time() - cpu_s) / len(seconds),
        }

    def close(self) -> None:
        if self._parameters is not None:
            self._parameters.close()
            self._parameters = None


def _exchange(parameters: Parameters) -> float:
    """Seconds of one push_pull."""
    began = time.perf_counter()
    parameters.begin(Operation.PUSH_PULL)
    parameters.settle()
    return time.perf_counter() - began


# ── limits ─────────────────────────────────────────────────────────────────────────────────────


def _limits(order: Message) -> Message:
    """Seconds to copy the bytes there and back in memory, and over a plain socket."""
    size, for_s = int(order["bytes"]), float(order["for_s"])
    ours = np.ones(size, np.uint8)
    theirs = np.zeros(size, np.uint8)

    def copy() -> None:
        np.copyto(theirs, ours)
        np.copyto(ours, theirs)

    address = (order["host"], int(order["port"]))
    with socket.create_connection(address, timeout=PATIENCE_S) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(bytes.fromhex(order["token"]))
        socket_s = _median(lambda: _there_and_back(peer, ours.data, theirs.data), for_s)
    return {"socket_s": socket_s, "memcpy_s": _median(copy, for_s)}


def _median(call: Callable[[], Any], for_s: float) -> float:
    call()
    seconds: list[float] = []
    until = time.perf_counter() + for_s
    while not seconds or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _there_and_back(peer: socket.socket, up: memoryview, down: memoryview) -> None:
    if len(up) <= DIRECT_BYTES:
        peer.sendall(up)
        _receive(peer, down)
        return
    sender = threading.Thread(target=peer.sendall, args=(up,))
    sender.start()
    _receive(peer, down)
    sender.join()


def _receive(peer: socket.socket, into: memoryview) -> bool:
    """Fills `into`; False at a clean end."""
    got = 0
    while got < len(into):
        count = peer.recv_into(into[got:], 0, socket.MSG_WAITALL)
        if not count:
            return False
        got += count
    return True


def offer_echo(line: Line, bind: str) -> None:
    """The server's end of the plain socket: says where it is, and serves one client."""
    token = secrets.token_bytes(16)
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.create_server((bind, 0), family=family, backlog=1)
    listener.settimeout(PATIENCE_S)
    threading.Thread(target=_echo, args=(listener, token), name="echo", daemon=True).start()
    port = listener.getsockname()[1]
    line.send({"type": "echo", "port": port, "token": token.hex()})


def _echo(listener: socket.socket, token: bytes) -> None:
    try:
        with listener:
            peer, _ = listener.accept()
        with peer:
            peer.settimeout(PATIENCE_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            said = bytearray(len(token))
            if not _receive(peer, memoryview(said)) or not hmac.compare_digest(said, token):
                return
            block = memoryview(bytearray(256 << 10))
            while count := peer.recv_into(block):
                peer.sendall(block[:count])
    except OSError:
        return  # nobody came, or they left


# ── the user's model ───────────────────────────────────────────────────────────────────────────


def _gradient(order: Message, files: material.Files) -> Message:
    """How long a gradient takes, and how large it is."""
    found = material.load(order["train"], int(order["seed"]), files)
    params = found.initial()
    out = {name: np.zeros_like(array) for name, array in params.items()}
    data, rows = found.data, slice(0, found.batch_size)
    with np.errstate(all="ignore"):
        seconds = _median(
            lambda: found.model.gradients(params, data.x[rows], data.y[rows], out),
            float(order["for_s"]),
        )
    size = sum(array.size for array in out.values())
    size_bytes = sum(array.nbytes for array in out.values())
    return {"parameters": size, "bytes": size_bytes, "seconds": seconds}
