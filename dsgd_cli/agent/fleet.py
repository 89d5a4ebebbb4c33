"""The processes of this host: start, restart with back-off, stop, and what is known of each.

Each has one state at a time: starting -> ready (it said so) -> exited (status 0, by itself) |
stopped (asked to) | restarting (it died, and will be started again) | failed (it died too often, or
is not to be restarted). Decides by the clock that it is given through `tick`; does not wait.
"""

from __future__ import annotations

import itertools
import selectors
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsgd_cli.agent.child import Child, Hearing
from dsgd_cli.agent.clients import Clients
from dsgd_cli.agent.framing import Message, Refused
from dsgd_cli.agent.life import Exit, Plan, Process, backoff_s
from dsgd_cli.agent.strays import Strays

REMEMBERED = ("progress", "formed", "finished", "failed", "run_error")


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
        self._run_dir, self._selector = run_dir, selector
        self._emit, self._renew, self._changed = clients.emit, renew, changed
        self._hearing = Hearing(self._on_message, clients.emit_lines)
        self._strays = Strays(run_dir, cluster_id)
        self._lives = itertools.count(1)
        self._stopping = False
        self._stopped = 0
        self._killed: set[str] = set()

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

    def stop(self, grace_s: float, now_s: float) -> None:
        """TERM to all, KILL after `grace_s`, and no more restarts. Once more can only be sooner."""
        if not self._stopping:
            self._stopping = True
            self._stopped = len(self.running)
        for process in self.processes.values():
            process.restart_at = None
            if process.child is None:
                if process.state == "restarting":
                    process.state = "stopped"
                continue
            kill_at = now_s + grace_s
            process.kill_at = kill_at if process.kill_at is None else min(kill_at, process.kill_at)
            process.child.signal(signal.SIGTERM)
            process.child.signal(signal.SIGCONT)  # a frozen one may end by itself, too
        self._strays.suspect(now_s)

    @property
    def ended(self) -> Message | None:
        """After `stop`, when nothing is left any more: {stopped, killed, killed_processes}."""
        if not self._stopping or self.running or self._strays.due_s is not None:
            return None
        killed = sorted(self._killed)
        return {"stopped": self._stopped, "killed": len(killed), "killed_processes": killed}

    def reap(self, now_s: float) -> None:
        """Look for ended children: after SIGCHLD, and now and then."""
        for process in list(self.processes.values()):
            if process.child is not None and process.child.ended():
                self._on_exit(process, process.child.finish(), now_s)

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        for process in self.processes.values():
            if process.child is not None and process.kill_at and now_s >= process.kill_at:
                process.child.signal(signal.SIGKILL)
                process.kill_at = now_s + 1.0  # again, if need be
                self._killed.add(process.plan.process)
            if process.restart_at is not None and now_s >= process.restart_at:
                self._restart(process, now_s)
        lives = {process.child.life for process in self.processes.values() if process.child}
        if not (self._stopping and lives):  # they may still be ending what they began
            self._strays.tick(now_s, lives)

    def next_s(self) -> float | None:
        """When `tick` has something to do."""
        due = [process.kill_at for process in self.processes.values() if process.child]
        due += [process.restart_at for process in self.processes.values()]
        if not (self._stopping and self.running):
            due.append(self._strays.due_s)
        return min((at for at in due if at is not None), default=None)

    def kill_all(self) -> None:
        """At once, for an agent that cannot go on."""
        for process in self.processes.values():
            if process.child is not None:
                process.child.signal(signal.SIGKILL)

    def _launch(self, process: Process) -> None:
        life = str(next(self._lives))
        child = Child(process.plan, life, self._run_dir, self._selector, self._hearing)
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
        self._strays.suspect(now_s)
        process.child, process.kill_at, process.exit = None, None, exit
        delay_s = None
        if self._stopping:
            process.state = "stopped"
        elif exit.status == 0 and not process.plan.restart:
            process.state = "exited"
        else:
            if process.plan.restart:
                delay_s = backoff_s(process.restarted, now_s, process.plan.backoff_s)
            process.state = "failed" if delay_s is None else "restarting"
            process.restart_at = None if delay_s is None else now_s + delay_s
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
