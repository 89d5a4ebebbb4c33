"""What this host is: python, platform, libc, free space. Asked often, so it must be quick.

The launcher chooses wheels by these; a field that cannot be known is null, never a guess.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

from dsgd_cli.agent import paths, processes
from dsgd_cli.agent.framing import Message


def ready() -> Message:
    """The few facts of the first line."""
    return {
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "pid": os.getpid(),
        "host_id": paths.host_id(),
        "hostname": os.uname().nodename,
    }


def facts() -> Message:
    system = os.uname()
    cache, state = paths.cache(), paths.state()
    return {
        "host_id": paths.host_id(),
        "hostname": system.nodename,
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "implementation": sys.implementation.name,
        "machine": system.machine,
        "system": system.sysname,
        "libc": libc(),
        "disk_free_bytes": disk_free_bytes(cache),
        "ssh_connection": os.environ.get("SSH_CONNECTION"),
        "cache": str(cache),
        "state": str(state),
        "boot_id": processes.boot_id(),
    }


def libc() -> list[str] | None:
    """["glibc", "2.36"] or ["musl", "1.2"]."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        if name == "glibc":
            return [name, version]
    return _musl()


def _musl() -> list[str] | None:
    import subprocess

    for loader in sorted(Path("/lib").glob("ld-musl-*")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run([str(loader)], capture_output=True, text=True, timeout=5).stderr
            for line in said.splitlines():
                if line.startswith("Version "):
                    return ["musl", line.removeprefix("Version ").strip()]
    return None


def disk_free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
