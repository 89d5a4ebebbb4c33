"""The cache of a host: folders named by the hash of their content, complete or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsgd_cli.agent import names, paths
from dsgd_cli.agent.framing import Message, Refused

KINDS = ("code", "env", "files")


def target(kind: Any, digest: Any) -> Path:
    if kind not in KINDS:
        raise Refused("invalid", f"not a kind of content: {ascii(kind)[:100]}")
    return paths.cache() / str(kind) / names.checked(names.HASH, digest, "hash")


def missing(wanted: Message) -> Message:
    """Which of the wanted contents are not here. Same shape as the question."""
    code = wanted.get("code")
    answer: Message = {"code": code is not None and not target("code", code).is_dir()}
    for kind in ("env", "files"):
        digests = wanted.get(kind) or []
        answer[kind] = [digest for digest in digests if not target(kind, digest).is_dir()]
    return answer
