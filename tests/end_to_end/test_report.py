"""`dsgd report` on runs that really were, and the report that each training leaves."""

from __future__ import annotations

from tests.end_to_end.conftest import User
from tests.reporting.test_tensorboard import read

SHORT = "train.until={max_epochs: 3}"


def test_a_training_leaves_a_report_and_several_runs_make_one(user: User) -> None:
    homes = []
    for algorithm in ("downpour", "synchronous", "sandblaster"):
        run = user.dsgd(
            *("train", "--local", "1x2", "--set", f"name={user.name}", "--set", SHORT),
            *("--set", f"train.algorithm={algorithm}", "--runs", algorithm),
        )
        assert run.code == 0, run.err
        said = next(line for line in run.out.splitlines() if line.startswith("report: "))
        page = user.folder / said.removeprefix("report: ")
        assert page.name == "report.html"
        assert page.read_text().count("<svg") >= 9
        homes.append(str(page.parent))
    report = user.dsgd("report", *homes, "-o", "all.html", "--json")
    assert report.code == 0, report.err
    assert report.lines[-1]["report"] == "all.html"
    assert report.lines[-1]["troubles"] == []
    text = (user.folder / "all.html").read_text()
    for algorithm in ("downpour", "synchronous", "sandblaster"):
        assert f"<td>{algorithm}</td>" in text
    user.assert_nothing_left()


def test_a_folder_that_is_no_run_is_2(user: User) -> None:
    run = user.dsgd("report", ".")
    assert run.code == 2
    assert "error: . is not the folder of a run" in run.err
    assert user.dsgd("report").code == 2


def test_scalars_for_tensorboard_are_written_on_request(user: User) -> None:
    arguments = ("train", "--local", "1x2", "--set", f"name={user.name}", "--set", SHORT, "--json")
    run = user.dsgd(*arguments)
    assert run.code == 0, run.err
    assert not list(user.folder.glob("runs/*/events.out.tfevents.*"))
    run = user.dsgd(*arguments, "--set", "train.tensorboard=true")
    assert run.code == 0, run.err
    (path,) = user.folder.glob("runs/*/events.out.tfevents.*")
    held_out = [event for event in read(path) if event.tag == "held_out/accuracy"]
    evaluations = [r for r in user.metrics(run.summary["run_dir"]) if r["kind"] == "evaluate"]
    assert [event.step for event in held_out] == [record["step"] for record in evaluations]
