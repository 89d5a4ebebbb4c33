"""Runs the text scenarios beside this file: script lines, `----`, the decisions expected.

A block is one or more commands; below `----` stands what the machine decided, in order. With
`REWRITE_SCENARIOS=1` the expectations are written anew; commit that only if you understand what
changed them. Commands (a worker is a number; `@2` is its incarnation, otherwise the newest):

    run KEY=VALUE…              until: accuracy loss max_epochs max_steps max_time plateau=PATIENCE;
        batch, every, examples, workers, clip_norm, decay=FACTOR:PATIENCE (of a plateau);
        algorithm, and whatever its options are; places=0,0,1: the partition of each worker
    at SECONDS                  what follows happens at that time
    up 0 1 …                    join, prepare, configure, initialise: decisions are left out
    begin 0 1 …                 the same, but what the last of them leads to is shown
    joined|lost|moved|initialised|drained WORKER[@INCARNATION]
    prepared WORKER [examples=…] [held_out=…] [digest=…] [data=DIGEST] [W=4x2]
    report WORKER TASK [upto=…] [steps=…] [examples=…] [each=SECONDS] [loss=…]
        [nonfinite=STREAK:TENSOR]   without `upto`: all of the task
        [round=…]                   of a `work`; without it: not finite
    claimed WORKER TASK | ticked WORKER CLOCK
    committed ROUND | measured ROUND SQUARES | operated NUMBER VALUES…
    evaluated WORKER ID accuracy=… loss=… [kept=PATH]
    fenced WORKER INCARNATION
    configured | frozen | thawed | exported | tick | stop WHY… | failed WORKER ERROR… | broken WHY…
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.contract.options import ALGORITHMS
from dsgd_cli.engine import events as e
from dsgd_cli.engine.tasks import Task
from dsgd_cli.engine.training import Training
from dsgd_cli.engine.vectors import Combine, Dot, Gradient, Largest, Op

FOLDER = Path(__file__).parent
HIDDEN = ("report",)  # records that would drown the rest


class Script:
    """One scenario's machine, clock and what the commands need to remember."""

    def __init__(self) -> None:
        self.machine: Training | None = None
        self.now_s = 0.0
        self.examples = 100
        self.incarnations: dict[int, int] = {}
        self.tasks: dict[int, Task] = {}  # by their numbers: all that were handed out

    def block(self, commands: list[str]) -> list[str]:
        lines = [line for command in commands for line in self.command(command)]
        return lines or ["nothing"]

    def command(self, command: str) -> Iterator[str]:
        verb, *words = command.split()
        if verb == "run":
            self.run(dict(word.split("=") for word in words))
        elif verb == "at":
            self.now_s = float(words[0])
        elif verb == "up":
            self.up([int(word) for word in words])
        elif verb == "begin":
            yield from rendered(self.up([int(word) for word in words]))
        else:
            yield from rendered(self.feed(EVENTS[verb](self, words)))

    def feed(self, event: e.Event) -> list[e.Decision]:
        assert self.machine is not None, "a scenario begins with `run`"
        decisions = self.machine.on(event, self.now_s)
        handed_out = [d.task for d in decisions if isinstance(d, e.Grant | e.Work)]
        self.tasks |= {task.id: task for task in handed_out}
        return decisions

    def run(self, options: dict[str, str]) -> None:
        self.now_s, self.incarnations, self.tasks = 0.0, {}, {}
        self.examples = int(options.get("examples", 100))
        count, _, unit = options.get("every", "1:epoch").partition(":")
        until = e.Until(
            loss=number(options.get("loss")),
            accuracy=number(options.get("accuracy")),
            max_epochs=whole(options.get("max_epochs")),
            max_steps=whole(options.get("max_steps")),
            max_time_s=number(options.get("max_time")),
            plateau=plateau(options.get("plateau")),
        )
        settings = e.Settings(
            seed=0,
            batch_size=int(options.get("batch", 10)),
            until=until,
            every=e.Every(float(count), unit),  # type: ignore[arg-type]
            algorithm=algorithm(options),
            optimizer=optimizer(options),
            workers=int(options.get("workers", 1)),
            places=tuple(map(int, filter(None, options.get("places", "").split(",")))),
        )
        self.machine = Training(settings)

    def up(self, workers: list[int]) -> list[e.Decision]:
        """As far as the last worker's `Prepared`, which starts the training: what is decided."""
        for worker in workers:
            self.feed(joined(self, [str(worker)]))
        self.feed(prepared(self, [str(workers[0])]))
        self.feed(e.Configured())
        decisions = self.feed(e.Initialised(workers[0], self.incarnations[workers[0]]))
        for worker in workers[1:]:
            decisions = self.feed(prepared(self, [str(worker)]))
        return decisions

    def who(self, word: str) -> tuple[int, int]:
        worker, _, incarnation = word.partition("@")
        return int(worker), int(incarnation or self.incarnations.get(int(worker), 1))


def number(text: str | None) -> float | None:
    return None if text is None else float(text)


def whole(text: str | None) -> int | None:
    return None if text is None else int(text)


def options(words: list[str]) -> dict[str, str]:
    return dict(word.split("=") for word in words)


def algorithm(given: dict[str, str]) -> dict[str, Any]:
    """Its options with their defaults, as the coordinator gets them."""
    model = ALGORITHMS[given.get("algorithm", "downpour")]
    chosen = {name: value(given[name]) for name in model.model_fields if name in given}
    return model.model_validate(chosen).model_dump(mode="json")


def optimizer(given: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {"clip_norm": number(given.get("clip_norm"))}
    if "decay" in given:
        factor, _, patience = given["decay"].partition(":")
        how = {"factor": float(factor), **(plateau(patience) or {})}
        made["decay"] = {"name": "plateau", "options": how}
    return made


def plateau(patience: str | None) -> dict[str, Any] | None:
    return patience and {"patience": int(patience), "min_delta": 0.0, "metric": None}


def value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def joined(script: Script, words: list[str]) -> e.Event:
    worker = int(words[0].partition("@")[0])
    script.incarnations[worker] = script.incarnations.get(worker, 0) + 1
    return e.WorkerJoined(*script.who(words[0]))


def prepared(script: Script, words: list[str]) -> e.Event:
    given = options(words[1:])
    shape = tuple(int(side) for side in given.get("W", "4x2").split("x"))
    examples = int(given.get("examples", script.examples))
    digests = given.get("digest", "d1"), given.get("data", "x1")
    held_out = int(given.get("held_out", 1))
    columns = tuple(given["columns"].split("/")) if "columns" in given else ()
    who = script.who(words[0])
    tensors = (("W", shape),)
    return e.Prepared(*who, tensors, "float32", examples, *digests, held_out, columns=columns)


def report(script: Script, words: list[str]) -> e.Event:
    given = options(words[2:])
    streak, _, tensor = given.get("nonfinite", "0:").partition(":")
    steps, examples = int(given.get("steps", 1)), 10
    if "upto" not in given:
        task = script.tasks[int(words[1])]
        given["upto"], examples = str(task.stop), task.stop - task.start
    examples = int(given.get("examples", examples * steps))
    return e.Report(
        *script.who(words[0]),
        task_id=int(words[1]),
        done_upto=int(given["upto"]),
        steps=steps,
        examples=examples,
        loss_sum=float(given.get("loss", 1)) * examples,
        loss_count=examples,
        compute_s=steps * float(given.get("each", 0.02)),
        nonfinite_streak=int(streak),
        nonfinite_where=tensor,
        round=int(given.get("round", 0)),
    )


def evaluated(script: Script, words: list[str]) -> e.Event:
    given = options(words[2:])
    kept = e.Kept(given.pop("kept"), 8, "0" * 64) if "kept" in given else None
    metrics = {name: float(value) for name, value in given.items()}
    return e.Evaluated(*script.who(words[0]), int(words[1]), metrics, kept)


def failed(script: Script, words: list[str]) -> e.Event:
    return e.WorkerFailed(*script.who(words[0]), " ".join(words[1:]), "Traceback: line 1")


EVENTS: dict[str, Callable[[Script, list[str]], e.Event]] = {
    "joined": joined,
    "prepared": prepared,
    "report": report,
    "evaluated": evaluated,
    "failed": failed,
    "lost": lambda script, words: e.WorkerLost(*script.who(words[0])),
    "claimed": lambda script, words: e.Claimed(*script.who(words[0]), int(words[1])),
    "ticked": lambda script, words: e.Ticked(*script.who(words[0]), int(words[1])),
    "committed": lambda script, words: e.Committed(int(words[0])),
    "measured": lambda script, words: e.Measured(int(words[0]), float(words[1])),
    "operated": lambda script, words: e.Operated(int(words[0]), tuple(map(float, words[1:]))),
    "moved": lambda script, words: e.Moved(*script.who(words[0])),
    "initialised": lambda script, words: e.Initialised(*script.who(words[0])),
    "drained": lambda script, words: e.Drained(*script.who(words[0])),
    "fenced": lambda script, words: e.Fenced(int(words[0]), int(words[1])),
    "configured": lambda script, words: e.Configured(),
    "frozen": lambda script, words: e.Frozen(),
    "thawed": lambda script, words: e.Thawed(),
    "exported": lambda script, words: e.Exported(),
    "tick": lambda script, words: e.Tick(),
    "stop": lambda script, words: e.StopRequested(" ".join(words)),
    "broken": lambda script, words: e.RunFailed(
        e.Failure("server/0", " ".join(words), kind="internal")
    ),
}


def rendered(decisions: list[e.Decision]) -> Iterator[str]:
    for decision in decisions:
        yield from render(decision)


def render(decision: e.Decision) -> Iterator[str]:
    match decision:
        case e.Record():
            if decision.fields["kind"] not in HIDDEN:
                yield "record " + fields(decision.fields)
        case e.Progress():
            shown = ("step", "epoch", "loss", "value", "elapsed_s", "workers")
            yield "progress " + fields({name: decision.fields[name] for name in shown})
        case e.Grant(worker, task):
            yield f"grant worker/{worker} {span(task)}"
        case e.Work():
            yield work(decision)
        case e.Accept(worker, task_id, round_, part):
            yield f"accept worker/{worker} task {task_id}: round {round_} part {part}"
        case e.Late(worker, task_id):
            yield f"late worker/{worker} task {task_id}"
        case e.Advance(worker, limit):
            yield f"advance worker/{worker} to clock {limit}"
        case e.Measure(round_, parts, scale) | e.Commit(round_, parts, scale):
            what = type(decision).__name__.lower()
            yield f"{what} round {round_}: {parts} parts, scale {scale:.6g}"
        case e.Operate(count, ops):
            yield f"operate #{count}"
            yield from (f"  {operation(op)}" for op in ops)
        case e.SetRate(factor):
            yield f"set rate {factor:g}"
        case e.Evaluate(worker, evaluation, frozen, _, keep, kept):
            also = " frozen" * frozen + ("" if keep else " without keeping")
            yield f"evaluate worker/{worker} #{evaluation}{also}" + f" beside #{kept}" * (kept > 0)
        case e.Expel(worker, incarnation, why):
            yield f"expel worker/{worker}@{incarnation}: {why}"
        case e.Fence(worker, incarnation):
            yield f"fence worker/{worker} below {incarnation}"
        case e.ConfigureShards():
            yield f"configure shards {decision.tensors} {decision.dtype}"
        case e.Finish():
            yield from finish(decision)
        case e.Prepare() | e.Initialise() | e.Start() | e.Drain():
            yield f"{type(decision).__name__.lower()} worker/{decision.worker}"
        case _:
            yield type(decision).__name__.lower()


def span(task: Task) -> str:
    return f"task {task.id}: epoch {task.epoch} [{task.start}, {task.stop})"


def work(decision: e.Work) -> str:
    part = "" if decision.part is None else f" part {decision.part}"
    needs = f" needs {decision.needs}" if decision.needs else ""
    fetch = " fetch" if decision.fetch else ""
    where = f"round {decision.round}{part}{needs}{fetch}"
    return f"work worker/{decision.worker} {span(decision.task)} {where}"


def operation(op: Op) -> str:
    match op:
        case Combine(out, terms):
            return f"{out} = " + " + ".join(f"{c:.6g} {vector}" for c, vector in terms)
        case Gradient(out, round_, parts, scale, l2):
            decay = f" + {l2:.6g} x" if l2 else ""
            return f"{out} = {scale:.6g} sum(round {round_}, {parts} parts){decay}"
        case Dot(a, b):
            return f"{a} . {b}"
        case Largest(a):
            return f"largest {a}"


def finish(decision: e.Finish) -> Iterator[str]:
    yield f"finish {decision.outcome}: {decision.reason}"
    names = ("metric", "value", "loss", "steps", "examples", "seconds", "epochs", "exported")
    yield "  " + fields({name: getattr(decision, name) for name in names})
    if decision.failure is not None:
        yield f"  failure of {decision.failure.process} ({decision.failure.kind}): " + (
            f"{decision.failure.error} | {decision.failure.traceback}"
        )


def fields(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def rerun(text: str) -> str:
    """The scenario with what the machine decides now below each `----`."""
    script, out = Script(), []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        commands = lines[: lines.index("----")] if "----" in lines else lines
        spoken = [line for line in commands if line and not line.startswith("#")]
        if spoken:
            commands = [*commands, "----", *script.block(spoken)]
        out.append("\n".join(commands))
    return "\n\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expected = path.read_text()
    actual = rerun(expected)
    if os.environ.get("REWRITE_SCENARIOS"):
        path.write_text(actual)
    else:
        assert actual == expected
