"""`dsgd bench`: how fast parameters move on the hosts of a description, and what that means.

The cluster is started as `up` does; the coordinator gives the servers shards of no run, the workers
exchange with them through the channels of a training, and everything is taken down. Beside each
size the limits are measured: a plain socket to the first server and a copy in memory. GB/s counts
bytes pushed and bytes pulled; the time is that of one push_pull to all servers, the median.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import DeadlinePassed, DsgdError, ProcessDied
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.down import Receipt, killed, take_down
from dsgd_cli.launcher.interrupt import Forced, Interrupts
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.remote import Message
from dsgd_cli.launcher.running import Running
from dsgd_cli.launcher.up import bring_up
from dsgd_cli.launcher.watch import Said, Screen, wait_for

ANSWER_TIMEOUT_S = 120.0
SIZES = (32_000, 1_000_000, 16_000_000, 100_000_000)
BLOCK_BYTES = 1 << 20
MAX_BYTES = 4_000_000_000
WORKER_0 = names.process_name("worker", 0)
SERVER_0 = names.process_name("server", 0)


@dataclass(frozen=True, slots=True)
class Carrier:
    """A channel as the table calls it."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


CARRIERS = (
    Carrier("shm", "shm"),
    Carrier("tcp", "tcp"),
    Carrier("tcp, plain", "tcp", {"encrypt": False}),
    Carrier("grpc", "grpc"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """How `bench` was asked to behave."""

    sizes: Sequence[int] = SIZES
    blocks: Sequence[int] = (BLOCK_BYTES,)
    channels: Sequence[str] = tuple(carrier.label for carrier in CARRIERS)
    workers: int = 1  # that exchange at once
    for_s: float = 0.5
    confirm: Callable[[str], bool] = lambda question: False
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds for so many bytes there and back."""

    socket_s: float
    memcpy_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table; `error`: why there are no figures."""

    channel: str
    bytes: int
    block_bytes: int
    workers: int
    limits: Limits
    seconds: float = 0.0  # of one push_pull, the median over all workers
    per_s: float = 0.0  # push_pulls of all workers
    worker_cpu_s: float = 0.0  # per push_pull
    server_cpu_s: float = 0.0  # per push_pull, all servers together
    server_memory_bytes: int = 0  # of the largest
    error: str = ""

    @property
    def gb_per_s(self) -> float:
        return 2 * self.bytes * self.per_s / 1e9

    def as_json(self) -> Message:
        moved_gb = 2 * self.bytes / 1e9
        about = {
            "type": "bench",
            "channel": self.channel,
            "bytes": self.bytes,
            "block_bytes": self.block_bytes,
            "workers": self.workers,
        }
        if self.error:
            return about | {"error": self.error}
        return about | {
            "seconds": self.seconds,
            "per_s": self.per_s,
            "gb_per_s": self.gb_per_s,
            "of_socket": self.limits.socket_s / self.seconds,
            "of_memcpy": self.limits.memcpy_s / self.seconds,
            "worker_cpu_s_per_gb": self.worker_cpu_s / moved_gb,
            "server_cpu_s_per_gb": self.server_cpu_s / moved_gb,
            "server_memory_bytes": self.server_memory_bytes,
        }

    def row(self) -> tuple[str, ...]:
        about = (self.channel, size(self.bytes))
        if self.error:
            return (*about, *("-" * 6))
        said = self.as_json()
        return (
            *about,
            duration(self.seconds),
            f"{self.gb_per_s:.2f}",
            f"{100 * said['of_socket']:.0f} %",
            f"{100 * said['of_memcpy']:.0f} %",
            f"{said['worker_cpu_s_per_gb']:.2f}",
            f"{said['server_cpu_s_per_gb']:.2f}",
        )


HEAD = ("CHANNEL", "SIZE", "TIME", "GB/s", "OF A SOCKET", "OF MEMCPY", "WORKER CPU", "SERVER CPU")

NOTES = (
    "TIME: one push, update and pull; GB/s: bytes up and down, all workers; OF A SOCKET, OF MEMCPY:"
    " the time of the same bytes there and back over a plain socket, copied in memory, as a part of"
    " TIME; CPU: seconds per GB"
)


@dataclass(frozen=True, slots=True)
class Gradient:
    """What the description's own model costs a worker."""

    parameters: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    rows: tuple[Measured, ...]
    gradient: Gradient
    servers: int
    receipt: object

    def failures(self) -> list[str]:
        """Why lines have no figures, each reason once."""
        return list(dict.fromkeys(f"{row.channel}: {row.error}" for row in self.rows if row.error))

    def meaning(self) -> list[str]:
        """A sentence for each channel, about the description's own model."""
        model, n = self.gradient, self.servers
        many = "1 server serves" if n == 1 else f"{n} servers serve"
        said = []
        for row in self.rows:
            if row.bytes != model.bytes or row.error:
                continue
            workers = int(model.seconds / row.seconds)
            ending = f"{many} {count(workers, 'worker')}"
            if workers == 0:
                ending = "moving costs more than computing: a larger batch, or push_every, helps"
            said.append(
                f"with {short(model.parameters)} parameters a step costs {duration(row.seconds)} "
                f"on {row.channel}; computing takes {duration(model.seconds)}: {ending}"
            )
        return said

    def as_json(self) -> Message:
        return {
            "type": "bench_summary",
            "parameters": self.gradient.parameters,
            "gradient_s": self.gradient.seconds,
            "servers": self.servers,
            "meaning": self.meaning(),
            "said": str(self.receipt),
        }


def bench(spec: ClusterSpec, screen: Screen, options: Options, phases: Phases) -> Report:
    """Start the cluster, measure, take it down."""
    cluster = Cluster(spec, screen.note)
    running: Running | None = None
    with Interrupts(screen.note, options.timeout_s) as interrupts:
        try:
            running, _ = bring_up(
                cluster,
                screen,
                phase=phases,
                confirm=options.confirm,
                interrupts=interrupts,
                trains=True,
            )
            rows, gradient = _measure(running, screen, options)
            receipt = _take_down(cluster, running, interrupts)
            receipt.check()
            return Report(tuple(rows), gradient, spec.servers.count, receipt)
        except DsgdError:
            if cluster.touched:
                screen.note(f"{spec.name}: {_take_down(cluster, running, interrupts)}")
            raise
        except Forced:
            raise killed(cluster) from None
        finally:
            if running is not None:
                running.close()
            cluster.close()


def _take_down(cluster: Cluster, running: Running | None, interrupts: Interrupts) -> Receipt:
    if running is not None:
        running.watch.ending = True
        running.renewal.stop()
    with interrupts.noted("taking the cluster down"):
        return take_down(cluster, cluster.touched)


# ── measuring ──────────────────────────────────────────────────────────────────────────────────


def _measure(running: Running, screen: Screen, options: Options) -> tuple[list[Measured], Gradient]:
    ask = Conversation(running)
    found = ask.gradient(options.for_s)
    sizes = sorted({*options.sizes, found.bytes})
    carriers = [carrier for carrier in CARRIERS if carrier.label in options.channels]
    rows = []
    for size_bytes in sizes:
        limits = ask.limits(size_bytes, options.for_s)
        for block_bytes in options.blocks:
            for carrier in carriers:
                rows.append(ask.exchange(carrier, size_bytes, block_bytes, limits, options))
        screen.note(f"{size(size_bytes)} measured")
    return rows, found


@dataclass(slots=True)
class Conversation:
    """Orders to the daemons, and their answers."""

    running: Running

    def gradient(self, for_s: float) -> Gradient:
        spec = self.running.cluster.spec
        self.running.tell_all(
            "worker", lambda host: {"type": "files", **self.running.files(host)}, keep=True
        )
        order = {
            "do": "gradient",
            "train": spec.train.model_dump(mode="json"),
            "seed": spec.seed,
            "for_s": for_s,
        }
        said = self._workers(order, [WORKER_0])[WORKER_0]
        if "error" in said:
            raise ProcessDied(f"{WORKER_0}: {said['error']}")
        return Gradient(said["parameters"], said["bytes"], said["seconds"])

    def limits(self, size_bytes: int, for_s: float) -> Limits:
        """Between the first worker and the first server."""
        running = self.running
        echo = self._ask([SERVER_0], {"type": "echo"}, "echo")[SERVER_0]
        host = running.addresses[running.host_of[SERVER_0]].advertise
        order = {
            "do": "limits",
            "bytes": size_bytes,
            "for_s": for_s / 2,
            "host": host,
            "port": echo["port"],
            "token": echo["token"],
        }
        said = self._workers(order, [WORKER_0])[WORKER_0]
        if "error" in said:
            raise ProcessDied(f"{WORKER_0}: {said['error']}")
        return Limits(said["socket_s"], said["memcpy_s"])

    def exchange(
        self,
        carrier: Carrier,
        size_bytes: int,
        block_bytes: int,
        limits: Limits,
        options: Options,
    ) -> Measured:
        """All workers at once."""
        spec = self.running.cluster.spec
        workers = self._of_role("worker")[: options.workers]
        servers = self._of_role("server")
        base = Measured(carrier.label, size_bytes, block_bytes, len(workers), limits)
        optimizer = spec.train.optimizer.model_dump(mode="json")
        order = {
            "type": "bench",
            "bytes": size_bytes,
            "block_bytes": block_bytes,
            "optimizer": optimizer,
        }
        ready = self._ask([names.COORDINATOR], order, "bench_ready")[names.COORDINATOR]
        if "error" in ready:
            return _failed(base, ready["error"])
        opened = self._workers(
            {
                "do": "open",
                "bytes": size_bytes,
                "block_bytes": block_bytes,
                "epoch": ready["epoch"],
                "channel": carrier.name,
                "options": carrier.options,
            },
            workers,
        )
        for said in opened.values():
            if "error" in said:
                return _failed(base, said["error"])
        before = self._ask(servers, {"type": "usage"}, "usage")
        ran = self._workers({"do": "run", "for_s": options.for_s}, workers)
        after = self._ask(servers, {"type": "usage"}, "usage")
        for said in ran.values():
            if "error" in said:
                return _failed(base, said["error"])
        said_all = list(ran.values())
        pushes = sum(said["count"] for said in said_all)
        # from the first one's beginning to the last one's end: whoever came late counts against it
        window_s = max(s["ended_at"] for s in said_all) - min(s["began_at"] for s in said_all)
        used_s = sum(after[each]["cpu_s"] - before[each]["cpu_s"] for each in servers)
        seconds = sorted(said["seconds"] for said in ran.values())
        return Measured(
            carrier.label,
            size_bytes,
            block_bytes,
            len(workers),
            limits,
            seconds=seconds[len(seconds) // 2],
            per_s=pushes / window_s,
            worker_cpu_s=sum(said["cpu_s"] for said in ran.values()) / len(ran),
            server_cpu_s=used_s / pushes,
            server_memory_bytes=max(after[each]["memory_bytes"] for each in servers),
        )

    def _of_role(self, role: str) -> list[str]:
        placed = self.running.cluster.placed
        return [item.process for item in placed if item.process.startswith(f"{role}/")]

    def _workers(self, order: Message, workers: Sequence[str]) -> dict[str, Message]:
        return self._ask(workers, {"type": "bench", **order}, "benched")

    def _ask(self, processes: Sequence[str], order: Message, answer: str) -> dict[str, Message]:
        """Tell each of them, and wait for the answers of all."""
        answers: dict[str, Message] = {}
        for process in processes:
            self.running.tell(process, order)

        def done(said: Said) -> bool:
            if said.message.get("type") == answer and said.process in processes:
                answers[said.process] = said.message
            return len(answers) == len(processes)

        began = time.monotonic()

        def late() -> DsgdError:
            silent = ", ".join(sorted(set(processes) - set(answers)))
            return DeadlinePassed("measuring", silent, round(time.monotonic() - began))

        wait_for(self.running.watch, done, ANSWER_TIMEOUT_S, "measuring", late)
        return answers


def _failed(base: Measured, error: str) -> Measured:
    return Measured(
        base.channel, base.bytes, base.block_bytes, base.workers, base.limits, error=error
    )


def parse_size(text: str) -> int:
    """`32KB`, `1MiB`, `100 MB`, `4096` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 32KB, 1MiB, 100MB")
    base = 1024 if match[3] else 1000
    power = ("", "K", "M", "G").index(match[2].upper())
    number = round(float(match[1]) * float(base**power))
    if not 64 <= number <= MAX_BYTES:
        raise ValueError(f"{text!r}: sizes are from 64 bytes to {size(MAX_BYTES)}")
    return int(number) // 4 * 4


# ── words ──────────────────────────────────────────────────────────────────────────────────────


def duration(seconds: float) -> str:
    """`83 us`, `19 ms`, `1.4 s`."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(number: float) -> str:
    """`38.4 KB`, `100 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"


def short(number: float) -> str:
    """`11.2 M`, `9610`."""
    return f"{number / 1e6:.3g} M" if number >= 1e6 else f"{number:.0f}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
