"""How long dsgd's commands take: `--help`, `check`, the demo, SSH hosts up and down.

Each command is a process of its own, as a person starts it. The SSH hosts are real sshd on isolated
hosts (tests/ssh/hosts.py), so that part needs root. The first round of everything fills caches and
is not counted.

    python -m tests.benchmarks.start_and_stop [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Bar, Row, publish
from tests.ssh.hosts import Hosts, unavailable

CHECKOUT = Path(__file__).parents[2]
DEMO = CHECKOUT / "cluster_templates" / "localhost.yaml"
SSH_HOSTS = 8
TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class User:
    """Somebody at a terminal, with a home of their own."""

    folder: Path
    env: dict[str, str]

    def dsgd(self, *arguments: str) -> tuple[float, list[dict[str, Any]]]:
        """Runs a command; returns its seconds and what `--json` printed."""
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "dsgd_cli", *arguments],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"dsgd {' '.join(arguments)}: {done.returncode}\n{done.stderr}")
        lines = done.stdout.splitlines() if "--json" in arguments else []
        return seconds, [json.loads(line) for line in lines]

    def seconds(self, *arguments: str) -> float:
        return self.dsgd(*arguments)[0]

    @staticmethod
    def cpu_s() -> float:
        """What all commands so far have used; steadier than the clock on a busy machine."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime


def new_user(folder: Path) -> User:
    """Nothing of the real user's is touched but the checkout's own cache of packages."""
    foreign = ("DSGD_", "XDG_", "SSH_")
    env = {key: text for key, text in os.environ.items() if not key.startswith(foreign)}
    env |= {
        "HOME": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_CACHE_HOME": str(CHECKOUT / ".cache" / "benchmarks"),
        "PYTHONPATH": str(CHECKOUT),
    }
    work = folder / "work"
    work.mkdir()
    return User(work, env)


def repeated(times: int, measure: Callable[[], Any]) -> list[Any]:
    """The results of all rounds but the first."""
    return [measure() for _ in range(times + 1)][1:]


def without_hosts(user: User, repeats: int) -> list[Row]:
    (user.folder / "big.yaml").write_text(
        "hosts:\n"
        + "".join(f"  - {{address: gpu{i}.lab, name: gpu{i}, slots: 8}}\n" for i in range(200))
        + "servers: 20\nworkers: 800\n"
    )

    def command(what: str, bar_ms: float, *arguments: str) -> Row:
        rounds = repeated(repeats * 3, lambda: (user.seconds(*arguments), user.cpu_s()))
        walls, ends = zip(*rounds, strict=True)
        cpu_ms = 1e3 * (ends[-1] - ends[0]) / (len(ends) - 1)
        milliseconds = tuple(seconds * 1e3 for seconds in walls)
        bar = Bar(bar_ms, at_most=True)
        return Row(what, milliseconds, "ms", bar, f"of which {cpu_ms:.0f} ms on a processor")

    return [
        command("`dsgd --help`", 100, "--help"),
        command("`dsgd check`, 200 hosts", 150, "check", "big.yaml"),
    ]


def demo(user: User, repeats: int) -> list[Row]:
    def once() -> tuple[float, dict[str, float]]:
        seconds, lines = user.dsgd("train", str(DEMO), "--json")
        return seconds, lines[-1]["phases"]

    rounds = repeated(repeats, once)
    total = tuple(seconds for seconds, _ in rounds)
    rest = tuple(seconds - phases["train"] for seconds, phases in rounds)
    rows = [
        Row("the demo, from `dsgd train` to the prompt", total, "s", Bar(8, at_most=True)),
        Row("the demo but for its training", rest, "s", Bar(3, at_most=True)),
    ]
    return rows + [
        Row(f"the demo: phase `{name}`", tuple(phases[name] for _, phases in rounds), "s")
        for name in rounds[0][1]
    ]


def ssh(user: User, hosts: Hosts, repeats: int) -> list[Row]:
    """Up, up again, down: the environment is in the hosts' caches."""
    hosts.make_home(user.folder.parent)
    addresses = ", ".join(host.address for host in hosts)
    description = f"name: bench\nhosts: [{addresses}]\nservers: 1\nworkers: {len(hosts)}\n"
    (user.folder / "cluster.yaml").write_text(description)

    def once() -> tuple[float, float, float]:
        up, again = user.seconds("up"), user.seconds("up")
        down, lines = user.dsgd("down", "--json")
        if lines[-1]["left"] or not lines[-1]["stopped"]:
            raise SystemExit(f"down: {lines[-1]}")
        return up, again, down

    ups, agains, downs = zip(*repeated(repeats, once), strict=True)
    n = len(hosts)
    how = "1 worker each, environment cached"
    return [
        Row(f"`dsgd up`, {n} SSH hosts", ups, "s", Bar(3, at_most=True), how),
        Row("`dsgd up` again: nothing to do", agains, "s", Bar(2, at_most=True)),
        Row("`dsgd down`, verified", downs, "s", Bar(2, at_most=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        user = new_user(Path(name))
        rows = without_hosts(user, repeats) + demo(user, repeats)
        reason = unavailable()
        if reason is None:
            with Hosts(SSH_HOSTS) as hosts:
                rows += ssh(user, hosts, repeats)
        else:
            print(f"clusters of SSH hosts are not measured: {reason}", file=sys.stderr)
    print(publish("start_and_stop", rows))


if __name__ == "__main__":
    main()
