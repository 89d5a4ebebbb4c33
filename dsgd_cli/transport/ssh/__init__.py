"""The road to a host by SSH: one paramiko connection, one channel for each program.

Invariants: no host key is trusted that is not on record, pinned, or newly accepted on request; no
password is ever asked for or sent; the remote command is `exec` and the quoted argv, nothing else;
every wait has a deadline; a peer that vanished (a pulled cable) is noticed within 15 seconds. This
is the one folder that knows paramiko: none of its exceptions leaves it. ssh_config is not read.
"""

from __future__ import annotations

from dsgd_cli.transport.ssh.transport import SshTransport

__all__ = ["SshTransport"]
