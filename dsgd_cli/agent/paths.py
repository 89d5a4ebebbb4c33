"""Where things are on a host: the one place that knows.

    cache   ${XDG_CACHE_HOME:-~/.cache}/dsgd/    code/<hash>  env/<hash>  files/<hash>  data/<key>
    state   ${XDG_STATE_HOME:-~/.local/state}/dsgd/
                run/<cluster>@<host id>/         the run directory: gone when the cluster is
                results/<cluster>/<run id>/      what is not home yet
    socket  /tmp/dsgd-<uid>/<12 hex>.sock        short (a unix path has 107 bytes); XDG_RUNTIME_DIR
                                                 would vanish with the user's last login session

The host id keeps the machines apart that share a home. Folders are private (0700).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from pathlib import Path

from dsgd_cli.agent.framing import Refused


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise Refused("unfit", f"no home folder: {error}") from None


def _base(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    base = Path(value) if value.startswith("/") else home() / default
    return base / "dsgd"


def cache() -> Path:
    return _base("XDG_CACHE_HOME", ".cache")


def state() -> Path:
    return _base("XDG_STATE_HOME", ".local/state")


def machine_id() -> str:
    """Empty where there is none; copies of one image may share it."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    return ""


def host_id() -> str:
    """`<hostname>-<8 hex>`: the same for as long as machine and name are the same."""
    hostname = os.uname().nodename
    digest = hashlib.sha256(f"{machine_id()} {hostname}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", hostname.lower()).strip("-")[:40] or "host"
    return f"{readable}-{digest}"


def run_dir(cluster: str) -> Path:
    return state() / "run" / f"{cluster}@{host_id()}"


def results_dir(cluster: str) -> Path:
    return state() / "results" / cluster


def socket_dir() -> Path:
    return Path(f"/tmp/dsgd-{os.getuid()}")


def socket_path(run_dir: Path) -> Path:
    return socket_dir() / f"{hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]}.sock"


def make_private(folder: Path) -> None:
    """Create `folder` (0700) and its parents. Another process may be pruning empty ones."""
    for attempt in range(10):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:
            if attempt == 9:
                raise
        except OSError as error:
            raise Refused("unfit", f"cannot create {folder}: {error.strerror}") from None
        else:
            return


def make_socket_dir() -> Path:
    """The folder for sockets, ours alone. /tmp belongs to everybody: what is there is checked."""
    folder = socket_dir()
    make_private(folder)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Refused("unfit", f"{folder} is not a private folder of uid {os.getuid()}")
    return folder


def write_private(path: Path, text: str) -> None:
    """Replace a file (0600) as a whole: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def discard(folder: Path) -> None:
    """Remove a folder. Renamed first, so that a new one of that name is never half removed."""
    doomed = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def discarded(folder: Path) -> list[Path]:
    """What a `discard` that was killed half-way left behind."""
    if not folder.parent.is_dir():
        return []
    return sorted(folder.parent.glob(f"{folder.name}.gone-*"))


def remove_run(run_dir: Path) -> None:
    """Remove run directory and socket, and the folders that are empty then."""
    with contextlib.suppress(FileNotFoundError):
        socket_path(run_dir).unlink()
    discard(run_dir)
    for leftover in discarded(run_dir):
        shutil.rmtree(leftover, ignore_errors=True)
    prune()


def prune(*folders: Path) -> None:
    """Remove those folders that are empty: the given ones, then our own.

    `~/.local/state` counts as ours when it is empty: on a bare host nobody else made it.
    """
    base = state()
    ours = [socket_dir(), base / "results", base / "run", base]
    if base == home() / ".local" / "state" / "dsgd":
        ours += [base.parent, base.parent.parent]
    for folder in (*folders, *ours):
        with contextlib.suppress(OSError):
            folder.rmdir()
