"""One run on a worker: from `Prepare` to `RunOver`, on the caller's thread.

What comes before the first batch, evaluations and reports are here; the batches are those of the
algorithm's loop (`streams`, `rounds`). The worker decides between two batches what comes next
(`worker`), so nothing here waits for orders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from dsgd_cli.daemons import material
from dsgd_cli.daemons.best import Best
from dsgd_cli.daemons.computing import Computing, Counts, Vector, quiet
from dsgd_cli.daemons.material import Files, Material
from dsgd_cli.daemons.parameters import Parameters, open_channels
from dsgd_cli.daemons.rounds import Rounds
from dsgd_cli.daemons.streams import Stream
from dsgd_cli.engine.algorithms.names import uses_rounds
from dsgd_cli.engine.layout import cut
from dsgd_cli.engine.plateau import HIGHER_IS_BETTER, improves, metric_of
from dsgd_cli.learning.evaluate import evaluate, evaluate_training
from dsgd_cli.wire import dsgd_pb2 as pb
from dsgd_cli.wire import identity as ids
from dsgd_cli.wire.channels.choose import Wanted

Send = Callable[[pb.FromWorker], None]


class Loop(Protocol):
    """The worker's half of an algorithm."""

    @property
    def busy(self) -> bool:
        """Whether there is a batch to compute now."""

    def obey(self, kind: str, body: Any) -> None:
        """An order that is the algorithm's own."""

    def batch(self) -> None:
        """The next batch."""

    def drain(self) -> None:
        """Sends what must be sent, and holds nothing any more."""

    def evaluated(self, evaluate: Callable[[Mapping[str, Vector], Vector], None]) -> None:
        """Hands the newest parameters over, as views and as a vector."""


class Trainer:
    """From `Prepare` to `RunOver`. `folder`: where the best parameters are kept."""

    def __init__(
        self,
        prepare: pb.Prepare,
        files: Files,
        worker: int,
        incarnation: int,
        send: Send,
        folder: Path,
    ) -> None:
        self.epoch = prepare.epoch
        self.over = False
        self._train: dict[str, Any] = json.loads(prepare.train_json)
        self._worker = worker
        self._incarnation = incarnation
        self._send = send
        self._best = Best(folder, worker, prepare.epoch)
        self._wanted = Wanted(**json.loads(prepare.channel_json or "{}"))
        self._material: Material = material.load(self._train, prepare.seed, files)
        self._computing = Computing(self._material, prepare.seed)
        self._parameters: Parameters | None = None
        self._loop: Loop | None = None

    # ── before the first batch ──

    def prepared(self) -> None:
        """Says what the model and the data are."""
        data = self._material.data
        tensors = material.tensors(self._material.initial())
        self._send(
            pb.FromWorker(
                prepared=pb.Prepared(
                    epoch=self.epoch,
                    tensors=[pb.Tensor(name=name, shape=shape) for name, shape in tensors],
                    dtype=self._material.dtype,
                    examples=data.examples,
                    digest=self._material.digest,
                    data_digest=self._material.data_digest,
                    held_out=len(data.x_test),
                    classes=data.classes,
                    columns=data.columns,
                    label=data.label,
                )
            )
        )

    def connect(self, cut_: pb.Cut, identity: ids.Identity, addresses: Sequence[str]) -> None:
        """Opens the channels to the shards of this run."""
        if self._parameters is not None:
            return
        shapes = [(tensor.name, tuple(tensor.shape)) for tensor in cut_.tensors]
        layout = cut(shapes, cut_.dtype, cut_.servers, cut_.max_block_bytes)
        self._material = replace(self._material, examples=cut_.examples)
        me = (self._worker, self._incarnation)
        channels = open_channels(layout, self._wanted, identity, addresses, self.epoch, me)
        self.use(Parameters(layout, channels))

    def use(self, parameters: Parameters) -> None:
        """These are the run's."""
        self._parameters = parameters
        make = Rounds if uses_rounds(self._train["algorithm"]) else Stream
        self._loop = make(
            self._train,
            self._material,
            parameters,
            self._computing,
            self._report,
            self._send,
            self.epoch,
        )
        if self.over:
            parameters.close()

    def initialise(self) -> None:
        """Writes the first parameters into every shard."""
        assert self._parameters is not None
        self._parameters.write(self._material.initial())
        self._send(pb.FromWorker(initialised=pb.Initialised(epoch=self.epoch)))

    def start(self) -> None:
        assert self._parameters is not None
        self._parameters.pull()

    def abort(self) -> None:
        """The run is over; called from any thread, and breaks off what is in flight."""
        self.over = True
        if self._parameters is not None:
            self._parameters.close()

    # ── batches ──

    def obey(self, kind: str, body: Any) -> None:
        """An order to the algorithm's loop."""
        if self._loop is not None:
            self._loop.obey(kind, body)

    @property
    def busy(self) -> bool:
        return self._loop is not None and self._loop.busy and not self.over

    def batch(self) -> None:
        """The next batch, and what falls due with it."""
        assert self._loop is not None
        self._loop.batch()

    def drain(self) -> None:
        """Pushes what is summed, reports it, and drops the tasks."""
        assert self._loop is not None
        self._loop.drain()
        self._send(pb.FromWorker(drained=pb.Drained(epoch=self.epoch)))

    def _report(
        self, task: int, done_upto: int, counts: Counts, streak: int, round_: int = 0
    ) -> None:
        assert self._parameters is not None
        report = pb.Report(
            epoch=self.epoch,
            task=task,
            done_upto=done_upto,
            round=round_,
            nonfinite_streak=streak,
            nonfinite_where=self._computing.where,
            shard_bytes=self._parameters.moved.take(),
            **asdict(counts),
        )
        self._send(pb.FromWorker(report=report))

    # ── evaluations ──

    def evaluate(self, order: pb.Evaluate) -> None:
        """The metrics of the newest parameters on the held-out examples; the best are kept."""
        assert self._loop is not None

        def judge(views: Mapping[str, Vector], flat: Vector) -> None:
            data = self._material.data
            with quiet():
                model = self._material.model
                values = evaluate(model, views, data.x_test, data.y_test)
                if self._train["evaluate"]["training"]:
                    values = evaluate_training(model, views, data) | values
            said = pb.Evaluated(epoch=self.epoch, evaluation=order.evaluation, metrics=values)
            name = metric_of(values, self._wanted_metric)
            if order.keep and name is not None and improves(name, values[name], order.best):
                said.kept.CopyFrom(self._best.keep(order.evaluation, flat, order.kept))
            self._send(pb.FromWorker(evaluated=said))

        self._loop.evaluated(judge)

    @property
    def _wanted_metric(self) -> str | None:
        until = self._train["until"]
        return next((name for name in HIGHER_IS_BETTER if until.get(name) is not None), None)
