"""Grids of runs: what they vary, what they are called, what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.contract.errors import (
    ClusterHeld,
    DsgdError,
    HostError,
    Interrupted,
    SpecError,
    TeardownIncomplete,
    UsageError,
)
from dsgd_cli.launcher import sweep as sweeping
from dsgd_cli.launcher.down import Receipt
from dsgd_cli.launcher.load import Loaded, load
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.result import Result
from dsgd_cli.launcher.sweep import Cell, Sweep, cells, grid, sweep
from dsgd_cli.launcher.train import Options
from dsgd_cli.reporting.runs import runs_in


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text("name: lab\n")
    return tmp_path


def loaded(values: list[str]) -> Loaded:
    return load("cluster.yaml", values)


def cells_of(*expressions: str) -> list[Cell]:
    return cells(grid(expressions), loaded)


def test_values_are_split_at_commas_outside_of_brackets_and_quotes() -> None:
    text = "train.algorithm=downpour,{synchronous: {backup_workers: 1}},'a,b'"
    assert grid([text, "workers= 1, 2"]) == [
        ("train.algorithm", ("downpour", "{synchronous: {backup_workers: 1}}", "'a,b'")),
        ("workers", ("1", "2")),
    ]


@pytest.mark.parametrize(
    ("expressions", "said"),
    [
        ((), "nothing varies"),
        (("workers",), "not a list of values"),
        (("=1,2",), "not a list of values"),
        (("workers=1,,2",), "not a list of values"),
        (("workers=",), "not a list of values"),
        (("workers=1,1",), "given twice"),
        (("workers=1", "workers=2"), "given twice"),
        (("workers=1", " workers=2"), "given twice"),
        (("algorithm=downpour", "train.algorithm=sandblaster"), "given twice"),
        (("seed=" + ",".join(map(str, range(1001))),), "1001 runs are too many"),
    ],
)
def test_what_is_no_grid(expressions: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        grid(expressions)


def test_every_combination_is_a_run_with_a_folder_of_its_own() -> None:
    made = cells_of("workers=1,2", "algorithm=downpour,{synchronous: {}}")
    assert [cell.label for cell in made] == [
        "workers=1 algorithm=downpour",
        "workers=1 algorithm={synchronous: {}}",
        "workers=2 algorithm=downpour",
        "workers=2 algorithm={synchronous: {}}",
    ]
    assert [cell.folder for cell in made] == [
        "01-workers-1-algorithm-downpour",
        "02-workers-1-algorithm-synchronous",
        "03-workers-2-algorithm-downpour",
        "04-workers-2-algorithm-synchronous",
    ]
    found = [(cell.spec.workers.count, cell.spec.train.algorithm.name) for cell in made]
    assert found == [(w, a) for w in (1, 2) for a in ("downpour", "synchronous")]


def test_fields_of_a_run_need_no_prefix() -> None:
    [small, large] = cells_of("batch_size=16,64")
    assert (small.spec.train.batch_size, large.spec.train.batch_size) == (16, 64)
    [one, two] = cells_of("train.until.max_epochs=1,2")
    assert (one.spec.train.until.max_epochs, two.spec.train.until.max_epochs) == (1, 2)


def test_all_mistakes_are_found_before_anything_starts() -> None:
    with pytest.raises(SpecError, match="5 of 6 runs cannot be") as caught:
        cells_of("workers=1,two,-1", "algorithm=downpour,downpur")
    said = [line for line in caught.value.details if line.startswith("--set")]
    assert len(said) == len(set(said)) == 3
    assert "--set train.algorithm=downpur:1:17  unknown algorithm 'downpur'" in said[0]
    carets = [line for line in caught.value.details if line.strip(" |^") == ""]
    assert len(carets) == 3  # each has its own, also where two are alike


def test_sandblaster_is_trained_once_for_all_optimizers_and_batch_sizes() -> None:
    made = cells_of("algorithm=downpour,sandblaster", "optimizer=sgd,adagrad", "batch_size=16,64")
    assert [cell.label for cell in made] == [
        *(
            f"algorithm=downpour optimizer={optimizer} batch_size={size}"
            for optimizer in ("sgd", "adagrad")
            for size in (16, 64)
        ),
        "algorithm=sandblaster",
    ]
    assert [cell.number for cell in made] == [1, 2, 3, 4, 5]
    assert made[-1].folder == "05-algorithm-sandblaster"
    assert made[-1].notes == (
        "sandblaster has no optimizer or batch_size: trained once for all of their values",
    )
    summaries: list[dict[str, Any]] = [{"outcome": "converged"}] * 5
    table = Sweep(Path(), made, summaries)
    assert table.head()[:4] == ("ALGORITHM", "OPTIMIZER", "BATCH_SIZE", "OUTCOME")
    assert [row[:3] for row in table.rows()][-2:] == [
        ("downpour", "adagrad", "64"),
        ("sandblaster", "–", "–"),
    ]


def test_mistakes_are_found_in_what_an_algorithm_has_no_use_for() -> None:
    with pytest.raises(SpecError, match="3 of 4 runs cannot be") as caught:
        cells_of("algorithm=downpour,downpur", "optimizer=sgd,agrad")
    said = [line for line in caught.value.details if line.startswith("--set")]
    assert len(said) == 2


def test_the_notes_on_a_description_are_the_cells() -> None:
    Path("cluster.yaml").write_text("train: {optimizer: sgd}\n")
    first, second = cells_of("algorithm=downpour,sandblaster")
    assert first.notes == ()
    assert "sandblaster uses no optimizer" in second.notes[0]


def test_a_file_that_is_not_there_is_said_as_ever() -> None:
    Path("cluster.yaml").unlink()
    with pytest.raises(SpecError, match=r"cluster\.yaml: no such file"):
        cells_of("workers=1,2")


class Screen:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("error", "runs"),
    [
        (HostError("gpu1", "no answer"), 3),
        (ClusterHeld("held"), 2),
        (TeardownIncomplete("left"), 2),
        (Interrupted("Ctrl-C", 130), 2),
        (None, 3),
    ],
)
def test_a_run_that_fails_ends_the_sweep_only_if_the_next_would_fail_like_it(
    error: DsgdError | None, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str | None] = []

    def train(spec: object, screen: object, options: Options, phases: Phases) -> Result:
        began.append(options.label)
        assert options.label is not None
        *_, running = json.loads((options.runs / "sweep.json").read_text())
        assert running["outcome"] == "running" and running["sweep"]["workers"] in "124"
        (options.runs / options.label).mkdir()
        (options.runs / options.label / "metrics.jsonl").touch()
        assert runs_in(options.runs)[-1] == (options.runs / options.label, running["sweep"])
        result = Result(made[0].spec, options.runs / options.label, phases)
        result.error = error if len(began) == 2 else None
        return result

    monkeypatch.setattr(sweeping, "train", train)
    made = cells_of("workers=1,2,4")
    screen = Screen()
    found = sweep(made, screen, Options(runs=Path("runs")))  # type: ignore[arg-type]
    assert began == [cell.folder for cell in made[:runs]]
    assert [text.split()[1] for text in screen.notes] == [f"{n}/3" for n in range(1, runs + 1)]
    assert len(found.summaries) == len(list(found.rows())) == runs
    kept = json.loads((found.folder / "sweep.json").read_text())
    assert [Path(entry["run_dir"]).name for entry in kept] == began
    assert "running" not in {entry["outcome"] for entry in kept}
    if error is None:
        found.check()
    else:
        with pytest.raises(type(error)):
            found.check()


def test_the_timeout_is_that_of_all_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, given = 100.0, []
    made = cells_of("workers=1,2,4")

    def train(spec: object, screen: object, options: Options, phases: Phases) -> Result:
        nonlocal now_s
        given.append(options.timeout_s)
        now_s += 6
        return Result(made[0].spec, options.runs / "run", phases)

    monkeypatch.setattr(sweeping, "train", train)
    monkeypatch.setattr(sweeping, "monotonic", lambda: now_s)
    sweep(made, Screen(), Options(runs=Path("runs"), timeout_s=10))  # type: ignore[arg-type]
    assert given == [10, 4, 0.001]
    given.clear()
    sweep(made, Screen(), Options(runs=Path("runs")))  # type: ignore[arg-type]
    assert given == [None] * 3


def test_what_broke_it_off_is_what_it_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cells_of("workers=1,2,4")
    stopped = Interrupted("Ctrl-C", 130)
    errors = iter([HostError("gpu1", "no answer"), stopped])

    def train(spec: object, screen: object, options: Options, phases: Phases) -> Result:
        return Result(made[0].spec, options.runs / "run", phases, error=next(errors))

    monkeypatch.setattr(sweeping, "train", train)
    found = sweep(made, Screen(), Options(runs=Path("runs")))  # type: ignore[arg-type]
    with pytest.raises(Interrupted) as caught:
        found.check()
    assert caught.value is stopped


def test_what_is_left_somewhere_ends_it_whatever_the_run_failed_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = cells_of("workers=1,2,4")

    def train(spec: object, screen: object, options: Options, phases: Phases) -> Result:
        result = Result(made[0].spec, options.runs / "run", phases)
        result.error = HostError("gpu1", "no answer")
        result.receipt = Receipt(0, left=("gpu1",), results=(), placed=3)
        return result

    monkeypatch.setattr(sweeping, "train", train)
    found = sweep(made, Screen(), Options(runs=Path("runs")))  # type: ignore[arg-type]
    assert len(found.summaries) == 1
