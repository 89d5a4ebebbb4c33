"""The agent: the one supervisor of a cluster on a host. One thread, one loop, nothing in it waits.

It outlives the connection that started it, holds the run directory's lock for life, and ends in one
way only, whoever asks (a command, SIGTERM, the lapse of its lease, a bug of its own): every process
that carries the cluster's marks is gone, then socket and run directory, then itself.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsgd_cli.agent import fleet, framing, hold, names, paths, processes, teardown
from dsgd_cli.agent.child import Plan
from dsgd_cli.agent.clients import Client, Clients
from dsgd_cli.agent.fleet import Fleet
from dsgd_cli.agent.framing import Input, Message, Refused
from dsgd_cli.agent.lease import Lease, now_s
from dsgd_cli.agent.lease import seconds as lease_seconds
from dsgd_cli.agent.store import Store

LAPSE_GRACE_S = 2.0
TERM_GRACE_S = 5.0
FLUSH_S = 1.0
LONGEST_WAIT_S = 1.0  # epoll's clock stands still in suspension, ours does not
LOCK_WAIT_S = 5.0


def main() -> None:
    """The entry of the payload: one line of configuration follows on stdin."""
    os.umask(0o077)
    try:
        config = framing.decode(Input(0).line())
        if os.fork():
            os._exit(0)
        os.setsid()
        agent = Agent(config)
        agent.listen()
    except Refused as refusal:
        framing.say({"error": refusal.error})
        os._exit(1)
    framing.say({"ok": {"pid": os.getpid()}})
    detach(agent.run_dir)
    os._exit(agent.run())


def detach(run_dir: Path) -> None:
    """Let go of the connection: its end is how the starter knows that we run."""
    os.chdir("/")
    log = os.open(run_dir / "logs" / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)


class Agent:
    def __init__(self, config: Message) -> None:
        self._cluster = names.cluster(config.get("cluster"))
        self._id = names.checked(names.CLUSTER_ID, config.get("cluster_id"), "cluster id")
        self._host = str(config.get("host"))
        self._lease = Lease(lease_seconds(config.get("lease_s")))
        self._spec = config.get("spec")
        self.run_dir = Path(config["run_dir"])
        self._lock = take_lock(self.run_dir / "lock")
        paths.make_private(self.run_dir / "logs")
        self._store = Store(self.run_dir)
        self._selector = selectors.DefaultSelector()
        self._ending: list[Callable[[Message], None]] | None = None
        self._ended: Message | None = None
        self._grace_until = 0.0
        self._verbs: dict[str, Callable[[Client, Message], Message | None]] = {
            "hello": lambda client, r: self._hello(),
            "start": lambda client, r: self._start(r),
            "tell": lambda client, r: self._tell(r),
            "lease": lambda client, r: self._set_lease(r),
            "subscribe": self._subscribe,
            "store": lambda client, r: self._store.spec(r.get("spec")),
            "put_secret": lambda client, r: self._store.put_secret(r.get("name"), r.get("text")),
            "get_secret": lambda client, r: {"text": self._store.secret(r.get("name"))},
            "stop": self._stop,
            "shutdown": self._shutdown,
        }

    def listen(self) -> None:
        """Everything that can fail before the first answer."""
        self._wakeup = self._catch_signals()
        listener = bind(self.run_dir)
        self._clients = Clients(listener, self._selector, self._answer)
        self._fleet = Fleet(
            self.run_dir,
            self._selector,
            self._clients.emit,
            lambda process, stream, lines: self._clients.emit_log(
                process, stream, lines, time.time()
            ),
            self._extend_lease,
            self._store.processes,
        )
        self._store.spec(self._spec)
        self._store.processes({})
        self._store.agent(self._cluster, self._id, self._host)

    def run(self) -> int:
        """Until everything has ended; the exit status."""
        status = 0
        try:
            while self._ended is None:
                self._turn()
        except BaseException:
            framing.complain(traceback.format_exc())
            self._fleet.kill_all()
            status = 1
        left_s = max(0.2, self._grace_until - now_s()) if status == 0 else 0.0
        fleet.end_strays(self.run_dir, left_s, DSGD_CLUSTER_ID=self._id)
        paths.remove_run(self.run_dir)
        for done in self._ending or ():
            done(self._ended or {"stopped": 0, "killed": 0, "killed_processes": []})
        self._clients.close(FLUSH_S)
        return status

    def _turn(self) -> None:
        """One round of the loop."""
        now = now_s()
        if self._lease.remaining_s <= 0 and self._ending is None:
            framing.complain(f"the lease of {self._lease.holder!r} has lapsed: ending everything")
            self._clients.emit({"event": "lapsed"})
            self._end(LAPSE_GRACE_S)
        self._fleet.tick(now)
        due = [LONGEST_WAIT_S, (self._fleet.next_s() or now + LONGEST_WAIT_S) - now]
        if self._ending is None:
            due.append(self._lease.remaining_s)
        for key, mask in self._selector.select(max(0.0, min(due))):
            if self._selector.get_map().get(key.fd) is key:  # not closed by one before it
                key.data(mask)
        self._fleet.reap(now_s())

    def _answer(self, client: Client, request: Message) -> Message | None:
        verb = self._verbs.get(str(request.get("do")))
        if verb is None:
            raise Refused("unknown", f"no such verb: {ascii(request.get('do'))[:100]}")
        if self._ending is not None and request.get("do") in ("start", "tell", "lease"):
            raise Refused("busy", f"{self._cluster} is ending here")
        return verb(client, request)

    def _hello(self) -> Message:
        known = self._fleet.processes
        return {
            "pid": os.getpid(),
            "cluster_id": self._id,
            "host": self._host,
            "processes": {name: process.describe() for name, process in known.items()},
            "lease": {"holder": self._lease.holder, "remaining_s": self._lease.remaining_s},
            "last": {name: process.last for name, process in known.items() if process.last},
            "ending": self._ending is not None,
        }

    def _start(self, request: Message) -> Message:
        argv, env = request.get("argv"), request.get("env") or {}
        if not isinstance(argv, list) or not argv or not all(isinstance(a, str) for a in argv):
            raise Refused("invalid", "`argv` is not a list of strings")
        if not isinstance(env, dict) or not all(isinstance(v, str) for v in env.values()):
            raise Refused("invalid", "`env` is not an object of strings")
        process = names.process(request.get("process"))
        plan = Plan(
            process,
            tuple(argv),
            env,
            {**(request.get("setup") or {}), "type": "setup"},
            bool(request.get("restart")),
            lease_seconds(request.get("backoff_s", 1.0)),
        )
        return self._fleet.start(plan)

    def _tell(self, request: Message) -> Message:
        message = request.get("message")
        if not isinstance(message, dict):
            raise Refused("invalid", "`message` is not an object")
        process = names.process(request.get("process"))
        self._fleet.tell(process, message, bool(request.get("keep")))
        return {}

    def _set_lease(self, request: Message) -> Message:
        seconds, holder = lease_seconds(request.get("seconds")), request.get("holder")
        self._lease.set(holder, seconds)
        self._fleet.tell_all({"type": "lease", "holder": holder, "seconds": seconds})
        return {"remaining_s": self._lease.remaining_s}

    def _extend_lease(self, seconds: Any) -> None:
        self._lease.extend(lease_seconds(seconds))

    def _subscribe(self, client: Client, request: Message) -> None:
        client.reply(request.get("id"), {})
        client.logs = bool(request.get("logs"))
        client.subscribed = True

    def _stop(self, client: Client, request: Message) -> None:
        chosen = request.get("processes")
        if chosen is not None:
            if not isinstance(chosen, list):
                raise Refused("invalid", "`processes` is neither a list nor null")
            chosen = [names.process(name) for name in chosen]
        grace_s = teardown.grace(request.get("grace_s", TERM_GRACE_S))
        number = request.get("id")
        self._fleet.stop(chosen, grace_s, now_s(), lambda said: client.reply(number, said))

    def _shutdown(self, client: Client, request: Message) -> None:
        number = request.get("id")
        self._end(
            teardown.grace(request.get("grace_s", TERM_GRACE_S)),
            lambda said: client.reply(number, said),
        )

    def _end(self, grace_s: float, done: Callable[[Message], None] | None = None) -> None:
        """Begin to end, or end sooner; `done` hears when all is gone."""
        first = self._ending is None
        self._ending = [*(self._ending or []), *([done] if done else [])]
        until = now_s() + grace_s
        self._grace_until = until if first else min(until, self._grace_until)
        for member in processes.sweep(self.run_dir, DSGD_CLUSTER_ID=self._id) if first else ():
            target = processes.Target(member.pid, member.start_time)
            target.send(signal.SIGTERM)
            target.close()

        def ended(said: Message) -> None:
            if first:
                self._ended = said

        self._fleet.stop(None, grace_s, now_s(), ended)

    def _catch_signals(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._selector.register(ours, selectors.EVENT_READ, self._on_signal)
        self._wakeup_writer = theirs
        return ours

    def _on_signal(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = self._wakeup.recv(4096)
            if {signal.SIGTERM, signal.SIGINT} & set(numbers):
                self._end(TERM_GRACE_S)


def take_lock(path: Path) -> int:
    """The lock that says: this run directory has an agent. An ending one is waited for."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while (descriptor := hold.lock_file(path)) is None:
        if time.monotonic() > deadline:
            raise Refused("busy", f"another agent has {path.parent}")
        time.sleep(0.02)
    return descriptor


def bind(run_dir: Path) -> socket.socket:
    """The agent's socket. We have the lock: what is at its path belongs to nobody alive."""
    path = paths.socket_path(run_dir)
    for _ in range(10):
        paths.make_socket_dir()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen(64)
        except FileNotFoundError:  # another agent has just removed the empty folder
            listener.close()
            continue
        return listener
    raise Refused("unfit", f"cannot listen at {path}")
