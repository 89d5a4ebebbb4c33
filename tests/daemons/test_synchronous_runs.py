"""Whole synchronous runs in one thread: the coordinator's machine, real workers, real shards.

Whoever comes next is drawn, so messages and batches take turns in any order. Without backup workers
the parameters must be those of one process whose batch is as large as all of theirs together,
whoever dies.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.spec import Train
from dsgd_cli.daemons import run as coordinator
from dsgd_cli.daemons.computing import quiet
from dsgd_cli.daemons.parameters import Parameters
from dsgd_cli.daemons.trainer import Trainer
from dsgd_cli.engine import events as ev
from dsgd_cli.engine import optimizers
from dsgd_cli.engine.layout import Layout, cut, flatten, unflatten
from dsgd_cli.engine.shard import RoundOver, Shard
from dsgd_cli.engine.tasks import order
from dsgd_cli.engine.training import Training
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire.channels.base import Exchange, Operation, Reason, Refused

RATE = 0.1
BATCH = 32
SERVERS = 2
DTYPE = "float64"


class Wire:
    """A worker's channel to a shard of this process."""

    def __init__(self, shard: Shard, worker: int, incarnation: int) -> None:
        self.shard = shard
        self.me = (worker, incarnation)
        self.pending: Exchange | None = None

    def begin(self, exchange: Exchange) -> None:
        self.pending = exchange

    def advance(self) -> bool:
        exchange, self.pending = self.pending, None
        assert exchange is not None
        try:
            for block, start in enumerate(self._starts()):
                self._exchange(exchange, block, slice(start, start + len(self.shard.read(block))))
        except RoundOver as error:
            raise Refused(Reason.ROUND_OVER, str(error)) from error
        exchange.versions = [self.shard.version(block) for block in range(self.shard.blocks)]
        return True

    def close(self) -> None:
        """Nothing is held."""

    def _starts(self) -> list[int]:
        sizes = [len(self.shard.read(block)) for block in range(self.shard.blocks)]
        return [0, *itertools.accumulate(sizes[:-1])]

    def _exchange(self, exchange: Exchange, block: int, where: slice) -> None:
        if exchange.data is not None:
            part = np.frombuffer(exchange.data[where], DTYPE)
            if exchange.operation is Operation.WRITE:
                self.shard.write(block, part)
            else:
                assert exchange.operation is Operation.CONTRIBUTE
                self.shard.contribute(*self.me, exchange.seq, exchange.tag, block, part)
        if exchange.into is not None:
            exchange.into[where] = self.shard.read(block)


class Room:
    """A run from the first worker that joins to `Finish`. `away`: workers that never come."""

    def __init__(self, folder: Path, seed: int, workers: int, away: int = 0, **train: Any) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        model = {"model": "softmax", "data": "digits", "dtype": DTYPE, "batch_size": BATCH}
        optimizer = {"sgd": {"learning_rate": RATE, "clip_norm": train.pop("clip_norm", None)}}
        self.train = Train.model_validate({**model, "optimizer": optimizer, **train}).model_dump(
            mode="json"
        )
        self.machine = Training(coordinator.settings(0, self.train, workers))
        self.events: deque[ev.Event] = deque()
        self.trainers: dict[int, Trainer] = {}
        self.incarnations = dict.fromkeys(range(workers), 0)
        self.orders: dict[int, deque[pb.FromCoordinator]] = {}
        self.shards: list[Shard] = []
        self.layout: Layout | None = None
        self.finish: ev.Finish | None = None
        self.now_s = 0.0
        for worker in range(workers - away):
            self.join(worker)

    def join(self, worker: int) -> None:
        self.incarnations[worker] += 1
        incarnation = self.incarnations[worker]
        prepare = pb.Prepare(epoch=1, seed=0, train_json=json.dumps(self.train))

        def say(message: pb.FromWorker) -> None:
            kind = message.WhichOneof("kind") or ""
            body = getattr(message, kind)
            self.events.append(coordinator.event_of(worker, incarnation, kind, body))

        self.trainers[worker] = Trainer(prepare, {}, worker, incarnation, say, self.folder)
        self.orders[worker] = deque()
        self.events.append(ev.WorkerJoined(worker, incarnation))

    def poison(self, batch: int) -> None:
        """Its gradient is not finite."""
        for trainer in self.trainers.values():
            data = trainer._material.data
            x = data.x.copy()
            x[self.rows(batch)] = np.nan
            object.__setattr__(trainer._material, "data", dataclasses.replace(data, x=x))

    def kill(self, worker: int) -> None:
        """What it has said is still on its way; what it was told is lost with it."""
        self.events.append(ev.WorkerLost(worker, self.incarnations[worker]))
        self.join(worker)

    def run(self, deaths: int = 0) -> ev.Finish:
        killed = sorted(self.random.sample(range(60, 150), deaths))
        for turn in range(100_000):
            if self.finish is not None:
                assert not killed, f"over after {turn} turns"
                return self.finish
            if killed and turn >= killed[0]:
                killed.pop(0)
                self.kill(self.random.choice(list(self.trainers)))
            self.turn()
        raise AssertionError(f"still {self.machine.phase}")

    def turn(self) -> None:
        """An event, an order or a batch, whichever is drawn."""
        ready = [worker for worker in self.trainers if self.is_ready(worker)]
        if self.events and (not ready or self.random.random() < 0.5):
            self.feed(self.events.popleft())
        elif ready:
            self.let_work(self.random.choice(ready))
        else:
            self.now_s += 1.0
            self.feed(ev.Tick())

    def is_ready(self, worker: int) -> bool:
        return bool(self.orders[worker]) or self.trainers[worker].busy

    def let_work(self, worker: int) -> None:
        trainer, orders = self.trainers[worker], self.orders[worker]
        with quiet():
            if not orders:
                trainer.batch()
                return
            message = orders.popleft()
            kind = message.WhichOneof("kind")
            body = getattr(message, str(kind))
            if kind == "prepare":
                trainer.prepared()
            elif kind in ("initialise", "start"):
                self.connect(worker)
                (trainer.initialise if kind == "initialise" else trainer.start)()
            elif kind == "evaluate":
                trainer.evaluate(body)
            elif kind == "drain":
                trainer.drain()
            else:
                trainer.obey(str(kind), body)

    def connect(self, worker: int) -> None:
        trainer = self.trainers[worker]
        if trainer._parameters is None:
            assert self.layout is not None
            wires = [Wire(shard, worker, self.incarnations[worker]) for shard in self.shards]
            trainer.use(Parameters(self.layout, wires))

    def feed(self, event: ev.Event) -> None:
        for decision in self.machine.on(event, self.now_s):
            self.carry_out(decision)

    def carry_out(self, decision: ev.Decision) -> None:
        match decision:
            case ev.Prepare(worker):
                self.orders[worker].append(pb.FromCoordinator(prepare=pb.Prepare()))
            case ev.Initialise(worker):
                self.orders[worker].append(pb.FromCoordinator(initialise=pb.Initialise()))
            case ev.Start(worker):
                self.orders[worker].append(pb.FromCoordinator(start=pb.Start()))
            case ev.Work() | ev.Accept() | ev.Late() | ev.Evaluate() | ev.Drain():
                message = coordinator.message_of(decision, 1)
                self.orders[decision.worker].append(message)
            case ev.Record() | ev.Progress():
                pass
            case ev.Finish():
                self.finish = decision
            case _:
                self.events.append(self.call(decision))

    def call(self, decision: ev.Decision) -> ev.Event:
        """What the coordinator asks of all shards, and their answer."""
        match decision:
            case ev.ConfigureShards(tensors, dtype):
                self.layout = cut(tensors, dtype, SERVERS, 4096)
                sgd = optimizers.make("sgd", {"learning_rate": RATE}, dtype)
                for s in self.layout.shards:
                    values = np.zeros(s.stop - s.start, dtype)
                    self.shards.append(Shard(values, self.layout.block_elements, sgd, rounds=True))
                return ev.Configured()
            case ev.Fence(worker, incarnation):
                for shard in self.shards:
                    shard.fence(worker, incarnation)
                return ev.Fenced(worker, incarnation)
            case ev.Measure(round_, parts, scale):
                squares = sum(shard.squares(round_, parts, scale) for shard in self.shards)
                return ev.Measured(round_, squares)
            case ev.Commit(round_, parts, scale):
                for shard in self.shards:
                    shard.commit(round_, parts, scale)
                return ev.Committed(round_)
            case ev.Freeze():
                for shard in self.shards:
                    shard.freeze()
                return ev.Frozen()
        assert isinstance(decision, ev.Export), decision
        return ev.Exported()

    def values(self) -> np.ndarray[Any, Any]:
        return np.concatenate([s.values(b) for s in self.shards for b in range(s.blocks)])

    def expected(
        self, batches: int, together: int, clip_norm: float | None
    ) -> np.ndarray[Any, Any]:
        """Of one process: gradient descent by the mean over that many batches of the order."""
        material, layout = self.trainers[0]._material, self.layout
        assert layout is not None
        data = material.data
        flat, gradient = np.zeros((2, layout.size))
        flatten(layout, material.initial(), flat)
        for start in range(0, batches, together):
            rows = [self.rows(n) for n in range(start, min(start + together, batches))]
            where = np.concatenate(rows)
            out = unflatten(layout, gradient)
            material.model.gradients(unflatten(layout, flat), data.x[where], data.y[where], out)
            norm = float(np.linalg.norm(gradient))
            factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
            flat -= RATE * factor * gradient
        return flat

    def rows(self, batch: int) -> np.ndarray[Any, Any]:
        examples = self.trainers[0]._material.data.examples
        epoch, place = divmod(batch, -(-examples // BATCH))
        return order(0, epoch + 1, examples)[place * BATCH : (place + 1) * BATCH]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("workers", "batches"), [(1, 7), (2, 100), (3, 40)])
def test_synchronous_workers_are_one_process_with_a_larger_batch(
    workers: int, batches: int, clip_norm: float | None, tmp_path: Path
) -> None:
    """Past the end of an epoch, and with a last step that is not full."""
    until = {"max_steps": batches}
    room = Room(tmp_path, 1, workers, algorithm="synchronous", until=until, clip_norm=clip_norm)
    finish = room.run()
    assert (finish.outcome, finish.steps) == ("finished", batches)
    np.testing.assert_allclose(
        room.values(), room.expected(batches, workers, clip_norm), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(8))
def test_whoever_dies_the_updates_stay_what_they_are(seed: int, tmp_path: Path) -> None:
    room = Room(tmp_path, seed, 3, algorithm="synchronous", until={"max_steps": 50})
    finish = room.run(deaths=4)
    assert (finish.outcome, finish.steps) == ("finished", 50)
    np.testing.assert_allclose(room.values(), room.expected(50, 3, None), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_with_backup_workers_every_example_counts_once_in_an_epoch(
    seed: int, tmp_path: Path
) -> None:
    algorithm = {"synchronous": {"backup_workers": 1}}
    room = Room(tmp_path, seed, 4, algorithm=algorithm, until={"max_epochs": 2})
    finish = room.run(deaths=2 * (seed % 2))
    batches = 2 * -(-room.trainers[0]._material.data.examples // BATCH)
    assert (finish.outcome, finish.epochs, finish.steps) == ("finished", 2, batches)
    updates = {shard.version(b) for shard in room.shards for b in range(shard.blocks)}
    assert updates == {-(-batches // 3)}


@pytest.mark.parametrize("seed", range(4))
def test_a_gradient_that_is_not_finite_is_left_out_of_its_step(seed: int, tmp_path: Path) -> None:
    """Also where workers are missing, so that one computes several batches of a step."""
    room = Room(tmp_path, seed, 3, 1, algorithm="synchronous", until={"max_steps": 30})
    for batch in (1, 6, 7, 8, 14):
        room.poison(batch)
    finish = room.run(deaths=2)
    assert (finish.outcome, finish.steps) == ("finished", 30)
    assert {shard.version(b) for shard in room.shards for b in range(shard.blocks)} == {9}
    assert np.isfinite(room.values()).all()
