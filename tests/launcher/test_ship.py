"""What travels: the same content gives the same bytes, and nothing that cannot go is sent."""

from __future__ import annotations

import io
import os
import socket
import stat
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsgd_cli.contract.errors import DsgdError, SpecError
from dsgd_cli.launcher import ship
from dsgd_cli.launcher.environment import Wheel
from dsgd_cli.launcher.remote import Remote
from dsgd_cli.launcher.ship import Bundle, code_bundle, file_bundle, send_all, wheel_bundle
from dsgd_cli.transport.local import LocalTransport


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both the launcher's cache and, for a local bootstrap, the host's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "cache" / "dsgd"


@pytest.fixture
def remote(caches: Path) -> Iterator[Remote]:
    """A real bootstrap on this machine."""
    transport = LocalTransport("here")
    opened = Remote(transport, sys.executable)
    yield opened
    opened.close()
    transport.close()


def stream(bundle: Bundle) -> bytes:
    data = b"".join(bundle.chunks())
    assert len(data) == bundle.size
    return data


def names(bundle: Bundle) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(stream(bundle))) as archive:
        return archive.getnames()


def make_tree(root: Path) -> Path:
    root.mkdir()
    (root / "model.py").write_text("x = 1\n")
    (root / "empty").mkdir()
    (root / "deep" / ("long" * 30)).mkdir(parents=True)
    (root / "deep" / ("long" * 30) / "ünï code.bin").write_bytes(os.urandom(700_000))
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "model.cpython-311.pyc").write_text("old")
    return root


# -- bundles ---------------------------------------------------------------------------------------


def test_the_code_is_the_cluster_half() -> None:
    bundle = code_bundle()
    sent = set(names(bundle))
    assert {
        "dsgd_cli/__init__.py",
        "dsgd_cli/contract/errors.py",
        "dsgd_cli/daemons/__main__.py",
        "dsgd_cli/engine/shard.py",
        "dsgd_cli/agent/payload.py",
    } <= sent
    half = {name.split("/")[1] for name in sent if "/" in name}
    assert half == {"__init__.py", *ship.ON_HOSTS}
    assert not [name for name in sent if "__pycache__" in name]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first = make_tree(tmp_path / "code")
    bundle = file_bundle(first)
    before = stream(bundle)
    for path in first.rglob("*"):
        os.utime(path, (1, 1))
    (first / "__pycache__" / "model.cpython-311.pyc").write_text("new")
    again = file_bundle(first)
    assert again.hash == bundle.hash
    assert stream(again) == before
    assert len(bundle.hash) == 32


@pytest.mark.parametrize("change", ["content", "name", "mode", "empty folder"])
def test_another_content_gives_another_hash(tmp_path: Path, change: str) -> None:
    tree = make_tree(tmp_path / "code")
    before = file_bundle(tree).hash
    if change == "content":
        (tree / "model.py").write_text("x = 2\n")
    elif change == "name":
        (tree / "model.py").rename(tree / "mode1.py")
    elif change == "mode":
        (tree / "run.sh").chmod(0o644)
    else:
        (tree / "another").mkdir()
    assert file_bundle(tree).hash != before


def test_the_name_is_part_of_a_file(tmp_path: Path) -> None:
    """The same bytes under another name are another folder in the cache."""
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    assert file_bundle(tmp_path / "a.py").hash != file_bundle(tmp_path / "b.py").hash
    assert names(file_bundle(tmp_path / "a.py")) == ["a.py"]


def test_links_inside_are_followed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "code")
    (tree / "link.py").symlink_to("model.py")
    (tree / "folder").symlink_to("deep")
    with tarfile.open(fileobj=io.BytesIO(stream(file_bundle(tree)))) as archive:
        assert archive.getmember("code/link.py").isreg()
        assert archive.getmember("code/folder").isdir()
        assert not [member for member in archive if member.issym() or member.islnk()]


def test_a_folder_of_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path / "code")
    count = len(file_bundle(tree).entries)
    monkeypatch.setattr(ship, "MAX_ENTRIES", count)
    file_bundle(tree)
    monkeypatch.setattr(ship, "MAX_ENTRIES", count - 1)
    with pytest.raises(SpecError, match="too many to be sent") as caught:
        file_bundle(tree)
    assert "host:/path" in str(caught.value.remedy)


def test_a_link_that_is_the_path_itself_is_followed(tmp_path: Path) -> None:
    make_tree(tmp_path / "code")
    (tmp_path / "data").symlink_to("code")
    assert "data/model.py" in names(file_bundle(tmp_path / "data"))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/etc/passwd", "leads out of"),
        ("../secret", "leads out of"),
        ("nowhere", "leads nowhere"),
        (".", "folder around it"),
        ("self", "leads nowhere"),
    ],
)
def test_links_that_cannot_go(tmp_path: Path, target: str, says: str) -> None:
    (tmp_path / "secret").write_text("s")
    tree = make_tree(tmp_path / "code")
    (tree / "self").symlink_to(target)
    with pytest.raises(SpecError, match=says) as failure:
        file_bundle(tree)
    assert str(tree / "self") in str(failure.value)


def test_what_is_no_file_cannot_go(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "code")
    os.mkfifo(tree / "pipe")
    with pytest.raises(SpecError, match="pipe is neither a file nor a folder"):
        file_bundle(tree)
    (tree / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "s"))
        with pytest.raises(SpecError, match="neither a file nor a folder"):
            file_bundle(tree)
    with pytest.raises(SpecError, match="/dev/null is neither"):
        file_bundle(Path("/dev/null"))
    with pytest.raises(SpecError, match=r"cannot read .*nothing: No such file"):
        file_bundle(tmp_path / "nothing")
    with pytest.raises(SpecError, match="has no name"):
        file_bundle(Path("/"))


# -- hashes of large files -------------------------------------------------------------------------


def test_a_large_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.npz"
    data.write_bytes(os.urandom(ship.REMEMBERED_FROM_BYTES))
    old = time.time_ns() - 10_000_000_000
    os.utime(data, ns=(old, old))
    first = file_bundle(data)
    assert (tmp_path / "cache" / "dsgd" / "hashes.json").exists()

    opened: list[Path] = []
    really_open = Path.open

    def watched(self: Path, *arguments: object, **options: object) -> object:
        opened.append(self)
        return really_open(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", watched)
    assert file_bundle(data) == first
    assert data not in opened
    os.utime(data, ns=(old + 1, old + 1))
    assert file_bundle(data).hash == first.hash
    assert data in opened


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    """It could change again within one tick of its clock, and look the same."""
    data = tmp_path / "data.npz"
    data.write_bytes(bytes(ship.REMEMBERED_FROM_BYTES))
    times = data.stat()
    first = file_bundle(data)
    data.write_bytes(b"1" * ship.REMEMBERED_FROM_BYTES)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_bundle(data).hash != first.hash


@pytest.mark.parametrize("rubbish", ["", "[]", "{", '{"a": 1}', '{"a": [1]}', "\0"])
def test_a_damaged_memory_costs_nothing(tmp_path: Path, rubbish: str) -> None:
    memory = tmp_path / "cache" / "dsgd" / "hashes.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(rubbish)
    (tmp_path / "m.py").write_text("x = 1\n")
    assert file_bundle(tmp_path / "m.py").entries[0].size == 6


# -- sending ---------------------------------------------------------------------------------------


def test_a_host_unpacks_what_was_sent(remote: Remote, tmp_path: Path, caches: Path) -> None:
    tree = make_tree(tmp_path / "code")
    bundles = [code_bundle(), file_bundle(tree)]
    send_all(remote, bundles)
    missing = remote.call(
        "observe",
        cluster="lab",
        wanted={"code": bundles[0].hash, "files": [bundles[1].hash, "0" * 32]},
    )["missing"]
    assert missing == {"code": False, "env": [], "files": ["0" * 32]}
    unpacked = caches / "files" / bundles[1].hash / "code"
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*")} == {
        path.relative_to(tree) for path in tree.rglob("*") if "__pycache__" not in str(path)
    }
    for path in tree.rglob("*"):
        if path.is_file() and "__pycache__" not in str(path):
            twin = unpacked / path.relative_to(tree)
            assert twin.read_bytes() == path.read_bytes()
            assert bool(twin.stat().st_mode & stat.S_IXUSR) == (path.name == "run.sh")
    sent = caches / "code" / bundles[0].hash / "dsgd_cli" / "contract" / "errors.py"
    assert sent.read_text() == (ship.PACKAGE / "contract" / "errors.py").read_text()
    send_all(remote, bundles)  # once more is no error


@pytest.mark.parametrize("change", ["content", "shorter", "gone"])
def test_a_file_that_changes_meanwhile_never_arrives(
    remote: Remote, tmp_path: Path, caches: Path, change: str
) -> None:
    data = tmp_path / "data.bin"
    data.write_bytes(bytes(600_000))
    bundle = file_bundle(data)
    if change == "gone":
        data.unlink()
    else:
        data.write_bytes(b"1" * (600_000 if change == "content" else 10))
    with pytest.raises(SpecError, match=r"changed while|cannot read"):
        send_all(remote, [bundle])
    remote.close()
    whole = [path for path in caches.glob("files/*") if not path.name.startswith(".")]
    assert whole == []


def test_what_is_no_wheel_is_refused_and_the_next_goes_on(
    remote: Remote, tmp_path: Path, caches: Path
) -> None:
    broken = tmp_path / "broken-1-py3-none-any.whl"
    broken.write_bytes(b"not a zip")
    entry = file_bundle(broken).entries[0]
    wheel = Wheel(broken, entry.sha256, entry.size)
    good = file_bundle(broken)
    with pytest.raises(DsgdError, match="cannot unpack env"):
        send_all(remote, [wheel_bundle(wheel), good])
    assert remote.call("observe", cluster="lab", wanted={})
