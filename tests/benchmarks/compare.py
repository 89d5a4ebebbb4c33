"""dsgd beside its peers, in one run: the bars of the design, each as a ratio, met or not met.

A round measures every side once, one after the other, so that what disturbs the machine disturbs
all; each ratio is taken within a round, and the median over the rounds counts. dsgd is measured by
its own commands, `dsgd bench` and `dsgd train`; the peers run in a virtual environment of theirs.

    python -m tests.benchmarks.compare --peers .peers/bin/python [--rounds 5] [--only digits]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.data import SEED_AUTHORS, write_digits, write_images
from tests.benchmarks.report import RESULTS, Bar, Row, publish

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
TIMEOUT_S = 600.0
SMALL, MIDDLE, LARGE = 31_400, 1_000_000, 100_000_000
SIZES = (SMALL, 256_000, MIDDLE, 4_000_000, 16_000_000, LARGE)
BLOCKS = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
CHANNELS = ("shm", "tcp", "tcp, plain", "grpc")
MEMORY_BAR = "shard × (1 + slots) + 100 MB + 4 MiB per worker"

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sides:
    """Runs commands of dsgd and of the peers."""

    folder: Path
    peers: Path

    def dsgd(self, *arguments: str) -> list[Found]:
        """What a command printed with --json."""
        env = {key: text for key, text in os.environ.items() if not key.startswith("DSGD_")}
        env |= {"PYTHONPATH": str(CHECKOUT), "XDG_STATE_HOME": str(self.folder / "state")}
        return self._run([sys.executable, "-m", "dsgd_cli", *arguments, "--json"], env)

    def peer(self, script: str, *arguments: object) -> list[Found]:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        argv = [str(self.peers), str(HERE / "peers" / script), *map(str, arguments)]
        return self._run(argv, env)

    def _run(self, argv: list[str], env: dict[str, str]) -> list[Found]:
        done = subprocess.run(
            argv, cwd=self.folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)}: {done.returncode}\n{done.stderr[-3000:]}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def bench(
        self,
        size: int,
        *channels: str,
        optimizer: str = "sgd",
        workers: int = 1,
        for_s: float = 1.0,
        block: int = 1 << 20,
    ) -> dict[str, Found]:
        """channel -> what `dsgd bench` measured, where it could."""
        description = (
            f"name: bench\nservers: 1\nworkers: {workers}\ntrain: {{optimizer: {optimizer}}}\n"
        )
        (self.folder / "bench.yaml").write_text(description)
        options = [f"--size={size}", f"--block={block}", f"--workers={workers}", f"--for={for_s}"]
        options += [f"--channel={channel}" for channel in channels]
        lines = self.dsgd("bench", "bench.yaml", *options)
        rows = [line for line in lines if line["type"] == "bench" and line["bytes"] == size]
        for row in rows:
            if "error" in row:
                print(f"dsgd bench: {row['channel']}: {row['error']}", file=sys.stderr)
        return {row["channel"]: row for row in rows if "error" not in row}

    def train(self, seed: int = 0, workers: int = 2, **train: Any) -> Found:
        description = {"name": "bench", "seed": seed, "workers": workers, "train": train}
        (self.folder / "train.yaml").write_text(json.dumps(description))
        lines = self.dsgd("train", "train.yaml", "--allow-unconverged")
        return next(line for line in reversed(lines) if line["type"] == "summary")


@dataclass(slots=True)
class Series:
    """Named figures, one of each in every round."""

    number: int = 0  # of the round
    rows: dict[str, tuple[str, Bar | None, str, list[float]]] = field(default_factory=dict)

    def add(
        self, what: str, value: float, unit: str = "×", bar: Bar | None = None, how: str = ""
    ) -> None:
        self.rows.setdefault(what, (unit, bar, how, []))[3].append(value)

    def table(self) -> list[Row]:
        return [
            Row(what, tuple(values), unit, bar, how)
            for what, (unit, bar, how, values) in self.rows.items()
        ]


def gb_per_s(size: int, seconds: float) -> float:
    return 2 * size / seconds / 1e9


def at_least(limit: float) -> Bar:
    return Bar(limit)


def at_most(limit: float) -> Bar:
    return Bar(limit, at_most=True)


# ── the comparisons: one round of each ─────────────────────────────────────────────────────────


def large(sides: Sides, series: Series) -> None:
    """100 MB there, applied, and back."""
    torch = sides.peer("torch_rpc.py", "--bytes", LARGE)[0]
    ours = sides.bench(LARGE, *CHANNELS)
    adagrad = sides.bench(LARGE, "tcp", optimizer="adagrad")["tcp"]
    rpc_s = torch["seconds"]
    name = "100 MB push + SGD + pull"
    series.add(
        f"{name}, tcp encrypted / torch RPC", rpc_s / ours["tcp"]["seconds"], bar=at_least(1.1)
    )
    series.add(
        f"{name}, tcp in clear / torch RPC",
        rpc_s / ours["tcp, plain"]["seconds"],
        bar=at_least(1.35),
    )
    series.add(f"{name}, shm / torch RPC", rpc_s / ours["shm"]["seconds"], bar=at_least(3.5))
    series.add(
        "100 MB push + Adagrad + pull, tcp encrypted / torch RPC with SGD",
        rpc_s / adagrad["seconds"],
        bar=at_least(0.75),
    )
    rpc_cpu = torch["server_cpu_s"] / torch["calls"] / (2 * LARGE / 1e9)
    series.add(
        "server CPU per GB, tcp encrypted / torch RPC",
        ours["tcp"]["server_cpu_s_per_gb"] / rpc_cpu,
        bar=at_most(1.0),
    )
    series.add(f"{name}, torch RPC", gb_per_s(LARGE, rpc_s), "GB/s")
    for channel in CHANNELS:
        series.add(f"{name}, dsgd {channel}", gb_per_s(LARGE, ours[channel]["seconds"]), "GB/s")
    for label, script in (
        ("Gloo send + recv, no update", "torch_gloo.py"),
        ("pyzmq REQ/REP, no update", "zmq_reqrep.py"),
        ("grpcio stream, plaintext", "plain_grpc.py"),
    ):
        seconds = sides.peer(script, "--bytes", LARGE)[0]["seconds"]
        series.add(f"100 MB, {label}", gb_per_s(LARGE, seconds), "GB/s")


def small(sides: Sides, series: Series) -> None:
    """31 KB there, applied, and back: one worker, then four."""
    rpc_s = sides.peer("torch_rpc.py", "--bytes", SMALL)[0]["seconds"]
    ours = sides.bench(SMALL, "shm", "tcp", optimizer="adagrad")
    name = "31 KB push + Adagrad + pull"
    series.add(
        f"{name}, tcp encrypted: time / torch RPC's",
        ours["tcp"]["seconds"] / rpc_s,
        bar=at_most(0.3),
    )
    series.add(
        f"{name}, shm: time / torch RPC's", ours["shm"]["seconds"] / rpc_s, bar=at_most(0.15)
    )
    series.add("31 KB round trip, torch RPC", rpc_s * 1e6, "µs")
    for channel in ("tcp", "shm"):
        series.add(f"31 KB round trip, dsgd {channel}", ours[channel]["seconds"] * 1e6, "µs")
    clients = sides.peer("torch_rpc.py", "--bytes", SMALL, "--clients", 4)
    rpc_per_s = sum(client["calls"] / client["elapsed_s"] for client in clients)
    four = sides.bench(SMALL, "shm", "tcp", optimizer="adagrad", workers=4)
    for channel in ("tcp", "shm"):
        series.add(
            f"4 workers at 31 KB, {channel}: pushes/s / torch RPC's with 4 clients",
            four[channel]["per_s"] / rpc_per_s,
            bar=at_least(3),
        )


def many(sides: Sides, series: Series) -> None:
    """Many workers at 1 MB against one server."""
    one = sides.bench(MIDDLE, "tcp")["tcp"]
    for workers in (16, 64):
        all_ = sides.bench(MIDDLE, "tcp", workers=workers, for_s=2.0)["tcp"]
        series.add(
            f"{workers} workers at 1 MB, tcp encrypted: GB/s / one worker's",
            all_["gb_per_s"] / one["gb_per_s"],
            bar=at_least(0.9),
        )
        allowed = MIDDLE + 100e6 + workers * (4 << 20)
        series.add(
            f"{workers} workers at 1 MB: server memory / allowed",
            all_["server_memory_bytes"] / allowed,
            bar=at_most(1.0),
            how=MEMORY_BAR,
        )


def digits(sides: Sides, series: Series) -> None:
    """A 64-128-10 network on the digits, a push and a fetch for each batch of 32."""
    path = sides.folder / "digits.npz"
    write_digits(path)
    seed = series.number
    network = ("--layers", "128", "--batch", 32, "--target", 0.97, "--seed", seed)
    ddp = sides.peer("torch_train.py", path, *network, "--for-s", 4)[0]
    alone = sides.peer("torch_train.py", path, *network, "--processes", 1, "--threads", 2)[0]
    adagrad = {"learning_rate": 0.05, "initial": 0.0, "epsilon": 1e-10}  # torch's defaults
    train = {"model": "mlp", "data": "digits", "batch_size": 32, "optimizer": {"adagrad": adagrad}}
    ours = sides.train(seed, **train, until={"loss": 1e-9, "max_time": "4s"})
    reached = sides.train(seed, **train, until={"accuracy": 0.97, "max_time": "60s"})
    (sides.folder / "model.yaml").write_text("name: bench\nworkers: 1\n")
    gradient = sides.dsgd("bench", "model.yaml", f"--size={SMALL}", "--channel=shm")[-1]
    series.add(
        "digits, 2 workers: batches/s / torch DDP",
        ours["batches_per_second"] / ddp["batches_per_s"],
        bar=at_least(5),
    )
    if ddp["reached_s"]:
        series.add(
            "digits: time to 0.97 / torch DDP's",
            reached["seconds"] / ddp["reached_s"],
            bar=at_most(0.4),
        )
        series.add("digits: time to 0.97, torch DDP", ddp["reached_s"], "s")
    series.add("digits: time to 0.97, dsgd", reached["seconds"], "s")
    series.add("digits, dsgd, 2 workers", ours["batches_per_second"], "batches/s")
    series.add("digits, torch DDP, 2 processes", ddp["batches_per_s"], "batches/s")
    series.add("digits, torch, 1 process", alone["batches_per_s"], "batches/s")
    series.add("digits, numpy gradient alone", 1 / gradient["gradient_s"], "batches/s")


def images(sides: Sides, series: Series) -> None:
    """11 M parameters, batches of 256."""
    path = sides.folder / "images.npz"
    if not path.exists():
        write_images(path)
    layers = ",".join(map(str, SEED_AUTHORS))
    ddp = sides.peer(
        *("torch_train.py", path, "--layers", layers, "--batch", 256, "--optimizer", "sgd"),
        *("--learning-rate", 0.01, "--for-s", 8),
    )[0]
    ours = sides.train(
        model={"mlp": {"hidden": SEED_AUTHORS}},
        data={"npz": str(path)},
        batch_size=256,
        optimizer={"sgd": {"learning_rate": 0.01}},
        evaluate={"every": "1 epoch"},
        until={"loss": 1e-9, "max_time": "12s"},
    )
    series.add(
        "11 M parameters, 2 workers: batches/s / torch DDP",
        ours["batches_per_second"] / ddp["batches_per_s"],
        bar=at_least(1.3),
    )
    series.add("11 M parameters, dsgd", ours["batches_per_second"], "batches/s")
    series.add("11 M parameters, torch DDP", ddp["batches_per_s"], "batches/s")


PARTS: dict[str, Callable[[Sides, Series], None]] = {
    "large": large,
    "small": small,
    "digits": digits,
    "images": images,
    "many": many,
}


# ── the plots ──────────────────────────────────────────────────────────────────────────────────


def curves(sides: Sides) -> Found:
    """Seconds against size and against block size: label -> [[bytes, seconds], …]."""
    by_size: dict[str, list[tuple[int, float]]] = {}
    by_block: dict[str, list[tuple[int, float]]] = {}
    for size in SIZES:
        for channel, row in sides.bench(size, *CHANNELS, for_s=0.5).items():
            by_size.setdefault(f"dsgd {channel}", []).append((size, row["seconds"]))
        for label, script in _peers():
            seconds = sides.peer(script, "--bytes", size, "--for-s", 0.5)[0]["seconds"]
            by_size.setdefault(label, []).append((size, seconds))
    for block in BLOCKS:
        for channel, row in sides.bench(LARGE, *CHANNELS, for_s=0.5, block=block).items():
            by_block.setdefault(f"dsgd {channel}", []).append((block, row["seconds"]))
        found = sides.peer("plain_grpc.py", "--bytes", LARGE, "--block", block)[0]["seconds"]
        by_block.setdefault("grpcio", []).append((block, found))
    return {"size": by_size, "block": by_block}


def _peers() -> Iterator[tuple[str, str]]:
    yield "torch RPC", "torch_rpc.py"
    yield "Gloo", "torch_gloo.py"
    yield "pyzmq", "zmq_reqrep.py"
    yield "grpcio", "plain_grpc.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, required=True, help="python with torch, pyzmq, …")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="may be repeated")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args()
    parts = options.only or list(PARTS)
    series = Series()
    with tempfile.TemporaryDirectory() as name:
        sides = Sides(Path(name), options.peers.absolute())
        for number in range(options.rounds):
            series.number = number
            for part in parts:
                print(f"round {number + 1} of {options.rounds}: {part}", file=sys.stderr)
                PARTS[part](sides, series)
            text = publish("compare", series.table(), {"rounds": number + 1})
        if not options.no_plots and not options.only:
            found = {"rounds": options.rounds, "curves": curves(sides)}
            text = publish("compare", series.table(), found)
            sides.peer("../plots.py", RESULTS / "compare.json", RESULTS)
    print(text)


if __name__ == "__main__":
    main()
