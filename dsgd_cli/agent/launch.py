"""Starts the agent of a cluster on this host, detached from the connection that asked for it.

The same stub and payload as for this process, with another entry: nothing needs to be installed.
The agent inherits the run directory's lock, forks into a session of its own, listens, and only then
answers on the pipe to us; whatever goes wrong before that comes back as its error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dsgd_cli.agent import bridge, framing, hold, names, paths, payload, processes, runs
from dsgd_cli.agent.framing import Message, Refused

LOCK = "lock"
LOCK_WAIT_S = 5.0
START_TIMEOUT_S = 15.0
ANSWER_TIMEOUT_S = 5.0


def start_agent(request: Message) -> Message:
    """{pid} or {pid, already: true}. Refused("busy") when another cluster id lives here."""
    cluster = names.cluster(request.get("cluster"))
    cluster_id = names.checked(names.CLUSTER_ID, request.get("cluster_id"), "cluster id")
    run_dir = runs.current(cluster)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        agent = runs.agent_of(run_dir)
        if agent is not None and agent["alive"]:
            if agent["cluster_id"] != cluster_id:
                raise Refused("busy", f"another cluster {cluster} runs here", agent=agent)
            ask(run_dir, {"id": 0, "do": "hello"}, ANSWER_TIMEOUT_S)
            return {"pid": agent["pid"], "already": True}
        lock = hold.lock_file(run_dir / LOCK)
        if lock is not None:
            break
        if time.monotonic() > deadline:
            raise Refused("busy", f"an agent of {cluster} starts or ends here at this moment")
        time.sleep(0.02)
    try:
        return _start(request, run_dir, lock)
    finally:
        os.close(lock)


def _start(request: Message, run_dir: Path, lock: int) -> Message:
    """With the run directory's lock, which the agent inherits: no other can come in between."""
    clear(run_dir)
    cluster, cluster_id = request["cluster"], request["cluster_id"]
    config = {**request, "run_dir": str(run_dir), "lock": lock}
    environment = {name: value for name, value in os.environ.items() if name[:5] != "DSGD_"}
    environment |= {processes.CLUSTER: cluster, processes.CLUSTER_ID: cluster_id}
    environment |= {processes.RUN_DIR: str(run_dir), processes.PROCESS: processes.AGENT}
    argv = [sys.executable, "-I", "-u", "-c", payload.STUB, "dsgd-agent", cluster]
    try:
        stdin = payload.payload("supervisor") + framing.encode(config)
        return _run(argv, environment, stdin, lock)
    except BaseException:
        processes.end_members(run_dir, cluster_id)
        clear(run_dir)
        with contextlib.suppress(OSError):
            (run_dir / LOCK).unlink()
            run_dir.rmdir()
        paths.prune()
        raise


def _run(argv: list[str], environment: dict[str, str], stdin: bytes, lock: int) -> Message:
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, pass_fds=(lock,)
    )
    try:
        out, err = child.communicate(stdin, START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise Refused("internal", f"the agent did not start in {START_TIMEOUT_S:g} s") from None
    for line in out.splitlines():
        try:
            said = framing.decode(line)
        except Refused:
            continue  # something of the interpreter's, or of a sitecustomize
        return _ok(said)
    raise Refused("internal", "the agent did not start: " + err.decode("utf-8", "replace")[-2000:])


def clear(run_dir: Path) -> None:
    """End and remove what a dead agent left, but the locks: they are ours, or may be."""
    processes.end_all(lambda: members(run_dir.name.partition("@")[0]), grace_s=1.0)
    paths.socket_path(run_dir).unlink(missing_ok=True)
    for entry in run_dir.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name not in (LOCK, hold.LOCK):
            entry.unlink(missing_ok=True)


def members(cluster: str) -> set[tuple[int, int]]:
    """(pid, start time) of all that belongs to the cluster: by its files, and by a sweep."""
    own = paths.run_dir(cluster)
    found = {(member.pid, member.start_time) for member in processes.sweep(own)}
    for run_dir in runs.here(cluster):
        for entry in (runs.agent_of(run_dir), *runs.processes_of(run_dir).values()):
            if entry is not None and entry["alive"]:
                found.update(processes.session_of(entry["pid"], entry["start_time"]))
    return found


def ask(run_dir: Path, request: Message, timeout_s: float) -> Message:
    """One command to the agent, and its answer. Refused when it does not answer in time."""
    with bridge.connect(run_dir, timeout_s) as joined:
        joined.settimeout(timeout_s)
        buffer = bytearray()
        try:
            joined.sendall(framing.encode(request))
            while data := joined.recv(65536):
                for line in framing.split_lines(buffer, data):
                    said = framing.decode(line)
                    if said.get("id") == request["id"]:
                        return _ok(said)
        except OSError as error:
            raise Refused("silent", f"the agent does not answer: {error}") from None
    raise Refused("silent", "the agent ended before it answered")


def _ok(said: Message) -> Message:
    if "error" in said:
        error: dict[str, Any] = dict(said["error"])
        raise Refused(error.pop("kind", "internal"), error.pop("message", ""), **error)
    return dict(said["ok"])
