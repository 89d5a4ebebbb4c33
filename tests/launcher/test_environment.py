"""Wheels for other machines: with the real pip, from an index of tiny packages in a folder."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.contract.errors import DeadlinePassed, HostUnfit
from dsgd_cli.launcher import environment
from dsgd_cli.launcher.environment import Platform, platform_of, wheels_for

FACTS: dict[str, Any] = {
    "python": [3, 11, 2],
    "implementation": "cpython",
    "machine": "x86_64",
    "system": "Linux",
    "libc": ["glibc", "2.36"],
}
ANY, CORE = "py3-none-any", "cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64"


def make_wheel(folder: Path, name: str, version: str, tag: str = ANY, meta: str = "") -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name.replace('-', '_')}/__init__.py", f"__version__ = {version!r}\n")
        info = f"{stem}.dist-info"
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{meta}"
        )
        tags = "".join(f"Tag: {each}\n" for each in [tag])
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n{tags}")
        wheel.writestr(f"{info}/RECORD", "")


def pinned(groups: Any, versions: dict[str, str]) -> dict[str, str]:
    """Of these packages, as if the launcher had these versions."""
    return {name: versions[name] for group in groups for name in group if name in versions}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip can find: the launcher's versions of all packages, for cp311 on x86_64."""
    folder = tmp_path / "index"
    folder.mkdir()
    wanted = {"numpy": "2.0", "grpcio": "1.7", "protobuf": "6.0", "pydantic": "2.9"}
    wanted |= {"cryptography": "47.0", "cffi": "2.0", "pycparser": "3.0"}
    wanted |= {"pydantic-core": "2.1", "annotated-types": "0.7"}
    wanted |= {"typing-extensions": "4.1", "typing-inspection": "0.4"}
    for name, version in wanted.items():
        native = name in ("numpy", "grpcio", "pydantic-core")
        meta = "Requires-Dist: pydantic-core==2.1\n" if name == "pydantic" else ""
        make_wheel(folder, name, version, CORE if native else ANY, meta)
    monkeypatch.setattr(environment, "_wanted", lambda groups: pinned(groups, wanted))
    monkeypatch.setattr(environment, "_at_least", lambda name: name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def pip_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    runs: list[list[str]] = []
    really_run = environment._Pip._run

    def watched(self: Any, argv: list[str]) -> tuple[int, str]:
        runs.append(argv)
        return really_run(self, argv)

    monkeypatch.setattr(environment._Pip, "_run", watched)
    return runs


@pytest.fixture
def quick_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Not the real pip: copies the wheels that are asked for. For tests of the cache alone."""
    runs: list[list[str]] = []

    def run(_: Any, argv: list[str]) -> tuple[int, str]:
        runs.append(argv)
        into = Path(argv[argv.index("--dest") + 1])
        for requirement in argv:
            name, equals, version = requirement.partition("==")
            for wheel in index.glob(f"{name.replace('-', '_')}-{version}-*.whl") if equals else ():
                shutil.copy2(wheel, into)
        return 0, ""

    monkeypatch.setattr(environment._Pip, "_run", run)
    return runs


def names(wheels: Any) -> list[str]:
    return ["-".join(wheel.path.name.split("-")[:2]) for wheel in wheels]


ALL = [
    *("annotated_types-0.7", "cffi-2.0", "cryptography-47.0", "grpcio-1.7", "numpy-2.0"),
    *("protobuf-6.0", "pycparser-3.0", "pydantic-2.9"),
    *("pydantic_core-2.1", "typing_extensions-4.1", "typing_inspection-0.4"),
]


def silent(note: str) -> None:
    raise AssertionError(note)


# -- resolving -------------------------------------------------------------------------------------


def test_the_launchers_versions_for_the_hosts_platform(
    index: Path, tmp_path: Path, pip_runs: list[list[str]]
) -> None:
    notes: list[str] = []
    wheels = wheels_for("gpu1", FACTS, notes.append)
    assert names(wheels) == ALL
    assert notes == ["getting packages for python 3.11, x86_64, glibc 2.36 (once)"]
    assert len(pip_runs) == 1
    for wheel in wheels:
        assert wheel.path.parent == tmp_path / "cache/dsgd/wheels/cp311-x86_64-glibc-2.36"
        assert wheel.size == wheel.path.stat().st_size
        assert re.fullmatch("[0-9a-f]{32}", wheel.hash) and wheel.sha256.startswith(wheel.hash)
    assert not list((tmp_path / "cache/dsgd/wheels").rglob(".part*"))


def test_a_second_time_runs_nothing(
    index: Path, quick_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = wheels_for("gpu1", FACTS, lambda _: None)
    monkeypatch.setattr(environment, "_wanted", lambda _: pytest.fail("read the versions again"))
    monkeypatch.setattr(environment.hashlib, "sha256", lambda *_: pytest.fail("hashed again"))
    started = time.perf_counter()
    assert wheels_for("gpu2", FACTS, silent) == wheels
    assert time.perf_counter() - started < 0.05
    assert len(quick_pip) == 1


def test_many_hosts_at_once_share_one_download(index: Path, quick_pip: list[list[str]]) -> None:
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda name=f"gpu{i}": found.append(wheels_for(name, FACTS, lambda _: None))
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(quick_pip) == 1
    assert found == [found[0]] * 6


def test_another_platform_gets_its_own(index: Path, pip_runs: list[list[str]]) -> None:
    for name in ("numpy", "grpcio", "pydantic-core"):
        version = {"numpy": "2.0", "grpcio": "1.7", "pydantic-core": "2.1"}[name]
        make_wheel(index, name, version, "cp312-cp312-musllinux_1_2_aarch64")
    facts = {**FACTS, "python": [3, 12, 1], "machine": "aarch64", "libc": ["musl", "1.2.5"]}
    here = wheels_for("gpu1", FACTS, lambda _: None)
    there = wheels_for("pi", facts, lambda _: None)
    assert names(here) == names(there) == ALL
    assert {w.path.name for w in here if "x86_64" in w.path.name}
    assert {w.path.name for w in there if "musllinux_1_2_aarch64" in w.path.name}


@pytest.mark.parametrize("what", ["wheel changed", "wheel gone", "index damaged"])
def test_a_damaged_cache_is_made_anew(index: Path, quick_pip: list[list[str]], what: str) -> None:
    wheels = wheels_for("gpu1", FACTS, lambda _: None)
    if what == "wheel changed":
        wheels[0].path.write_bytes(b"rubbish")
    elif what == "wheel gone":
        wheels[0].path.unlink()
    else:
        (wheels[0].path.parent / "index.json").write_text("{")
    assert wheels_for("gpu1", FACTS, lambda _: None) == wheels
    assert len(quick_pip) == 2


def test_an_upgraded_launcher_sends_its_new_versions(
    index: Path, quick_pip: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels_for("gpu1", FACTS, lambda _: None)
    wanted = environment._wanted(environment.GROUPS) | {"numpy": "2.1"}
    make_wheel(index, "numpy", "2.1", CORE)
    monkeypatch.setattr(environment, "_wanted", lambda groups: pinned(groups, wanted))
    monkeypatch.setattr(environment, "_installed_state", lambda: [["somewhere else", 1]])
    found = names(wheels_for("gpu1", FACTS, lambda _: None))
    assert "numpy-2.1" in found and "numpy-2.0" not in found


def test_the_state_of_the_packages_is_that_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), str(tmp_path)])
    before = environment._installed_state()
    assert len(before) == 1
    time.sleep(0.01)
    (folder / "numpy-2.1.dist-info").mkdir()
    assert environment._installed_state() != before


def test_the_newest_that_fits_where_the_launchers_version_does_not(
    index: Path, pip_runs: list[list[str]]
) -> None:
    for version in ("1.24", "1.26"):
        make_wheel(index, "numpy", version, CORE.replace("cp311", "cp310"))
    make_wheel(index, "numpy", "1.99", CORE.replace("cp311", "cp310"), "Requires-Python: >=3.11\n")
    make_wheel(index, "grpcio", "1.7", CORE.replace("cp311", "cp310"))
    make_wheel(index, "pydantic", "2.8", ANY, "Requires-Dist: pydantic-core==2.0\n")
    make_wheel(index, "pydantic", "2.9.1", ANY, "Requires-Dist: pydantic-core==2.2\n")
    make_wheel(index, "pydantic-core", "2.0", CORE.replace("cp311", "cp310"))
    notes: list[str] = []
    facts = {**FACTS, "python": [3, 10, 6]}
    found = names(wheels_for("old", facts, notes.append))
    assert "numpy-1.26" in found and "grpcio-1.7" in found
    assert "pydantic-2.8" in found and "pydantic_core-2.0" in found  # they go together
    assert len(found) == len({name.split("-")[0] for name in found}), found
    place = "python 3.10, x86_64, glibc 2.36"
    assert f"old: there is no numpy==2.0 for {place}; it gets numpy 1.26" in notes
    assert f"old: there is no pydantic==2.9 for {place}; it gets pydantic 2.8" in notes
    runs = len(pip_runs)
    wheels_for("old", facts, silent)
    assert len(pip_runs) == runs


# -- extras, and a requirements file ---------------------------------------------------------------


def added(*extras: str | Path, notes: list[str] | None = None) -> list[str]:
    """What comes on top of what every host gets."""
    base = wheels_for("gpu1", FACTS, lambda _: None)
    note = silent if notes is None else notes.append
    found = wheels_for("gpu2", FACTS, note, extras)
    assert found[: len(base)] == base
    return names(found[len(base) :])


def test_an_extra_is_got_when_it_is_asked_for(
    index: Path, quick_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, "pillow", "12.0", CORE)
    wanted = environment._wanted(environment.GROUPS) | {"pillow": "12.0"}
    monkeypatch.setattr(environment, "_wanted", lambda groups: pinned(groups, wanted))
    notes: list[str] = []
    assert added("images", notes=notes) == ["pillow-12.0"]
    assert notes == ["getting packages for python 3.11, x86_64, glibc 2.36, images (once)"]
    assert added("images") == ["pillow-12.0"]
    assert len(quick_pip) == 2


def test_an_extra_that_the_launcher_itself_does_not_have(
    index: Path, pip_runs: list[list[str]]
) -> None:
    make_wheel(index, "pillow", "11.9", CORE)
    make_wheel(index, "pillow", "12.0", CORE)
    notes: list[str] = []
    assert added("images", notes=notes) == ["pillow-12.0"]
    assert notes[-1] == "gpu2: no pillow here; it gets pillow 12.0"


def test_the_oldest_versions_are_those_that_dsgd_asks_for() -> None:
    for name in ("numpy", "pillow"):
        assert environment._at_least(name).startswith(f"{name}>="), name


def test_requirements_come_on_top_in_versions_that_go_with_dsgds(
    index: Path, tmp_path: Path, pip_runs: list[list[str]]
) -> None:
    make_wheel(index, "numpy", "2.1", CORE)  # newer, but not what is sent
    make_wheel(index, "lightning", "1.0", meta="Requires-Dist: flash\nRequires-Dist: numpy\n")
    make_wheel(index, "lightning", "2.0", meta="Requires-Dist: numpy>=2.1\n")
    make_wheel(index, "flash", "3.0", CORE)
    listed = tmp_path / "requirements.txt"
    listed.write_text("# for net.py\nlightning\nnumpy\n")
    notes: list[str] = []
    assert added(listed, notes=notes) == ["flash-3.0", "lightning-1.0"]
    place = "python 3.11, x86_64, glibc 2.36"
    assert notes == [f"getting the packages of requirements.txt for {place} (once)"]
    runs = len(pip_runs)
    assert added(listed) == ["flash-3.0", "lightning-1.0"]
    assert len(pip_runs) == runs
    listed.write_text("flash\n")  # another text is resolved anew, and beside the first
    assert added(listed, notes=[]) == ["flash-3.0"]
    assert not list((tmp_path / "cache/dsgd/wheels").rglob(".part*"))


def test_requirements_go_with_the_extra_that_is_sent_too(index: Path, tmp_path: Path) -> None:
    for version in ("11.9", "12.0"):
        make_wheel(index, "pillow", version, CORE)
    make_wheel(index, "vision", "1.0", meta="Requires-Dist: pillow<12\n")
    make_wheel(index, "vision", "0.9", meta="Requires-Dist: pillow\n")
    listed = tmp_path / "100%.txt"
    listed.write_text("vision\n")
    assert added("images", listed, notes=[]) == ["pillow-12.0", "vision-0.9"]
    assert added("images", listed) == ["pillow-12.0", "vision-0.9"]
    assert added(listed, notes=[]) == ["pillow-11.9", "vision-1.0"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere==1.0\n", "No matching distribution found for nowhere==1.0"),
        ("lightning\n", "lightning 2.0 depends on numpy>=2.1"),
    ],
)
def test_requirements_that_cannot_be_had(index: Path, tmp_path: Path, text: str, said: str) -> None:
    make_wheel(index, "lightning", "2.0", meta="Requires-Dist: numpy>=2.1\n")
    make_wheel(index, "numpy", "2.1", CORE)
    listed = tmp_path / "requirements.txt"
    listed.write_text(text)
    with pytest.raises(
        HostUnfit, match=r"no packages of requirements\.txt could be got"
    ) as failure:
        added(listed, notes=[])
    assert said in "\n".join(failure.value.details)


# -- what cannot be --------------------------------------------------------------------------------


def refused(facts: dict[str, Any], *parts: str, remedy: str = "env: existing") -> HostUnfit:
    with pytest.raises(HostUnfit) as failure:
        wheels_for("gpu1", facts, lambda _: None)
    text = "\n".join([str(failure.value), *failure.value.details])
    for part in ("gpu1: ", *parts):
        assert part in text, text
    assert remedy in failure.value.remedy
    assert failure.value.exit_code == 4
    return failure.value


def test_no_wheel_at_all(index: Path, tmp_path: Path) -> None:
    refused(
        {**FACTS, "machine": "riscv64"},
        "no package numpy could be got for python 3.11, riscv64, glibc 2.36",
        "pip said:",
        "No matching distribution found for numpy",
    )
    assert not list((tmp_path / "cache/dsgd/wheels").rglob("*.whl"))


def test_an_index_that_cannot_be_reached(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    refused(FACTS, "no package numpy", "pip said:", remedy="is the package index reachable")


def test_no_pip_here(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_run = subprocess.Popen
    monkeypatch.setattr(
        environment.subprocess,
        "Popen",
        lambda argv, **options: really_run([sys.executable, "-S", "-I", *argv[1:]], **options),
    )
    refused(FACTS, "there is no pip here", remedy="-m ensurepip; or set `env: existing`")


def test_a_pip_that_hangs_meets_the_deadline(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def hang(_: list[str], **options: Any) -> subprocess.Popen[str]:
        children.append(start([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return children[-1]

    monkeypatch.setattr(environment.subprocess, "Popen", hang)
    monkeypatch.setattr(environment, "DOWNLOAD_TIMEOUT_S", 0.3)
    with pytest.raises(DeadlinePassed, match="downloading packages"):
        wheels_for("gpu1", FACTS, lambda _: None)
    assert children[0].poll() is not None


LAUNCHER = """
import sys, threading
from dsgd_cli.launcher.environment import wheels_for
facts = {"python": [3, 11, 2], "implementation": "cpython", "machine": "x86_64"}
facts |= {"system": "Linux", "libc": ["glibc", "2.36"]}
threading.Thread(target=wheels_for, args=("gpu1", facts, print), daemon=True).start()
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["is left", "is killed"])
def test_pip_ends_with_its_launcher(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """While pip waits for an index that never answers. What it left is removed, then or later."""
    cache, elsewhere = tmp_path / "cache/dsgd/wheels", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as mute, monkeypatch.context() as hanging:
        hanging.setenv("TMPDIR", str(elsewhere))
        hanging.delenv("PIP_NO_INDEX")
        hanging.delenv("PIP_FIND_LINKS")
        hanging.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{mute.getsockname()[1]}/simple")
        hanging.setenv("PYTHONPATH", str(Path(environment.__file__).parents[2]))
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE)
        with launcher:
            try:
                mute.settimeout(30)
                connection, _ = mute.accept()
                with connection:
                    assert len(list(cache.rglob(".part.*"))) == 1
                    if how == "is killed":
                        launcher.kill()
                    assert launcher.stdin is not None
                    launcher.stdin.close()
                    launcher.wait(20)
                    connection.settimeout(20)
                    while connection.recv(65536):  # until pip is gone
                        pass
            finally:
                launcher.kill()
    assert list(elsewhere.iterdir()) == []
    assert len(list(cache.rglob(".part.*"))) == (1 if how == "is killed" else 0)
    if how == "is killed":
        assert names(wheels_for("gpu1", FACTS, lambda _: None)) == ALL
        assert not list(cache.rglob(".part.*"))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"system": "Darwin", "machine": "arm64", "libc": None}, "runs Darwin on arm64"),
        ({"implementation": "pypy"}, "its python is pypy"),
        ({"libc": None}, "its C library is unknown"),
        ({"libc": ["uclibc", "1.0"]}, "its C library is unknown"),
        ({"libc": ["glibc", "new"]}, "its C library is unknown"),
        ({"machine": "../../x"}, "its C library is unknown"),
    ],
)
def test_platforms_for_which_there_is_nothing(
    index: Path, pip_runs: list[list[str]], facts: dict[str, Any], says: str
) -> None:
    with pytest.raises(HostUnfit, match=says):
        wheels_for("gpu1", {**FACTS, **facts}, silent)
    assert pip_runs == []


# -- tags ------------------------------------------------------------------------------------------


def test_tags_of_glibc_hosts() -> None:
    tags = platform_of("gpu1", FACTS).pip_platforms()
    assert tags[0] == "manylinux_2_36_x86_64"
    assert tags.index("manylinux_2_17_x86_64") + 1 == tags.index("manylinux2014_x86_64")
    assert {"manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"} <= set(tags)
    assert "manylinux_2_37_x86_64" not in tags
    old = Platform((3, 10), "aarch64", "glibc", (2, 15)).pip_platforms()
    assert "manylinux2014_aarch64" not in old and "manylinux_2_15_aarch64" in old


def test_tags_of_musl_hosts() -> None:
    tags = Platform((3, 12), "x86_64", "musl", (1, 2)).pip_platforms()
    assert tags == ["musllinux_1_2_x86_64", "musllinux_1_1_x86_64"]


def test_the_packages_that_are_sent_are_the_launchers_own() -> None:
    wanted = environment._wanted(environment.GROUPS)
    assert set(wanted) == {name for group in environment.GROUPS for name in group}
    import numpy

    assert wanted["numpy"] == numpy.__version__


def test_the_oldest_version_comes_from_our_own_requirements() -> None:
    assert re.fullmatch(r"numpy>=[\d.]+", environment._at_least("numpy"))
    assert environment._at_least("no-such-package") == "no-such-package"
