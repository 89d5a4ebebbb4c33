"""The algorithms beside each other, and beside torch: digits, a 64-128-10 network, two workers.

    python -m tests.benchmarks.algorithms --peers .peers/bin/python [--rounds 3]

Every side gets the same number of passes over the examples and evaluates after each; how long it
took to 97 % is read from what it wrote. Medians over the rounds. A batch is 32 examples, also where
an algorithm knows no batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.compare import Found, Sides
from tests.benchmarks.data import write_digits
from tests.benchmarks.report import RESULTS, about, figure, machine, table

BATCH = 32
EPOCHS = 40
TARGET = 0.97
ADAGRAD = {"adagrad": {"learning_rate": 0.05, "initial": 0.0, "epsilon": 1e-10}}  # as torch has it

SIDES: dict[str, Found] = {
    "downpour": {"algorithm": "downpour"},
    "downpour, push and fetch every 4": {
        "algorithm": {"downpour": {"push_every": 4, "fetch_every": 4, "reduce": "mean"}}
    },
    "stale-synchronous, bound 3": {"algorithm": {"stale_synchronous": {"bound": 3}}},
    "synchronous": {"algorithm": "synchronous"},
    "synchronous, 1 of 3 is a backup": {
        "algorithm": {"synchronous": {"backup_workers": 1}},
        "workers": 3,
    },
    "sandblaster, L-BFGS": {
        "algorithm": {"sandblaster": {"l2": 1e-4, "portions": 5}},
        "dtype": "float64",
        "batch_size": None,
        "optimizer": None,
    },
}

COLUMNS: dict[str, Callable[[Found], float | None]] = {
    "batches/s": lambda run: run["batches_per_s"],
    "s to 97 %": lambda run: run["reached_s"],
    "epochs to 97 %": lambda run: run["reached_epoch"],
    "accuracy in the end": lambda run: run["accuracy"],
    "KB per batch": lambda run: run.get("kb_per_batch"),
    "staleness": lambda run: run.get("staleness_median"),
    "its p95": lambda run: run.get("staleness_p95"),
    "s in pull": lambda run: run.get("pull_s"),
    "s in compute": lambda run: run.get("compute_s"),
    "s in push": lambda run: run.get("push_s"),
}


def dsgd(sides: Sides, seed: int, options: Found) -> Found:
    """One run of an algorithm."""
    train = {"model": "mlp", "data": "digits", "batch_size": BATCH, "optimizer": ADAGRAD}
    train |= {key: value for key, value in options.items() if key != "workers"}
    train = {key: value for key, value in train.items() if value is not None}
    workers = options.get("workers", 2)
    summary = sides.train(seed, workers=workers, **train, until={"max_epochs": EPOCHS})
    lines = (sides.folder / summary["run_dir"] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return of_records(records) | {
        "batches_per_s": summary["examples"] / BATCH / summary["seconds"],
        "accuracy": summary["value"],
        "staleness_median": summary["staleness"]["median"],
        "staleness_p95": summary["staleness"]["p95"],
    }


def of_records(records: list[Found]) -> Found:
    """What the lines of metrics.jsonl come to."""
    reports = [record for record in records if record["kind"] == "report"]
    judged = [record for record in records if record["kind"] == "evaluate"]
    first = next((record for record in judged if record["accuracy"] >= TARGET), None)
    sums = {
        key: sum(record[key] for record in reports)
        for key in ("examples", "bytes", "pull_s", "compute_s", "push_s")
    }
    return {
        "reached_s": first and first["time"],
        "reached_epoch": first and first["epoch"],
        "kb_per_batch": sums["bytes"] / 1e3 / (sums["examples"] / BATCH),
        **{key: sums[key] for key in ("pull_s", "compute_s", "push_s")},
    }


def torch(sides: Sides, seed: int, processes: int) -> Found:
    """The same with torch."""
    path = sides.folder / "digits.npz"
    if not path.exists():
        write_digits(path)
    options: tuple[Any, ...] = ("--layers", "128", "--batch", BATCH, "--target", TARGET)
    options += ("--processes", processes, "--threads", 2 // processes, "--seed", seed)
    return sides.peer("torch_train.py", path, *options, "--epochs", EPOCHS, "--for-s", 0)[0]


def publish(found: dict[str, list[Found]]) -> str:
    """Write results/algorithms.md and .json; returns the Markdown."""
    facts = machine()
    rows = [[name, *(_cell(runs, of) for of in COLUMNS.values())] for name, runs in found.items()]
    text = f"{table(('', *COLUMNS), rows)}\n{about(facts)}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "algorithms.md").write_text(text)
    content = {"machine": facts, "runs": found}
    (RESULTS / "algorithms.json").write_text(json.dumps(content, indent=1) + "\n")
    return text


def _cell(runs: list[Found], of: Callable[[Found], float | None]) -> str:
    """The median; nothing where a side knows no such thing; never, where most did not get there."""
    values = [value for run in runs if (value := of(run)) is not None]
    if 2 * len(values) <= len(runs):
        return "never" if "reached_s" in runs[0] and of is COLUMNS["s to 97 %"] else ""
    return figure(statistics.median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[Found]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), options.peers.absolute())
        for seed in range(options.rounds):
            for name, settings in SIDES.items():
                found.setdefault(name, []).append(dsgd(sides, seed, settings))
            for name, processes in (("torch DDP, 2 processes", 2), ("torch, 1 process", 1)):
                found.setdefault(name, []).append(torch(sides, seed, processes))
    print(publish(found))


if __name__ == "__main__":
    main()
