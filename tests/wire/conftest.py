"""A real server on a loop of its own, and a proxy that can be cruel to connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.daemons.server import Service
from dsgd_cli.launcher.identity import Authority, make_authority, new_cluster_id
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.offered import make_carriers
from dsgd_cli.wire.dsgd_pb2_grpc import ServerStub, add_ServerServicer_to_server

BLOCK_ELEMENTS = 16


class NoLine:
    """Where a daemon's messages to its agent would go."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def identity(authority: Authority, process: str) -> ids.Identity:
    return ids.Identity(process, authority.cluster_id, **authority.issue(process))


class Shard:
    """server/0 of a cluster, in this process."""

    def __init__(self, authority: Authority, results: Path) -> None:
        self.authority = authority
        self.line = NoLine()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self.do(self._start(results))
        self.address = f"127.0.0.1:{self.port}"
        self.epoch = 1

    async def _start(self, results: Path) -> int:
        me = identity(self.authority, "server/0")
        self._server = ids.make_server(me)
        self.service = Service(me.cluster_id, 0, str(results), self.line)
        self.service.carriers = make_carriers(self.service, "127.0.0.1")
        add_ServerServicer_to_server(self.service, self._server)
        port = ids.listen(self._server, me, "127.0.0.1")
        await self._server.start()
        return port

    def do(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(30)

    def stub(self, process: str = "coordinator/0") -> Any:
        return ServerStub(
            ids.open_channel(identity(self.authority, process), "server/0", self.address)
        )

    def configure(
        self, elements: int, block_elements: int = BLOCK_ELEMENTS, **algorithm: Any
    ) -> None:
        """A run whose updates are `w -= g`."""
        request = pb.ConfigureRequest(
            epoch=self.epoch,
            run_id="run",
            stop=elements,
            block_elements=block_elements,
            dtype="float32",
            optimizer="sgd",
            options_json='{"learning_rate": 1.0}',
            algorithm_json=json.dumps({"name": "downpour", **algorithm}),
        )
        self.stub().Configure(request, timeout=10)

    def stop(self) -> None:
        async def end() -> None:
            await self._server.stop(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        for carrier in self.service.carriers.values():
            carrier.close()
        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture(scope="session")
def authority() -> Authority:
    return make_authority(new_cluster_id())


@pytest.fixture(scope="session")
def stranger() -> Authority:
    return make_authority(new_cluster_id())


@pytest.fixture
def shard(authority: Authority, tmp_path: Path) -> Iterator[Shard]:
    made = Shard(authority, tmp_path)
    yield made
    made.stop()


class Proxy:
    """Forwards TCP to a port; cuts a connection when `fate` says so of the bytes it has carried."""

    def __init__(self, port: int, fate: Callable[[], int | None]) -> None:
        self._port = port
        self._fate = fate
        self.cuts = 0
        self.connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(("127.0.0.1", self._port))
                self.connections |= {ours, theirs}
                budget = [self._fate()]
                for ends in ((ours, theirs, True), (theirs, ours, False)):
                    threading.Thread(target=self._copy, args=(*ends, budget), daemon=True).start()

    def seen(self, data: bytes, up: bool) -> bytes:
        """What passes, and how it is passed on: for those who listen or tamper."""
        return data

    def _copy(
        self, source: socket.socket, sink: socket.socket, up: bool, budget: list[int | None]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536 if budget[0] is None else 4096):
                data = self.seen(data, up)
                if budget[0] is not None:
                    budget[0] -= len(data)
                    if budget[0] < 0:
                        sink.sendall(data[: len(data) // 2])
                        self.cuts += 1
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for end in self.connections:
            end.close()
