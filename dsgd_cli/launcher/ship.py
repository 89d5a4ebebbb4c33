"""What travels to a host: dsgd's own code, wheels, and the user's files, each as one tar stream.

A bundle's hash names its content, so a host that has it is sent nothing. Streams are made while
they are sent, their size is known before, and the same content always gives the same bytes. Every
file is hashed again on its way: when it changed in the meantime, its last bytes are never sent, and
the host throws the rest away. What is on a host already is not decided here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.launcher.environment import Wheel, launcher_cache
from dsgd_cli.launcher.remote import Remote

PACKAGE = Path(__file__).resolve().parents[1]
ON_HOSTS = ("contract", "engine", "learning", "wire", "daemons", "agent")  # the cluster half
NOT_SENT = ("__pycache__", ".git")
CHUNK_BYTES = 1 << 18
BLOCK_BYTES = 512
UNPACK_TIMEOUT_S = 120.0
REMEMBERED_FROM_BYTES = 1 << 20  # smaller files are hashed anew: that is as quick
REMEMBERED_FILES = 10_000
MAX_ENTRIES = 200_000  # of one folder: each is held in memory and hashed
SETTLED_S = 2.0  # a file that changed later than this may change again within one clock tick


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder of a bundle."""

    name: str  # in the archive
    path: Path  # here
    size: int
    sha256: str  # "" for a folder
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """A tar stream that does not exist yet."""

    kind: str  # code | env | files
    hash: str
    size: int  # of the stream, in bytes
    entries: tuple[Entry, ...]

    def chunks(self) -> Iterator[bytes]:
        """The stream. Raises SpecError when a file is not what it was when it was hashed."""
        for entry in self.entries:
            yield _header(entry)
            if entry.sha256:
                yield from _content(entry)
                yield bytes(-entry.size % BLOCK_BYTES)
        yield bytes(2 * BLOCK_BYTES)


def send_all(remote: Remote, bundles: Sequence[Bundle]) -> None:
    """Send bundles one after the other; the host unpacks one while the next is on its way."""
    for bundle in bundles:
        remote.request("receive", kind=bundle.kind, hash=bundle.hash, size=bundle.size)
        for chunk in bundle.chunks():
            remote.write(chunk)
    for _ in bundles:
        remote.reply("receive", UNPACK_TIMEOUT_S)


@functools.cache
def code_bundle() -> Bundle:
    """The cluster half of dsgd, as this launcher has it."""
    entries = [_file_entry("dsgd_cli/__init__.py", PACKAGE / "__init__.py", {})]
    for name in ON_HOSTS:
        entries += _folder_entries(f"dsgd_cli/{name}", PACKAGE / name, PACKAGE, {})
    return _bundle("code", entries)


def wheel_bundle(wheel: Wheel) -> Bundle:
    """One wheel, to be unpacked into a folder of its own."""
    entries = (Entry(wheel.path.name, wheel.path, wheel.size, wheel.sha256),)
    return Bundle("env", wheel.hash, _stream_size(entries), entries)


def file_bundle(path: Path) -> Bundle:
    """A file or folder of the user, under its own name. Raises SpecError for what cannot go."""
    if not path.name or path.name == "..":
        raise SpecError(f"{path} has no name that a host could give it")
    hashes = _Hashes(launcher_cache() / "hashes.json")
    try:
        if path.is_dir():
            entries = _folder_entries(path.name, path, path.resolve(), hashes.known)
        else:
            entries = [_file_entry(path.name, path, hashes.known)]
    except OSError as error:
        what = error.filename or path
        raise SpecError(f"cannot read {what}: {error.strerror or error}") from error
    hashes.save()
    return _bundle("files", entries)


# -- entries and streams ---------------------------------------------------------------------------


def _bundle(kind: str, entries: Sequence[Entry]) -> Bundle:
    content = json.dumps([[entry.name, entry.sha256, entry.executable] for entry in entries])
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return Bundle(kind, digest, _stream_size(entries), tuple(entries))


def _stream_size(entries: Iterable[Entry]) -> int:
    content = sum(len(_header(entry)) + entry.size + -entry.size % BLOCK_BYTES for entry in entries)
    return content + 2 * BLOCK_BYTES


def _header(entry: Entry) -> bytes:
    """No times and no owners: the same content gives the same bytes."""
    info = tarfile.TarInfo(entry.name)
    info.size = entry.size
    info.mode = 0o755 if entry.executable or not entry.sha256 else 0o644
    info.type = tarfile.REGTYPE if entry.sha256 else tarfile.DIRTYPE
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _content(entry: Entry) -> Iterator[bytes]:
    """A file's bytes; the last chunk only when all of them are as they were."""
    digest, left = hashlib.sha256(), entry.size
    try:
        with entry.path.open("rb", buffering=0) as file:
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                digest.update(chunk)
                left -= len(chunk)
                if not chunk or (not left and digest.hexdigest() != entry.sha256):
                    raise SpecError(f"{entry.path} changed while it was being sent")
                yield chunk
    except OSError as error:
        raise SpecError(f"cannot read {entry.path}: {error.strerror}") from error


def _folder_entries(
    name: str, folder: Path, root: Path, known: dict[str, list[object]]
) -> list[Entry]:
    """A folder and all in it, sorted. Links are followed as long as they stay inside `root`."""
    entries = [Entry(name, folder, 0, "")]
    for path in sorted(folder.iterdir()):
        if path.name in NOT_SENT:
            continue
        inner = f"{name}/{path.name}"
        if path.is_symlink():
            _check_link(path, root)
        if path.is_dir():
            entries += _folder_entries(inner, path, root, known)
        else:
            entries.append(_file_entry(inner, path, known))
        if len(entries) > MAX_ENTRIES:
            raise SpecError(
                f"{folder} has more than {MAX_ENTRIES:,} files: too many to be sent",
                remedy="put it on the hosts and write host:/path",
            )
    return entries


def _check_link(link: Path, root: Path) -> None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, for older pythons
        raise SpecError(f"{link} is a link that leads nowhere ({error})") from error
    if not target.is_relative_to(root):
        raise SpecError(f"{link} is a link that leads out of {root}: {target}")
    if link.parent.resolve().is_relative_to(target):
        raise SpecError(f"{link} is a link to a folder around it")


def _file_entry(name: str, path: Path, known: dict[str, list[object]]) -> Entry:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise SpecError(f"{path} is neither a file nor a folder: it cannot be sent to a host")
    executable = bool(found.st_mode & 0o100)
    return Entry(name, path, found.st_size, _hash(path, found, known), executable)


def _hash(path: Path, found: os.stat_result, known: dict[str, list[object]]) -> str:
    """The SHA-256 of a file; `known` is asked and told about large ones."""
    state = [found.st_size, found.st_mtime_ns, found.st_ino]
    key = str(path.absolute())
    remembered = known.get(key)
    if remembered is not None and remembered[:3] == state:
        return str(remembered[3])
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    settled = time.time() - found.st_mtime > SETTLED_S
    if found.st_size >= REMEMBERED_FROM_BYTES and settled:
        known[key] = [*state, digest.hexdigest()]
    return digest.hexdigest()


class _Hashes:
    """Hashes of large files from earlier times. Losing them costs nothing but time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.known: dict[str, list[object]] = {}
        with suppress(OSError, ValueError, AttributeError):
            read = json.loads(file.read_text())
            self.known = {
                key: value
                for key, value in read.items()
                if isinstance(value, list) and len(value) == 4
            }
        self._before = dict(self.known)

    def save(self) -> None:
        if self.known == self._before:
            return
        newest = dict(list(self.known.items())[-REMEMBERED_FILES:])
        with suppress(OSError):
            write_whole(self._file, json.dumps(newest))


def write_whole(file: Path, text: str) -> None:
    """Replace a file of the launcher's cache: readers see the old one or the new one."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as opened:
            opened.write(text)
        Path(part).replace(file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
