"""The packages that a bare host needs: wheels that fit its python and platform.

They are the versions that the launcher itself runs with, downloaded once per platform with pip into
the launcher's cache; hosts need neither pip nor internet. An index beside them remembers what was
resolved, so that a second `up` starts no pip, hashes nothing and reads no metadata. When a version
has no wheel for a platform, the newest one that has is taken, and that is said. What the user's
model needs besides (`env: {requirements: …}`) is resolved on top of them, once for each text.
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
REQUIREMENTS_TIMEOUT_S = 1800.0  # torch has 200 MB, and with CUDA some gigabytes
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
Extra = str | Path  # a name in EXTRAS, or a requirements file


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
    host: str, facts: Mapping[str, Any], note: Note, extras: Sequence[Extra] = ()
) -> tuple[Wheel, ...]:
    """The wheels for a host, from the cache or, once for each platform, by pip.

    First those that every host needs, then what each of `extras` adds to those before it. Raises
    HostUnfit when there are none for it. May be called for many hosts at once: those of one
    platform wait for the first one's download.
    """
    platform = platform_of(host, facts)
    found = _kept(host, _of_dsgd(platform, "", note), note)
    for extra in extras:
        if isinstance(extra, Path):
            job = _of_file(platform, extra, found)
        else:
            job = _of_dsgd(platform, extra, note)
        found += _kept(host, job, note)
    return found


def pip_timeout_s(extras: Sequence[Extra]) -> float:
    """How long pip may take for the wheels of a host."""
    times = (REQUIREMENTS_TIMEOUT_S if isinstance(x, Path) else DOWNLOAD_TIMEOUT_S for x in extras)
    return sum(times, DOWNLOAD_TIMEOUT_S)


# -- what is resolved together ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """Wheels for a platform that have an index of their own, and how pip gets them."""

    platform: Platform
    index: Path
    what: str
    groups: Groups  # the index holds as long as the launcher has the same versions of these
    timeout_s: float
    resolve: Callable[[_Pip], None]


def _of_dsgd(platform: Platform, extra: str, note: Note) -> _Job:
    """Packages of dsgd's own, in the launcher's versions: those of an extra, or all others."""
    groups = EXTRAS[extra] if extra else GROUPS
    return _Job(
        platform,
        _wheels_folder(platform) / (f"index-{extra}.json" if extra else "index.json"),
        f"packages for {platform}{f', {extra}' if extra else ''}",
        groups,
        DOWNLOAD_TIMEOUT_S,
        lambda pip: _resolve(pip, groups, note),
    )


def _of_file(platform: Platform, listed: Path, base: Sequence[Wheel]) -> _Job:
    """What a requirements file adds to the wheels that the host gets anyway.

    Those are taken as they are: what needs another numpy than dsgd has is refused by pip. As with
    every `pip download`, markers are judged on this machine.
    """
    pins = dict(map(_name_and_version, base))
    content = json.dumps(pins).encode() + listed.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    return _Job(
        platform,
        _wheels_folder(platform) / digest / "index.json",
        f"the packages of {listed.name} for {platform}",
        (),  # their versions are in the folder's name
        REQUIREMENTS_TIMEOUT_S,
        lambda pip: _resolve_file(pip, listed, pins),
    )


def _wheels_folder(platform: Platform) -> Path:
    return launcher_cache() / "wheels" / platform.tag


def _name_and_version(wheel: Wheel) -> tuple[str, str]:
    name, version = wheel.path.name.split("-")[:2]
    return name, version


def _kept(host: str, job: _Job, note: Note) -> tuple[Wheel, ...]:
    """What the job's index says; where it says nothing, what pip gets."""
    found = _from_index(job.index, job.groups)
    if found is None:
        folder = job.index.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / "lock", host, job.timeout_s):
            found = _from_index(job.index, job.groups)  # somebody else may have been quicker
            if found is None:
                note(f"getting {job.what} (once)")
                found = _download(host, job)
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
def _locked(file: Path, host: str, timeout_s: float) -> Iterator[None]:
    """One download at a time, among threads and among launchers."""
    end = time.monotonic() + timeout_s
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
                        timeout_s,
                    ) from None
                time.sleep(0.05)
        yield


# -- pip -------------------------------------------------------------------------------------------


def _download(host: str, job: _Job) -> tuple[Wheel, ...]:
    """Resolve and download everything; leaves the folder as it was when that fails.

    With the folder's lock. A launcher that is left meanwhile removes its part on the way out; what
    one that was killed had downloaded is removed here.
    """
    folder = job.index.parent
    for abandoned in folder.glob(".part.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=".part.", dir=folder, ignore_cleanup_errors=True
    ) as part_name:
        part = Path(part_name)
        job.resolve(_Pip(host, job.platform, part, job.timeout_s))
        wheels = []
        for path in sorted(part.glob("*.whl")):
            target = folder / path.name
            path.replace(target)
            wheels.append(Wheel(target, _sha256(target), target.stat().st_size))
        _write_index(job.index, job.groups, wheels)
        return tuple(wheels)


def _sha256(path: Path) -> str:
    """A wheel of torch's does not belong into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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
            raise pip.refusal(f"package {group[0]}", failure)
        lacking = f"there is no {pins[0]} for {pip.platform}" if pins else f"no {group[0]} here"
        note(f"{pip.host}: {lacking}; it gets {group[0]} {pip.version_of(group[0])}")


def _resolve_file(pip: _Pip, listed: Path, pins: Mapping[str, str]) -> None:
    """What the file names and all that it depends on, but for what is pinned."""
    constraints = pip.into / "constraints.txt"
    constraints.write_text("\n".join(_pins(pins, *pins)))
    what = ["--requirement", str(listed), "--constraint", str(constraints)]
    failure = pip.download(what, dependencies=True)
    if failure is not None:
        raise pip.refusal(f"packages of {listed.name}", failure)
    for path in pip.into.glob("*.whl"):
        if path.name.split("-")[0] in pins:
            path.unlink()


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

    def __init__(self, host: str, platform: Platform, into: Path, timeout_s: float) -> None:
        self.host = host
        self.platform = platform
        self.into = into
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def download(self, requirements: Sequence[str], *, dependencies: bool) -> str | None:
        """Download wheels. Returns what pip said when it found none that fit."""
        if not requirements:
            return "not installed beside dsgd"
        python = "".join(map(str, self.platform.python))
        argv = [sys.executable, "-c", PIP, "download", "--dest", str(self.into)]
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
        found = [path.name for path in self.into.glob("*.whl") if path.name.startswith(prefix)]
        return found[0].split("-")[1] if found else "?"

    def refusal(self, what: str, said: str) -> HostUnfit:
        lines = [f"  {line}" for line in said.splitlines() if line.strip()]
        return HostUnfit(
            self.host,
            f"no {what} could be got for {self.platform}",
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
                env={**os.environ, "TMPDIR": str(self.into)},  # killed, it removes nothing itself
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
                    self._timeout_s,
                    remedy=_remedy("is the package index reachable from here?"),
                ) from None
        return child.returncode, said


def _remedy(first: str = "") -> str:
    existing = "set `env: existing` and install dsgd's packages on the host"
    return f"{first}; or {existing}" if first else existing
