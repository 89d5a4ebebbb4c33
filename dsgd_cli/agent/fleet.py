"""The processes of this host: start, restart with back-off, stop, and what is known of each.

Each has one state at a time: starting -> ready (it said so) -> exited (status 0, by itself) |
stopped (asked to) | restarting (it died, and will be started again) | failed (it died too often, or
is not to be restarted). Decides by the clock that it is given through `tick`; does not wait.
"""

from __future__ import annotations

import selectors
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dsgd_cli.agent import processes
from dsgd_cli.agent.child import Child, Hearing
from dsgd_cli.agent.clients import Clients
from dsgd_cli.agent.framing import Message, Refused
from dsgd_cli.agent.life import Exit, Plan, Process, backoff_s

REMEMBERED = ("progress", "formed", "finished", "failed", "run_error")


class Stopping:
    """A `stop` that waits for the end of its processes."""

    def __init__(self, running: set[str], done: Callable[[Message], None]) -> None:
        self.running = running
        self.waiting = set(running)
        self.killed: set[str] = set()
        self.done = done


class Fleet:
    def __init__(
        self,
        run_dir: Path,
        cluster_id: str,
        selector: selectors.BaseSelector,
        clients: Clients,
        renew: Callable[[Any], None],
        changed: Callable[[Message], None],
    ) -> None:
        self.processes: dict[str, Process] = {}
        self._run_dir, self._cluster_id, self._selector = run_dir, cluster_id, selector
        self._emit, self._renew, self._changed = clients.emit, renew, changed
        self._hearing = Hearing(self._on_message, clients.emit_lines)
        self._stops: list[Stopping] = []

    @property
    def running(self) -> set[str]:
        return {name for name, process in self.processes.items() if process.child is not None}

    def start(self, plan: Plan) -> Message:
        known = self.processes.get(plan.process)
        if known is not None and known.child is not None:
            return {"pid": known.pid, "already": True}
        process = self.processes[plan.process] = Process(plan)
        try:
            self._launch(process)
        except Refused:
            process.state = "failed"
            raise
        return {"pid": process.pid}

    def tell(self, name: str, message: Message, keep: bool) -> None:
        process = self.processes.get(name)
        if process is None or (
            process.child is None and not (keep and process.restart_at is not None)
        ):
            raise Refused("missing", f"{name} is not running here")
        if keep:
            kind = str(message.get("type"))
            process.kept.pop(kind, None)
            process.kept[kind] = message
        if process.child is not None:
            process.child.tell(message)

    def tell_all(self, message: Message) -> None:
        """To every running child that reads; the others would only pile it up."""
        for process in self.processes.values():
            if process.child is not None:
                process.child.tell(message, droppable=True)

    def stop(
        self,
        chosen: Iterable[str] | None,
        grace_s: float,
        now_s: float,
        done: Callable[[Message], None],
    ) -> None:
        """TERM, `grace_s`, KILL; `done` hears {stopped, killed, killed_processes} afterwards."""
        targets = set(self.processes if chosen is None else chosen) & self.processes.keys()
        stopping = Stopping(targets & self.running, done)
        self._stops.append(stopping)
        for name in targets:
            process = self.processes[name]
            process.restart_at = None
            process.stopping = True
            if process.child is None:
                if process.state == "restarting":
                    process.state = "stopped"
                continue
            kill_at = now_s + grace_s
            process.kill_at = kill_at if process.kill_at is None else min(kill_at, process.kill_at)
            process.child.signal(signal.SIGTERM)
            process.child.signal(signal.SIGCONT)  # a frozen one may end by itself, too
        self._settle()

    def reap(self, now_s: float) -> None:
        """Look for ended children: after SIGCHLD, and now and then."""
        for process in list(self.processes.values()):
            if process.child is not None and process.child.ended():
                self._on_exit(process, process.child.finish(), now_s)
        self._settle()

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        for process in self.processes.values():
            if process.child is not None and process.kill_at and now_s >= process.kill_at:
                process.child.signal(signal.SIGKILL)
                process.kill_at = now_s + 1.0  # again, if need be
                for stopping in self._stops:
                    stopping.killed |= stopping.waiting & {process.plan.process}
            if process.restart_at is not None and now_s >= process.restart_at:
                self._restart(process, now_s)

    def next_s(self) -> float | None:
        """When `tick` has something to do."""
        due = [process.kill_at for process in self.processes.values() if process.child]
        due += [process.restart_at for process in self.processes.values()]
        return min((at for at in due if at is not None), default=None)

    def kill_all(self) -> None:
        """At once, for an agent that cannot go on."""
        for process in self.processes.values():
            if process.child is not None:
                process.child.signal(signal.SIGKILL)

    def _launch(self, process: Process) -> None:
        child = Child(process.plan, self._run_dir, self._selector, self._hearing)
        process.child, process.pid, process.start_time = child, child.pid, child.start_time
        process.started_at = child.started_at
        process.state, process.ready, process.last = "starting", None, {}
        process.restart_at = process.kill_at = None
        child.tell(process.plan.setup)
        for message in process.kept.values():
            child.tell(message)
        name = process.plan.process
        self._save()
        self._emit(
            {"event": "started", "process": name, "pid": child.pid, "restarts": process.restarts}
        )

    def _restart(self, process: Process, now_s: float) -> None:
        process.restart_at = None
        process.restarts += 1
        process.restarted.append(now_s)
        try:
            self._launch(process)
        except Refused:
            process.state = "failed"
            self._save()

    def _on_exit(self, process: Process, exit: Exit, now_s: float) -> None:
        name = process.plan.process
        if not process.stopping:
            processes.end_strays(self._run_dir, self._cluster_id, among={name})
        process.child, process.kill_at, process.exit = None, None, exit
        delay_s = None
        if process.stopping:
            process.state = "stopped"
        elif exit.status == 0:
            process.state = "exited"
        else:
            if process.plan.restart:
                delay_s = backoff_s(process.restarted, now_s, process.plan.backoff_s)
            process.state = "failed" if delay_s is None else "restarting"
            process.restart_at = None if delay_s is None else now_s + delay_s
        for stopping in self._stops:
            stopping.waiting.discard(name)
        self._save()
        self._emit(
            {
                "event": "exited",
                "process": name,
                "pid": exit.pid,
                "status": exit.status,
                "signal": exit.signal,
                "oom": exit.oom,
                "restart_in_s": delay_s,
                "restarts": process.restarts,
                "tail": list(exit.tail),
                "t": exit.t,
            }
        )

    def _settle(self) -> None:
        """Answer the stops that have nothing to wait for any more."""
        for stopping in [each for each in self._stops if not each.waiting]:
            self._stops.remove(stopping)
            if stopping.running:
                processes.end_strays(self._run_dir, self._cluster_id, among=stopping.running)
            killed = sorted(stopping.killed)
            stopped = len(stopping.running)
            stopping.done({"stopped": stopped, "killed": len(killed), "killed_processes": killed})

    def _on_message(self, name: str, message: Message) -> None:
        process, kind = self.processes[name], message.get("type")
        if kind == "lease":
            self._renew(message.get("seconds"))
            return
        if kind == "ready":
            process.ready, process.state = message, "ready"
            self._save()
        elif kind in REMEMBERED:
            process.last[kind] = message
        self._emit({"event": "child", "process": name, "message": message})

    def _save(self) -> None:
        self._changed(
            {
                name: {
                    "pid": process.pid,
                    "pgid": process.pid,
                    "start_time": process.start_time,
                    "state": process.state,
                    "restarts": process.restarts,
                    "port": (process.ready or {}).get("port"),
                }
                for name, process in self.processes.items()
            }
        )
