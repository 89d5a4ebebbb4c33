"""One training, from a description to a folder with the result and a cluster that is gone.

`train` is check, up, run, collect, down, verify, whatever happens on the way: a failure, a limit
or Ctrl-C skip forward to what can still be done, and the teardown is always tried. `follow` reads
the run's events until it ends; what happened is a `Result`, and what failed is raised at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import (
    Diverged,
    DsgdError,
    Interrupted,
    ProcessDied,
    TargetMissed,
)
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.collect import fetch_logs, fetch_model, make_run_dir
from dsgd_cli.launcher.describe import resolved_yaml
from dsgd_cli.launcher.down import FORCED_DOWN_S, GRACE_S, Receipt, take_down
from dsgd_cli.launcher.interrupt import FORCED_CODE, Forced, Interrupts
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.remote import Message
from dsgd_cli.launcher.up import Running, bring_up, started_something, unreachable
from dsgd_cli.launcher.watch import Screen, run_error

STOP_TIMEOUT_S = 10.0  # from Ctrl-C to the end of the run


class TrainScreen(Screen, Protocol):
    """What a training shows."""

    def progress(self, message: Message) -> None: ...
    def progress_ends(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """How `train` was asked to behave."""

    keep: bool = False
    allow_unconverged: bool = False
    timeout_s: float | None = None
    runs: Path = Path("runs")
    confirm: Callable[[str], bool] = lambda question: False


@dataclass
class Result:
    """What a training came to; filled in as it goes."""

    spec: ClusterSpec
    run_dir: Path
    phases: Phases
    finished: Message | None = None
    last_progress: Message = field(default_factory=dict)
    model: Path | None = None
    receipt: Receipt | None = None
    kept: bool = False
    error: DsgdError | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        if isinstance(self.error, Interrupted) and self.error.exit_code == 124:
            return "timeout"
        if self.finished is not None:
            return str(self.finished["outcome"])
        return "stopped" if isinstance(self.error, Interrupted) else "failed"

    def summary(self) -> Message:
        """The line with which `train --json` ends; also `summary.json`."""
        run = self.finished or self.last_progress
        seconds = float(run.get("seconds", run.get("elapsed_s", 0.0)) or 0.0)
        steps = int(run.get("steps", run.get("step", 0)) or 0)
        return {
            "type": "summary",
            "outcome": self.outcome,
            "reason": str(self.error) if self.error else str(run.get("reason", "")),
            "metric": run.get("metric"),
            "value": run.get("value"),
            "loss": run.get("loss"),
            "steps": steps,
            "examples": int(run.get("examples", 0) or 0),
            "epochs": run.get("epochs"),
            "seconds": round(seconds, 3),
            "batches_per_second": round(steps / seconds, 1) if seconds else 0.0,
            "workers": self.spec.workers.count,
            "servers": self.spec.servers.count,
            "phases": self.phases.rounded(),
            "run_dir": str(self.run_dir),
            "model": str(self.model) if self.model else None,
            "stopped": self.receipt.stopped if self.receipt else 0,
            "left": len(self.receipt.left) if self.receipt else 0,
        }


def train(spec: ClusterSpec, screen: TrainScreen, options: Options, phases: Phases) -> Result:
    """Train, bring the result home and take the cluster down. Errors are in `Result.error`."""
    result = Result(spec, make_run_dir(spec.name, options.runs), phases)
    (result.run_dir / "cluster.yaml").write_text(resolved_yaml(spec))
    cluster = Cluster(spec, screen.note)
    running: Running | None = None
    with Interrupts(screen.note, options.timeout_s) as interrupts:
        try:
            try:
                running, _ = bring_up(
                    cluster,
                    screen,
                    phase=phases,
                    confirm=options.confirm,
                    interrupts=interrupts,
                    trains=True,
                )
                with phases("train"):
                    _run(running, result, screen, interrupts)
                with phases("collect"):
                    _collect_model(running, result)
            except DsgdError as error:
                result.error = error
            screen.progress_ends()
            _wind_down(cluster, running, result, screen, options)
        except Forced:
            _kill(cluster, running, result, screen)
        finally:
            if running is not None:
                running.close()
            cluster.close()
        _judge(result, options, interrupts)
    (result.run_dir / "summary.json").write_text(json.dumps(result.summary(), indent=1) + "\n")
    return result


def _run(running: Running, result: Result, screen: TrainScreen, interrupts: Interrupts) -> None:
    """Start the run and read its events until it has finished. Raises when it failed."""
    spec = running.cluster.spec
    running.tell_all("worker", lambda host: {"type": "files", **running.files(host)}, keep=True)
    interrupts.deliver = running.watch.interrupt
    try:
        running.tell(
            names.COORDINATOR,
            {
                "type": "run",
                "run_id": result.run_dir.name,
                "seed": spec.seed,
                "train": spec.train.model_dump(mode="json"),
                "channel": spec.channel.model_dump(mode="json"),
                "workers": spec.workers.count,
            },
        )
        with (result.run_dir / "metrics.jsonl").open("w") as metrics:
            result.finished = _follow(running, result, screen, metrics)
    finally:
        interrupts.deliver = None
    if interrupts.code is not None:
        result.error = Interrupted(f"stopped by {interrupts.reason}", interrupts.code)


def _follow(running: Running, result: Result, screen: TrainScreen, metrics: IO[str]) -> Message:
    stop_by: float | None = None
    while True:
        if stop_by is not None and time.monotonic() > stop_by:
            raise ProcessDied(f"the run did not stop within {STOP_TIMEOUT_S:g} s")
        said = running.watch.next(0.5)
        if said is None:
            continue
        kind = said.message.get("type") or said.message.get("event")
        if kind == "interrupt":
            why = str(said.message["why"])
            screen.note(f"{why}: stopping {running.cluster.spec.name} (Ctrl-C again = kill now)")
            running.tell(names.COORDINATOR, {"type": "finish", "why": why})
            stop_by = time.monotonic() + STOP_TIMEOUT_S
        elif said.process != names.COORDINATOR:
            continue
        elif kind == "progress":
            result.last_progress = said.message
            screen.progress(said.message)
        elif kind == "record":
            metrics.write(json.dumps(said.message["record"]) + "\n")
        elif kind == "unreachable":
            raise ProcessDied(unreachable(said.message, running.host_of).message)
        elif kind == "run_error":
            raise run_error(said.message, running.host_of)
        elif kind == "finished":
            return said.message


def _collect_model(running: Running, result: Result) -> None:
    """Stream the exported slices into `model.safetensors`."""
    finished = result.finished
    if finished is None or not finished.get("slices"):
        return
    cluster = running.cluster
    hosts = {running.host_of[f"server/{piece['server']}"] for piece in finished["slices"]}
    for host in hosts:
        cluster.remotes[host] = cluster.open(host)
    target = result.run_dir / "model.safetensors"
    metadata = {
        "dsgd.run": result.run_dir.name,
        "dsgd.outcome": str(finished["outcome"]),
        "dsgd.steps": str(finished.get("steps", 0)),
    }
    fetch_model(cluster.remotes, running.host_of, finished, target, metadata)
    result.model = target


def _wind_down(
    cluster: Cluster,
    running: Running | None,
    result: Result,
    screen: TrainScreen,
    options: Options,
) -> None:
    """Logs home, then either leave the cluster idle (`--keep`) or take it down and verify."""
    if running is not None:
        with result.phases("collect"):
            run_dirs = {
                host: seen.run_dir
                for host, seen in running.observed.items()
                if host not in running.watch.lost
            }
            for error in fetch_logs(cluster, run_dirs, result.run_dir / "logs").values():
                result.warnings.append(f"logs did not come home: {error}")
    if running is not None and options.keep and result.error is None:
        running.release(cluster.spec.idle_timeout_s)
        result.kept = True
        return
    if running is not None:
        running.watch.ending = True
        running.renewal.stop()
    if running is None and not started_something(result.error):
        return  # somebody else's cluster, or nothing was started
    with result.phases("down"):
        ends = {host: running.renewal.ends_at(host) for host in cluster.hosts} if running else {}
        result.receipt = take_down(cluster, grace_s=GRACE_S, lease_ends=ends)


def _kill(cluster: Cluster, running: Running | None, result: Result, screen: TrainScreen) -> None:
    """The second Ctrl-C: KILL everything, wait for two seconds, say what is not confirmed."""
    screen.progress_ends()
    screen.note("killing")
    ends = {host: running.renewal.ends_at(host) for host in cluster.hosts} if running else {}
    with result.phases("down"):
        result.receipt = take_down(cluster, grace_s=0.0, deadline_s=FORCED_DOWN_S, lease_ends=ends)
    result.error = Interrupted("killed by a second Ctrl-C", FORCED_CODE)


def _judge(result: Result, options: Options, interrupts: Interrupts) -> None:
    """Turn the outcome into the error that decides the exit code."""
    if result.error is None and result.finished is not None:
        result.error = _verdict(result.finished, options)
    receipt = result.receipt
    if receipt is not None and receipt.left:
        try:
            receipt.check()
        except DsgdError as error:
            if result.error is None:
                result.error = error
            else:
                result.warnings += [error.message, *(f"  {line}" for line in error.details)]


def _verdict(finished: Message, options: Options) -> DsgdError | None:
    outcome, reason = finished["outcome"], str(finished.get("reason", ""))
    if outcome == "diverged":
        return Diverged(f"diverged: {reason}")
    if outcome == "failed":
        return ProcessDied(f"the run failed: {reason}")
    if outcome == "stopped" and not options.allow_unconverged:
        return TargetMissed(
            f"stopped before the target: {reason}",
            remedy="raise the limit under `train.until`, or pass --allow-unconverged",
        )
    return None
