"""Where an importable module of the user's lives, without importing it."""

from __future__ import annotations

from pathlib import Path


def find_module(name: str, folder: Path | None = None) -> Path | None:
    """The file or folder of a module's top-level package in the working folder.

    `lab.models` -> `./lab`; None when it is not there: then it must be installed on the hosts.
    """
    root = folder or Path.cwd()
    top = name.partition(".")[0]
    for place in (root / top, root / f"{top}.py"):
        if (place / "__init__.py").is_file() or place.is_file():
            return place.resolve()
    return None
