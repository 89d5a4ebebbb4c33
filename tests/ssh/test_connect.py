"""Connecting: who is trusted, who is refused, in which words and how soon."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.contract.errors import (
    AuthenticationFailed,
    ConnectFailed,
    HostError,
    HostKeyRejected,
)
from dsgd_cli.transport.ssh import SshTransport
from dsgd_cli.transport.ssh.dial import DEAD_PEER_S, KEEPALIVE_AFTER_S, KEEPALIVE_EVERY_S
from dsgd_cli.transport.ssh.line import Line
from dsgd_cli.transport.ssh.transport import RETRY_PAUSES_S
from tests.ssh.hosts import PYTHON, Host, Hosts, KeyPair, make_key, require, write_key

pytestmark = pytest.mark.ssh


def hello(transport: SshTransport) -> bytes:
    """Proves that programs run there: prints the host's name."""
    stream = transport.open([PYTHON, "-I", "-c", "import os; print(os.uname().nodename)"])
    try:
        return stream.read(100, 10).strip()
    finally:
        stream.close()


@contextmanager
def refused(
    kind: type[HostError], *parts: str, within_s: float = 5.0, remedy: str = ""
) -> Iterator[None]:
    """The error's type, its exit code, words in its message, and how long it may take."""
    started = time.monotonic()
    with pytest.raises(HostError) as failure:
        yield
    assert time.monotonic() - started < within_s
    assert type(failure.value) is kind, failure.value
    assert failure.value.exit_code == 4
    assert failure.value.host == "gpu1"
    for part in parts:
        assert part in str(failure.value), str(failure.value)
    assert remedy in failure.value.remedy, failure.value.remedy


@pytest.fixture
def host(shared_hosts: Hosts, home: Path) -> Host:
    """A host into which the user of `home` may log in with plain defaults."""
    shared_hosts.make_home(home)
    return shared_hosts[0]


@pytest.fixture
def connect(host: Host) -> Iterator[Callable[..., SshTransport]]:
    """Makes transports to the host that are closed in the end; no thread and no socket stays."""
    before = set(threading.enumerate())
    made: list[SshTransport] = []

    def make(**options: object) -> SshTransport:
        options = {"user": "root", "address": host.address, **options}
        made.append(SshTransport("gpu1", **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for transport in made:
        transport.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, set(threading.enumerate()) - before
        time.sleep(0.01)


Connect = Callable[..., SshTransport]


# -- host keys -------------------------------------------------------------------------------------


def test_a_known_host(connect: Connect, host: Host) -> None:
    assert hello(connect()) == host.name.encode()


def test_an_unknown_host_is_refused(connect: Connect, host: Host, home: Path) -> None:
    (home / ".ssh" / "known_hosts").unlink()
    fingerprint = host.host_key_fingerprint
    with refused(HostKeyRejected, "unknown", fingerprint, remedy=f"`host_key: {fingerprint}`"):
        connect().open(["true"])
    with refused(HostKeyRejected, remedy=f"ssh-keyscan {host.address} >> ~/.ssh/known_hosts"):
        connect().open(["true"])
    assert not (home / ".ssh" / "known_hosts").exists()
    assert not (home / ".local").exists()


def test_the_refusal_shows_the_line_that_would_make_it_known(
    connect: Connect, host: Host, home: Path
) -> None:
    known = home / ".ssh" / "known_hosts"
    known.unlink()
    with pytest.raises(HostKeyRejected) as failure:
        connect().open(["true"])
    known.write_text("\n".join(failure.value.details) + "\n")
    assert hello(connect()) == host.name.encode()


def test_a_changed_key_is_refused_with_its_place(connect: Connect, host: Host, home: Path) -> None:
    known = home / ".ssh" / "known_hosts"
    known.write_text(f"# mine\n{host.address} {make_key().public}\n")
    for host_keys in ("strict", "accept-new"):
        with refused(HostKeyRejected, "CHANGED", "~/.ssh/known_hosts:2"):
            connect(host_keys=host_keys).open(["true"])
    assert not (home / ".local").exists()


def test_accept_new_records_once_and_says_so(connect: Connect, host: Host, home: Path) -> None:
    (home / ".ssh" / "known_hosts").write_text("")
    said: list[str] = []
    assert hello(connect(host_keys="accept-new", on_accept=said.append)) == host.name.encode()
    assert len(said) == 1
    assert host.host_key_fingerprint in said[0] and "~/.local/state/dsgd/known_hosts" in said[0]
    own = home / ".local" / "state" / "dsgd" / "known_hosts"
    assert own.read_text() == host.known_hosts_line + "\n"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.parent.stat().st_mode) == 0o700
    assert (home / ".ssh" / "known_hosts").read_text() == ""
    assert hello(connect(on_accept=said.append)) == host.name.encode()  # strict, and known now
    assert len(said) == 1


def test_a_pinned_key(connect: Connect, host: Host, home: Path) -> None:
    (home / ".ssh" / "known_hosts").unlink()
    assert hello(connect(host_key=host.host_key_fingerprint)) == host.name.encode()
    other = make_key().fingerprint
    with refused(HostKeyRejected, "not the one in the cluster file", other):
        connect(host_key=other, host_keys="accept-new").open(["true"])
    assert not (home / ".local").exists()


def test_a_hashed_and_a_revoked_record(connect: Connect, host: Host, home: Path) -> None:
    known = home / ".ssh" / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert host.address not in known.read_text()
    assert hello(connect()) == host.name.encode()
    with known.open("a") as file:
        file.write(f"@revoked * {host.host_keys[0].public}\n")
    with refused(HostKeyRejected, "revoked", "known_hosts:"):
        connect().open(["true"])


def test_servers_with_several_keys_and_another_port(home: Path) -> None:
    require()
    order = ["HostKeyAlgorithms rsa-sha2-512,ecdsa-sha2-nistp256,ssh-ed25519"]
    kinds = ("rsa", "ecdsa", "ed25519")
    with Hosts(1, port=2222, host_key_kinds=kinds, sshd_options=order) as hosts:
        host = hosts.make_home(home) and hosts[0]
        known = home / ".ssh" / "known_hosts"

        def say_hello(**options: object) -> bytes:
            transport = SshTransport("gpu1", host.address, port=2222, **options)  # type: ignore[arg-type]
            try:
                return hello(transport)
            finally:
                transport.close()

        for key in host.host_keys:  # whatever the server would rather show
            known.write_text(f"[{host.address}]:2222 {key.public}\n")
            assert say_hello() == host.name.encode()
        known.write_text(f"{host.address} {host.host_keys[2].public}\n")  # without the port
        assert say_hello() == host.name.encode()
        known.write_text("")
        for key in host.host_keys:
            assert say_hello(host_key=key.fingerprint) == host.name.encode()
        with refused(HostKeyRejected, *(key.fingerprint for key in host.host_keys)):
            say_hello(host_key=make_key().fingerprint)
        with refused(HostKeyRejected, remedy=f"ssh-keyscan -p 2222 {host.address}"):
            say_hello()


def test_a_server_whose_host_keys_are_all_of_no_use(home: Path) -> None:
    require()
    sha1_only = ["HostKeyAlgorithms ssh-rsa"]
    with Hosts(1, host_key_kinds=("rsa",), sshd_options=sha1_only) as hosts:
        hosts.make_home(home)
        transport = SshTransport("gpu1", hosts[0].address)
        with refused(HostKeyRejected, "has no host key that dsgd can use", remedy="ssh-ed25519"):
            transport.open(["true"])
        transport.close()


def test_a_known_host_that_shows_a_key_of_another_type(
    connect: Connect, host: Host, home: Path
) -> None:
    known = home / ".ssh" / "known_hosts"
    known.write_text(f"{host.address} {make_key('ecdsa').public}\n")
    with refused(HostKeyRejected, "CHANGED", "~/.ssh/known_hosts:1"):
        connect(host_keys="accept-new").open(["true"])


# -- authentication --------------------------------------------------------------------------------


def test_an_identity_file(connect: Connect, host: Host, home: Path) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    assert hello(connect(identity_file=str(host.identity_file))) == host.name.encode()
    shutil.copy(host.identity_file, home / "lab_key")
    assert hello(connect(identity_file="~/lab_key")) == host.name.encode()


def test_a_wrong_key(connect: Connect, home: Path) -> None:
    write_key(home / ".ssh", "id_ed25519", make_key())
    with refused(
        AuthenticationFailed,
        "auth refused for user 'root' (tried ~/.ssh/id_ed25519)",
        remedy="ssh-copy-id root@",
    ):
        connect().open(["true"])


def test_no_key_at_all(connect: Connect, home: Path) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    with refused(AuthenticationFailed, "tried no key"):
        connect().open(["true"])


def test_an_unknown_user(connect: Connect) -> None:
    with refused(AuthenticationFailed, "auth refused for user 'nobody-here'"):
        connect(user="nobody-here").open(["true"])


def test_a_key_with_a_passphrase(connect: Connect, home: Path) -> None:
    write_key(home / ".ssh", "id_ed25519", make_key(password="secret"))
    with refused(
        AuthenticationFailed, "~/.ssh/id_ed25519 has a passphrase", remedy=f"ssh-add {home}"
    ):
        connect().open(["true"])
    with refused(AuthenticationFailed, "has a passphrase", remedy="ssh-add"):
        connect(identity_file=home / ".ssh" / "id_ed25519").open(["true"])


def test_identity_files_that_cannot_be_used(connect: Connect, home: Path) -> None:
    with refused(AuthenticationFailed, "~/nokey: No such file", within_s=0.5):
        connect(identity_file="~/nokey").open(["true"])
    path = home / ".ssh" / "id_ed25519"
    path.chmod(0o644)
    with refused(AuthenticationFailed, "others may read", remedy="chmod 600", within_s=0.5):
        connect(identity_file=path).open(["true"])
    with refused(AuthenticationFailed, "~/.ssh/id_ed25519 (unused: others may read it"):
        connect().open(["true"])
    path.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nrubbish\n")
    path.chmod(0o600)
    with refused(AuthenticationFailed, "~/.ssh/id_ed25519 (unusable"):
        connect().open(["true"])


def test_all_kinds_of_keys(connect: Connect, host: Host, home: Path) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    authorized = Path(f"{host.root}/root/.ssh/authorized_keys")
    before = authorized.read_text()
    try:
        for kind in ("rsa", "ecdsa"):
            key = make_key(kind)
            path = write_key(home / ".ssh", f"id_{kind}", key)
            host.authorize(key)
            assert hello(connect()) == host.name.encode()
            path.unlink()
    finally:
        authorized.write_text(before)


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def ssh_agent(home: Path, *keys: KeyPair) -> Iterator[str]:
    path = home / "agent.sock"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL) as agent:
        try:
            deadline = time.monotonic() + 5
            while not accepts(path):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            for key in keys:
                subprocess.run(
                    ["ssh-add", "-q", str(write_key(home / "keys", "key", key))],
                    env={**os.environ, "SSH_AUTH_SOCK": str(path)},
                    check=True,
                )
            yield str(path)
        finally:
            agent.terminate()


@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="needs ssh-agent")
def test_the_users_agent(
    connect: Connect, host: Host, shared_hosts: Hosts, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    with ssh_agent(home, make_key(), shared_hosts.client_key) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        assert hello(connect()) == host.name.encode()
        with refused(AuthenticationFailed, "(tried agent: 2 keys)"):
            connect(user="nobody-here").open(["true"])
    with ssh_agent(home, *(make_key() for _ in range(7))) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        with refused(AuthenticationFailed, "hung up", remedy="identity_file"):
            connect().open(["true"])
        assert hello(connect(identity_file=host.identity_file)) == host.name.encode()


def test_an_agent_that_does_not_answer(
    connect: Connect, host: Host, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(home / "agent.sock"))
        agent.listen()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "agent.sock"))
        assert hello(connect(auth_timeout_s=1)) == host.name.encode()  # by ~/.ssh/id_ed25519
        (home / ".ssh" / "id_ed25519").unlink()
        with refused(AuthenticationFailed, "agent: does not answer"):
            connect(auth_timeout_s=1).open(["true"])
    monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "nothing.sock"))
    with refused(AuthenticationFailed, "agent: not there"):
        connect().open(["true"])


def test_an_agent_that_never_signs(
    connect: Connect, shared_hosts: Hosts, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists the right key, and then waits for somebody to confirm."""
    (home / ".ssh" / "id_ed25519").unlink()
    import base64

    blob = base64.b64decode(shared_hosts.client_key.public.split()[1])
    answer = b"\x0c" + struct.pack(">II", 1, len(blob)) + blob + struct.pack(">I", 0)
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(home / "agent.sock"))
        agent.listen()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "agent.sock"))

        def serve() -> None:
            connection, _ = agent.accept()
            with connection:
                connection.recv(100)
                connection.sendall(struct.pack(">I", len(answer)) + answer)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with refused(AuthenticationFailed, "your ssh agent did not sign"):
            connect(auth_timeout_s=2).open(["true"])
        thread.join(5)


def test_a_server_that_wants_a_password(home: Path) -> None:
    require()
    options = ["PubkeyAuthentication no", "PasswordAuthentication yes"]
    # sshd takes the first of two contradicting lines, so the harness's own `no` wins over ours
    with Hosts(1, sshd_options=options[:1]) as hosts:
        hosts.make_home(home)
        transport = SshTransport("gpu1", hosts[0].address)
        with refused(AuthenticationFailed, "does not accept keys for user"):
            transport.open(["true"])
        transport.close()


# -- the network -----------------------------------------------------------------------------------


def test_a_closed_port(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(RETRY_PAUSES_S) < 5
    monkeypatch.setattr("dsgd_cli.transport.ssh.transport.RETRY_PAUSES_S", (0.01, 0.01, 0.01))
    with refused(ConnectFailed, ":2 refuses connections", within_s=2, remedy="start sshd"):
        connect(port=2).open(["true"])


def test_a_server_that_comes_up_a_little_later(connect: Connect, host: Host) -> None:
    """Refused at first: transient, so it is tried again."""
    relay = socket.socket()
    relay.bind(("127.0.0.1", 0))
    port = relay.getsockname()[1]

    def forward() -> None:
        time.sleep(0.5)  # nobody listens until then
        relay.listen()
        near, _ = relay.accept()
        far = socket.create_connection((host.address, 22))
        pump = threading.Thread(target=copy, args=(far, near))
        pump.start()
        copy(near, far)
        pump.join(5)
        near.close()
        far.close()

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    thread = threading.Thread(target=forward)
    thread.start()
    transport = connect(address="127.0.0.1", port=port, host_key=host.host_key_fingerprint)
    try:
        assert hello(transport) == host.name.encode()
    finally:
        transport.close()
        thread.join(10)
        relay.close()


def test_an_unknown_name(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ConnectFailed, "name", "no-such-host.invalid", within_s=12):
        connect(address="no-such-host.invalid").open(["true"])

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with refused(ConnectFailed, "is unknown (Name or service not known)", within_s=0.5):
        connect(address="gpu1.lab").open(["true"])


def test_a_resolver_that_never_answers(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def slow(*_: object, flags: int = 0, **__: object) -> None:
        if not flags:
            answered.wait(20)
        raise socket.gaierror(socket.EAI_NONAME, "not a number")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        with refused(ConnectFailed, "could not be resolved in 0.5 s", within_s=2):
            connect(address="gpu1.lab", connect_timeout_s=0.5).open(["true"])
    finally:
        answered.set()


@pytest.mark.parametrize("address", ["", "a..b", "x" * 300, "a\0b", "-oProxyCommand=x", "a b\n"])
def test_addresses_that_are_none(connect: Connect, address: str) -> None:
    with refused(ConnectFailed, within_s=12):
        connect(address=address, port=9).open(["true"])


def test_a_server_that_accepts_and_says_nothing(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with refused(ConnectFailed, f"127.0.0.1:{port} accepts connections but", within_s=3):
            connect(address="127.0.0.1", port=port, connect_timeout_s=1).open(["true"])


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-9.9-x\r\n"])
def test_a_server_that_is_not_ssh(
    connect: Connect, says: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsgd_cli.transport.ssh.transport.RETRY_PAUSES_S", (0.01, 0.01, 0.01))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port, stop = server.getsockname()[1], threading.Event()

        def answer() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with refused(ConnectFailed, "handshake", within_s=8):
                connect(address="127.0.0.1", port=port).open(["true"])
        finally:
            stop.set()
            thread.join(5)


def test_a_black_hole(shared_hosts: Hosts, connect: Connect) -> None:
    """Packets are lost on one way: nothing is refused, nothing answers."""
    host = shared_hosts[0]
    host.blackhole(shared_hosts.launcher)
    try:
        with refused(ConnectFailed, "does not answer (waited 1 s)", within_s=3):
            connect(connect_timeout_s=1).open(["true"])
    finally:
        host.heal(shared_hosts.launcher)
    assert hello(connect()) == host.name.encode()


def test_nobody_at_that_address(shared_hosts: Hosts, connect: Connect) -> None:
    with refused(ConnectFailed, shared_hosts.unused_address(), within_s=12):
        connect(address=shared_hosts.unused_address(), connect_timeout_s=1).open(["true"])


# -- many connections, and lost ones ---------------------------------------------------------------


def test_twenty_connections_to_one_server_all_succeed(connect: Connect, host: Host) -> None:
    """sshd begins to drop at ten that are not signed in yet (MaxStartups 10:30:100)."""
    transports = [connect() for _ in range(20)]
    names: list[bytes] = []
    threads = [
        threading.Thread(target=lambda t=each: names.append(hello(t))) for each in transports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert names == [host.name.encode()] * 20


def test_eight_handshakes_at_most_are_in_flight(
    shared_hosts: Hosts, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of hosts: they cost processor time here, and sshd's patience there."""
    lock, inside, most = threading.Lock(), 0, 0
    negotiate = Line.negotiate

    def counted(*arguments: Any) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            time.sleep(0.02)
            negotiate(*arguments)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(Line, "negotiate", counted)
    transports = [SshTransport("gpu1", shared_hosts[i % 2].address) for i in range(20)]
    names: list[bytes] = []
    threads = [
        threading.Thread(target=lambda t=each: names.append(hello(t))) for each in transports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for transport in transports:
        transport.close()
    assert len(names) == 20
    assert 2 <= most <= 8


def test_a_signal_is_a_negative_status(connect: Connect) -> None:
    stream = connect().open([PYTHON, "-I", "-c", "import os; os.kill(os.getpid(), 15)"])
    assert stream.wait(10) == -15


def test_threads_share_one_connection(connect: Connect, host: Host) -> None:
    transport = connect()
    before = host.log.count("Accepted publickey")
    names: list[bytes] = []
    threads = [threading.Thread(target=lambda: names.append(hello(transport))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert names == [host.name.encode()] * 6
    assert host.log.count("Accepted publickey") == before + 1


def test_more_streams_than_sessions(connect: Connect) -> None:
    """sshd allows ten (MaxSessions); the eleventh says so, and fits when another one ended."""
    transport = connect()
    slow_to_end = ["sh", "-c", "cat; sleep 0.3"]
    streams = [transport.open(slow_to_end) for _ in range(10)]
    with refused(ConnectFailed, "refuses another session", within_s=6, remedy="MaxSessions"):
        transport.open(["cat"])
    streams[0].close()
    again = transport.open(["cat"])
    again.write(b"x")
    assert again.read(1, 5) == b"x"


def test_dead_peers_are_noticed_within_15_seconds() -> None:
    assert KEEPALIVE_AFTER_S + 3 * KEEPALIVE_EVERY_S < 15
    assert DEAD_PEER_S < 15


def test_a_pulled_cable_is_noticed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one only reads, only waits or writes; each on a connection of its own."""
    require()
    # the same mechanism, only sooner
    monkeypatch.setattr("dsgd_cli.transport.ssh.dial.DEAD_PEER_S", 2)
    monkeypatch.setattr("dsgd_cli.transport.ssh.dial.KEEPALIVE_AFTER_S", 1)
    monkeypatch.setattr("dsgd_cli.transport.ssh.dial.KEEPALIVE_EVERY_S", 1)
    with Hosts(1) as hosts:
        hosts.make_home(home)
        transports = [SshTransport("gpu1", hosts[0].address) for _ in range(3)]
        reading, waiting, writing = (each.open(["sleep", "60"]) for each in transports)
        hosts[0].unplug()
        actions: list[Callable[[], object]] = [
            lambda: reading.read(1, None),
            lambda: waiting.wait(30),
            lambda: writing.write(b"x" * 20_000_000),
        ]
        noticed: list[object] = []

        def expect(action: Callable[[], object]) -> None:
            with refused(ConnectFailed, "the connection was lost (", within_s=5):
                action()
            noticed.append(action)

        threads = [threading.Thread(target=expect, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert [actions.index(action) for action in actions if action in noticed] == [0, 1, 2]
        hosts[0].plug()
        assert hello(transports[0]) == hosts[0].name.encode()  # the next one connects anew
        idle = transports[0].open(["cat"])
        hosts[0].unplug()
        started = time.monotonic()
        idle.close()
        for transport in transports:
            transport.close()
        assert time.monotonic() - started < 1.5


def test_a_host_that_lost_its_power(home: Path) -> None:
    require()
    with Hosts(1) as hosts:
        hosts.make_home(home)
        transport = SshTransport("gpu1", hosts[0].address, connect_timeout_s=1)
        stream = transport.open(["cat"])
        hosts[0].kill()
        with refused(ConnectFailed, within_s=16):
            while True:
                stream.write(b"x")
                time.sleep(0.05)
        with refused(ConnectFailed, within_s=4):
            transport.open(["cat"])
        transport.close()


def test_a_connection_that_broke_unseen_is_replaced(connect: Connect, host: Host) -> None:
    transport = connect()
    for _ in range(10):
        stream = transport.open(["cat"])
        assert transport._connection is not None
        transport._connection._line.sock.shutdown(socket.SHUT_RDWR)  # it will find out
        assert hello(transport) == host.name.encode()
        stream.close()


def test_a_server_that_stops_answering_is_not_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require()
    monkeypatch.setattr("dsgd_cli.transport.ssh.connection.CHANNEL_TIMEOUT_S", 0.5)
    with Hosts(1) as hosts:
        hosts.make_home(home)
        transport = SshTransport("gpu1", hosts[0].address)
        transport.open(["cat"])
        hosts[0].freeze()
        with refused(ConnectFailed, "does not answer any more", within_s=2):
            transport.open(["cat"])
        hosts[0].thaw()
        assert hello(transport) == hosts[0].name.encode()
        transport.close()


def test_a_frozen_host_does_not_hold_up_closing(home: Path) -> None:
    """Its kernel goes on answering, its sshd does not: neither reading nor writing goes on."""
    require()
    with Hosts(1) as hosts:
        hosts.make_home(home)
        transport = SshTransport("gpu1", hosts[0].address)
        idle, busy = transport.open(["cat"]), transport.open(["cat", "/dev/zero"])
        hosts[0].freeze()
        with pytest.raises(TimeoutError):
            idle.read(1, 0.1)
        failures: list[BaseException] = []

        def write() -> None:
            try:
                busy.write(b"x" * 50_000_000)
            except ConnectFailed as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        started = time.monotonic()
        idle.close()
        busy.close()
        transport.close()
        writer.join(5)
        assert time.monotonic() - started < 2.5
        assert len(failures) == 1
        hosts[0].thaw()


def test_closing_while_connecting(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        transport = connect(address="127.0.0.1", port=silent.getsockname()[1], connect_timeout_s=2)
        failures: list[BaseException] = []

        def run() -> None:
            try:
                transport.open(["true"])
            except ConnectFailed as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        silent.accept()[0].close()
        started = time.monotonic()
        transport.close()
        assert time.monotonic() - started < 0.5
        thread.join(5)
        assert len(failures) == 1
        with refused(ConnectFailed, "closed"):
            transport.open(["true"])


# -- nothing reaches a shell -----------------------------------------------------------------------

HOSTILE = [
    "$(touch /tmp/canary)",
    "`touch /tmp/canary`",
    "; touch /tmp/canary",
    "x\ntouch /tmp/canary\n",
    "' ; touch /tmp/canary '",
    "-oProxyCommand=touch /tmp/canary",
    "../../tmp/canary",
    "\x1b]52;c;x\x07",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_never_reach_a_shell(connect: Connect, host: Host, hostile: str) -> None:
    with pytest.raises(HostError):
        connect(user=hostile).open(["true"])
    with pytest.raises(HostError):
        connect(address=hostile, connect_timeout_s=0.3).open(["true"])
    if hostile.startswith("-"):
        with pytest.raises(ConnectFailed, match="not the name of a program"):
            connect().open([hostile])
    else:
        stream = connect().open([hostile, "-c", "pass"])  # as `python:`
        assert stream.wait(10) in (126, 127)
    assert "/tmp/canary" not in host.files("/tmp")
    assert not Path("/tmp/canary").exists()
    with pytest.raises(ConnectFailed, match="not the name of a program"):
        connect().open([f"{hostile}\0"])


def test_nothing_is_printed(host: Host, home: Path) -> None:
    """paramiko's log and its threads' tracebacks stay out of the user's terminal."""
    script = (
        "from dsgd_cli.transport.ssh import SshTransport\n"
        "from dsgd_cli.contract.errors import DsgdError\n"
        "import socket\n"
        "with socket.create_server(('127.0.0.1', 0)) as silent:\n"
        "    for options in ({'port': 2}, {'user': 'x'}, {'host_key': 'SHA256:x'},\n"
        "                    {'address': '127.0.0.1', 'port': silent.getsockname()[1]}):\n"
        f"        options = {{'address': {host.address!r}, 'connect_timeout_s': 0.5, **options}}\n"
        "        try:\n"
        "            SshTransport('gpu1', **options).open(['true'])\n"
        "        except DsgdError:\n"
        "            print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("refused\n" * 4, "")
