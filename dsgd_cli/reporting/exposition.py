"""A cluster's state as Prometheus text (exposition format 0.0.4), for a textfile collector. Pure.

`dsgd status --metrics > lab.prom`. What nobody knows is left out, never 0: an idle cluster has no
loss. The numbers of a run start again with the next one, as a counter may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsgd_cli.reporting.series import number

Message = Mapping[str, Any]
Labels = dict[str, str]


class Family(NamedTuple):
    """A metric: its name, what it is, and its samples."""

    name: str
    kind: str  # gauge | counter
    help: str
    samples: tuple[tuple[Labels, Any], ...]


def exposition(status: Message) -> str:
    """The text for what `dsgd status --json` prints. A family without a known value is absent."""
    lines: list[str] = []
    for family in (*_processes(status), *_run(status.get("run") or {})):
        samples = [
            f"{family.name}{_labels({'cluster': str(status['cluster']), **labels})} {_value(known)}"
            for labels, value in family.samples
            if (known := number(value)) is not None
        ]
        if samples:
            lines.append(f"# HELP {family.name} {family.help}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            lines += samples
    return "".join(f"{line}\n" for line in lines)


def _processes(status: Message) -> Iterator[Family]:
    entries = status["processes"]
    hosts = {str(entry["host"]): None for entry in entries}
    yield Family(
        "dsgd_host_reachable",
        "gauge",
        "Whether the host answers.",
        tuple(({"host": host}, int(host not in status["unreachable"])) for host in hosts),
    )
    where = [{"process": str(entry["process"]), "host": str(entry["host"])} for entry in entries]
    yield Family(
        "dsgd_process_up",
        "gauge",
        "Whether the process runs and is ready.",
        tuple(zip(where, (int(entry["state"] == "ready") for entry in entries), strict=True)),
    )
    yield Family(
        "dsgd_process_restarts_total",
        "counter",
        "How often the process was started again.",
        tuple(zip(where, (entry.get("restarts") for entry in entries), strict=True)),
    )


def _run(run: Message) -> Iterator[Family]:
    """Of the run that is under way, or was the last one."""
    for name, kind, text, key in (
        ("steps_total", "counter", "Gradient batches of all workers.", "step"),
        ("examples_total", "counter", "Training examples computed.", "examples"),
        ("epochs", "gauge", "Complete epochs.", "epoch"),
        ("seconds", "gauge", "Time since training began.", "elapsed_s"),
        ("examples_per_second", "gauge", "Training examples a second, lately.", "examples_per_s"),
        ("workers", "gauge", "Workers that take part.", "workers"),
        ("training_loss", "gauge", "Mean training loss, lately.", "loss"),
    ):
        yield Family(f"dsgd_run_{name}", kind, text, (({}, run.get(key)),))
    moved = enumerate(run.get("shard_bytes") or ())
    yield Family(
        "dsgd_run_moved_bytes_total",
        "counter",
        "Parameters and gradients that went to and from a server.",
        tuple(({"process": f"server/{place}"}, amount) for place, amount in moved),
    )
    held_out = ({"metric": str(run.get("metric"))}, run.get("value"))
    yield Family("dsgd_run_metric", "gauge", "The held-out metric that counts.", (held_out,))
    yield Family(
        "dsgd_run_finished", "gauge", "Whether it is over.", (({}, _flag(run.get("finished"))),)
    )
    staleness = run.get("staleness") or {}
    yield Family(
        "dsgd_run_staleness",
        "gauge",
        "Pushes of others between fetch and arrival, of a finished run.",
        tuple(
            ({"quantile": part}, staleness.get(key))
            for part, key in (("0.5", "median"), ("0.95", "p95"))
        ),
    )
    dropped = staleness.get("dropped")
    yield Family("dsgd_run_dropped_pushes", "gauge", "Pushes too late.", (({}, dropped),))


def _flag(value: Any) -> int | None:
    return int(value) if isinstance(value, bool) else None


def _labels(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _value(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
