"""What a training came to: filled in as it goes, printed as the summary, judged at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dsgd_cli.contract.errors import (
    Diverged,
    DsgdError,
    Interrupted,
    ProcessDied,
    SpecError,
    TargetMissed,
)
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.down import Receipt
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.remote import Message

TIMEOUT_CODE = 124


@dataclass
class Result:
    """One training. `error` decides the exit code; `warnings` are what went wrong besides."""

    spec: ClusterSpec
    run_dir: Path
    phases: Phases
    finished: Message | None = None
    last_progress: Message = field(default_factory=dict)
    model: Path | None = None
    best: Path | None = None
    receipt: Receipt | None = None
    kept: bool = False
    error: DsgdError | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """converged, finished (there was no target), stopped, diverged, failed or timeout."""
        if isinstance(self.error, Interrupted):
            return "timeout" if self.error.exit_code == TIMEOUT_CODE else "stopped"
        if isinstance(self.error, ProcessDied | SpecError):
            return "failed"
        if self.finished is not None:
            return str(self.finished["outcome"])
        return "failed"

    def warn(self, what: str, error: DsgdError) -> None:
        """Something that failed on the way to the end."""
        self.warnings += [f"{what}: {error.message}", *(f"  {line}" for line in error.details)]

    def summary(self) -> Message:
        """The line with which `train --json` ends; also `summary.json`."""
        run = self.finished or self.last_progress
        seconds = float(run.get("seconds", run.get("elapsed_s", 0.0)) or 0.0)
        steps = int(run.get("steps", run.get("step", 0)) or 0)
        examples = int(run.get("examples", 0) or 0)
        return {
            "type": "summary",
            "outcome": self.outcome,
            "reason": str(self.error) if self.error else str(run.get("reason", "")),
            "metric": run.get("metric"),
            "value": run.get("value"),
            "target": self.spec.train.until.target,
            "loss": run.get("loss"),
            "steps": steps,
            "examples": examples,
            "epochs": run.get("epochs"),
            "seconds": round(seconds, 3),
            "batches_per_second": round(steps / seconds, 1) if seconds else 0.0,
            "examples_per_second": round(examples / seconds, 1) if seconds else 0.0,
            "algorithm": self.spec.train.algorithm.name,
            "workers": self.spec.workers.count,
            "servers": self.spec.servers.count,
            "phases": self.phases.rounded(),
            "run_dir": str(self.run_dir),
            "model": str(self.model) if self.model else None,
            "best": self._best(run),
            "staleness": run.get("staleness"),
            "classes": run.get("classes") or [],
            "columns": run.get("columns") or [],
            "label": run.get("label") or None,
            "stopped": self.receipt.stopped if self.receipt else 0,
            "left": len(self.receipt.left) if self.receipt else 0,
        }

    def _best(self, run: Message) -> Message | None:
        """The best of all evaluations, with the file that has its parameters."""
        found = run.get("best")
        if found is None:
            return None
        about = {key: found[key] for key in ("metric", "value", "step", "metrics")}
        return {**about, "model": str(self.best) if self.best else None}

    def judge(self, allow_unconverged: bool) -> None:
        """Turn the outcome and the receipt into the error that decides the exit code."""
        if self.error is None and self.finished is not None:
            self.error = verdict(self.finished, allow_unconverged)
        for place in self.receipt.results if self.receipt else ():
            self.warnings.append(f"not home: {place} (`dsgd down --purge` removes it)")
        try:
            if self.receipt is not None:
                self.receipt.check()
        except DsgdError as error:
            if self.error is None:
                self.error = error
            else:
                self.warn("teardown", error)


def verdict(finished: Message, allow_unconverged: bool) -> DsgdError | None:
    """The error of a run that finished by itself; None when that is a success."""
    outcome, reason = finished["outcome"], str(finished.get("reason", ""))
    if outcome == "diverged":
        return Diverged(f"diverged: {reason}")
    if outcome == "failed":
        return ProcessDied(f"the run failed: {reason}")
    if outcome == "stopped" and not allow_unconverged:
        return TargetMissed(
            f"stopped before the target: {reason}",
            remedy="raise the limit under `train.until`, or pass --allow-unconverged",
        )
    return None
