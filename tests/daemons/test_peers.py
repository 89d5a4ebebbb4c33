"""The coordinator's calls to servers have bounds, too."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from dsgd_cli.daemons import peers
from dsgd_cli.launcher.identity import make_authority
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids


async def test_a_call_that_is_never_answered_names_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accepted by the kernel, and then nothing: as from a process that is stopped."""
    monkeypatch.setattr(peers, "GIVE_UP_S", 0.5)
    cluster_id = "0123456789abcdef"
    tls = make_authority(cluster_id).issue("coordinator/0")
    me = ids.Identity("coordinator/0", cluster_id, **tls)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        peer = peers.Peer(me, 1, f"127.0.0.1:{silent.getsockname()[1]}")
        try:
            with pytest.raises(ids.PeerUnreachable, match="has not answered Freeze for 0 s") as it:
                await peer.call("Freeze", pb.FreezeRequest(epoch=1), timeout_s=0.1)
        finally:
            await peer.close()
    assert it.value.process == "server/1"
