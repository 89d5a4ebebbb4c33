"""What only shared memory can get wrong: who may write where, what is left, and torn reads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels import shm, shm_link, shm_loop, shm_member, shm_server, shm_snapshots
from dsgd_cli.wire.channels.base import (
    Channel,
    Exchange,
    Operation,
    Reason,
    Refused,
    Route,
    Shape,
    Unavailable,
    run,
)
from dsgd_cli.wire.channels.choose import Wanted, open_channel
from dsgd_cli.wire.channels.memory import ShardMemory
from dsgd_cli.wire.channels.shm import ShmChannel
from dsgd_cli.wire.channels.shm_memory import SLOTS_AT, GradientMemory, Unfit, attach
from dsgd_cli.wire.channels.shm_records import (
    ASKED,
    HELLO,
    MAGIC,
    MOST_BLOCKS,
    REQUEST,
    REQUEST_AT,
    RING,
    SERVER_SLEEPS,
    SLEEPS,
    WELCOME,
)
from dsgd_cli.wire.channels.spin import Spin
from dsgd_cli.wire.identity import PeerUnreachable
from tests.freezing import freeze
from tests.wire.channels import shm_roles as roles
from tests.wire.conftest import Shard, identity

ELEMENTS = 4096
BLOCK = 1024
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class World:
    """A server's carrier in this process, without mTLS, and workers' channels to it."""

    def __init__(
        self, elements: int = ELEMENTS, block: int = BLOCK, spin: Spin | None = None
    ) -> None:
        self.service = roles.make_service(elements, block)
        self.held = self.service._run
        self.shape = Shape(elements * 4, block * 4)
        self.carrier = shm_server.ShmCarrier(self.service, spin=spin)
        self.service.carriers = {"shm": self.carrier}
        self.channels: list[ShmChannel] = []

    def ticket(self, worker: int = 0, incarnation: int = 1) -> pb.ShmTicket:
        return roles.ticket(self.carrier, self.service, worker, incarnation)

    def channel(self, worker: int = 0, incarnation: int = 1, **more: Any) -> ShmChannel:
        route = Route(roles.CLUSTER, 1, 0, worker, incarnation)
        more.setdefault("ask", lambda: self.ticket(worker, incarnation))
        made = ShmChannel(None, "here", route, self.shape, **more)
        self.channels.append(made)
        return made

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.carrier.close()

    def vector(self, value: float = 0.0) -> Any:
        return np.full(self.shape.size_bytes // 4, value, np.float32)

    def values(self) -> Any:
        return np.concatenate(self.held.shard._data)

    def connect(self, ticket: pb.ShmTicket) -> socket.socket:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.settimeout(10)
        end.connect("\0" + ticket.socket[1:])
        return end


@pytest.fixture
def new_world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*arguments: Any) -> World:
        made.append(World(*arguments))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(new_world: Callable[..., World]) -> World:
    return new_world()


def push(channel: ShmChannel, seq: int, gradient: Any, into: Any = None) -> Exchange:
    operation = Operation.PUSH if into is None else Operation.PUSH_PULL
    down = None if into is None else into.data.cast("B")
    exchange = Exchange(operation, seq, memoryview(gradient).cast("B"), down)
    run([channel], [exchange])
    return exchange


def pull(channel: ShmChannel, into: Any) -> Exchange:
    exchange = Exchange(Operation.PULL, into=into.data.cast("B"))
    run([channel], [exchange])
    return exchange


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, what
        time.sleep(0.005)


# ── the memory ─────────────────────────────────────────────────────────────────────────────────


def memories() -> list[tuple[int, int, object]]:
    """(descriptor, size, what keeps it) of a shard's and of a worker's memory."""
    shard, worker = ShardMemory(8192, 2), GradientMemory(8192)
    return [(shard.fd, 8192 + 16, shard.values), (worker.fd, worker.size_bytes, worker)]


@pytest.mark.parametrize("which", [0, 1], ids=["shard", "gradients"])
def test_the_other_side_cannot_write_it(which: int) -> None:
    fd, size, _keep = memories()[which]
    view = attach(fd, size)
    with pytest.raises(TypeError):
        view[0] = 1
    libc = ctypes.CDLL(None, use_errno=True)
    place = ctypes.c_void_p(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
    assert libc.mprotect(place, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() == errno.EACCES
    with pytest.raises(PermissionError):
        mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # a fresh description helps nobody
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
    finally:
        os.close(again)


@pytest.mark.parametrize("which", [0, 1], ids=["shard", "gradients"])
def test_its_size_is_final(which: int) -> None:
    fd, size, _keep = memories()[which]
    for other in (0, size - 1, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, other)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # nor can more be forbidden
    assert os.fstat(fd).st_size == size


def test_a_write_by_its_owner_is_seen_by_the_other_side() -> None:
    memory = GradientMemory(8192)
    view = attach(memory.fd, memory.size_bytes)
    offset = memory.offset(memory.buffers[1])
    assert offset is not None
    memory.buffers[1][:3] = b"abc"
    assert view[offset : offset + 3] == b"abc"
    assert memory.offset(memoryview(bytearray(8192))) is None


def test_memory_that_could_shrink_is_not_attached(tmp_path: Path) -> None:
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    pipe = os.pipe()
    try:
        for fd in (loose, file):
            os.ftruncate(fd, 4096)
        for fd in (loose, file, *pipe):
            with pytest.raises(Unfit):
                attach(fd, 4096)
        fcntl.fcntl(loose, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with pytest.raises(Unfit, match="holes"):
            attach(loose, 4096)
        os.posix_fallocate(loose, 0, 4096)
        attach(loose, 4096)
        with pytest.raises(Unfit, match="8192"):
            attach(loose, 8192)
    finally:
        for fd in (loose, file, *pipe):
            os.close(fd)


# ── torn reads ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("courtesy", [False, True])
def test_what_is_read_is_whole_while_others_write(
    new_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, courtesy: bool
) -> None:
    """Without snapshots and without waiting for readers there is something to detect."""
    if not courtesy:
        monkeypatch.setattr(shm_member, "HOLD_BLOCK_BYTES", 1 << 30)
        monkeypatch.setattr(shm_member, "pays", lambda shape: False)
    world = new_world(1 << 19, 1 << 18)
    writer, reader = world.channel(0), world.channel(1)
    stop = threading.Event()
    pushes = 0

    def write() -> None:
        nonlocal pushes
        gradient = world.vector(-1)
        while not stop.is_set():
            pushes += 1
            push(writer, pushes, gradient)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        into = world.vector()
        ends_at = time.monotonic() + 30
        reads = 0
        while reads < 100 or (reader.torn_reads < 20 and not courtesy):
            versions = pull(reader, into).versions
            reads += 1
            for block, version in enumerate(versions):
                part = into[block << 18 : (block + 1) << 18]
                assert part.min() == part.max() == version, "a block of two updates"
            assert time.monotonic() < ends_at, f"{reader.torn_reads} torn of {reads}"
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


def test_a_block_that_changes_while_it_is_copied_is_copied_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = world.channel()
    into = world.vector()
    pull(channel, into)
    times = 3
    copyto = np.copyto

    def copy(target: Any, source: Any) -> None:
        nonlocal times
        copyto(target, source)
        if threading.current_thread() is threading.main_thread() and times:
            times -= 1
            push(other, 3 - times, world.vector(-1))

    other = world.channel(1)
    monkeypatch.setattr(shm_link.np, "copyto", copy)
    versions = pull(channel, into).versions
    assert channel.torn_reads >= 1
    for block, version in enumerate(versions):
        assert (into[block * BLOCK : (block + 1) * BLOCK] == version).all()


def test_a_block_that_never_settles_ends_the_connection(world: World) -> None:
    """The server died, or stopped, in the middle of an update."""
    channel = world.channel(give_up_s=0.5)
    world.held.shard._stamps[2] += 1
    with pytest.raises(PeerUnreachable, match="block 2 does not settle"):
        pull(channel, world.vector())


def test_readers_of_large_blocks_are_waited_for_but_not_for_long(
    new_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_member, "HOLD_BLOCK_BYTES", 1)
    monkeypatch.setattr(shm_member, "HOLD_S", 1.0)
    monkeypatch.setattr(shm_member, "pays", lambda shape: False)
    world = new_world(ELEMENTS, ELEMENTS)
    reader, writer = world.channel(0), world.channel(1)
    pull(reader, world.vector())
    push(writer, 1, world.vector(1))
    began = time.monotonic()
    push(writer, 2, world.vector(1))
    assert time.monotonic() - began < 0.8  # the reader is done and has said so
    _announce(world, reader)
    began = time.monotonic()
    push(writer, 3, world.vector(1))
    assert time.monotonic() - began < 0.8  # it has not begun to read
    while not reader.advance():
        pass
    _announce(world, reader)
    assert reader._link is not None
    reader._link.reads(True)
    began = time.monotonic()
    push(writer, 4, world.vector(1))
    assert 0.8 < time.monotonic() - began < 5  # it does not go on, and is waited for no longer
    began = time.monotonic()
    push(writer, 5, world.vector(1))
    assert time.monotonic() - began < 0.8  # nor again


def _announce(world: World, reader: ShmChannel) -> None:
    reader.begin(Exchange(Operation.PULL, into=world.vector().data.cast("B")))
    until(lambda: _answered(reader), "no answer")


def test_who_reads_a_snapshot_sees_what_was_announced_and_who_is_late_the_newest(
    new_world: Callable[..., World],
) -> None:
    size = shm_snapshots.BLOCK_BYTES // 4
    world = new_world(size, size)
    reader, writer = world.channel(0), world.channel(1)
    into = world.vector()
    seq = 0

    def read_after(pushes: int) -> int:
        nonlocal seq
        exchange = Exchange(Operation.PULL, into=into.data.cast("B"))
        reader.begin(exchange)
        until(lambda: _answered(reader), "no answer")
        for _ in range(pushes):
            seq += 1
            push(writer, seq, world.vector(-1), world.vector())
        while not reader.advance():
            pass
        assert (into == exchange.versions[0]).all()
        return exchange.versions[0]

    pull(reader, into)
    pull(writer, into)  # now both are connected
    assert read_after(shm_snapshots.RING - 2) == 0
    assert read_after(shm_snapshots.RING + 1) == seq
    assert seq == 2 * shm_snapshots.RING - 1
    assert reader.torn_reads == 0


def _answered(channel: ShmChannel) -> bool:
    """Whether the server has said something about the first block."""
    assert channel._link is not None
    return channel._link.answer(0) is not None


# ── slots, and a worker that does not keep the rules ───────────────────────────────────────────


def test_gradients_are_sent_from_where_they_were_computed(world: World) -> None:
    channel = world.channel()
    buffers = shm.share([channel], world.shape.size_bytes)
    assert buffers is not None
    for seq in range(1, 7):
        np.frombuffer(buffers[seq & 1], np.float32)[:] = -seq
        into = world.vector()
        push(channel, seq, buffers[seq & 1], into)
        assert (into == sum(range(seq + 1))).all()
    assert channel._staging is None


def test_a_slot_is_free_once_all_is_acknowledged(world: World) -> None:
    channel = world.channel()
    buffers = shm.share([channel], world.shape.size_bytes)
    assert buffers is not None
    slots = [np.frombuffer(buffer, np.float32) for buffer in buffers]
    slots[0][:] = -1
    for seq in range(1, 200):
        push(channel, seq, buffers[(seq - 1) & 1])
        slots[(seq - 1) & 1][:] = np.nan  # at once: nobody looks at it any more
        slots[seq & 1][:] = -1
    assert (world.values() == 199).all()


def test_gradients_from_elsewhere_are_copied(world: World) -> None:
    channel = world.channel()
    shm.share([channel], world.shape.size_bytes)
    for seq in range(1, 4):
        push(channel, seq, world.vector(-1))
    assert (world.values() == 3).all()


def test_a_gradient_that_becomes_infinite_while_it_is_applied_spoils_nothing(
    new_world: Callable[..., World],
) -> None:
    """What is checked is what is applied: the worker writes into its slot all the time."""
    world = new_world(1 << 18, 1 << 16)
    channel = world.channel()
    buffers = shm.share([channel], world.shape.size_bytes)
    assert buffers is not None
    slot = np.frombuffer(buffers[0], np.float32)
    stop = threading.Event()

    def meddle() -> None:
        while not stop.is_set():
            slot[::97] = np.inf
            slot[::97] = 0

    thread = threading.Thread(target=meddle)
    thread.start()
    refused = applied = 0
    try:
        ends_at = time.monotonic() + 20
        while (refused < 3 or applied < 3) and time.monotonic() < ends_at:
            try:
                push(channel, applied + 1, buffers[0])
                applied += 1
            except Refused as error:
                assert error.reason is Reason.NOT_FINITE
                refused += 1
            assert np.isfinite(world.values()).all()
    finally:
        stop.set()
        thread.join(10)
    assert refused, "nothing was ever caught: the test is too slow"


def hello(world: World, ticket: bytes, memory: GradientMemory, size: int | None = None) -> bytes:
    return HELLO.pack(MAGIC, ticket, memory.size_bytes if size is None else size, 0, 1)


def welcomed(end: socket.socket) -> bool:
    try:
        data, fds, _, _ = socket.recv_fds(end, WELCOME.size, 3)
    except ConnectionError:
        return False
    for fd in fds:
        os.close(fd)
    return bool(data)


class Rude:
    """A worker that says what it likes: a connection by hand."""

    def __init__(self, world: World) -> None:
        self._memory = memory = GradientMemory(world.shape.size_bytes, slots=1)
        index, self._desk = memory.desk()
        ticket = world.ticket()
        self.end = world.connect(ticket)
        socket.send_fds(self.end, [hello(world, ticket.ticket, memory)], [memory.fd])
        assert index == 0
        assert welcomed(self.end)

    def ask(self, number: int, seq: int, offset: int, operation: int) -> None:
        REQUEST.pack_into(self._desk, 8 * REQUEST_AT, seq, offset, operation, 0)
        self._desk.cast("Q")[ASKED] = number
        with contextlib.suppress(BlockingIOError):
            self.end.send(RING)


@pytest.mark.parametrize(
    "request_",
    [
        (1, 0, Operation.PUSH),  # a desk is no gradient
        (1, SLOTS_AT - 4, Operation.PUSH),
        (1, SLOTS_AT + 4, Operation.PUSH),  # the end lies outside
        (1, 1 << 63, Operation.PUSH),
        (1, SLOTS_AT, 9),
        (1, SLOTS_AT, 1 << 63),
    ],
)
def test_a_request_that_cannot_be_ends_the_connection(
    new_world: Callable[..., World], request_: tuple[int, ...]
) -> None:
    world = new_world(ELEMENTS, BLOCK)  # the slot is as large as the shard: whole pages
    rude = Rude(world)
    with rude.end as end, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        rude.ask(1, *request_)  # may be too late to ring
        assert end.recv(1) == b""
    until(lambda: not world.carrier._loop._members, "it is still there")
    assert (world.values() == 0).all()
    push(world.channel(), 1, world.vector(-1))  # the server lives on
    assert (world.values() == 1).all()


@pytest.mark.parametrize("polls", [True, False])
def test_a_request_that_changes_during_an_exchange_changes_nothing_of_it(
    new_world: Callable[..., World], polls: bool
) -> None:
    """And is heard afterwards, whether the server polls or not."""
    world = new_world(1 << 22, 1 << 16, None if polls else Spin(0))
    rude = Rude(world)
    with rude.end:
        rude.ask(1, 1, SLOTS_AT, Operation.PUSH)
        until(lambda: world.held.shard.version(0) == 1, "no push")
        rude.ask(2, 2, SLOTS_AT, Operation.PUSH)
        until(lambda: world.held.shard.version(63) == 2, "no second push")
    assert {world.held.shard.version(block) for block in range(64)} == {2}
    until(lambda: not world.carrier._loop._members, "it is still there")


def test_bells_that_nobody_reads_stop_nobody(world: World) -> None:
    """A worker that rings without end and asks for nothing, and one that never reads its own."""
    rude = Rude(world)
    with rude.end as end:
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10_000):
                end.send(RING)
        rude._desk.cast("Q")[SLEEPS] = 1
        for number in range(1, 2000):
            rude.ask(number, number, SLOTS_AT, Operation.PUSH)
            until(lambda n=number: world.held.shard.version(3) == n, "no push")  # type: ignore[misc]
    push(world.channel(1), 1, world.vector(-1))


def test_whoever_sleeps_is_woken(new_world: Callable[..., World]) -> None:
    """With neither end polling, and with pauses in which both fall asleep."""
    world = new_world()
    channel = world.channel(spin=Spin(0))
    channel.connect()
    into = world.vector()
    for seq in range(1, 40):
        if seq % 4 == 0:
            until(lambda: bool(_words(channel)[SERVER_SLEEPS]), "the server does not sleep")
        began = time.monotonic()
        push(channel, seq, world.vector(-1), into)
        assert time.monotonic() - began < shm_link.SLEEP_S / 2, "it was not woken, it woke up"
    assert (into == 39).all()


def _words(channel: ShmChannel) -> memoryview:
    assert channel._link is not None
    return channel._link._words


def test_a_lost_wake_up_costs_a_moment_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_loop, "IDLE_S", 60.0)
    channel = world.channel(spin=Spin(0))
    push(channel, 1, world.vector(-1))
    ring = shm_link.Link._ring
    rings = 0

    def lose_the_first(link: shm_link.Link) -> None:
        nonlocal rings
        rings += 1
        if rings > 1:
            ring(link)

    monkeypatch.setattr(shm_link.Link, "_ring", lose_the_first)
    loop = world.carrier._loop
    assert loop is not None

    def sleeps() -> bool:  # it may say so while it is at work, and it looks when that is done
        return bool(_words(channel)[SERVER_SLEEPS]) and not loop._working

    for seq in range(2, 50):  # now and then it looks once more after it has said that it sleeps
        until(sleeps, "the server does not sleep")
        rings = 0
        push(channel, seq, world.vector(-1))
        assert (world.values() == seq).all()
        if rings > 1:
            return
    raise AssertionError("no wake-up was lost")


def test_a_shard_of_too_many_blocks_is_left_to_others(world: World) -> None:
    route = Route(roles.CLUSTER, 1, 0, 0, 1)
    shape = Shape(64 * (MOST_BLOCKS + 1), 64)
    channel = ShmChannel(None, "here", route, shape, ask=world.ticket)
    with pytest.raises(Unavailable, match="blocks"):
        channel.connect()


# ── who gets in ────────────────────────────────────────────────────────────────────────────────


def test_a_ticket_lets_one_connection_in_and_for_a_while_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = GradientMemory(world.shape.size_bytes)

    def enter(ticket: bytes) -> bool:
        with world.connect(first) as end:
            socket.send_fds(end, [hello(world, ticket, memory)], [memory.fd])
            return welcomed(end)

    first = world.ticket()
    assert enter(first.ticket)
    assert not enter(first.ticket)
    assert not enter(b"?" * 16)
    monkeypatch.setattr(shm_server, "TICKET_LIFE_S", -1.0)
    assert not enter(world.ticket().ticket)


def test_memory_that_is_not_what_it_says_is_refused(world: World) -> None:
    memory = GradientMemory(world.shape.size_bytes)
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(loose, 0, memory.size_bytes)
    try:
        for fds, size in (([loose], None), ([memory.fd], 4096), ([], None)):
            ticket = world.ticket()
            with world.connect(ticket) as end:
                socket.send_fds(end, [hello(world, ticket.ticket, memory, size)], fds)
                assert not welcomed(end)
    finally:
        os.close(loose)


def test_who_says_nothing_is_shown_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_loop, "STRANGER_LIFE_S", 0.05)
    monkeypatch.setattr(shm_loop, "IDLE_S", 0.05)
    with world.connect(world.ticket()) as end:
        assert end.recv(1) == b""


@needs_root
def test_another_user_is_shown_out(world: World) -> None:
    """He has a good ticket, which he does not even get to show."""
    ticket = world.ticket()
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "end = socket.socket(socket.AF_UNIX); end.settimeout(10)\n"
        "end.connect('\\0' + sys.argv[1])\n"
        "try:\n"
        "    print('got', end.recv(1))\n"
        "except ConnectionError:\n"
        "    print('got', b'')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ticket.socket[1:]],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "got b''\n"
    assert ticket.ticket in world.carrier._tickets  # still good for its owner


@needs_root
def test_a_worker_does_not_talk_to_another_users_socket(world: World) -> None:
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "end = socket.socket(socket.AF_UNIX); end.bind('\\0' + sys.argv[1]); end.listen()\n"
        "print('ready', flush=True)\n"
        "print(end.accept()[0].recv(100))\n"
    )
    name = f"dsgd-test-{os.getpid()}-{time.monotonic_ns()}"
    thief = subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
    try:
        assert thief.stdout is not None
        assert thief.stdout.readline() == "ready\n"
        ask = lambda: pb.ShmTicket(socket="@" + name, ticket=b"0" * 16)  # noqa: E731
        with pytest.raises(PeerUnreachable, match="another user's"):
            pull(world.channel(ask=ask, give_up_s=0.01), world.vector())
        assert thief.stdout.readline() == "b''\n"
    finally:
        thief.kill()
        thief.communicate()


def test_a_worker_of_another_host_is_told_so(world: World) -> None:
    route = Route(roles.CLUSTER, 1, 0, 0, 1)
    with pytest.raises(Refused) as caught:
        world.carrier.open(pb.OpenChannelRequest(host="elsewhere"), route, world.held)
    assert caught.value.reason is Reason.NO_CARRIER


@pytest.mark.parametrize("shape", ["tiny"], indirect=True)
def test_one_host_gets_shm_and_two_hosts_something_else(
    configured: Shard, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = identity(configured.authority, "worker/0")
    route = Route(me.cluster_id, configured.epoch, 0, 0, 1)
    notes: list[str] = []

    def opened(kind: str) -> Channel:
        channel = open_channel(Wanted(kind), me, configured.address, route, shape, notes.append)
        channel.close()
        return channel

    assert isinstance(opened("auto"), ShmChannel)
    monkeypatch.setattr(shm, "host", lambda: "another/host")
    assert not isinstance(opened("auto"), ShmChannel)
    assert notes == []  # nobody expects shared memory between hosts
    with pytest.raises(DsgdError, match=r"the shm channel does not work: .*on another host"):
        opened("shm")


# ── what breaks ────────────────────────────────────────────────────────────────────────────────


def test_exactly_once_while_connections_are_cut(new_world: Callable[..., World]) -> None:
    world = new_world(1 << 14, 64)  # 256 blocks, so that cuts fall into the middle
    pushes = 150
    failures: list[BaseException] = []

    def train(worker: int) -> None:
        try:
            channel = world.channel(worker)
            buffers = shm.share([channel], world.shape.size_bytes)
            assert buffers is not None
            for buffer in buffers:
                np.frombuffer(buffer, np.float32)[:] = -1
            into = world.vector()
            for seq in range(1, pushes + 1):
                done = push(channel, seq, buffers[seq & 1], into)
                assert done.applied == [(1, seq)] * world.shape.blocks
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    cuts = 0
    while any(thread.is_alive() for thread in threads):
        world.carrier.retire(lambda route: True)
        cuts += 1
        time.sleep(0.02)
    assert not failures
    assert cuts >= 5
    assert (world.values() == 2 * pushes).all()


def test_a_fenced_workers_connection_ends(world: World) -> None:
    old = world.channel(incarnation=1)
    push(old, 1, world.vector(-1))
    world.service._fence({0: 2})
    world.service._retire()
    old._ask = lambda: _admitted(world, 1)
    with pytest.raises(Refused) as caught:
        push(old, 2, world.vector(-1))
    assert caught.value.reason is Reason.FENCED
    push(world.channel(incarnation=2), 1, world.vector(-1))
    assert (world.values() == 2).all()


def _admitted(world: World, incarnation: int) -> pb.ShmTicket:
    """As OpenChannel does it."""
    from dsgd_cli.wire.channels.base import Header

    world.service.admit(Header(Route(roles.CLUSTER, 1, 0, 0, incarnation), 0, Operation.PULL))
    return world.ticket(incarnation=incarnation)


def test_a_server_that_comes_back_has_another_memory(new_world: Callable[..., World]) -> None:
    """The worker sends its unanswered push to the new one, which knows nothing of the old."""
    worlds = [new_world(), new_world()]
    current = worlds[0]
    channel = worlds[0].channel(ask=lambda: current.ticket())
    push(channel, 1, current.vector(-1))
    old = channel._link
    assert old is not None
    current = worlds[1]
    worlds[0].carrier.close()
    into = current.vector(7)
    push(channel, 1, current.vector(-1), into)
    assert (into == 1).all()
    assert channel._link is not None
    assert channel._link is not old
    assert (worlds[0].values() == 1).all()


def test_close_ends_a_wait(world: World) -> None:
    channel = world.channel()
    world.held.shard.freeze()
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            push(channel, 1, world.vector())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: channel._link is not None, "no connection")
    channel.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(failures[0], PeerUnreachable)


def gradients_of(pid: int) -> set[int]:
    """Inodes of the memories in which this process writes gradients."""
    links = list(Path(f"/proc/{pid}/fd").iterdir())
    return {link.stat().st_ino for link in links if "memfd:dsgd-gradients" in str(link.readlink())}


def mapped() -> set[int]:
    """Inodes of the gradients that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:dsgd-gradients" in line}


def start(*arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, roles.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def line(process: subprocess.Popen[str], text: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if text:
        process.stdin.write(text + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_worker_killed_in_the_middle_of_a_push_leaves_nothing_with_the_server(
    new_world: Callable[..., World],
) -> None:
    elements = 4 << 20
    world = new_world(elements, roles.BLOCK_BYTES // 4)
    worker = start("worker", elements, 0)
    with ended(worker):
        line(worker, world.ticket().SerializeToString().hex())
        until(lambda: world.held.shard.version(0) > 3, "no pushes")
        slots = gradients_of(worker.pid)
        assert slots & mapped()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    until(lambda: not slots & mapped(), "the slots are still mapped")
    assert not world.carrier._loop._members
    # Its successor finds each block with or without the last push, never with a part of it.
    channel = world.channel(incarnation=2)
    into = world.vector()
    done = pull(channel, into)
    size = roles.BLOCK_BYTES // 4
    for block, (version, (incarnation, seq)) in enumerate(
        zip(done.versions, done.applied, strict=True)
    ):
        assert (into[block * size : (block + 1) * size] == version).all()
        assert (incarnation, seq) == (1, version)
    push(channel, 1, world.vector(-1), into)
    assert into.min() >= done.versions[-1] + 1


def memfds() -> set[int]:
    """Inodes of our memfds that any process of this host has open (a mapping counts)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for link in folder.iterdir():
                with contextlib.suppress(OSError):
                    if "memfd:dsgd-" in str(link.readlink()):
                        found.add(link.stat().st_ino)
    return found


def test_nothing_is_left_when_both_are_killed() -> None:
    elements = 4 << 20
    shm_before = set(Path("/dev/shm").iterdir())
    server = start("server", elements)
    with ended(server):
        assert line(server) == "ready"
        given = line(server, "0")
        worker = start("worker", elements, 0)
        with ended(worker):
            assert line(worker, given) == "push 1"
            name = pb.ShmTicket.FromString(bytes.fromhex(given)).socket
            assert name in Path("/proc/net/unix").read_text()
            ours = {
                link.stat().st_ino
                for pid in (server.pid, worker.pid)
                for link in Path(f"/proc/{pid}/fd").iterdir()
                if "memfd:dsgd-" in str(link.readlink())
            }
            assert len(ours) >= 2
            assert ours <= memfds()
            assert set(Path("/dev/shm").iterdir()) <= shm_before
            for process in (server, worker):
                process.send_signal(signal.SIGKILL)
            for process in (server, worker):
                process.wait()
    assert name not in Path("/proc/net/unix").read_text()
    assert not ours & memfds()
    assert set(Path("/dev/shm").iterdir()) <= shm_before


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_small_dev_shm_is_enough() -> None:
    """As in a container: 64 MB there, and a shard and slots of more than 100 MB each."""
    elements = 26 << 20
    small = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    before = ("unshare", "-m", "--propagation", "private", "sh", "-c", small, "sh")
    server = start("server", elements, before=before)
    with ended(server):
        assert line(server) == "ready"
        given = line(server, "0")
        worker = start("worker", elements, 0, before=before)
        with ended(worker):
            assert line(worker, given) == "push 1"
            assert line(worker) == "push 2"


def test_a_stopped_worker_stops_nobody_else(new_world: Callable[..., World]) -> None:
    elements = 4 << 20
    world = new_world(elements, roles.BLOCK_BYTES // 4)
    worker = start("worker", elements, 0)
    with ended(worker):
        line(worker, world.ticket().SerializeToString().hex())
        freeze(worker.pid)
        channel = world.channel(1)
        into = world.vector()
        for seq in range(1, 6):
            push(channel, seq, world.vector(-1), into)
        assert into.min() >= 5
