"""Keeping a cluster alive: as long as the launcher is there, its agents hear from it.

An agent that hears nothing until its lease ends stops everything on its host. So a launcher that
vanished leaves nothing behind, and no other machine has to do anything about it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from dsgd_cli.contract.errors import DeadlinePassed, DsgdError
from dsgd_cli.launcher.remote import AgentLink

RENEW_S = 2.0  # or a fifth of a short lease
REPLY_S = 5.0


class Renewal:
    """A thread that renews the lease at every agent until it is stopped."""

    def __init__(self, links: Mapping[str, AgentLink], lease_s: float) -> None:
        self._links = links
        self._lease_s = lease_s
        self._stop = threading.Event()
        self.last: dict[str, float] = {}  # host -> time.time() of the last renewal it answered
        self._threads = [
            threading.Thread(target=self._run, args=(name,), name=f"lease {name}", daemon=True)
            for name in links
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No renewal leaves after this."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(REPLY_S)

    def ends_at(self, host: str) -> float | None:
        """When this host's lease ends if nobody renews it: seconds since the epoch, or None."""
        last = self.last.get(host)
        return None if last is None else last + self._lease_s

    def _run(self, host: str) -> None:
        while not self._stop.is_set():
            sent = time.time()
            try:
                self._links[host].call(
                    "lease", holder="launcher", seconds=self._lease_s, timeout_s=REPLY_S
                )
                self.last[host] = sent
            except DeadlinePassed:
                continue  # a late answer, behind many log lines perhaps: it may have arrived
            except DsgdError:
                return  # the link's own end is reported as an event
            self._stop.wait(min(RENEW_S, self._lease_s / 5))
