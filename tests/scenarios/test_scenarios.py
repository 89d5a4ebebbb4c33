"""Runs the text scenarios beside this file: script lines, `----`, the decisions expected.

A block is one or more commands; below `----` stands what the machine decided, in order. With
`REWRITE_SCENARIOS=1` the expectations are written anew; commit that only if you understand what
changed them. Commands (a worker is a number; `@2` is its incarnation, otherwise the newest):

    run KEY=VALUE…              until: accuracy loss max_epochs max_steps max_time; batch, every
    at SECONDS                  what follows happens at that time
    up 0 1 …                    join, prepare, configure, initialise: decisions are left out
    joined|lost|moved|initialised|drained WORKER[@INCARNATION]
    prepared WORKER [examples=…] [digest=…] [W=4x2]
    report WORKER TASK upto=… [steps=…] [examples=…] [each=SECONDS] [loss=…]
        [nonfinite=STREAK:TENSOR]
    evaluated WORKER ID accuracy=… loss=…
    fenced WORKER INCARNATION
    configured | frozen | thawed | exported | tick | stop WHY… | failed WORKER ERROR… | broken WHY…
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.engine import events as e
from dsgd_cli.engine.training import Training

FOLDER = Path(__file__).parent
HIDDEN = ("report",)  # records that would drown the rest


class Script:
    """One scenario's machine, clock and what the commands need to remember."""

    def __init__(self) -> None:
        self.machine: Training | None = None
        self.now_s = 0.0
        self.examples = 100
        self.incarnations: dict[int, int] = {}

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
        else:
            for decision in self.feed(EVENTS[verb](self, words)):
                yield from render(decision)

    def feed(self, event: e.Event) -> list[e.Decision]:
        assert self.machine is not None, "a scenario begins with `run`"
        return self.machine.on(event, self.now_s)

    def run(self, options: dict[str, str]) -> None:
        self.now_s, self.incarnations = 0.0, {}
        self.examples = int(options.get("examples", 100))
        count, _, unit = options.get("every", "1:epoch").partition(":")
        until = e.Until(
            loss=number(options.get("loss")),
            accuracy=number(options.get("accuracy")),
            max_epochs=whole(options.get("max_epochs")),
            max_steps=whole(options.get("max_steps")),
            max_time_s=number(options.get("max_time")),
        )
        every = e.Every(float(count), unit)  # type: ignore[arg-type]
        self.machine = Training(e.Settings(0, int(options.get("batch", 10)), until, every))

    def up(self, workers: list[int]) -> None:
        """As far as the last worker's `Prepared`, which starts the training."""
        for worker in workers:
            self.feed(joined(self, [str(worker)]))
        self.feed(prepared(self, [str(workers[0])]))
        self.feed(e.Configured())
        self.feed(e.Initialised(workers[0], self.incarnations[workers[0]]))
        for worker in workers[1:]:
            self.feed(prepared(self, [str(worker)]))

    def who(self, word: str) -> tuple[int, int]:
        worker, _, incarnation = word.partition("@")
        return int(worker), int(incarnation or self.incarnations.get(int(worker), 1))


def number(text: str | None) -> float | None:
    return None if text is None else float(text)


def whole(text: str | None) -> int | None:
    return None if text is None else int(text)


def options(words: list[str]) -> dict[str, str]:
    return dict(word.split("=") for word in words)


def joined(script: Script, words: list[str]) -> e.Event:
    worker = int(words[0].partition("@")[0])
    script.incarnations[worker] = script.incarnations.get(worker, 0) + 1
    return e.WorkerJoined(*script.who(words[0]))


def prepared(script: Script, words: list[str]) -> e.Event:
    given = options(words[1:])
    shape = tuple(int(side) for side in given.get("W", "4x2").split("x"))
    examples = int(given.get("examples", script.examples))
    digest = given.get("digest", "d1")
    return e.Prepared(*script.who(words[0]), (("W", shape),), "float32", examples, digest)


def report(script: Script, words: list[str]) -> e.Event:
    given = options(words[2:])
    streak, _, tensor = given.get("nonfinite", "0:").partition(":")
    steps = int(given.get("steps", 1))
    examples = int(given.get("examples", 10 * steps))
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
    )


def evaluated(script: Script, words: list[str]) -> e.Event:
    metrics = {name: float(value) for name, value in options(words[2:]).items()}
    return e.Evaluated(*script.who(words[0]), int(words[1]), metrics)


def failed(script: Script, words: list[str]) -> e.Event:
    return e.WorkerFailed(*script.who(words[0]), " ".join(words[1:]), "Traceback: line 1")


EVENTS: dict[str, Callable[[Script, list[str]], e.Event]] = {
    "joined": joined,
    "prepared": prepared,
    "report": report,
    "evaluated": evaluated,
    "failed": failed,
    "lost": lambda script, words: e.WorkerLost(*script.who(words[0])),
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


def render(decision: e.Decision) -> Iterator[str]:
    match decision:
        case e.Record():
            if decision.fields["kind"] not in HIDDEN:
                yield "record " + fields(decision.fields)
        case e.Progress():
            shown = ("step", "epoch", "loss", "value", "elapsed_s", "workers")
            yield "progress " + fields({name: decision.fields[name] for name in shown})
        case e.Grant(worker, task):
            where = f"epoch {task.epoch} [{task.start}, {task.stop})"
            yield f"grant worker/{worker} task {task.id}: {where}"
        case e.Evaluate(worker, evaluation, frozen):
            yield f"evaluate worker/{worker} #{evaluation}" + (" frozen" if frozen else "")
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
