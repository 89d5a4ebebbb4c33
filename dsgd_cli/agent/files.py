"""Sending and removing single files: only below the run directories and the results.

Paths come from the other side, so they are resolved first: no link and no `..` leads elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from dsgd_cli.agent import framing, paths
from dsgd_cli.agent.framing import Message, Refused


def allowed(value: Any) -> Path:
    """The path, when it lies below `run/` or `results/` of our state folder."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise Refused("invalid", f"not an absolute path: {ascii(value)[:200]}")
    path = Path(os.path.realpath(value))
    for base in ("run", "results"):
        root = Path(os.path.realpath(paths.state() / base))
        if root in path.parents:
            return path
    raise Refused("forbidden", f"not a file of a cluster: {ascii(value)[:200]}")


def send(value: Any, number: Any) -> None:
    """The reply {"size": n}, then n bytes: as many as the file had when it was opened."""
    path = allowed(value)
    try:
        file = path.open("rb")
    except OSError as error:
        raise Refused("missing", f"{path}: {error.strerror}") from None
    with file:
        left = os.fstat(file.fileno()).st_size
        framing.say({"id": number, "ok": {"size": left}})
        while left:
            chunk = file.read(min(left, framing.CHUNK_BYTES))
            if not chunk:
                raise EOFError(f"{path} was cut while it was sent")  # ends the connection
            framing.write_all(1, chunk)
            left -= len(chunk)


def remove(value: Any) -> Message:
    """Remove a file or a folder, and the folders above it that are empty then."""
    path = allowed(value)
    existed = os.path.lexists(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    results = Path(os.path.realpath(paths.state() / "results"))
    paths.prune(*(parent for parent in path.parents if results in parent.parents))
    return {"removed": existed}
