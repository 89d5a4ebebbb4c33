"""`top`: watches a run that somebody else has started, and changes nothing.

It is one more listener at the agent of the coordinator's host: it holds no lease and takes no lock,
so it may come and go, and the run does not notice.
"""

from __future__ import annotations

import queue

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import UsageError
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.commands import is_over
from dsgd_cli.launcher.follow import TrainScreen
from dsgd_cli.launcher.remote import AgentLink, Message, Missing

Events = queue.SimpleQueue[tuple[str, Message]]


def top(spec: ClusterSpec, screen: TrainScreen) -> None:
    """Show the run of a cluster until it has ended, or Ctrl-C. Raises UsageError where none is."""
    cluster = Cluster(spec, screen.note)
    try:
        events: Events = queue.SimpleQueue()
        link = _listen(cluster, events)
        last = (link.call("hello").get("last") or {}).get(names.COORDINATOR) or {}
        if "progress" in last:
            screen.progress(last["progress"])
            if is_over(last):
                screen.progress_ends()
                screen.note(f"{spec.name}: this run is over; waiting for the next")
        else:
            screen.note(f"{spec.name}: waiting for a run")
        _show(spec.name, events, screen)
        link.close()
    except KeyboardInterrupt:
        screen.progress_ends()
        screen.note(f"left the view; {spec.name} goes on")
    finally:
        cluster.close()


def _listen(cluster: Cluster, events: Events) -> AgentLink:
    host, name = cluster.coordinator_host, cluster.spec.name
    try:
        link = cluster.open(host).attach(name, events)
    except Missing:
        raise UsageError(
            f"{name}: nothing runs on {host}", remedy="`dsgd train` starts a run, and shows it"
        ) from None
    link.call("subscribe", logs=False)
    return link


def _show(name: str, events: Events, screen: TrainScreen) -> None:
    while True:
        _, event = events.get()
        if event["event"] == "lost":
            screen.progress_ends()
            screen.note(f"{name} has ended, or the connection has")
            return
        if event["event"] != "child" or event["process"] != names.COORDINATOR:
            continue
        message = event["message"]
        kind = message.get("type")
        if kind == "progress":
            screen.progress(message)
        elif kind == "record":
            screen.record(message["record"])
        elif kind == "finished":
            screen.progress_ends()
            screen.note(f"the run is over: {message.get('reason') or message['outcome']}")
