"""Which keys a user may sign in with: the file that they named, their agent's, their usual files.

A file that others may read is not used, and no passphrase is ever asked for; why a key was left out
is kept for the error message.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Generator
from pathlib import Path

import paramiko

from dsgd_cli.contract.errors import AuthenticationFailed
from dsgd_cli.transport.ssh.attempt import in_words, short
from dsgd_cli.transport.ssh.key_agent import AgentSilent, KeyAgent

USUAL_FILES = ("id_ed25519", "id_ecdsa", "id_rsa")


class Tried:
    """What was offered, for the error message."""

    def __init__(self) -> None:
        self.agent: str | None = None
        self.files: list[str] = []
        self.locked: list[Path] = []  # passphrase

    def __str__(self) -> str:
        agent = [f"agent: {self.agent}"] if self.agent else []
        return ", ".join([*agent, *self.files]) or "no key: there is none in ~/.ssh, and no agent"


def check_identity(host: str, path: Path) -> None:
    """A key that the user named must be there, and be private."""
    try:
        exposed = _others_may_read(path)
        path.open("rb").close()
    except OSError as error:
        raise AuthenticationFailed(
            host,
            f"cannot read the identity file {short(path)}: {error.strerror}",
            remedy="correct `identity_file:`",
        ) from error
    if exposed:
        raise AuthenticationFailed(
            host,
            f"others may read the identity file {short(path)}, so it is not used",
            remedy=f"chmod 600 {shlex.quote(str(path))}",
        )


def keys_to_offer(
    identity: Path | None, tried: Tried, agent_timeout_s: float
) -> Generator[paramiko.PKey, None, None]:
    """Each key once, in this order: the named one, the agent's, and without a named one the usual
    files. Close it: the agent stays open in between."""
    offered: set[bytes] = set()
    if identity is not None:
        named = _load(identity, tried)
        if named is not None:
            offered.add(named.asbytes())
            yield named
    agent = _open_agent(tried, agent_timeout_s)
    if agent is not None:
        with contextlib.closing(agent):
            for count, key in enumerate(agent.get_keys(), 1):
                tried.agent = f"{count} key{'s' * (count > 1)}"
                if key.asbytes() not in offered:
                    offered.add(key.asbytes())
                    yield key
    if identity is None:
        for name in USUAL_FILES:
            path = Path("~/.ssh").expanduser() / name
            usual = _load(path, tried) if path.is_file() else None
            if usual is not None and usual.asbytes() not in offered:
                yield usual


def _open_agent(tried: Tried, timeout_s: float) -> KeyAgent | None:
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        return None
    try:
        agent = KeyAgent(path, timeout_s)
    except AgentSilent:
        tried.agent = "does not answer"
        return None
    except (paramiko.SSHException, OSError, EOFError, ValueError):
        tried.agent = "not there"
        return None
    tried.agent = "no keys"
    return agent


def _load(path: Path, tried: Tried) -> paramiko.PKey | None:
    """A private key file; None when it cannot be used, and `tried` says why."""
    try:
        if _others_may_read(path):
            tried.files.append(f"{short(path)} (unused: others may read it; chmod 600)")
            return None
        key = paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError):  # TypeError: cryptography's own
        tried.locked.append(path)
        return None
    except Exception as error:  # a damaged key raises whatever its parser meets
        tried.files.append(f"{short(path)} (unusable: {in_words(error)})")
        return None
    tried.files.append(short(path))
    return key


def _others_may_read(path: Path) -> bool:
    """As OpenSSH sees it: the files of other users are their own business."""
    found = path.stat()
    return found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077 != 0
