"""Host keys on record: OpenSSH's known_hosts files, read and extended without any library.

Says for a key that a server showed whether it is known, unknown or not the one on record, and where
the record is (`file:line`), which is what a user needs to repair it. Hashed names, patterns, ports,
negation and `@revoked` are understood; certificate authorities are not, and prove nothing here.
"""

from __future__ import annotations

import base64
import binascii
import enum
import fcntl
import fnmatch
import hashlib
import hmac
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class Verdict(enum.Enum):
    """What the records say about a key."""

    KNOWN = "known"
    UNKNOWN = "unknown"  # there is no record of this host
    CHANGED = "changed"  # there is one, and it is another key
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Record:
    """One line about one host."""

    place: str  # file:line
    kind: str  # ssh-ed25519 …
    blob: bytes
    revoked: bool
    exact: bool  # it names the port too (or the port is 22)


def fingerprint(blob: bytes) -> str:
    """As OpenSSH prints it: SHA256:…"""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def name_of(address: str, port: int) -> str:
    """How known_hosts calls a server."""
    return address.lower() if port == 22 else f"[{address.lower()}]:{port}"


def line_for(address: str, port: int, kind: str, blob: bytes) -> str:
    """The line that would make this key known."""
    return f"{name_of(address, port)} {kind} {base64.b64encode(blob).decode()}"


def read(files: Iterable[Path], address: str, port: int) -> tuple[Record, ...]:
    """All records of one server. What cannot be read or understood is not a record."""
    found: list[Record] = []
    for file in files:
        try:
            text = file.read_text("utf-8", "replace")
        except OSError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            record = _parse(line, f"{file}:{number}", address.lower(), port)
            if record is not None:
                found.append(record)
    return tuple(found)


def judge(records: Sequence[Record], kind: str, blob: bytes) -> tuple[Verdict, tuple[Record, ...]]:
    """The verdict about a key, and the records that it rests on.

    A record without the port only counts in favour of a key, as in OpenSSH. A key of another type
    than the one on record is a changed key: anything else would let an impostor choose the type.
    """
    same = tuple(record for record in records if record.blob == blob)
    revoked = tuple(record for record in same if record.revoked)
    if revoked:
        return Verdict.REVOKED, revoked
    if same:
        return Verdict.KNOWN, same
    others = tuple(record for record in records if record.exact and not record.revoked)
    if others:
        of_this_kind = tuple(record for record in others if record.kind == kind)
        return Verdict.CHANGED, of_this_kind or others
    return Verdict.UNKNOWN, ()


def append(file: Path, line: str) -> None:
    """Add a line to dsgd's own file (0600, in a folder of ours), unless it is there already."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    with os.fdopen(os.open(file, flags, 0o600), "r+", encoding="utf-8") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0)
        text = opened.read()
        if line not in text.splitlines():
            opened.write(("" if not text or text.endswith("\n") else "\n") + line + "\n")


def _parse(line: str, place: str, address: str, port: int) -> Record | None:
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    marker = words.pop(0) if words[0].startswith("@") else ""
    if len(words) < 3 or marker not in ("", "@revoked"):
        return None
    exact = _names(words[0], name_of(address, port))
    if not exact and (port == 22 or not _names(words[0], address)):
        return None
    try:
        blob = base64.b64decode(words[2], validate=True)
    except (binascii.Error, ValueError):
        return None
    return Record(place, words[1], blob, marker == "@revoked", exact)


def _names(field: str, name: str) -> bool:
    """Whether the first field of a line means this server."""
    if field.startswith("|1|"):
        try:
            salt, digest = (base64.b64decode(part, validate=True) for part in field[3:].split("|"))
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(hmac.new(salt, name.encode(), "sha1").digest(), digest)
    wanted = False
    for pattern in field.lower().split(","):
        negated = pattern.startswith("!")
        if _matches(pattern.lstrip("!"), name):
            if negated:
                return False
            wanted = True
    return wanted


def _matches(pattern: str, name: str) -> bool:
    """`*` and `?` only: brackets are part of `[address]:port`."""
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
