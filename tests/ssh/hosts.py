"""Test hosts that are really other machines: one sshd each, in namespaces of its own.

A host has its own network, mount, pid, uts and ipc namespaces, private /root, /home, /tmp, /run,
/var/tmp and /dev/shm, its own host key, name and address. The checkout, its virtual environment
and the Python that runs the tests are hidden: all that a host has is /usr/bin/python3 without any
package. All hosts of one `Hosts` share a bridge; there is no way out of it, so no internet either.

sshd is process 1 of its namespace: it reaps orphans, and killing it removes the host with all that
runs there. A guard process does the same when the tests themselves are killed. The machine's own
sshd, its keys and ~/.ssh are never touched. What happens on a host is looked at from outside.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import os
import random
import re
import shlex
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PYTHON = "/usr/bin/python3"
CHECKOUT = Path(__file__).resolve().parents[2]
MARK = "DSGD_TEST_HOST"  # in the environment of a host's outer process; the guard looks for it
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PRIVATE = {"/root": 700, "/home": 755, "/tmp": 1777, "/var/tmp": 1777, "/dev/shm": 1777}
LOOKED_AT = ("/root", "/home", "/tmp", "/var/tmp", "/dev/shm", "/run")
SEEN_ROOTS = "/run/test-host"  # the harness's own files on a host
_counter = 0


# -- may they run here? --------------------------------------------------------------------------


@cache
def unavailable() -> str | None:
    """Why there can be no test hosts here, or None."""
    if not sys.platform.startswith("linux"):
        return "test hosts need Linux"
    if os.geteuid() != 0:
        return "test hosts need root (network and mount namespaces)"
    missing = [tool for tool in ("sshd", "ip", "unshare", "nsenter") if _tool(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (openssh-server, iproute2, util-linux)"
    version = _run([PYTHON, "-c", "import sys; print(sys.version_info >= (3, 10))"], check=False)
    if version.stdout.strip() != "True":
        return f"{PYTHON} is missing or older than 3.10"
    probe = f"dt{os.getpid():x}-pr"
    for argv in (
        ["unshare", "-m", "-p", "-u", "-i", "-n", "--fork", "--mount-proc", "true"],
        ["ip", "link", "add", probe, "type", "bridge"],
        ["ip", "link", "del", probe],
    ):
        done = _run(argv, check=False)
        if done.returncode != 0:
            return f"`{' '.join(argv)}` failed: {done.stderr.strip()}"
    return None


def require() -> None:
    """Skips the test that asks for hosts where there can be none; DSGD_REQUIRE_SSH=1 fails it."""
    import pytest

    reason = unavailable()
    if reason is None:
        return
    if os.environ.get("DSGD_REQUIRE_SSH") == "1":
        pytest.fail(f"DSGD_REQUIRE_SSH=1, but the SSH tests cannot run: {reason}", pytrace=False)
    pytest.skip(f"SSH TESTS NOT RUN: {reason}")


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PATH}")


def _run(
    argv: Sequence[str], *, check: bool = True, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    tool = _tool(argv[0]) or argv[0]
    done = subprocess.run(
        [tool, *argv[1:]], input=stdin, capture_output=True, text=True, timeout=30
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done


@cache
def hidden_paths() -> tuple[str, ...]:
    """Folders that an empty tmpfs covers on every host: the checkout and every Python package."""
    outside = {Path(p).resolve() for p in (sys.prefix, sys.exec_prefix, sys.base_prefix)}
    outside.add(Path(sys.executable).resolve().parents[1])
    above = CHECKOUT.parent
    outside.add(CHECKOUT if str(above) in ("/", "/usr", "/var", "/etc", "/run") else above)
    outside.add(Path(site.getuserbase()))
    sites = _run([PYTHON, "-I", "-c", "import site; print('\\n'.join(site.getsitepackages()))"])
    outside |= {Path(line) for line in sites.stdout.split()}
    chosen: list[str] = []
    for path in sorted(str(p) for p in outside if p.is_dir() and str(p) not in ("/", "/usr")):
        if not any(path.startswith(f"{top}/") for top in (*PRIVATE, *chosen)):
            chosen.append(path)
    return tuple(chosen)


# -- keys ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyPair:
    private: str  # OpenSSH format
    public: str  # "ssh-ed25519 AAAA…"

    @property
    def fingerprint(self) -> str:
        """As OpenSSH prints it: SHA256:…"""
        blob = base64.b64decode(self.public.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def make_key(kind: str = "ed25519", password: str | None = None) -> KeyPair:
    """A new key pair: ed25519, ecdsa or rsa."""
    key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    if kind == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    elif kind == "ecdsa":
        key = ec.generate_private_key(ec.SECP256R1())
    else:
        key = rsa.generate_private_key(65537, 2048)
    lock: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, lock
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return KeyPair(private.decode(), public.decode())


def write_key(folder: Path, name: str, key: KeyPair) -> Path:
    """Writes a private key as ssh wants it (0600), with its .pub; returns its path."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key.private)
    path.with_name(f"{name}.pub").write_text(key.public + "\n")
    return path


# -- one host ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a host, seen from outside."""

    pid: int  # outside
    inner_pid: int  # as the host numbers it
    state: str  # R, S, D, Z, T …
    cmdline: tuple[str, ...]

    def __str__(self) -> str:
        return f"[{self.inner_pid} {self.state}] {' '.join(self.cmdline)[:200]}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that may be left on a host: compare one from before with one from after."""

    processes: frozenset[tuple[int, tuple[str, ...]]]
    sockets: frozenset[str]
    files: frozenset[str]


@dataclass(slots=True)
class Host:
    """One host. `address`, `port` and `identity_file` are what a YAML file would say."""

    name: str
    address: str
    port: int
    user: str
    identity_file: Path
    host_keys: tuple[KeyPair, ...]
    link: str  # the outer end of its cable
    log_file: Path
    outer: subprocess.Popen[str]
    pid1: int = 0
    _namespace: int = field(default=0, repr=False)

    @property
    def known_hosts_line(self) -> str:
        """Its first host key, as ~/.ssh/known_hosts has it."""
        name = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        return f"{name} {self.host_keys[0].public}"

    @property
    def host_key_fingerprint(self) -> str:
        return self.host_keys[0].fingerprint

    @property
    def root(self) -> Path:
        """The host's file system, seen from outside (symlinks in it lead outside: mind them)."""
        return Path(f"/proc/{self.pid1}/root")

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    # -- looking from outside

    def processes(self) -> list[Process]:
        """Everything that runs there but sshd and its sessions."""
        found = []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            with suppress(OSError):  # it ended meanwhile
                if _inode(f"/proc/{entry.name}/ns/pid") != self._namespace:
                    continue
                process = _process(int(entry.name))
                if process is not None:
                    found.append(process)
        return found

    def pids(self) -> list[int]:
        """Pids, as seen from outside, of everything that runs there but sshd."""
        return [process.pid for process in self.processes()]

    def listening(self) -> frozenset[str]:
        """Listening sockets but sshd's: `tcp 10.1.2.3:4183`, `unix /tmp/dsgd-0/x.sock`."""
        found = set()
        for kind in ("tcp", "tcp6", "udp", "udp6"):
            for line in _lines(f"/proc/{self.pid1}/net/{kind}"):
                words = line.split()
                if kind.startswith("tcp") and words[3] != "0A":
                    continue
                address, _, port = words[1].partition(":")
                if int(port, 16) != self.port:
                    found.add(f"{kind} {_address(address)}:{int(port, 16)}")
        for line in _lines(f"/proc/{self.pid1}/net/unix"):
            words = line.split()
            if len(words) > 7 and int(words[3], 16) & 0x10000:  # SO_ACCEPTCON
                found.add(f"unix {words[7]}")
        return frozenset(found)

    def files(self, *folders: str, ignore: Iterable[str] = ()) -> frozenset[str]:
        """All paths below the folders (default: all private ones), the cache excepted."""
        skipped = (SEEN_ROOTS, "/run/sshd", "/root/.ssh", "/root/.cache", *ignore)
        found: set[str] = set()
        for folder in folders or LOOKED_AT:
            top = f"{self.root}{folder}"
            for where, names, files in os.walk(top):
                inner = where[len(str(self.root)) :]
                names[:] = [n for n in names if f"{inner}/{n}" not in skipped]
                found |= {f"{inner}/{name}" for name in (*names, *files)}
        return frozenset(found - set(skipped))

    def snapshot(self, ignore: Iterable[str] = ()) -> Snapshot:
        """What there is now; `ignore`: absolute folders on the host that do not count."""
        running = frozenset((p.inner_pid, p.cmdline) for p in self.processes())
        return Snapshot(running, self.listening(), self.files(ignore=ignore))

    # -- doing things to it

    def exec(
        self, *argv: str, check: bool = True, stdin: str = "", timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command there as root without ssh, from /root."""
        enter = ["nsenter", "-t", str(self.pid1), "-m", "-u", "-i", "-n", "-p", "--wd=/root", "--"]
        done = subprocess.run(
            [_tool(enter[0]) or enter[0], *enter[1:], *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={"HOME": "/root", "PATH": PATH, "USER": "root", "LANG": "C.UTF-8"},
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.name}: {shlex.join(argv)}: {done.returncode} {done.stderr}")
        return done

    def unplug(self) -> None:
        """Pulls the cable: nobody is told."""
        _run(["ip", "link", "set", self.link, "down"])

    def plug(self) -> None:
        _run(["ip", "link", "set", self.link, "up"])

    def blackhole(self, address: str) -> None:
        """Whatever this host sends to `address` is lost; what it receives from there is not."""
        self.exec("ip", "route", "replace", "blackhole", f"{address}/32")

    def heal(self, address: str) -> None:
        self.exec("ip", "route", "del", "blackhole", f"{address}/32")

    def filter_port(self, port: int) -> None:
        """A firewall: whoever connects to this TCP port hears nothing, not even a refusal."""
        self.exec("ip", "rule", "add", "ipproto", "tcp", "sport", str(port), "blackhole")

    def open_port(self, port: int) -> None:
        self.exec("ip", "rule", "del", "ipproto", "tcp", "sport", str(port), "blackhole")

    def authorize(self, key: KeyPair) -> None:
        """Lets one more client key in."""
        with Path(f"{self.root}/root/.ssh/authorized_keys").open("a") as file:
            file.write(key.public + "\n")

    def freeze(self) -> None:
        """Stops every process there, sshd first; the kernel goes on answering."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def kill(self) -> None:
        """Power loss: the host and all that ran there are gone. Idempotent."""
        if self.outer.poll() is None:
            if self.pid1:
                with suppress(ProcessLookupError):
                    os.kill(self.pid1, signal.SIGKILL)
            else:
                self.outer.kill()
        self.outer.wait(10)
        if self.outer.stdin is not None:
            self.outer.stdin.close()

    def _signal_all(self, number: int) -> None:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with suppress(OSError):
                    if _inode(f"/proc/{entry.name}/ns/pid") == self._namespace:
                        os.kill(int(entry.name), number)

    # -- starting it

    def _find_pid1(self, deadline: float) -> None:
        own = _inode("/proc/self/ns/net")
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        while True:
            with suppress(OSError, ValueError, IndexError):
                pid = int(children.read_text().split()[0])
                if _inode(f"/proc/{pid}/ns/net") != own:
                    self.pid1 = pid
                    self._namespace = _inode(f"/proc/{pid}/ns/pid")
                    return
            self._check(deadline, "its namespaces")

    def _go(self, deadline: float) -> None:
        assert self.outer.stdin is not None
        with self.outer.stdin as stdin:
            stdin.write("go\n")
        while "Server listening on" not in self.log:
            self._check(deadline, "sshd")

    def _check(self, deadline: float, what: str) -> None:
        if self.outer.poll() is not None or time.monotonic() > deadline:
            ended = self.outer.poll()
            raise RuntimeError(f"test host {self.name}: no {what} (status {ended})\n{self.log}")
        time.sleep(0.002)


def _process(pid: int) -> Process | None:
    status = dict(line.partition(":\t")[::2] for line in _lines(f"/proc/{pid}/status", skip=0))
    if status["Name"].startswith("sshd"):
        return None
    cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    words = tuple(word.decode(errors="replace") for word in cmdline)
    if words == ("",):
        words = (f"<{status['Name'].strip()}>",)
    return Process(pid, int(status["NSpid"].split()[-1]), status["State"][0], words)


def _inode(path: str) -> int:
    return Path(path).stat().st_ino


def _lines(path: str, skip: int = 1) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines()[skip:]


def _address(text: str) -> str:
    raw = bytes.fromhex(text)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    return socket.inet_ntop(family, words)


# -- all hosts of a test -------------------------------------------------------------------------


class Hosts:
    """`with Hosts(3) as hosts:` three hosts on one bridge. Iterate, index, `hosts.launcher`."""

    def __init__(
        self,
        count: int,
        *,
        port: int = 22,
        host_key_kinds: Sequence[str] = ("ed25519",),
        sshd_options: Sequence[str] = (),
        prefix: str = "host",
    ) -> None:
        self._count = count
        self._port = port
        self._kinds = host_key_kinds
        self._options = sshd_options
        self._prefix = prefix
        self._hosts: list[Host] = []
        self._cleanup = ExitStack()
        self.client_key = make_key()
        self.launcher = ""  # the address of the machine that runs the tests, as the hosts see it

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._hosts)

    def __enter__(self) -> Hosts:
        reason = unavailable()
        if reason is not None:
            raise RuntimeError(reason)
        sweep_stale()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes everything. Idempotent."""
        self._cleanup.close()

    @property
    def known_hosts(self) -> str:
        """A known_hosts file with every host key of every host."""
        return "".join(
            f"{host.known_hosts_line.split()[0]} {key.public}\n"
            for host in self
            for key in host.host_keys
        )

    def make_home(self, home: Path) -> Path:
        """A home folder whose user may log in everywhere with plain defaults; returns it."""
        write_key(home / ".ssh", "id_ed25519", self.client_key)
        (home / ".ssh" / "known_hosts").write_text(self.known_hosts)
        return home

    def snapshots(self, ignore: Iterable[str] = ()) -> list[Snapshot]:
        return [host.snapshot(ignore) for host in self]

    def unused_address(self) -> str:
        """An address of this network where nobody is."""
        return str(ipaddress.ip_address(self.launcher) - 1)

    def _start(self) -> None:
        global _counter
        _counter += 1
        stem = f"dt{os.getpid():x}-{_counter}"
        folder = Path(tempfile.mkdtemp(prefix=f"{stem}."))
        self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        identity = write_key(folder, "id_ed25519", self.client_key)
        network = _free_network()
        addresses = [str(network[i + 1]) for i in range(self._count)]
        self.launcher = str(network[254])
        names = [f"{self._prefix}{i}" for i in range(self._count)]
        etc_hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for address, name in zip(addresses, names, strict=True)
        )
        deadline = time.monotonic() + 20.0
        for index, (name, address) in enumerate(zip(names, addresses, strict=True)):
            keys = tuple(make_key(kind) for kind in self._kinds)
            log_file = folder / f"{name}.log"
            script = self._script(name, address, keys, etc_hosts)
            script_file = folder / f"{name}.sh"
            script_file.write_text(script)  # in the folder that no other user can look into
            outer = _spawn(script_file, log_file, stem)
            self._hosts.append(
                Host(
                    name=name,
                    address=address,
                    port=self._port,
                    user="root",
                    identity_file=identity,
                    host_keys=keys,
                    link=f"{stem}-{index}",
                    log_file=log_file,
                    outer=outer,
                )
            )
            self._cleanup.callback(self._hosts[-1].kill)
        bridge = f"{stem}b"
        links = [bridge, *(host.link for host in self._hosts)]
        self._cleanup.callback(_remove_links, links)
        guard = _guard(stem, [host.outer.pid for host in self._hosts], links, folder)
        self._cleanup.callback(_dismiss, guard)
        # the cleanup runs backwards: guard, links, hosts, folder
        for host in self._hosts:
            host._find_pid1(deadline)
        plan = [
            f"link add {bridge} type bridge",
            f"addr add {self.launcher}/24 dev {bridge}",
            f"link set {bridge} up",
        ]
        for host in self._hosts:
            plan.append(f"link add {host.link} type veth peer name eth0 netns {host.pid1}")
            plan.append(f"link set {host.link} master {bridge} up")
        _run(["ip", "-batch", "-"], stdin="\n".join(plan) + "\n")
        for host in self._hosts:
            host._go(deadline)

    def _script(self, name: str, address: str, keys: Sequence[KeyPair], etc_hosts: str) -> str:
        """What process 1 of a host does before it becomes sshd."""
        files = {"hosts": etc_hosts, "authorized_keys": self.client_key.public + "\n"}
        config = [
            f"ListenAddress {address}:{self._port}",
            "PidFile none",
            "UsePAM no",
            "UseDNS no",
            "PrintMotd no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            *self._options,
        ]
        for index, key in enumerate(keys):
            files[f"host_key_{index}"] = key.private
            config.append(f"HostKey {SEEN_ROOTS}/host_key_{index}")
        files["sshd_config"] = "\n".join(config) + "\n"
        files["machine-id"] = hashlib.md5(f"{address}".encode()).hexdigest() + "\n"
        lines = [
            "set -e",
            "umask 077",
            "mount -t tmpfs -o mode=755 tmpfs /run",
            f"mkdir -p -m 755 /run/sshd /run/lock {SEEN_ROOTS}",
        ]
        for file, text in files.items():
            lines += [
                f"cat > {SEEN_ROOTS}/{file} <<'END-OF-FILE'",
                text.rstrip("\n"),
                "END-OF-FILE",
            ]
        lines += [
            f"chmod 644 {SEEN_ROOTS}/hosts {SEEN_ROOTS}/machine-id",
            f"mount --bind {SEEN_ROOTS}/hosts /etc/hosts",
            f"[ ! -e /etc/machine-id ] || mount --bind {SEEN_ROOTS}/machine-id /etc/machine-id",
        ]
        for path in hidden_paths():
            lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(path)}")
        for path, mode in PRIVATE.items():
            lines.append(f"mount -t tmpfs -o mode={mode} tmpfs {path}")
        lines += [
            "mkdir -p -m 700 /root/.ssh",
            f"cp {SEEN_ROOTS}/authorized_keys /root/.ssh/authorized_keys",
            f"echo {shlex.quote(name)} > /proc/sys/kernel/hostname",
            "umask 022",
            "cd /",
            "read go",
            "ip link set lo up",
            f"ip addr add {address}/24 dev eth0",
            "ip link set eth0 up",
            f"unset {MARK}",
            f"exec {_tool('sshd')} -D -e -f {SEEN_ROOTS}/sshd_config </dev/null",
        ]
        return "\n".join(lines) + "\n"


def assert_nothing_left(before: Iterable[Snapshot], after: Iterable[Snapshot]) -> None:
    """Fails with the whole list when a host has more than it had before."""
    left: list[str] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        for pid, cmdline in sorted(new.processes - old.processes):
            left.append(f"host {index}: process {pid} {' '.join(cmdline)[:200]}")
        left += [f"host {index}: socket {name}" for name in sorted(new.sockets - old.sockets)]
        left += [f"host {index}: file {path}" for path in sorted(new.files - old.files)]
    assert not left, "left behind:\n" + "\n".join(left)


def _spawn(script_file: Path, log_file: Path, stem: str) -> subprocess.Popen[str]:
    flags = ["-m", "-p", "-u", "-i", "-n", "--fork", "--kill-child", "--mount-proc"]
    with log_file.open("w") as log:
        return subprocess.Popen(
            [
                *(str(_tool("unshare")), *flags, "--propagation", "private"),
                *("/bin/sh", str(script_file)),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            cwd="/",
            start_new_session=True,
            env={"PATH": PATH, "LANG": "C.UTF-8", MARK: stem},
        )


def _guard(stem: str, pids: list[int], links: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Removes the hosts when the tests die without a chance to do so: its stdin ends then."""
    ours = f"grep -q {MARK}={stem} /proc/$p/environ"
    kill = f"for p in {' '.join(map(str, pids))}; do {ours} && kill -9 $p; done"
    unlink = f"for l in {' '.join(links)}; do ip link del $l; done"
    script = f"cat; {kill}; sleep 0.2; {unlink}; rm -rf {shlex.quote(str(folder))}"
    return subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={"PATH": PATH},
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(guard.pid, signal.SIGKILL)
    guard.wait(10)
    if guard.stdin is not None:
        guard.stdin.close()


def _remove_links(links: Sequence[str]) -> None:
    _run(
        ["ip", "-force", "-batch", "-"],
        check=False,
        stdin="".join(f"link del {n}\n" for n in links),
    )


def _free_network() -> list[ipaddress.IPv4Address]:
    """A /24 of 10.0.0.0/8 that no route or address of this machine touches."""
    taken = []
    for route in json.loads(_run(["ip", "-4", "-j", "route", "show", "table", "all"]).stdout):
        text = route.get("dst", "default")
        if text != "default":
            with suppress(ValueError):
                taken.append(ipaddress.ip_network(text, strict=False))
    chosen = random.Random(os.urandom(8))
    while True:
        network = ipaddress.ip_network(
            f"10.{chosen.randrange(1, 255)}.{chosen.randrange(256)}.0/24"
        )
        if not any(network.overlaps(other) for other in taken):
            return list(network)


def sweep_stale() -> list[str]:
    """Removes what test sessions that are dead left behind; returns the names of the links."""
    listing = _run(["ip", "-j", "link", "show"], check=False).stdout or "[]"
    stale = []
    for link in json.loads(listing):
        match = re.fullmatch(r"dt([0-9a-f]+)-.+", link["ifname"])
        if match is not None and not Path(f"/proc/{int(match[1], 16)}").exists():
            stale.append(link["ifname"])
    if stale:
        _remove_links(stale)
    return stale
