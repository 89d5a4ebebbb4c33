"""What of a requirements file is not installed for the launcher's own python.

The processes on this machine run with it and with its packages: nothing is installed for them, so
that what is missing can only be named. Versions are pip's to judge: only names are compared, and
lines that hold on some machines only (`; sys_platform == …`) or that are options are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dsgd_cli.contract.errors import HostUnfit

NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^]]*\])?\s*([=<>!~@(].*)?$")
LONGEST = 10  # names in a message


def check(host: str, requirements: Path) -> None:
    """Raises HostUnfit with the names of what is missing here."""
    missing = [
        name for name in named(requirements.read_text(errors="replace")) if not _is_installed(name)
    ]
    if missing:
        more = ", …" if len(missing) > LONGEST else ""
        raise HostUnfit(
            host,
            f"{requirements.name} names what {sys.executable} does not have:"
            f" {', '.join(missing[:LONGEST])}{more}",
            remedy=f"{sys.executable} -m pip install -r {requirements}",
        )


def named(text: str) -> Iterator[str]:
    """The packages that a requirements file asks for everywhere."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)(#|--).*", "", line).strip()
        match = NAME.fullmatch(line)
        if match is not None and ";" not in line:
            yield match[1]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
