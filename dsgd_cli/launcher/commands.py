"""The commands but `train`: start (`up`), look (`status`), show_logs, stop (`down`)."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import (
    DsgdError,
    HostsFailed,
    Interrupted,
    ProcessDied,
    UsageError,
)
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.down import Receipt, killed, take_down
from dsgd_cli.launcher.interrupt import FORCED_CODE, Forced, Interrupts
from dsgd_cli.launcher.observe import ObservedHost, Wanted, observe
from dsgd_cli.launcher.parallel import attempt
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.remote import Message, Missing
from dsgd_cli.launcher.running import Running
from dsgd_cli.launcher.up import bring_up
from dsgd_cli.launcher.watch import Screen


def start(
    spec: ClusterSpec,
    screen: Screen,
    phases: Phases,
    *,
    confirm: Callable[[str], bool],
    timeout_s: float | None,
) -> Message:
    """`up`: make the cluster run and leave it idle. What a failed start began is taken down."""
    cluster = Cluster(spec, screen.note)
    with Interrupts(screen.note, timeout_s) as interrupts:
        try:
            return _start(cluster, screen, phases, confirm, interrupts)
        except Forced:
            raise killed(cluster) from None
        finally:
            cluster.close()


def _start(
    cluster: Cluster,
    screen: Screen,
    phases: Phases,
    confirm: Callable[[str], bool],
    interrupts: Interrupts,
) -> Message:
    try:
        running, todo = bring_up(
            cluster,
            screen,
            phase=phases,
            confirm=confirm,
            interrupts=interrupts,
            trains=False,
        )
    except DsgdError:
        if cluster.touched:
            with interrupts.noted("taking down what was started"):
                screen.note(f"{cluster.spec.name}: {take_down(cluster, cluster.touched)}")
        raise
    try:
        with interrupts.noted("leaving the cluster as it is: started and idle"):
            running.release(cluster.spec.idle_timeout_s)
        return _started(running, len(todo.starts), phases)
    finally:
        running.close()


def _started(running: Running, starts: int, phases: Phases) -> Message:
    spec, placed = running.cluster.spec, running.cluster.placed
    ends = time.strftime("%H:%M:%S", time.localtime(time.time() + spec.idle_timeout_s))
    what = f"{starts} started" if starts else "nothing to do"
    said = f"{spec.name}: {len(placed)}/{len(placed)} running, {what}; ends at {ends} if idle"
    rows = [
        (
            item.process,
            item.host,
            str(running.ready[item.process].get("pid", "")),
            running.address_of(item.process) if running.ready[item.process]["port"] else "-",
        )
        for item in placed
    ]
    return {
        "type": "up",
        "cluster": spec.name,
        "cluster_id": running.cluster_id,
        "started": starts,
        "running": len(placed),
        "phases": phases.rounded(),
        "said": said,
        "table": rows,
    }


LOOK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Status:
    """What `status` found: a row per process, unreachable hosts as errors."""

    KEYS: ClassVar[tuple[str, ...]] = (
        *("process", "host", "pid", "state", "restarts"),
        *("step", "epoch", "loss", "examples_per_s"),  # of the run, in the coordinator's row
    )
    HEAD: ClassVar[tuple[str, ...]] = tuple(key.upper() for key in KEYS)
    cluster: str
    entries: tuple[Message, ...]
    errors: dict[str, DsgdError]
    said: str
    run: Message  # what is known of the run that is under way or was the last; may be empty

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return [tuple(_cell(entry.get(key)) for key in self.KEYS) for entry in self.entries]

    def as_json(self) -> Message:
        return {
            "type": "status",
            "cluster": self.cluster,
            "processes": list(self.entries),
            "unreachable": {host: error.message for host, error in self.errors.items()},
            "run": self.run,
            "said": self.said,
        }

    def check(self) -> None:
        """Raise for unreachable hosts (exit 4), and for a process that failed (exit 6)."""
        if self.errors:
            raise HostsFailed(self.errors)
        failed = [e for e in self.entries if e["state"] in ("failed", "died")]
        if failed:
            first = failed[0]
            raise ProcessDied(
                f"{first['process']}@{first['host']} has failed",
                remedy="`dsgd up` starts it again; `dsgd logs --role` shows what it said",
            )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def look(spec: ClusterSpec, screen: Screen) -> Status:
    """`status`: ask every host, wait for none of them long. Changes nothing."""
    cluster = Cluster(spec, screen.note, connect_timeout_s=LOOK_TIMEOUT_S)
    found: dict[str, tuple[ObservedHost, Message]] = {}

    def one(host: str) -> None:
        remote = cluster.open(host)
        seen = observe(remote, spec.name, Wanted())
        hello: Message = {}
        if seen.agent_alive:
            link = remote.attach(spec.name, queue.SimpleQueue())
            hello = link.call("hello", timeout_s=5.0)
            link.close()
        else:
            remote.close()
        found[host] = (seen, hello)

    try:
        _, errors = attempt(cluster.used, one, phase="status", deadline_s=20.0)
    finally:
        cluster.close()
    said = _outlook(found)
    if errors:
        said += f"; {len(errors)} hosts do not answer"
    run = _last_run(found)
    return Status(spec.name, tuple(_entries(cluster, found, errors, run)), errors, said, run)


def _entries(
    cluster: Cluster,
    found: dict[str, tuple[ObservedHost, Message]],
    errors: dict[str, DsgdError],
    run: Message,
) -> list[Message]:
    entries: list[Message] = []
    for item in cluster.placed:
        entry: Message = {"process": item.process, "host": item.host, "state": "absent"}
        if item.host in errors:
            entry["state"] = "unreachable"
        elif item.host in found:
            seen, hello = found[item.host]
            state = (hello.get("processes") or {}).get(item.process)
            if state is not None:
                entry |= {key: state.get(key) for key in ("pid", "state", "restarts")}
            elif item.process in seen.processes and not seen.agent_alive:
                entry["state"] = "died"
            if item.process == names.COORDINATOR:
                entry |= {key: run.get(key) for key in ("step", "epoch", "loss", "examples_per_s")}
        entries.append(entry)
    return entries


def _last_run(found: dict[str, tuple[ObservedHost, Message]]) -> Message:
    """What the coordinator said last of a run, with the staleness if it is over."""
    for _, hello in found.values():
        last = (hello.get("last") or {}).get(names.COORDINATOR) or {}
        if "progress" in last:
            run = {key: value for key, value in last["progress"].items() if key != "type"}
            over = is_over(last)
            staleness = {"staleness": last["finished"]["staleness"]} if over else {}
            return {**run, "finished": over, **staleness}
    return {}


def is_over(last: Message) -> bool:
    """Whether the run whose progress a coordinator said last has ended."""
    run = last.get("progress") or {}
    end = last.get("finished") or {}  # perhaps of the run before
    return all(end.get(theirs) == run.get(ours) for ours, theirs in _SAME_AT_THE_END)


# a run's last progress is said when it is over
_SAME_AT_THE_END = (("step", "steps"), ("examples", "examples"), ("epoch", "epochs"))


def _outlook(found: dict[str, tuple[ObservedHost, Message]]) -> str:
    """When it ends by itself, in words."""
    leases = [hello["lease"] for _, hello in found.values() if hello.get("lease")]
    if not leases:
        return "nothing runs where anybody answers" if not found else "nothing runs"
    remaining = min(float(lease["remaining_s"]) for lease in leases)
    at = time.strftime("%H:%M:%S", time.localtime(time.time() + remaining))
    if any(lease["holder"] == "launcher" for lease in leases):
        return f"a launcher is at work; if it goes silent, all ends at {at}"
    return f"idle; ends at {at} unless something is trained before"


class LogView(Screen, Protocol):
    """Where `logs` prints."""

    reader_is_gone: bool


def show_logs(
    spec: ClusterSpec,
    screen: LogView,
    *,
    follow: bool,
    roles: Sequence[str],
    hosts: Sequence[str],
    tail: str,
) -> None:
    """`logs`: print what the processes wrote. Ctrl-C only leaves the view."""
    cluster = Cluster(spec, screen.note)
    _check_selection(cluster, roles, hosts)
    by_host: dict[str, list[str]] = {}
    for item in cluster.placed:
        if _selected(item.process, roles) and (not hosts or item.host in hosts):
            by_host.setdefault(item.host, []).append(item.process)

    def one(host: str) -> None:
        remote = cluster.open(host)
        for entry in remote.log_lines(
            cluster=spec.name,
            processes=by_host[host],
            tail="all" if tail == "all" else int(tail),
            follow=follow,
        ):
            if screen.reader_is_gone:
                break
            screen.log_line(entry["process"], host, entry["line"], "stdout")
        remote.close()

    try:
        deadline_s = 366 * 86400.0 if follow else 60.0
        _, errors = attempt(by_host, one, phase="logs", deadline_s=deadline_s)
    except KeyboardInterrupt:
        screen.note(f"left the log view; {spec.name} goes on (dsgd logs -f shows it again)")
        return
    finally:
        cluster.close()
    absent = [host for host, error in errors.items() if isinstance(error, Missing)]
    if absent and len(absent) == len(by_host):
        raise UsageError(
            f"{spec.name}: nothing runs, so there are no logs to show",
            remedy="those of a run that is over are in its folder: runs/NAME/logs",
        )
    if errors:
        raise HostsFailed(errors)


def _check_selection(cluster: Cluster, roles: Sequence[str], hosts: Sequence[str]) -> None:
    known = {item.process for item in cluster.placed} | set(names.ROLES)
    for what, given, possible in (("role", roles, known), ("host", hosts, set(cluster.hosts))):
        for each in given:
            if each not in possible:
                near = get_close_matches(each, possible, n=1)
                raise UsageError(
                    f"--{what} {each}: the cluster has no such {what}",
                    remedy=f"did you mean {near[0]}?" if near else "",
                )


def _selected(process: str, roles: Sequence[str]) -> bool:
    return not roles or process in roles or process.split("/")[0] in roles


def stop(spec: ClusterSpec, screen: Screen, *, force: bool, purge: bool) -> Receipt:
    """`down`: stop everything on all hosts and verify it. Raises ClusterHeld unless forced."""
    cluster = Cluster(spec, screen.note)
    try:
        with Interrupts(screen.note):
            errors = cluster.connect_where_possible()
            if not force and cluster.coordinator_host in cluster.remotes:
                cluster.hold()
            return take_down(cluster, purge=purge, known_errors=errors)
    except Forced:
        raise Interrupted("killed by a second Ctrl-C", FORCED_CODE) from None
    finally:
        cluster.close()
