"""The carriers that a server offers beside gRPC: one literal table."""

from __future__ import annotations

import contextlib

from dsgd_cli.wire.channels.base import Carrier, Holding
from dsgd_cli.wire.channels.shm_server import ShmCarrier
from dsgd_cli.wire.channels.tcp_server import TcpCarrier


def make_carriers(holding: Holding, bind: str) -> dict[str, Carrier]:
    """kind -> carrier, each ready for `open`. What this host lacks is left out."""
    carriers: dict[str, Carrier] = {"tcp": TcpCarrier(holding, bind)}
    with contextlib.suppress(AttributeError, OSError):  # no abstract sockets, no eventfd
        carriers["shm"] = ShmCarrier(holding)
    return carriers
