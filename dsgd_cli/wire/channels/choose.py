"""Which channel a worker opens to a shard: the kind that was asked for, or the best that works.

`auto` tries shm, tcp and grpc in this order; why a kind is passed over between these two is handed
to `note`, once, unless it is the ordinary course of things (shm between hosts). A kind that was
asked for by name must work, or the run ends with the reason. The order is settled when a run
begins; a channel that breaks later opens the same kind again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.base import Channel, Route, Shape, Unavailable
from dsgd_cli.wire.channels.grpc import GrpcChannel
from dsgd_cli.wire.channels.shm import ShmChannel
from dsgd_cli.wire.channels.tcp import open_tcp

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The `channel` section of the specification."""

    name: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


def _grpc(
    identity: ids.Identity, address: str, route: Route, shape: Shape, options: Mapping[str, Any]
) -> Channel:
    return GrpcChannel(identity, address, route, shape)


def _shm(
    identity: ids.Identity, address: str, route: Route, shape: Shape, options: Mapping[str, Any]
) -> Channel:
    channel = ShmChannel(identity, address, route, shape)
    channel.connect()
    return channel


Opener = Callable[[ids.Identity, str, Route, Shape, Mapping[str, Any]], Channel]

# Each connects, so that it is known to work, or raises Unavailable. The order is that of `auto`.
OPENERS: dict[str, Opener] = {"shm": _shm, "tcp": open_tcp, "grpc": _grpc}


def open_channel(
    wanted: Wanted,
    identity: ids.Identity,
    address: str,
    route: Route,
    shape: Shape,
    note: Note = lambda text: None,
) -> Channel:
    """A channel to one shard. Raises Refused, PeerUnreachable, or DsgdError when none works."""
    kinds = list(OPENERS) if wanted.name == "auto" else [wanted.name]
    why: list[str] = []
    for kind in kinds:
        try:
            if kind not in OPENERS:
                raise Unavailable(kind, "this version has no such channel")
            channel = OPENERS[kind](identity, address, route, shape, wanted.options)
        except Unavailable as error:
            why.append(error.why or str(error.__cause__))
            if error.why:
                note(f"server/{route.shard}: no {kind} channel: {error.why}")
            continue
        return channel
    raise DsgdError(f"server/{route.shard}: the {wanted.name} channel does not work: {why[-1]}")
