"""The packages that a bare host needs: wheels that fit its python and platform.

They are the versions that the launcher itself runs with, downloaded once per platform with pip into
the launcher's cache; hosts need neither pip nor internet. An index beside them remembers what was
resolved, so that a second `up` starts no pip, hashes nothing and reads no metadata. When a version
has no wheel for a platform, the newest one that has is taken, and that is said.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsgd_cli.contract.errors import DeadlinePassed, HostUnfit

# what must be of one origin is resolved together: pydantic wants its very own core
GROUPS = (
    ("numpy",),
    ("grpcio",),
    ("protobuf",),
    ("cryptography", "cffi", "pycparser"),
    ("pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"),
)
# what only some runs need, by the name of dsgd's extra
EXTRAS = {"images": (("pillow",),)}
DOWNLOAD_TIMEOUT_S = 150.0
OLDEST_GLIBC, OLDEST_MUSL = 5, 1  # minor versions that manylinux and musllinux begin with
LEGACY = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}  # name -> glibc 2.x
INDEX_VERSION = 1
LAST_LINES = 6
# pip, which ends with whoever holds the other end of its stdin, however that one ends
PIP = """\
import os, runpy, signal, threading
def end_with_launcher():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=end_with_launcher, daemon=True).start()
runpy.run_module('pip', run_name='__main__', alter_sys=True)
"""

Note = Callable[[str], None]
Groups = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel in the launcher's cache."""

    path: Path
    sha256: str
    size: int

    @property
    def hash(self) -> str:
        """Its name in a host's cache."""
        return self.sha256[:32]


@dataclass(frozen=True, slots=True)
class Platform:
    """What decides which wheels fit a host."""

    python: tuple[int, int]
    machine: str
    libc: str  # glibc | musl
    libc_version: tuple[int, int]

    def __str__(self) -> str:
        python = ".".join(map(str, self.python))
        return (
            f"python {python}, {self.machine}, {self.libc} {'.'.join(map(str, self.libc_version))}"
        )

    @property
    def tag(self) -> str:
        """As a folder's name: cp311-x86_64-glibc-2.36."""
        python = "".join(map(str, self.python))
        return f"cp{python}-{self.machine}-{self.libc}-{'.'.join(map(str, self.libc_version))}"

    def pip_platforms(self) -> list[str]:
        """What pip calls the platforms whose wheels run there, the best first."""
        major, minor = self.libc_version
        if self.libc == "musl":
            versions = range(minor, OLDEST_MUSL - 1, -1)
            return [f"musllinux_{major}_{each}_{self.machine}" for each in versions]
        names = []
        for each in range(minor, OLDEST_GLIBC - 1, -1):
            names.append(f"manylinux_{major}_{each}_{self.machine}")
            names += [f"{old}_{self.machine}" for old, since in LEGACY.items() if since == each]
        return [*names, f"linux_{self.machine}"]


def launcher_cache() -> Path:
    """Where the launcher keeps what it can get again: ${XDG_CACHE_HOME:-~/.cache}/dsgd."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "dsgd"


def platform_of(host: str, facts: Mapping[str, Any]) -> Platform:
    """The platform that a host's facts describe. Raises HostUnfit where no wheels can fit."""
    python, libc = facts.get("python") or (0, 0), facts.get("libc")
    system, machine = str(facts.get("system")), str(facts.get("machine"))
    implementation = str(facts.get("implementation"))
    if system != "Linux":
        raise HostUnfit(host, f"runs {system} on {machine}: dsgd's processes need Linux")
    if implementation != "cpython":
        raise HostUnfit(
            host,
            f"its python is {implementation}: dsgd has packages for cpython alone",
            remedy=_remedy("set `python:` to a cpython"),
        )
    name, version = libc if libc else ("", "")
    match = re.match(r"(\d+)\.(\d+)", str(version))
    if name not in ("glibc", "musl") or match is None or not re.fullmatch(r"\w+", machine):
        raise HostUnfit(
            host,
            f"its C library is unknown ({name or 'none found'} {version}, {machine}):"
            " dsgd cannot choose packages for it",
            remedy=_remedy(),
        )
    return Platform((int(python[0]), int(python[1])), machine, name, (int(match[1]), int(match[2])))


def wheels_for(
    host: str, facts: Mapping[str, Any], note: Note, extra: str = ""
) -> tuple[Wheel, ...]:
    """The wheels for a host, from the cache or, once for each platform, by pip.

    With `extra`, those that dsgd's extra of this name adds, and no others. Raises HostUnfit when
    there are none for it. May be called for many hosts at once: those of one platform wait for the
    first one's download.
    """
    platform = platform_of(host, facts)
    folder = launcher_cache() / "wheels" / platform.tag
    groups = EXTRAS[extra] if extra else GROUPS
    index = folder / (f"index-{extra}.json" if extra else "index.json")
    found = _from_index(index, groups)
    if found is None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / "lock", host):
            found = _from_index(index, groups)  # somebody else may have been quicker
            if found is None:
                note(f"getting packages for {platform}{f', {extra}' if extra else ''} (once)")
                found = _download(host, platform, index, groups, note)
    return found


# -- the index -------------------------------------------------------------------------------------


def _from_index(index: Path, groups: Groups) -> tuple[Wheel, ...] | None:
    """What was resolved before, if the launcher's packages and the files are still the same."""
    try:
        read = json.loads(index.read_text())
        if read["version"] != INDEX_VERSION:
            return None
        if read["installed"] != _installed_state() and read["wanted"] != _wanted(groups):
            return None
        wheels = []
        for name, sha256, size, mtime_ns in read["wheels"]:
            path = index.parent / name
            found = path.stat()
            if (found.st_size, found.st_mtime_ns) != (size, mtime_ns):
                return None
            wheels.append(Wheel(path, sha256, size))
        return tuple(wheels)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_index(index: Path, groups: Groups, wheels: Sequence[Wheel]) -> None:
    content = {
        "version": INDEX_VERSION,
        "installed": _installed_state(),
        "wanted": _wanted(groups),
        "wheels": [
            [wheel.path.name, wheel.sha256, wheel.size, wheel.path.stat().st_mtime_ns]
            for wheel in wheels
        ],
    }
    part = index.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(index)


def _installed_state() -> list[list[object]]:
    """Changes whenever a package of the launcher is installed, upgraded or removed.

    Reading the folders' times is a hundred times quicker than asking for the versions.
    """
    state: list[list[object]] = []
    for path in sys.path:
        if path.endswith("-packages"):
            with suppress(OSError):
                state.append([path, Path(path).stat().st_mtime_ns])
    return state


def _wanted(groups: Groups) -> dict[str, str]:
    """The versions that the launcher runs with, by name."""
    from importlib import metadata  # 30 ms that a second `up` does not spend

    wanted = {}
    for group in groups:
        for name in group:
            with suppress(metadata.PackageNotFoundError):
                wanted[name] = metadata.version(name)
    return wanted


@contextmanager
def _locked(file: Path, host: str) -> Iterator[None]:
    """One download at a time, among threads and among launchers."""
    end = time.monotonic() + DOWNLOAD_TIMEOUT_S
    with file.open("w") as opened:
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DeadlinePassed(
                        "waiting for another dsgd that downloads packages",
                        host,
                        DOWNLOAD_TIMEOUT_S,
                    ) from None
                time.sleep(0.05)
        yield


# -- pip -------------------------------------------------------------------------------------------


def _download(
    host: str, platform: Platform, index: Path, groups: Groups, note: Note
) -> tuple[Wheel, ...]:
    """Resolve and download everything; leaves the folder as it was when that fails.

    With the folder's lock. A launcher that is left meanwhile removes its part on the way out; what
    one that was killed had downloaded is removed here.
    """
    folder = index.parent
    for abandoned in folder.glob(".part.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=".part.", dir=folder, ignore_cleanup_errors=True
    ) as part_name:
        part = Path(part_name)
        _resolve(_Pip(host, platform, part), groups, note)
        wheels = []
        for path in sorted(part.glob("*.whl")):
            target = folder / path.name
            path.replace(target)
            sha256 = hashlib.sha256(target.read_bytes()).hexdigest()
            wheels.append(Wheel(target, sha256, target.stat().st_size))
        _write_index(index, groups, wheels)
        return tuple(wheels)


def _resolve(pip: _Pip, groups: Groups, note: Note) -> None:
    """All of the launcher's versions at once; where that fails, group by group."""
    wanted = _wanted(groups)
    failure = pip.download(_pins(wanted, *wanted), dependencies=False)
    if failure is None:
        return
    for group in groups:
        pins = _pins(wanted, *group)
        if pip.download(pins, dependencies=False) is None:
            continue
        failure = pip.download([_at_least(group[0])], dependencies=len(group) > 1)
        if failure is not None:
            raise pip.refusal(group[0], failure)
        lacking = f"there is no {pins[0]} for {pip.platform}" if pins else f"no {group[0]} here"
        note(f"{pip.host}: {lacking}; it gets {group[0]} {pip.version_of(group[0])}")


def _pins(wanted: Mapping[str, str], *names: str) -> list[str]:
    return [f"{name}=={wanted[name]}" for name in names if name in wanted]


def _at_least(name: str) -> str:
    """The oldest version that dsgd itself asks for, as its package says."""
    from importlib import metadata

    with suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("dsgd") or ():
            bare = requirement.partition(";")[0].strip()  # without `extra == …`
            if re.fullmatch(rf"{name}\s*>=[\w.]+", bare):
                return bare
    return name


class _Pip:
    """pip, asked for another machine's wheels."""

    def __init__(self, host: str, platform: Platform, into: Path) -> None:
        self.host = host
        self.platform = platform
        self._into = into
        self._end = time.monotonic() + DOWNLOAD_TIMEOUT_S

    def download(self, requirements: Sequence[str], *, dependencies: bool) -> str | None:
        """Download wheels. Returns what pip said when it found none that fit."""
        if not requirements:
            return "not installed beside dsgd"
        python = "".join(map(str, self.platform.python))
        argv = [sys.executable, "-c", PIP, "download", "--dest", str(self._into)]
        argv += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        for name in self.platform.pip_platforms():
            argv += ["--platform", name]
        argv += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        argv += [] if dependencies else ["--no-deps"]
        status, said = self._run([*argv, *requirements])
        if status == 0:
            return None
        if "No module named pip" in said:
            raise HostUnfit(
                self.host,
                "needs packages that the launcher downloads with pip, but there is no pip here",
                remedy=_remedy(f"{sys.executable} -m ensurepip"),
            )
        return said

    def version_of(self, name: str) -> str:
        """The version of the wheel that was downloaded for `name`."""
        prefix = f"{name.replace('-', '_')}-"
        found = [path.name for path in self._into.glob("*.whl") if path.name.startswith(prefix)]
        return found[0].split("-")[1] if found else "?"

    def refusal(self, name: str, said: str) -> HostUnfit:
        lines = [f"  {line}" for line in said.splitlines() if line.strip()]
        return HostUnfit(
            self.host,
            f"no package {name} could be got for {self.platform}",
            details=["pip said:", *lines[-LAST_LINES:]],
            remedy=_remedy("is the package index reachable from here?"),
        )

    def _run(self, argv: Sequence[str]) -> tuple[int, str]:
        """Run PIP: until its end, the deadline, or the end of this process."""
        its_stdin, lifeline = os.pipe()
        with os.fdopen(its_stdin) as stdin, os.fdopen(lifeline, "w"):
            child = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            atexit.register(child.kill)  # before its folder is removed
            try:
                return self._wait(child)
            finally:
                atexit.unregister(child.kill)

    def _wait(self, child: subprocess.Popen[str]) -> tuple[int, str]:
        with child:
            try:
                said, _ = child.communicate(timeout=max(0.1, self._end - time.monotonic()))
            except BaseException as error:
                os.killpg(child.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise DeadlinePassed(
                    "downloading packages with pip",
                    self.host,
                    DOWNLOAD_TIMEOUT_S,
                    remedy=_remedy("is the package index reachable from here?"),
                ) from None
        return child.returncode, said


def _remedy(first: str = "") -> str:
    existing = "set `env: existing` and install dsgd's packages on the host"
    return f"{first}; or {existing}" if first else existing
