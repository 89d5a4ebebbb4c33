"""`dsgd predict`: what a run's model says of some data, computed on this machine.

The launcher finds the files and writes the order; a process of the cluster half does the rest
(`learning.predict`) and answers with one line. Errors of the user's code come back as what they
were there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import dsgd_cli
from dsgd_cli.contract.errors import (
    DsgdError,
    ProcessDied,
    SpecError,
    UsageError,
    UserCodeError,
)
from dsgd_cli.contract.options import FOLDERS
from dsgd_cli.contract.references import DATA_SUFFIXES, DataRef, ModelRef
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.load import load
from dsgd_cli.launcher.modules import find_module
from dsgd_cli.launcher.remote import Message
from dsgd_cli.reporting.runs import is_run, read_summary

CHILD = "dsgd_cli.learning.predict"
SUFFIXES = (".npz", ".csv")
ERRORS: dict[str, type[DsgdError]] = {
    "SpecError": SpecError,
    "UserCodeError": UserCodeError,
    "DsgdError": DsgdError,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What `predict` was asked for."""

    data: str | None = None  # a reference as in `train.data`; default: the run's own
    labels: bool = True  # whether those data have some
    part: str | None = None  # held-out | training | all
    best: bool = False
    out: Path | None = None


def predict(run: Path, options: Options) -> Message:
    """The result as `--json` prints it. Raises UsageError, SpecError, UserCodeError."""
    if options.out is not None and options.out.suffix not in SUFFIXES:
        raise UsageError(f"{options.out}: outputs are written as .npz or .csv")
    if not options.labels and options.data is None:
        raise UsageError("the run's own data have labels", remedy="give --data, or no --no-labels")
    if not options.labels and options.part not in (None, "all"):
        raise UsageError("examples without labels are no parts: all of them", remedy="no --part")
    model_file = _model_file(run, options.best)
    spec = _spec(run, options.data)
    order = {
        "model_file": str(model_file),
        "train": spec.train.model_dump(mode="json"),
        "seed": spec.seed,
        "files": {
            "model": _file(spec.train.model, "model"),
            "data": _file(spec.train.data, "data"),
        },
        "own": options.data is None,
        "labels": options.labels,
        **_names(run),
        "part": options.part,
        "out": None if options.out is None else str(options.out),
    }
    answer = _ask(order, spec)
    return {
        "type": "prediction",
        "run": str(run),
        "model": str(model_file),
        **{key: answer[key] for key in ("data", "part", "examples", "outputs")},
        "this_host_only": options.data is None and spec.train.data.per_host,
        "metrics": _finite(answer["metrics"]),
        "out": order["out"],
    }


def _model_file(run: Path, best: bool) -> Path:
    name = "best.safetensors" if best else "model.safetensors"
    if not run.is_dir():
        raise UsageError(f"{run}: no such folder", remedy="give the folder of a run: runs/NAME")
    found = (run / name).is_file()
    if not (run / "cluster.yaml").is_file() or not (found or is_run(run)):
        raise UsageError(
            f"{run} is not the folder of a run: it lacks cluster.yaml or summary.json",
            remedy="give the folder that `dsgd train` has named: runs/NAME",
        )
    if not found:
        other = "" if best or not (run / "best.safetensors").is_file() else "try --best"
        raise UsageError(f"{run} has no {name}: the run brought no such model home", remedy=other)
    return run / name


def _names(run: Path) -> dict[str, Any]:
    """What the run's class numbers, features and labels are called, where its data said so."""
    try:
        summary = read_summary(run)
    except OSError:
        summary = {}
    label = str(summary.get("label") or "")
    kinds = ("classes", "columns")
    return {"label": label} | {
        kind: [str(name) for name in summary.get(kind) or ()] for kind in kinds
    }


def _spec(run: Path, data: str | None) -> ClusterSpec:
    """The run's description, with other data if there are some."""
    path = run / "cluster.yaml"
    try:
        return load(path, [] if data is None else [_override(path, data)]).spec
    except SpecError as error:
        if any(line.startswith("--set") for line in error.details):
            raise
        remedy = "the run's own model and data must still be where they were; or give other --data"
        raise SpecError(error.message, details=error.details, remedy=remedy) from None


def _override(path: Path, data: str) -> str:
    """`--data` as an override; what is of the run's kind is read as the run's own was."""
    if data.lstrip().startswith("{"):
        return f"train.data={data}"
    own = _own_data(path)
    kinds = {kind for suffix, kind in DATA_SUFFIXES.items() if data.endswith(suffix)}
    if Path(data).is_dir():
        kinds.update(FOLDERS)
    kind = next((kind for kind in kinds if kind in own), None)
    options = {key: value for key, value in own.items() if key != "per_host"}  # it is here
    value = data if kind is None else {**options, kind: data}
    return f"train.data={json.dumps(value)}"


def _own_data(path: Path) -> Mapping[str, Any]:
    """`train.data` as it is written: its file need not be there any more."""
    try:
        own = yaml.safe_load(path.read_text())["train"]["data"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return own if isinstance(own, Mapping) else {}


def _file(ref: ModelRef | DataRef, what: str) -> str | None:
    """Where the user's file is on this machine; None for what is built in or installed."""
    if ref.on_host and not Path(ref.path).exists():
        remedy = "predict where it is" + ("" if what == "model" else ", or give --data")
        raise UsageError(f"the {what} is on the hosts, not here: {ref.path}", remedy=remedy)
    if ref.path:
        return ref.path
    found = find_module(ref.name) if ref.kind == "module" else None
    return None if found is None else str(found)


def _ask(order: Message, spec: ClusterSpec) -> Message:
    """Start the process, give it the order, read its answer."""
    here = str(Path(dsgd_cli.__file__).resolve().parents[1])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **spec.workers.env, "PYTHONPATH": os.pathsep.join(paths)}
    env["PYTHONSAFEPATH"] = "1"  # the working folder hides nothing
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:  # it inherits the mask: Ctrl-C is for us, who then kill it
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        try:
            said, _ = process.communicate(json.dumps(order))
        except BaseException:
            process.kill()
            process.wait()
            if order["out"]:
                out = Path(order["out"])
                out.with_name(f".{out.name}.part").unlink(missing_ok=True)
            raise
    try:
        answer: Message = json.loads(said)
    except ValueError:
        raise ProcessDied(
            f"the process that computes the outputs ended with status {process.returncode}"
        ) from None
    if answer["type"] == "failed":
        _raise(answer)
    return answer


def _raise(answer: Message) -> None:
    details, remedy = answer.get("details", ()), answer.get("remedy", "")
    kind = ERRORS.get(answer["error"])
    if kind is None:
        raise DsgdError(f"a bug of dsgd: {answer['message']}", details=details)
    raise kind(answer["message"], details=details, remedy=remedy)


def _finite(metrics: Mapping[str, float] | None) -> dict[str, float | None] | None:
    """JSON has neither NaN nor infinity."""
    if metrics is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def said(result: Message) -> str:
    """`accuracy 0.9722  loss 0.0907  on 360 held-out examples of digits`."""
    parts = [
        f"{name} {'not finite' if value is None else f'{value:.4f}'}"
        for name, value in sorted((result["metrics"] or {}).items())
    ]
    which = "" if result["part"] == "all" else f"{result['part']} "
    on = "on " if parts else "outputs of "
    here = ", of this host's alone" if result["this_host_only"] else ""
    parts.append(f"{on}{result['examples']} {which}examples of {result['data']}{here}")
    return "  ".join(parts)
