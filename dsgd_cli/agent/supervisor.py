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
import traceback
from pathlib import Path
from typing import Any

from dsgd_cli.agent import framing, hold, names, paths, processes
from dsgd_cli.agent.clients import Clients
from dsgd_cli.agent.commands import Commands, Done
from dsgd_cli.agent.fleet import Fleet
from dsgd_cli.agent.framing import Input, Message, Refused
from dsgd_cli.agent.launch import LOCK
from dsgd_cli.agent.lease import Lease, now_s, seconds
from dsgd_cli.agent.store import Store
from dsgd_cli.agent.teardown import GRACE_S

LAPSE_GRACE_S = 2.0
FLUSH_S = 1.0
LONGEST_WAIT_S = 1.0  # epoll's clock stands still in suspension, ours does not


def main() -> None:
    """The entry of the payload: one line of configuration follows on stdin."""
    os.umask(0o077)
    try:
        config = framing.decode(Input(0).line())
        if os.fork():
            os._exit(0)
        os.setsid()
        agent = Agent(config)
    except Refused as refusal:
        framing.say({"error": refusal.error})
        os._exit(1)
    except OSError as error:
        framing.say({"error": {"kind": "unfit", "message": f"cannot start an agent: {error}"}})
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
    """Holds everything together: the loop, the signals, the lease, the end."""

    def __init__(self, config: Message) -> None:
        cluster = names.cluster(config.get("cluster"))
        self._id = names.checked(names.CLUSTER_ID, config.get("cluster_id"), "cluster id")
        host = str(config.get("host"))
        self.run_dir = Path(config["run_dir"])
        self._lease = Lease(seconds(config.get("lease_s")))
        self._asked: list[Done] = []  # by whom to end
        inherit_lock(config.get("lock"), self.run_dir)
        paths.make_private(self.run_dir / "logs")
        self._selector = selectors.DefaultSelector()
        self._signals = self._catch_signals()
        self._clients = Clients(
            bind(self.run_dir), self._selector, lambda c, r: self._commands.answer(c, r)
        )
        self._store = store = Store(self.run_dir, self._tell)
        self._fleet = Fleet(
            self.run_dir,
            self._id,
            self._selector,
            self._clients,
            lambda length: self._lease.extend(seconds(length)),
            lambda found: store.processes(found, now_s()),
        )
        identity = {"cluster_id": self._id, "host": host}
        self._commands = Commands(identity, self._lease, store, self._fleet, self._end)
        store.begin(cluster, self._id, host, config.get("spec"))

    def run(self) -> int:
        """Until everything has ended; the exit status."""
        ended, status = None, 0
        try:
            while (ended := self._fleet.ended) is None:
                self._turn()
        except BaseException:
            text = traceback.format_exc()
            framing.complain(text)
            with contextlib.suppress(Exception):  # whatever is broken: the children end
                self._clients.emit({"event": "crashed", "traceback": text})
            self._fleet.kill_all()
            processes.end_members(self.run_dir, self._id)
            status = 1
        paths.remove_run(self.run_dir)
        if ended is not None:
            for done in self._asked:
                done(ended)
        self._clients.close(FLUSH_S)
        return status

    def _turn(self) -> None:
        """One round of the loop."""
        ending = self._commands.ending
        if self._lease.remaining_s <= 0 and not ending:
            framing.complain(f"the lease of {self._lease.holder!r} has lapsed: ending everything")
            self._clients.emit({"event": "lapsed"})
            self._end(LAPSE_GRACE_S)
        now = now_s()
        self._store.tick(now)
        self._fleet.tick(now)
        if self._fleet.ended is not None:
            return
        wait_s = min(LONGEST_WAIT_S, (self._fleet.next_s() or now + LONGEST_WAIT_S) - now)
        if not ending:
            wait_s = min(wait_s, self._lease.remaining_s)
        for key, mask in self._selector.select(max(0.0, wait_s)):
            if self._selector.get_map().get(key.fd) is key:  # not closed by one before it
                key.data(mask)
        self._fleet.reap(now_s())

    def _tell(self, text: str) -> None:
        """Something that a person should know, and that ends nothing."""
        framing.complain(text)
        self._clients.emit({"event": "note", "text": text})

    def _end(self, grace_s: float, done: Done | None = None) -> None:
        """Begin to end, or end sooner; `done` hears when all is gone."""
        self._asked += [done] if done else []
        if not self._commands.ending:
            self._commands.ending = True
            for member in processes.sweep(self.run_dir, self._id):
                target = processes.Target(member.pid, member.start_time)
                target.send(signal.SIGTERM)
                target.close()
        self._fleet.stop(grace_s, now_s())

    def _catch_signals(self) -> tuple[socket.socket, socket.socket]:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._selector.register(reader, selectors.EVENT_READ, self._on_signal)
        return reader, writer

    def _on_signal(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if {signal.SIGTERM, signal.SIGINT} & set(self._signals[0].recv(4096)):
                self._end(GRACE_S)


def inherit_lock(descriptor: Any, run_dir: Path) -> None:
    """The lock that says: this run directory has an agent. Ours for life, not our children's."""
    try:
        os.set_inheritable(descriptor, False)
        if hold.is_still(descriptor, run_dir / LOCK):
            return
    except (OSError, TypeError):
        pass
    raise Refused("busy", f"{run_dir} was taken away")


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
