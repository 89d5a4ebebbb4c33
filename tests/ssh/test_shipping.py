"""A machine with nothing but python3 gets dsgd's code, its packages and a user's files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsgd_cli.contract.errors import ConnectFailed, DsgdError
from dsgd_cli.launcher import environment, ship
from dsgd_cli.launcher.environment import wheels_for
from dsgd_cli.launcher.remote import Remote
from dsgd_cli.transport.ssh import SshTransport
from tests.ssh.hosts import PYTHON, Host, Hosts, assert_nothing_left

REAL_HOME = os.environ.get("HOME", "/")

pytestmark = pytest.mark.ssh


@pytest.fixture
def host(shared_hosts: Hosts, home: Path) -> Iterator[Host]:
    """A host with an empty cache, which is emptied again."""
    shared_hosts.make_home(home)
    before = shared_hosts[0].snapshot()
    yield shared_hosts[0]
    deadline = time.monotonic() + 10
    while shared_hosts[0].snapshot().processes - before.processes:
        assert time.monotonic() < deadline, shared_hosts[0].processes()
        time.sleep(0.01)
    assert_nothing_left([before], [shared_hosts[0].snapshot()])
    shared_hosts[0].exec("rm", "-rf", "/root/.cache")


@pytest.fixture
def transport(host: Host) -> Iterator[SshTransport]:
    opened = SshTransport("gpu1", host.address, user="root")
    yield opened
    opened.close()


def test_a_bare_host_gets_all_it_needs(
    transport: SshTransport,
    host: Host,
    tmp_path: Path,
    launcher_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(launcher_cache))
    (tmp_path / "model.py").write_text("print('my model')\n")
    remote = Remote(transport, PYTHON)
    facts = remote.call("observe", cluster="lab", wanted={})
    with monkeypatch.context() as patched:
        patched.setenv("HOME", REAL_HOME)  # pip's settings are there
        wheels = wheels_for("gpu1", facts, lambda _: None)
    code, model = ship.code_bundle(), ship.file_bundle(tmp_path / "model.py")
    bulk = Remote(transport, PYTHON)
    ship.send_all(bulk, [code, *(ship.wheel_bundle(wheel) for wheel in wheels), model])
    wanted = {"code": code.hash, "env": [wheel.hash for wheel in wheels], "files": [model.hash]}
    missing = remote.call("observe", cluster="lab", wanted=wanted)["missing"]
    assert missing == {"code": False, "env": [], "files": []}
    bulk.close()
    remote.close()

    cache = facts["cache"]
    paths = [f"{cache}/code/{code.hash}", *(f"{cache}/env/{wheel.hash}" for wheel in wheels)]
    script = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "import numpy, grpc, google.protobuf, pydantic, dsgd_cli.wire.dsgd_pb2\n"
        "from cryptography.hazmat.primitives.ciphers.aead import AESGCM\n"
        "print(numpy.ones(3) @ numpy.ones(3), numpy.__file__)\n"
        f"exec(open('{cache}/files/{model.hash}/model.py').read())"
    )
    said = host.exec(PYTHON, "-I", "-c", script).stdout
    assert said.startswith(f"3.0 {cache}/env/")
    assert said.endswith("my model\n")

    monkeypatch.setattr(environment._Pip, "_run", lambda *_: pytest.fail("ran pip again"))
    assert wheels_for("gpu1", facts, lambda _: None) == wheels


def test_a_large_file_and_control_at_the_same_time(
    transport: SshTransport, host: Host, tmp_path: Path
) -> None:
    """Bulk goes on a stream of its own: requests are answered while it is on its way."""
    data = tmp_path / "data.bin"
    data.write_bytes(os.urandom(40_000_000))
    control, bulk = Remote(transport, PYTHON), Remote(transport, PYTHON)
    bundle = ship.file_bundle(data)
    failures: list[BaseException] = []

    def send() -> None:
        try:
            ship.send_all(bulk, [bundle])
        except BaseException as error:
            failures.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    answered = 0
    while sender.is_alive():
        control.call("observe", cluster="lab", wanted={}, timeout_s=5)
        answered += 1
    assert failures == []
    assert answered >= 3
    unpacked = f"/root/.cache/dsgd/files/{bundle.hash}/data.bin"
    assert Path(f"{host.root}{unpacked}").read_bytes() == data.read_bytes()
    control.close()
    bulk.close()


def test_a_connection_that_breaks_in_the_middle_leaves_no_half_content(
    transport: SshTransport, host: Host, tmp_path: Path
) -> None:
    data = tmp_path / "data.bin"
    data.write_bytes(os.urandom(20_000_000))
    bundle = ship.file_bundle(data)
    remote = Remote(transport, PYTHON)
    remote.request("receive", kind="files", hash=bundle.hash, size=bundle.size)
    chunks = bundle.chunks()
    for _ in range(20):
        remote.write(next(chunks))
    transport.close()
    with pytest.raises(ConnectFailed):
        for chunk in chunks:
            remote.write(chunk)
    remote.close()
    deadline = time.monotonic() + 10
    while host.files("/root/.cache/dsgd/files"):
        assert time.monotonic() < deadline, host.files("/root/.cache/dsgd/files")
        time.sleep(0.01)


def test_a_full_disk_is_said(transport: SshTransport, host: Host, tmp_path: Path) -> None:
    host.exec("mkdir", "-p", "/root/.cache/dsgd")
    host.exec("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/root/.cache/dsgd")
    try:
        (tmp_path / "data.bin").write_bytes(os.urandom(5_000_000))
        remote = Remote(transport, PYTHON)
        with pytest.raises(DsgdError, match=r"gpu1: cannot unpack .*No space left") as failure:
            ship.send_all(remote, [ship.file_bundle(tmp_path / "data.bin")])
        assert failure.value.exit_code == 4
        remote.call("observe", cluster="lab", wanted={})  # the bytes that followed are consumed
        remote.close()
    finally:
        host.exec("umount", "/root/.cache/dsgd")
