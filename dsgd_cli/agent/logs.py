"""The `logs` verb: the ends of rotated log files, and then what is added to them.

Per process in order, from the oldest rotated file to the newest. Following keeps each file open and
goes on by inode, so that a rotation neither loses nor repeats a line; files that appear later are
picked up. It ends with stdin, with the next request, or with the run directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsgd_cli.agent import framing, names
from dsgd_cli.agent.framing import Input, Refused
from dsgd_cli.agent.logfile import FILES, LineDecoder
from dsgd_cli.agent.processes import AGENT

POLL_S = 0.1
CHUNK_BYTES = 64 * 1024


def chosen(value: Any) -> list[str] | None:
    """None: all processes. The agent's own log is shown only when it is named."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise Refused("invalid", "`processes` is neither a list nor null")
    return [name if name == AGENT else names.process(name) for name in value]


def tail(value: Any) -> int | None:
    """None: all of it."""
    if value in (None, "all"):
        return None
    if not isinstance(value, int) or value < 0:
        raise Refused("invalid", f"not a number of lines: {ascii(value)[:100]}")
    return value


def send(
    run_dir: Path, processes: list[str] | None, lines: int | None, follow: bool, stdin: Input
) -> None:
    folder = run_dir / "logs"
    if not folder.is_dir():
        raise Refused("missing", f"nothing of {run_dir.name.partition('@')[0]} runs here")
    logs: dict[str, Log] = {}
    while True:
        for path in sorted(folder.glob("*.log")):
            process = names.process_of(path.stem)
            wanted = process != AGENT if processes is None else process in processes
            if wanted and process not in logs:
                logs[process] = Log(process, path, lines)
        for log in logs.values():
            log.say_more()
        if not follow or not folder.is_dir():
            break
        lines = None  # of files that appear from now on, everything is new
        if stdin.wait(POLL_S):  # the next request, or the end of the connection
            break
    for log in logs.values():
        log.close()


class Log:
    """One process's log files, read to their end, again and again."""

    def __init__(self, process: str, path: Path, lines: int | None) -> None:
        self._process, self._path = process, path
        self._decoder = LineDecoder()
        self._file = -1
        for candidate in reversed(self._files()):
            self._open(candidate)
            if lines is not None:
                lines -= seek_lines_back(self._file, lines)
                if lines == 0:
                    break

    def say_more(self) -> None:
        """Say what was added since, over any rotation."""
        self._drain()
        while self._file >= 0 and (newer := self._newer()):
            self._open(newer)
            self._drain()

    def close(self) -> None:
        self._say(self._decoder.feed(b"", final=True))
        if self._file >= 0:
            os.close(self._file)

    def _open(self, path: Path) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _files(self) -> list[Path]:
        """Oldest first."""
        rotated = [self._path.with_name(f"{self._path.name}.{n}") for n in range(FILES - 1, 0, -1)]
        return [path for path in (*rotated, self._path) if path.is_file()]

    def _newer(self) -> Path | None:
        """The file after the open one. It had no writer any more when the next one appeared."""
        here = os.fstat(self._file)
        files = self._files()
        for index, path in enumerate(files):
            if os.path.samestat(path.stat(), here):
                newer = files[index + 1 : index + 2]
                if newer:
                    self._drain()  # what came between our last look and the rotation
                return newer[0] if newer else None
        return files[0] if files and here.st_nlink == 0 else None  # rotated away unread

    def _drain(self) -> None:
        while self._file >= 0 and (data := os.read(self._file, CHUNK_BYTES)):
            self._say(self._decoder.feed(data))

    def _say(self, lines: list[str]) -> None:
        said = ({"log": {"process": self._process, "line": line}} for line in lines)
        framing.write_all(1, b"".join(framing.encode(message) for message in said))


def seek_lines_back(file: int, lines: int) -> int:
    """Place `file` at the start of its last `lines` lines; how many there were, at most `lines`."""
    position = os.lseek(file, 0, os.SEEK_END)
    newlines = -1  # the one that ends the last line starts no line
    while lines and position:
        size = min(CHUNK_BYTES, position)
        position -= size
        block = os.pread(file, size, position)
        end = len(block)
        while (end := block.rfind(b"\n", 0, end)) >= 0:
            newlines += 1
            if newlines == lines:
                os.lseek(file, position + end + 1, os.SEEK_SET)
                return lines
    if not lines:
        return 0
    os.lseek(file, 0, os.SEEK_SET)
    return newlines + 1
