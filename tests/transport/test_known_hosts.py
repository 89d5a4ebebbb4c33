"""Host keys on record: what OpenSSH's files mean."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stat
import threading
from pathlib import Path

import pytest

from dsgd_cli.transport.ssh import known_hosts
from dsgd_cli.transport.ssh.known_hosts import Verdict

KEY, OTHER = b"\0\0\0\x0bssh-ed25519 one", b"\0\0\0\x0bssh-ed25519 two"
TEXT, OTHER_TEXT = (base64.b64encode(key).decode() for key in (KEY, OTHER))


def verdict(
    tmp_path: Path, text: str, address: str = "gpu1", port: int = 22, kind: str = "ssh-ed25519"
) -> tuple[Verdict, list[str]]:
    file = tmp_path / "known_hosts"
    file.write_text(text)
    found, records = known_hosts.judge(known_hosts.read([file], address, port), kind, KEY)
    return found, [record.place.removeprefix(f"{file}:") for record in records]


def hashed(name: str) -> str:
    salt = bytes(range(20))
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize(
    "names",
    ["gpu1", "GPU1", "a,gpu1,b", "gpu?", "gpu*", "*", "*,!gpu2", hashed("gpu1")],
)
def test_names_that_mean_the_host(tmp_path: Path, names: str) -> None:
    assert verdict(tmp_path, f"{names} ssh-ed25519 {TEXT} me@here\n") == (Verdict.KNOWN, ["1"])
    assert verdict(tmp_path, f"{names} ssh-ed25519 {OTHER_TEXT}\n") == (Verdict.CHANGED, ["1"])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# gpu1 ssh-ed25519 KEY",
        "gpu2 ssh-ed25519 KEY",
        "gpu11 ssh-ed25519 KEY",
        "!gpu1 ssh-ed25519 KEY",
        "*,!gpu1 ssh-ed25519 KEY",
        "[gpu1]:2222 ssh-ed25519 KEY",
        "@cert-authority gpu1 ssh-ed25519 KEY",
        "gpu1 ssh-ed25519",
        "gpu1 ssh-ed25519 not*base64",
        "|1|not|hashed ssh-ed25519 KEY",
        "|1|only-one ssh-ed25519 KEY",
        f"{hashed('gpu2')} ssh-ed25519 KEY",
        "\0\0\0",
        "@revoked",
    ],
)
def test_lines_that_say_nothing_about_it(tmp_path: Path, line: str) -> None:
    assert verdict(tmp_path, line.replace("KEY", TEXT)) == (Verdict.UNKNOWN, [])


def test_another_port(tmp_path: Path) -> None:
    with_port, without = f"[gpu1]:2222 ssh-ed25519 {TEXT}\n", f"gpu1 ssh-ed25519 {TEXT}\n"
    assert verdict(tmp_path, with_port, port=2222) == (Verdict.KNOWN, ["1"])
    assert verdict(tmp_path, f"{hashed('[gpu1]:2222')} x {TEXT}", port=2222)[0] is Verdict.KNOWN
    assert verdict(tmp_path, without, port=2222) == (Verdict.KNOWN, ["1"])
    # a record without the port proves nothing against a key
    other = f"gpu1 ssh-ed25519 {OTHER_TEXT}\n"
    assert verdict(tmp_path, other, port=2222) == (Verdict.UNKNOWN, [])


def test_a_key_of_another_type_is_a_changed_key(tmp_path: Path) -> None:
    text = f"gpu1 ssh-rsa {OTHER_TEXT}\n"
    assert verdict(tmp_path, text) == (Verdict.CHANGED, ["1"])
    both = f"{text}gpu1 ssh-ed25519 {OTHER_TEXT}x==\ngpu1 ssh-ed25519 {OTHER_TEXT}\n"
    assert verdict(tmp_path, both) == (Verdict.CHANGED, ["3"])  # the place of the same type


def test_revoked_wins(tmp_path: Path) -> None:
    text = f"gpu1 ssh-ed25519 {TEXT}\n@revoked * ssh-ed25519 {TEXT}\n"
    assert verdict(tmp_path, text) == (Verdict.REVOKED, ["2"])
    other = f"@revoked gpu1 ssh-ed25519 {OTHER_TEXT}\n"
    assert verdict(tmp_path, other) == (Verdict.UNKNOWN, [])


def test_an_ipv6_address(tmp_path: Path) -> None:
    line = known_hosts.line_for("fe80::1", 2222, "ssh-ed25519", KEY)
    assert line.startswith("[fe80::1]:2222 ssh-ed25519 ")
    assert verdict(tmp_path, line, "fe80::1", 2222) == (Verdict.KNOWN, ["1"])


def test_files_that_are_not_there_or_rubbish(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 10)
    assert known_hosts.read([tmp_path / "none", tmp_path, tmp_path / "bytes"], "gpu1", 22) == ()


def test_the_fingerprint_is_that_of_openssh() -> None:
    key = base64.b64decode("AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl")
    assert known_hosts.fingerprint(key) == "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU"


def test_appending_keeps_lines_whole_and_single(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "known_hosts"
    lines = [f"host{i} ssh-ed25519 {TEXT}" for i in range(20)]
    threads = [threading.Thread(target=known_hosts.append, args=(file, line)) for line in lines * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.read_text().splitlines()) == sorted(lines)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("no newline at the end")
    known_hosts.append(file, lines[0])
    assert file.read_text() == f"no newline at the end\n{lines[0]}\n"
