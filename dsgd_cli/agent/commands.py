"""What a launcher may ask of the agent: every command checked, then given to who does it.

Commands on one connection are answered in their order, except `shutdown`, which answers when all
is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from dsgd_cli.agent import names
from dsgd_cli.agent.clients import Client
from dsgd_cli.agent.fleet import Fleet
from dsgd_cli.agent.framing import Message, Refused
from dsgd_cli.agent.lease import Lease, seconds
from dsgd_cli.agent.life import Plan
from dsgd_cli.agent.store import Store
from dsgd_cli.agent.teardown import GRACE_S, grace

Done = Callable[[Message], None]


class Commands:
    def __init__(
        self,
        identity: Message,
        lease: Lease,
        store: Store,
        fleet: Fleet,
        end: Callable[[float, Done], None],
    ) -> None:
        self.ending = False
        self._identity = identity  # cluster_id, host
        self._lease, self._store, self._fleet, self._end = lease, store, fleet, end
        self._verbs: dict[str, Callable[[Client, Message], Message | None]] = {
            "hello": lambda client, r: self._hello(),
            "start": lambda client, r: self._fleet.start(plan(r)),
            "tell": lambda client, r: self._tell(r),
            "lease": lambda client, r: self._set_lease(r),
            "subscribe": self._subscribe,
            "put_secret": lambda client, r: self._store.put_secret(r.get("name"), r.get("text")),
            "get_secret": lambda client, r: {"text": self._store.secret(r.get("name"))},
            "shutdown": self._shutdown,
        }

    def answer(self, client: Client, request: Message) -> Message | None:
        """The value of "ok"; None when it comes later or has been sent."""
        name = request.get("do")
        verb = self._verbs.get(str(name))
        if verb is None:
            raise Refused("unknown", f"no such verb: {ascii(name)[:100]}")
        if self.ending and name in ("start", "tell", "lease"):
            raise Refused("busy", "the cluster is ending here")
        return verb(client, request)

    def _hello(self) -> Message:
        known = self._fleet.processes
        return {
            "pid": os.getpid(),
            **self._identity,
            "processes": {name: process.describe() for name, process in known.items()},
            "lease": {"holder": self._lease.holder, "remaining_s": self._lease.remaining_s},
            "last": {name: process.last for name, process in known.items() if process.last},
            "ending": self.ending,
        }

    def _tell(self, request: Message) -> Message:
        message = request.get("message")
        if not isinstance(message, dict):
            raise Refused("invalid", "`message` is not an object")
        process = names.process(request.get("process"))
        self._fleet.tell(process, message, bool(request.get("keep")))
        return {}

    def _set_lease(self, request: Message) -> Message:
        length_s, holder = seconds(request.get("seconds")), request.get("holder")
        self._lease.set(holder, length_s)
        self._fleet.tell_all({"type": "lease", "holder": holder, "seconds": length_s})
        return {"remaining_s": self._lease.remaining_s}

    def _subscribe(self, client: Client, request: Message) -> None:
        client.reply(request.get("id"), {})
        client.logs = bool(request.get("logs"))
        client.subscribed = True

    def _shutdown(self, client: Client, request: Message) -> None:
        grace_s = grace(request.get("grace_s", GRACE_S))
        self._end(grace_s, _replying(client, request.get("id")))


def plan(request: Message) -> Plan:
    """The checked arguments of `start`."""
    argv, env = request.get("argv"), request.get("env") or {}
    setup = request.get("setup") or {}
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise Refused("invalid", "`argv` is not a list of strings")
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise Refused("invalid", "`env` is not an object of strings")
    if not isinstance(setup, dict):
        raise Refused("invalid", "`setup` is not an object")
    return Plan(
        process=names.process(request.get("process")),
        argv=tuple(argv),
        env=env,
        setup={**setup, "type": "setup"},
        restart=bool(request.get("restart")),
        backoff_s=seconds(request.get("backoff_s", 1.0)),
    )


def _replying(client: Client, number: Any) -> Done:
    return lambda said: client.reply(number, said)
