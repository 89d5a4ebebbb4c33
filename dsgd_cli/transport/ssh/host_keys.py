"""Whether a server is the one that the user means: its host key is pinned, on record, or refused.

A new key is accepted only on request, and then recorded in dsgd's own file: the user's known_hosts
is read and never written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import paramiko

from dsgd_cli.contract.errors import HostKeyRejected
from dsgd_cli.transport.ssh import known_hosts
from dsgd_cli.transport.ssh.attempt import Server, short
from dsgd_cli.transport.ssh.known_hosts import Verdict

# type of a host key -> the signature algorithms to ask for, in the order in which we prefer types
ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}


class HostKeyCheck:
    """Decides whether a server's key is the right one."""

    def __init__(
        self,
        server: Server,
        pinned: str | None,
        accept_new: bool,
        on_accept: Callable[[str], None] | None,
    ) -> None:
        self._server = server
        self._pinned = pinned.rstrip("=") if pinned else None
        self._accept_new = accept_new
        self._on_accept = on_accept
        self._own_file = _own_known_hosts()
        self._files = (
            Path("~/.ssh/known_hosts").expanduser(),
            Path("/etc/ssh/ssh_known_hosts"),
            self._own_file,
        )
        self._shown: list[str] = []

    def algorithms_to_ask_for(self) -> list[list[str]]:
        """One list for each connection to try.

        A server signs with one key only. The types on record come first, or a known server that
        prefers another of its keys would look like an impostor. For a fingerprint the type is
        unknown: one after the other.
        """
        self._shown = []
        if self._pinned:
            return [list(algorithms) for algorithms in ALGORITHMS.values()]
        known = [record.kind for record in self._records() if not record.revoked]
        kinds = sorted(ALGORITHMS, key=lambda kind: kind not in known)
        return [[algorithm for kind in kinds for algorithm in ALGORITHMS[kind]]]

    def accepts(self, key: paramiko.PKey) -> bool:
        """True: this is the host. False: not the pinned key. Raises HostKeyRejected."""
        kind, blob = key.get_name(), key.asbytes()
        if self._pinned:
            self._shown.append(known_hosts.fingerprint(blob))
            return known_hosts.fingerprint(blob) == self._pinned
        verdict, records = known_hosts.judge(self._records(), kind, blob)
        if verdict is Verdict.UNKNOWN and self._accept_new:
            self._accept(kind, blob)
        elif verdict is not Verdict.KNOWN:
            raise self._rejection(verdict, kind, blob, [record.place for record in records])
        return True

    def none_accepted(self) -> HostKeyRejected:
        """The error after all of `algorithms_to_ask_for`."""
        if not self._pinned:
            return HostKeyRejected(
                self._server.host,
                f"{self._server} has no host key that dsgd can use",
                remedy=f"give it one of the type {next(iter(ALGORITHMS))}",
            )
        shown = ", ".join(self._shown) or "no key that dsgd can use"
        return HostKeyRejected(
            self._server.host,
            f"its host key is not the one in the cluster file: {self._server} has {shown},"
            f" not {self._pinned}",
            remedy="find out why; if the host was reinstalled, correct `host_key:`",
        )

    def _records(self) -> tuple[known_hosts.Record, ...]:
        return known_hosts.read(self._files, self._server.address, self._server.port)

    def _line(self, kind: str, blob: bytes) -> str:
        return known_hosts.line_for(self._server.address, self._server.port, kind, blob)

    def _accept(self, kind: str, blob: bytes) -> None:
        try:
            known_hosts.append(self._own_file, self._line(kind, blob))
        except OSError as error:
            raise HostKeyRejected(
                self._server.host,
                f"its new host key could not be recorded in {self._own_file}: {error}",
            ) from error
        if self._on_accept is not None:
            self._on_accept(
                f"{self._server.host}: accepted its new host key {kind}"
                f" {known_hosts.fingerprint(blob)} (recorded in {short(self._own_file)})"
            )

    def _rejection(
        self, verdict: Verdict, kind: str, blob: bytes, places: Sequence[str]
    ) -> HostKeyRejected:
        server, fingerprint = self._server, known_hosts.fingerprint(blob)
        shown = f"{kind} {fingerprint}"
        where = ", ".join(short(place) for place in places)
        if verdict is Verdict.REVOKED:
            return HostKeyRejected(server.host, f"its host key {shown} is revoked in {where}")
        if verdict is Verdict.CHANGED:
            return HostKeyRejected(
                server.host,
                f"its host key CHANGED: {server} shows {shown}, which is not the one in {where};"
                " somebody may be listening in",
                remedy=f"if the host was reinstalled: remove {where} and check the new key",
            )
        scan = f"ssh-keyscan {server.port_option}{shlex.quote(server.address)}"
        return HostKeyRejected(
            server.host,
            f"its host key is unknown: {server} shows {shown}",
            details=[self._line(kind, blob)],
            remedy=(
                "compare the fingerprint with the host's own; then either"
                f" `{scan} >> ~/.ssh/known_hosts`,"
                f" or `host_key: {fingerprint}` for this host,"
                " or `host_keys: accept-new` under `ssh:`"
            ),
        )


def _own_known_hosts() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()
    return base / "dsgd" / "known_hosts"
