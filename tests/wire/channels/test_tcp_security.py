"""One test for each thing that the README says of the tcp channel's protection."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from dsgd_cli.wire.channels import frames, tcp, tcp_server
from dsgd_cli.wire.channels.base import Operation, Reason, Route, Shape, Unavailable
from dsgd_cli.wire.channels.frames import HEAD, Broken, Kind, Reader, Seal
from dsgd_cli.wire.channels.tcp import TcpChannel
from dsgd_cli.wire.channels.tcp_server import TcpCarrier
from dsgd_cli.wire.identity import PeerUnreachable
from tests.wire.channels.conftest import SHAPES
from tests.wire.channels.intruder import Client, Tap, ask, pattern
from tests.wire.channels.kinds import KINDS, Worker
from tests.wire.conftest import Shard, identity

TINY = SHAPES["tiny"]
ONES = np.ones(TINY.size_bytes // 4, np.float32)
ENCRYPTED = next(kind for kind in KINDS if kind.name == "tcp")
PLAIN = next(kind for kind in KINDS if kind.name == "tcp-plain")


@pytest.fixture
def at(shard: Shard) -> Shard:
    shard.configure(TINY.size_bytes // 4, TINY.block_bytes // 4)
    return shard


@pytest.fixture
def carrier(at: Shard) -> TcpCarrier:
    made = at.service.carriers["tcp"]
    assert isinstance(made, TcpCarrier)
    return made


@pytest.fixture
def client(at: Shard) -> Iterator[Callable[..., Client]]:
    """Connects with a fresh ticket, and is let in."""
    with contextlib.ExitStack() as stack:

        def make(**more: Any) -> Client:
            made = Client(ask(at, TINY, **more).tcp).greet()
            stack.callback(made.close)
            assert made.is_let_in()
            return made

        yield make


def applied(at: Shard) -> list[int]:
    """How many pushes are in each block."""
    run = at.service._run
    assert run is not None
    return [run.shard.version(block) for block in range(TINY.blocks)]


NOTHING = [0] * TINY.blocks
ONCE = [1] * TINY.blocks


# ── listening ──


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("plain", [False, True])
def test_a_listener_learns_neither_values_nor_names(shard: Shard, name: str, plain: bool) -> None:
    shape = SHAPES[name]
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    carrier: Any = shard.service.carriers["tcp"]
    control, data = Tap(shard.port), Tap(carrier.port)
    carrier.advertised_port = data.port
    worker = Worker(PLAIN if plain else ENCRYPTED, shard, shape, address=control.address)
    try:
        worker.do(Operation.WRITE, up=pattern(worker.size))
        worker.push(worker.ones(0))
        worker.do(Operation.PULL)
        np.testing.assert_array_equal(worker.parameters, pattern(worker.size))
    finally:
        worker.channel.close()
        control.close()
        data.close()
    assert len(data.up) > 2 * shape.size_bytes and len(data.down) > 2 * shape.size_bytes
    wire = bytes(control.up + control.down + data.up + data.down)
    assert (b"gradient" in wire) == plain  # in clear it is there: the test can see
    for name_ in (shard.authority.cluster_id.encode(), b"worker", b"server", b"dsgd.Server"):
        assert name_ not in bytes(data.up + data.down)
    # TLS says in clear which server is called (`server-0.<cluster id>.dsgd`), and nothing else.
    assert b"worker" not in control.up + control.down
    assert b"dsgd.Server" not in control.up + control.down


def test_a_nonce_is_never_used_twice(at: Shard, client: Callable[..., Client]) -> None:
    """Two connections have other keys; two frames of one have other numbers."""
    one, other = client(), client()
    assert len({one.ticket.key_up, one.ticket.key_down, other.ticket.key_up}) == 3
    same = [one.push(1, ONES)[HEAD.size :] for _ in range(3)]
    assert len({bytes(frame[:64]) for frame in same}) == 3


# ── frames that are not what the worker sent next ──


def test_what_the_worker_sends_is_applied(at: Shard, client: Callable[..., Client]) -> None:
    good = client()
    good.end.sendall(good.push(1, ONES))
    assert len(good.read_frame()) > TINY.size_bytes
    assert applied(at) == ONCE


def test_a_replayed_frame_is_refused(at: Shard, client: Callable[..., Client]) -> None:
    victim = client()
    frame = victim.push(1, ONES)
    victim.end.sendall(frame)
    victim.read_frame()
    victim.end.sendall(frame)
    assert victim.is_shut()
    assert applied(at) == ONCE


def test_a_frame_replayed_to_another_connection_is_refused(
    at: Shard, client: Callable[..., Client]
) -> None:
    recorded = client().push(1, ONES)
    other = client()
    other.end.sendall(recorded)
    assert other.is_shut()
    assert applied(at) == NOTHING


@pytest.mark.parametrize("left", [1, HEAD.size, 1000, -1])
def test_a_truncated_frame_is_not_applied(
    at: Shard, client: Callable[..., Client], left: int
) -> None:
    victim = client()
    victim.end.sendall(victim.push(1, ONES)[:left])
    victim.end.shutdown(socket.SHUT_WR)
    assert victim.is_shut()
    assert applied(at) == NOTHING


def test_frames_in_another_order_are_refused(at: Shard, client: Callable[..., Client]) -> None:
    victim = client()
    first, second = victim.push(1, ONES), victim.push(2, ONES)
    victim.end.sendall(second + first)
    assert victim.is_shut()
    assert applied(at) == NOTHING


def test_a_frame_that_is_left_out_is_noticed(at: Shard, client: Callable[..., Client]) -> None:
    victim = client()
    victim.push(1, ONES)
    victim.end.sendall(victim.push(1, ONES))
    assert victim.is_shut()
    assert applied(at) == NOTHING


def test_a_reflected_frame_is_refused(at: Shard, client: Callable[..., Client]) -> None:
    victim = client()
    victim.end.sendall(victim.push(1, ONES))
    victim.end.sendall(victim.read_frame())
    assert victim.is_shut()
    assert applied(at) == ONCE


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("byte", [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 30, 2000, -17, -16, -1])
def test_a_flipped_bit_anywhere_is_refused(
    at: Shard, client: Callable[..., Client], byte: int, bit: int
) -> None:
    """In the length, the kind, the rest of the head, the opening, the values or the tag."""
    victim = client()
    frame = bytearray(victim.push(1, ONES))
    frame[byte] ^= 1 << bit
    with contextlib.suppress(ConnectionError):  # it may have hung up before the last byte
        victim.end.sendall(frame)
        victim.end.shutdown(socket.SHUT_WR)
    assert victim.is_shut()
    assert applied(at) == NOTHING


def test_every_bit_of_a_short_frame_counts() -> None:
    """All of them, on the format itself."""
    key, body = bytes(range(16)), b"some values"
    for place in range(8 * (HEAD.size + len(body) + 16)):
        frame = bytearray(HEAD.size + len(body) + 16)
        Seal(key).close(Kind.DATA, body, memoryview(frame))
        frame[place // 8] ^= 1 << place % 8
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(frame)
            theirs.shutdown(socket.SHUT_WR)
            reader = Reader(ours, Seal(key), 1000)
            with pytest.raises(Broken):
                while not reader.fill():
                    pass
                reader.frame(memoryview(bytearray(1000)))


def test_a_worker_takes_nothing_that_was_changed_on_its_way(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit in most connections: they end, what arrives in others is right, all counts once."""
    shape = SHAPES["large"]
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    carrier: Any = shard.service.carriers["tcp"]
    chance = random.Random(3)
    flips = [0]

    def tamper(data: bytes, up: bool) -> bytes:
        if len(data) > 1000 and chance.random() < 0.01:
            flips[0] += 1
            changed = bytearray(data)
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        return data

    tap = Tap(carrier.port, tamper)
    carrier.advertised_port = tap.port
    monkeypatch.setattr(tcp, "PAUSE_S", (0.01, 0.05))
    worker = Worker(ENCRYPTED, shard, shape, stall_s=1.0, give_up_s=60)
    try:
        for push in range(1, 11):
            exchange = worker.push(worker.ones(-1))
            np.testing.assert_array_equal(worker.parameters, worker.ones(push))
            assert exchange.versions == [push] * shape.blocks
    finally:
        worker.channel.close()
        tap.close()
    assert flips[0] > 3


def test_a_worker_does_not_take_its_own_words_for_the_servers(at: Shard) -> None:
    """Somebody in the middle who sends everything back."""
    mirror = socket.create_server(("127.0.0.1", 0))
    carrier: Any = at.service.carriers["tcp"]
    carrier.advertised_port = mirror.getsockname()[1]

    def reflect() -> None:
        with contextlib.suppress(OSError):
            while True:
                end, _ = mirror.accept()
                with end, contextlib.suppress(OSError):
                    greeting = end.recv(len(frames.MAGIC) + frames.TICKET_BYTES + 24)
                    end.sendall(greeting[-24:])
                    while data := end.recv(65_536):
                        end.sendall(data)

    thread = threading.Thread(target=reflect, daemon=True)
    thread.start()
    worker = Worker(ENCRYPTED, at, TINY, stall_s=0.3, give_up_s=0.5)
    try:
        with pytest.raises(PeerUnreachable, match="not made by the other end"):
            worker.push(ONES)
    finally:
        worker.channel.close()
        mirror.close()
    assert (worker.parameters == 0).all()
    assert applied(at) == NOTHING


# ── tickets ──


def test_a_ticket_is_good_for_one_connection(at: Shard, client: Callable[..., Client]) -> None:
    first = client()
    again = Client(first.ticket).greet()
    assert again.is_shut()
    again.close()
    first.end.sendall(first.push(1, ONES))  # and the first one lives on
    assert len(first.read_frame()) > TINY.size_bytes


def test_a_ticket_is_good_for_ten_seconds(at: Shard, carrier: TcpCarrier) -> None:
    now = [time.monotonic()]
    carrier._clock = lambda: now[0]
    for age_s, good in ((9.9, True), (10.1, False)):
        late = Client(ask(at, TINY).tcp)
        now[0] += age_s
        assert late.greet().is_let_in() is good
        late.close()


def test_a_ticket_without_its_keys_is_worth_nothing(at: Shard) -> None:
    """As who has seen it on the wire, in clear or not."""
    for plain in (False, True):
        ticket = ask(at, TINY, plain=plain).tcp
        stolen = Client(
            type(ticket)(port=ticket.port, ticket=ticket.ticket, key_up=bytes(16))
        ).greet()
        assert stolen.is_shut()
        stolen.close()
    assert applied(at) == NOTHING


def test_a_worker_gets_no_ticket_of_another(at: Shard) -> None:
    refused = ask(at, TINY, worker=0, certificate="worker/1").refusal
    assert Reason(int(refused.reason)) is Reason.FENCED
    with pytest.raises(grpc.RpcError) as caught:
        ask(at, TINY, certificate="coordinator/0")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_whose_ticket_it_is_decides_whose_push_it_is(
    at: Shard, client: Callable[..., Client]
) -> None:
    """Nothing in a frame says who sends it, so nothing in a frame can lie about it."""
    other = client(worker=1)
    other.end.sendall(other.push(1, ONES))
    other.read_frame()
    run = at.service._run
    assert run is not None
    assert (run.shard.applied(0, 0), run.shard.applied(1, 0)) == ((0, 0), (1, 1))


def test_the_tickets_of_a_run_end_with_it(at: Shard, client: Callable[..., Client]) -> None:
    old, open_one = Client(ask(at, TINY).tcp), client(worker=1)
    at.epoch = 2
    at.configure(TINY.size_bytes // 4, TINY.block_bytes // 4)
    assert old.greet().is_shut()
    assert open_one.is_shut()
    old.close()


def test_a_worker_has_one_ticket_and_one_connection(
    at: Shard, carrier: TcpCarrier, client: Callable[..., Client]
) -> None:
    first = client()
    unused = [ask(at, TINY).tcp for _ in range(50)]
    assert len(carrier._tickets) == 1
    second = Client(unused[-1]).greet()
    assert second.is_let_in()
    assert first.is_shut()
    second.close()


# ── those who try their luck ──


@pytest.mark.parametrize("length", [1 << 31, (1 << 32) - 1, 200_000, 15, 0])
def test_a_length_out_of_bounds_is_refused_before_a_byte_is_awaited(
    at: Shard, client: Callable[..., Client], length: int
) -> None:
    victim = client()
    victim.end.sendall(HEAD.pack(length, Kind.EXCHANGE, 0))
    assert victim.is_shut()
    assert applied(at) == NOTHING


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        bytes.fromhex("1603010200010001fc0303") + bytes(500),  # a TLS client's hello
        b"dsgd" + bytes(40),
        b"\0" * 1000,
    ],
)
def test_who_speaks_something_else_is_shut_out(
    at: Shard, carrier: TcpCarrier, words: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", carrier.port), timeout=10) as end:
        end.sendall(words)
        with contextlib.suppress(ConnectionResetError):
            assert end.recv(100) == b""


def test_clear_frames_do_not_enter_an_encrypted_connection(
    at: Shard, client: Callable[..., Client]
) -> None:
    victim = client()
    victim.up = Seal(None)
    victim.end.sendall(victim.push(1, ONES))
    victim.end.shutdown(socket.SHUT_WR)
    assert victim.is_shut()
    assert applied(at) == NOTHING


def test_half_open_connections_hold_nobody_up(
    at: Shard, carrier: TcpCarrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are kept: some say nothing, some stop in the middle of the hello."""
    monkeypatch.setattr(tcp_server, "HELLO_S", 2.0)
    worker = Worker(ENCRYPTED, at, TINY)
    worker.push(ONES)
    with contextlib.ExitStack() as stack:
        stack.callback(worker.channel.close)
        ends = []
        for number in range(tcp_server.MAX_HALF_OPEN + 20):
            end = socket.create_connection(("127.0.0.1", carrier.port), timeout=10)
            stack.callback(end.close)
            end.sendall((b"dsgd" + bytes(20))[: number % 24])
            ends.append(end)
        began_s = time.monotonic()
        worker.push(ONES)
        newcomer = Worker(ENCRYPTED, at, TINY, worker=1)
        stack.callback(newcomer.channel.close)
        newcomer.push(ONES)
        assert time.monotonic() - began_s < 1.0
        for end in ends:  # all are shut out in the end
            with contextlib.suppress(ConnectionResetError):
                assert end.recv(1) == b""


@pytest.mark.parametrize("name", ["tiny", "large"])
def test_half_a_frame_ends_its_own_connection_and_holds_up_no_other(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tcp_server, "FRAME_S", 1.0)
    shape = SHAPES[name]
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    slow = Client(ask(shard, shape).tcp).greet()
    other = Worker(ENCRYPTED, shard, shape, worker=1)
    try:
        assert slow.is_let_in()
        slow.end.sendall(slow.push(1, bytes(100))[:20])
        for _ in range(3):
            other.push(other.ones())
        assert slow.is_shut()
    finally:
        slow.close()
        other.channel.close()


def test_who_does_not_read_is_not_written_to_for_ever(shard: Shard) -> None:
    """Back-pressure: its pushes are not taken either, and the server's memory stays as it is."""
    shape = SHAPES["large"]
    shard.configure(shape.size_bytes // 4, shape.block_bytes // 4)
    greedy = Client(ask(shard, shape).tcp).greet()
    other = Worker(ENCRYPTED, shard, shape, worker=1)
    try:
        assert greedy.is_let_in()
        greedy.end.settimeout(0.5)
        pull = frames.OPENING.pack(Operation.PULL, 0, 0, 0)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 100 << 20:
                frame = greedy.sealed(Kind.EXCHANGE, pull)
                greedy.end.sendall(frame)
                sent += len(frame)
        other.push(other.ones())
    finally:
        greedy.close()
        other.channel.close()


# ── in clear ──


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        *[(a, False) for a in ("127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.5.5", "100.64.0.1")],
        *[(a, False) for a in ("::1", "fd00::1", "fe80::1%eth0", "::ffff:10.0.0.1")],
        *[(a, True) for a in ("8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8")],
    ],
)
def test_in_clear_only_among_private_addresses(address: str, refused: bool) -> None:
    class End:
        def getpeername(self) -> tuple[str, int]:
            return (address, 1)

    if refused:
        with pytest.raises(Unavailable, match="public"):
            tcp._check_private(End())  # type: ignore[arg-type]
    else:
        tcp._check_private(End())  # type: ignore[arg-type]


@pytest.mark.parametrize("force", [False, True])
def test_force_insists_on_it(at: Shard, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    def public(end: socket.socket) -> None:
        raise Unavailable("tcp", "public")

    monkeypatch.setattr(tcp, "_check_private", public)
    route = Route(at.authority.cluster_id, 1, 0, 0, 1)
    channel = TcpChannel(
        identity(at.authority, "worker/0"), at.address, route, TINY, encrypt=False, force=force
    )
    with contextlib.closing(channel):
        if force:
            channel.connect()
        else:
            with pytest.raises(Unavailable):
                channel.connect()


def test_encryption_is_what_you_get_unless_you_ask_otherwise(at: Shard) -> None:
    route = Route(at.authority.cluster_id, 1, 0, 0, 1)
    assert TcpChannel(None, "", route, TINY)._encrypt is True  # type: ignore[arg-type]
    assert not ask(at, Shape(4000, 64)).HasField("refusal")
