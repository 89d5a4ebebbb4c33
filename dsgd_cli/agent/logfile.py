"""The log file of one process: appended to, rotated by size, bounded whatever the process prints.

`worker-3.log` is the newest, `worker-3.log.1` the one before it, and so on. Lines are cut at
64 KiB. Writing never raises: a full disk costs log lines, not the process.
"""

from __future__ import annotations

import codecs
import contextlib
import os
from pathlib import Path

LINE_MAX_BYTES = 64 * 1024
FILE_MAX_BYTES = 16 * 1024 * 1024
FILES = 3  # in all


class LogFile:
    """Append-only, with rotation."""

    def __init__(self, path: Path, max_bytes: int = FILE_MAX_BYTES, files: int = FILES) -> None:
        self._path, self._max_bytes, self._files = path, max_bytes, files
        self._descriptor = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._size + len(data) > self._max_bytes and self._size:
                self._rotate()
            if self._descriptor < 0:
                self._open()
            self._size += os.write(self._descriptor, data)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        self.close()
        self._size = 0
        for number in range(self._files - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                (newer if number > 1 else self._path).replace(older)


class LineDecoder:
    """Bytes as they come -> whole lines of text. UTF-8 may be cut anywhere; bad bytes become �."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes, final: bool = False) -> list[str]:
        text = self._rest + self._decoder.decode(data, final)
        *lines, self._rest = text.split("\n")
        if len(self._rest) > LINE_MAX_BYTES // 4 or (final and self._rest):
            lines.append(self._rest)
            self._rest = ""
        return [part for line in lines for part in _pieces(line.removesuffix("\r"))]


def _pieces(line: str) -> list[str]:
    """A line of at most 64 KiB in UTF-8 as it is, a longer one in pieces."""
    size = LINE_MAX_BYTES // 4  # a character has at most 4 bytes
    if len(line) <= size:
        return [line]
    return [line[start : start + size] for start in range(0, len(line), size)]
