"""The carriers that a server offers beside gRPC: one literal table."""

from __future__ import annotations

from dsgd_cli.wire.channels.base import Carrier, Holding
from dsgd_cli.wire.channels.shm_server import ShmCarrier
from dsgd_cli.wire.channels.tcp_server import TcpCarrier


def make_carriers(holding: Holding, bind: str) -> dict[str, Carrier]:
    """kind -> carrier, each ready for `open`. What this host lacks is left out."""
    return {"shm": ShmCarrier(holding), "tcp": TcpCarrier(holding, bind)}
