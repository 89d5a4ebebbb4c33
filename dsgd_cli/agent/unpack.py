"""Filling the cache from a tar stream.

It is unpacked beside its target and renamed, so that concurrent senders and broken connections
leave either a whole folder or nothing. Only plain files and folders are taken from an archive: no
links, no devices, no path that leaves the folder. The hash is the launcher's name for the content;
it is not recomputed here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from dsgd_cli.agent import cache, paths
from dsgd_cli.agent.framing import Message, Refused

ABANDONED_AFTER_S = 24 * 3600


def receive(kind: Any, digest: Any, chunks: Iterator[bytes]) -> Message:
    """Unpack a tar stream as <cache>/<kind>/<hash>. All `chunks` are consumed, whatever happens."""
    try:
        place = cache.target(kind, digest)
        if not place.is_dir():
            _unpack(kind, place, chunks)
        return {"path": str(place)}
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise Refused("unfit", f"cannot unpack {kind} {digest}: {error}") from error
    finally:
        for _ in chunks:
            pass


def _unpack(kind: str, place: Path, chunks: Iterator[bytes]) -> None:
    paths.make_private(place.parent)
    _remove_abandoned(place.parent)
    part = Path(tempfile.mkdtemp(prefix=f".{place.name[:16]}.", suffix=".part", dir=place.parent))
    try:
        content = part / "content"
        content.mkdir()
        with tarfile.open(fileobj=cast(IO[bytes], _Readable(chunks)), mode="r|*") as archive:
            for member in archive:
                _extract(archive, member, content)
        if kind == "env":
            content = _unzip_wheel(content, part / "wheel")
        with contextlib.suppress(OSError):  # another sender was quicker: its content is the same
            content.rename(place)
        if not place.is_dir():
            raise Refused("unfit", f"cannot put content at {place}")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    path = _inside(folder, member.name)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    elif member.isreg():
        source = archive.extractfile(member)
        assert source is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, source, member.mode & 0o111)
    else:
        raise Refused("invalid", f"neither a file nor a folder: {ascii(member.name)[:200]}")


def _unzip_wheel(folder: Path, into: Path) -> Path:
    found = list(folder.iterdir())
    if len(found) != 1 or found[0].suffix != ".whl":
        raise Refused("invalid", "an environment is sent as one wheel")
    into.mkdir()
    with zipfile.ZipFile(found[0]) as wheel:
        for member in wheel.infolist():
            name = _wheel_path(member.filename)
            if (member.external_attr >> 16) & 0o170000 == 0o120000 or "\\" in member.filename:
                raise Refused("invalid", f"unsafe in a wheel: {ascii(member.filename)[:200]}")
            path = _inside(into, name)
            if member.is_dir() or not name:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source:
                _write(path, source, 0)
    return into


def _wheel_path(name: str) -> str:
    """Where a member of a wheel goes: `x.data/purelib/` is the root; scripts are left out ("")."""
    parts = PurePosixPath(name).parts
    if len(parts) > 1 and parts[0].endswith(".data"):
        return "/".join(parts[2:]) if parts[1] in ("purelib", "platlib") else ""
    return name


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise Refused("invalid", f"unsafe path in an archive: {ascii(name)[:200]}")
    return folder / path


def _write(path: Path, source: IO[bytes], executable: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o644 | executable), "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _remove_abandoned(folder: Path) -> None:
    """Parts whose unpacker was killed. By age: on a shared home its pid says nothing."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(part, ignore_errors=True)


class _Readable:
    """The file that tarfile reads in stream mode: `read(n)` gives n bytes unless at the end."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._buffer += chunk
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data
