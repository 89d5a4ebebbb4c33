"""Content that arrives: whole, or not at all, and nowhere else."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from dsgd_cli.agent import paths
from tests.agent.client import Host, Lines, Refusal, eventually

HASH = "0123456789abcdef" * 4


def tar(*members: tuple[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def wheel(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def send(remote: Lines, data: bytes, kind: str = "files", digest: object = HASH) -> str:
    number = remote.ask("receive", kind=kind, hash=digest, size=len(data))
    remote.stream.write(data)
    path: str = remote.reply(number)["path"]
    return path


def cached() -> list[str]:
    """All that is in the cache, temporary things too."""
    base = paths.cache()
    found = [Path(top) / name for top, *below in os.walk(base) for names in below for name in names]
    return sorted(str(path.relative_to(base)) for path in found)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tree_arrives(host: Host, mode: str) -> None:
    remote = host.connect()
    big = bytes(range(256)) * 8192
    data = tar(("dsgd_cli/__init__.py", b"x = 1"), ("dsgd_cli/a/b.bin", big), ("e", b""), mode=mode)
    path = Path(send(remote, data, "code"))
    assert path == paths.cache() / "code" / HASH
    assert (path / "dsgd_cli/__init__.py").read_bytes() == b"x = 1"
    assert (path / "dsgd_cli/a/b.bin").read_bytes() == big
    seen = remote.call("observe", cluster="lab", wanted={"code": HASH, "env": [HASH]})
    assert seen["missing"] == {"code": False, "env": [HASH], "files": []}
    assert send(remote, tar(("other", b"")), "code") == str(path), "there already: left as it is"
    assert not (path / "other").exists()
    assert not [name for name in cached() if "part" in name]


def test_a_wheel_is_unzipped(host: Host) -> None:
    members = ("np/core.py", b"y = 2"), ("np-1.data/purelib/np/pure.py", b""), ("np/empty/", b"")
    data = wheel(*members, ("np-1.data/scripts/tool", b"#!"))
    path = Path(send(host.connect(), tar(("np-1-py3-none-any.whl", data)), "env"))
    assert (path / "np/core.py").read_text() == "y = 2"
    assert (path / "np/pure.py").exists()
    assert sorted(p.name for p in path.rglob("*")) == ["core.py", "np", "pure.py"]


LINK = tarfile.TarInfo("link")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "/etc"
HARD = tarfile.TarInfo("hard")
HARD.type, HARD.linkname = tarfile.LNKTYPE, "/etc/passwd"
DEVICE = tarfile.TarInfo("null")
DEVICE.type = tarfile.CHRTYPE
FIFO = tarfile.TarInfo("fifo")
FIFO.type = tarfile.FIFOTYPE


@pytest.mark.parametrize("member", ["/etc/x", "../x", "a/../../x", "..", LINK, HARD, DEVICE, FIFO])
def test_unsafe_members_are_refused(host: Host, member: str | tarfile.TarInfo) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("fine"), io.BytesIO())
        archive.addfile(tarfile.TarInfo(member) if isinstance(member, str) else member)
    remote = host.connect()
    with pytest.raises(Refusal) as refusal:
        send(remote, file.getvalue() + b"\0" * 500_000)
    assert refusal.value.kind == "invalid"
    assert cached() == ["files"]
    assert remote.call("verify", cluster="lab")["left"] == [], "still in step with us"


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "a\\..\\x", "x.data/purelib/../../y"]
)
def test_unsafe_names_in_a_wheel_are_refused(host: Host, name: str) -> None:
    data = tar(("a.whl", wheel(("fine", b""), (name, b"evil"))))
    with pytest.raises(Refusal) as refusal:
        send(host.connect(), data, "env")
    assert refusal.value.kind == "invalid"
    assert cached() == ["env"]


def test_a_link_in_a_wheel_is_refused(host: Host) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(Refusal):
        send(host.connect(), tar(("a.whl", file.getvalue())), "env")
    assert cached() == ["env"]


def test_what_is_no_archive_is_refused(host: Host) -> None:
    remote = host.connect()
    for kind, data in (
        ("files", b"no tar" * 1000),
        ("env", tar(("a.whl", b"no zip"))),
        ("env", tar(("a.txt", b""))),
        ("env", tar(("a.whl", wheel()), ("b.whl", wheel()))),
        ("env", tar()),
    ):
        with pytest.raises(Refusal):
            send(remote, data, kind)
    for kind, digest in (("secrets", HASH), ("env", "../../x"), ("env", "A" * 64), ("env", None)):
        with pytest.raises(Refusal) as refusal:
            send(remote, tar(("x", b"")), kind, digest)
        assert refusal.value.kind == "invalid"
    assert cached() == ["env", "files"]


def test_a_broken_connection_leaves_nothing(host: Host) -> None:
    remote = host.connect()
    data = tar(("big", b"x" * 3_000_000))
    remote.ask("receive", kind="files", hash=HASH, size=len(data))
    remote.stream.write(data[:2_000_000])
    eventually(lambda: any(name.endswith("/big") for name in cached()), "unpacking")
    remote.hang_up()
    assert remote.stream.wait(10) == 0
    assert cached() == ["files"]


def test_many_send_the_same_at_once(host: Host) -> None:
    data = tar(*((f"dir/{n}", b"x" * 20_000) for n in range(100)))
    remotes = [host.connect() for _ in range(4)]
    numbers = [r.ask("receive", kind="files", hash=HASH, size=len(data)) for r in remotes]
    for remote in remotes:
        remote.stream.write(data[:-100_000])
    eventually(lambda: sum(name.endswith("content") for name in cached()) == 4, "all unpacking")
    writers = [
        threading.Thread(target=remote.stream.write, args=(data[-100_000:],)) for remote in remotes
    ]
    for writer in writers:
        writer.start()
    answers = [r.reply(number)["path"] for r, number in zip(remotes, numbers, strict=True)]
    for writer in writers:
        writer.join()
    assert len(set(answers)) == 1
    assert len(list(Path(answers[0]).glob("dir/*"))) == 100
    assert not [name for name in cached() if "part" in name]


def test_a_size_that_is_none_ends_the_connection(host: Host) -> None:
    remote = host.connect()
    remote.stream.write(json.dumps({"do": "receive", "kind": "files", "hash": HASH}).encode())
    remote.stream.write(b"\n")
    assert remote.stream.wait(10) == 0
