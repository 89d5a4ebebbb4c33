"""init, check, schema, up, status, logs, down on this machine."""

from __future__ import annotations

import json
import os
import signal

from tests.end_to_end.conftest import User, wait_until

CLUSTER = """
name: NAME
servers: 2
workers: 2
idle_timeout: 30s
train:
  until: {accuracy: 0.95, max_epochs: 50}
"""


def test_init_writes_a_file_that_check_accepts_and_never_overwrites(user: User) -> None:
    assert user.dsgd("init").code == 0
    text = (user.folder / "cluster.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    run = user.dsgd("check")
    assert (run.code, run.err) == (0, "")
    assert user.dsgd("init").code == 2
    assert (user.folder / "cluster.yaml").read_text() == text


def test_schema_is_json_schema(user: User) -> None:
    schema = json.loads(user.dsgd("schema").out)
    assert schema["type"] == "object"
    assert {"hosts", "servers", "workers", "train"} <= set(schema["properties"])


def test_check_finds_a_mistake_and_its_place(user: User) -> None:
    user.write(CLUSTER.replace("workers: 2", "worker: 2"))
    run = user.dsgd("check")
    assert run.code == 3
    assert "cluster.yaml:4:1  unknown key 'worker' – did you mean 'workers'?" in run.err
    assert run.out == ""


def test_a_missing_file_is_3(user: User) -> None:
    run = user.dsgd("train", "nothing.yaml")
    assert run.code == 3
    assert "nothing.yaml" in run.err


def test_wrong_usage_is_2(user: User) -> None:
    assert user.dsgd("train", "--nonsense").code == 2
    assert user.dsgd("frobnicate").code == 2
    user.write(CLUSTER)
    assert user.dsgd("train", "cluster.yaml", "--local", "1x2").code == 2
    assert user.dsgd("logs", "cluster.yaml", "--tail", "many").code == 2


def test_up_twice_status_train_keep_and_down_twice(user: User) -> None:
    user.write(CLUSTER)
    up = user.dsgd("up", "--json")
    assert up.code == 0, up.err
    before = {(m.pid, m.process) for m in user.members()}
    assert len(before) == 6
    again = user.dsgd("up", "--json")
    assert again.lines[-1]["started"] == 0
    assert {(m.pid, m.process) for m in user.members()} == before

    status = user.dsgd("status", "--json")
    assert status.code == 0
    assert {p["state"] for p in status.lines[-1]["processes"]} == {"ready"}
    assert "idle; ends at" in status.lines[-1]["said"]

    for _ in range(2):  # several runs on one cluster
        train = user.dsgd("train", "--keep", "--json")
        assert train.code == 0, train.err
    assert {(m.pid, m.process) for m in user.members()} == before
    metrics = user.dsgd("status", "--metrics")
    assert metrics.code == 0, metrics.err
    label = f'{{cluster="{user.name}"'
    assert metrics.out.count(f"dsgd_process_up{label}") == 5
    assert f"dsgd_run_steps_total{label}}} {train.summary['steps']}\n" in metrics.out
    assert f"dsgd_run_finished{label}}} 1\n" in metrics.out
    assert f"dsgd_run_staleness{label},quantile=" in metrics.out
    assert user.dsgd("status", "--metrics", "--json").code == 2

    down = user.dsgd("down", "--json")
    assert down.code == 0
    assert (down.lines[-1]["stopped"], down.lines[-1]["left"]) == (5, [])
    user.assert_nothing_left()
    twice = user.dsgd("down")
    assert (twice.code, "nothing running" in twice.out) == (0, True)
    gone = user.dsgd("status", "--json")
    assert {p["state"] for p in gone.lines[-1]["processes"]} == {"absent"}


def test_train_takes_down_even_a_cluster_that_was_up(user: User) -> None:
    user.write(CLUSTER)
    assert user.dsgd("up").code == 0
    run = user.dsgd("train", "--json")
    assert (run.code, run.summary["stopped"]) == (0, 5)
    user.assert_nothing_left()


def test_up_starts_only_what_died(user: User) -> None:
    user.write(CLUSTER)
    assert user.dsgd("up").code == 0
    before = {m.process: m.pid for m in user.members()}
    os.kill(before["server/1"], signal.SIGKILL)
    wait_until(lambda: user.pid_of("server/1") is None, 5, "its death")
    assert user.dsgd("status").code == 6
    up = user.dsgd("up", "--json")
    assert (up.code, up.lines[-1]["started"]) == (0, 1), up.err
    after = {m.process: m.pid for m in user.members()}
    assert after.pop("server/1") != before.pop("server/1")
    assert after == before
    assert user.dsgd("train").code == 0


def test_a_changed_description_is_not_applied_without_yes(user: User) -> None:
    user.write(CLUSTER)
    assert user.dsgd("up").code == 0
    before = {(m.pid, m.process) for m in user.members()}
    refused = user.dsgd("up", "--set", "workers=3")
    assert refused.code == 10
    assert "~ placed worker/2: none -> local" in refused.err
    assert "--yes" in refused.err
    assert {(m.pid, m.process) for m in user.members()} == before
    assert user.dsgd("up", "--set", "workers=3", "--yes").code == 0
    assert user.pid_of("worker/2") is not None
    assert user.dsgd("down", "--set", "workers=3").code == 0
    user.assert_nothing_left()


def test_an_idle_cluster_ends_by_itself(user: User) -> None:
    user.write(CLUSTER.replace("30s", "2s"))
    assert user.dsgd("up").code == 0
    assert len(user.members()) == 6
    wait_until(lambda: not user.members(), 2 + 5, "the end of the idle time")
    wait_until(lambda: not user.files_left(), 1, "no run directory")


def test_a_second_launcher_is_told_who_holds_the_cluster(user: User) -> None:
    user.write(CLUSTER.replace("0.95, max_epochs: 50", "1.0, loss: 0.0, max_time: 60s"))
    first = user.start("train", "--json")
    assert first.stdout is not None
    next(line for line in first.stdout if '"progress"' in line)
    for command in ("up", "train", "down"):
        second = user.dsgd(command)
        assert second.code == 8, (command, second.err)
        assert f"(pid {first.pid})" in second.err
    assert len(user.members()) == 6
    assert user.dsgd("down", "--force").code == 0
    run = user.finish(first, timeout_s=20)
    assert run.code == 6
    user.assert_nothing_left()


def test_logs_show_what_processes_print(user: User) -> None:
    model = (
        "import numpy as np\n"
        "print('hello from the model')\n"
        "def init(rng, example): return {'w': np.zeros(3)}\n"
        "def predict(params, x): return np.zeros((len(x), 3))\n"
        "def gradients(params, x, y): return 0.5, {'w': np.ones(3)}\n"
    )
    user.write(CLUSTER.replace("servers: 2", "servers: 1"))
    user.write(model, "model.py")
    settings = ("--set", "train.model=model.py", "--set", "train.until={max_steps: 20}")
    run = user.dsgd("train", "--keep", *settings)
    assert run.code == 0, run.err
    assert "worker/0@local | hello from the model" in run.err
    logs = user.dsgd("logs", "--role", "worker/1")
    assert logs.code == 0
    assert "worker/1@local | hello from the model" in logs.out
    assert "worker/0" not in logs.out
    lines = user.dsgd("logs", "--json", "--tail", "1").lines
    assert {line["process"] for line in lines if line["type"] == "log"} >= {"worker/0", "worker/1"}
    follow = user.start("logs", "-f")
    assert follow.stdout is not None
    assert "hello" in follow.stdout.readline()
    follow.send_signal(signal.SIGINT)
    left = user.finish(follow, timeout_s=5)
    assert (left.code, "left the log view" in left.err) == (0, True)
    assert user.dsgd("down").code == 0


def test_top_watches_a_run_without_touching_it(user: User) -> None:
    user.write("name: NAME\ntrain: {until: {accuracy: 1.0, loss: 0.0, max_time: 1h}}\n")
    nothing = user.dsgd("top")
    assert nothing.code == 2
    assert "nothing runs on local" in nothing.err
    training = user.start("train", "--json")
    wait_until(lambda: user.pid_of("coordinator/0"), 20, "a coordinator")
    wait_until(
        lambda: '"progress"' in (training.stdout and training.stdout.readline()), 20, "a run"
    )
    watching, leaving = user.start("top", "--json"), user.start("top")
    for top in (watching, leaving):
        assert top.stdout is not None
        assert top.stderr is not None
    lines = iter(watching.stdout.readline, "")
    first = next(line for line in map(json.loads, lines) if line["type"] == "progress")
    assert first["workers"] == 2
    later = next(line for line in map(json.loads, lines) if line["type"] == "progress")
    assert later["step"] > first["step"]
    assert "examples/s" in leaving.stderr.readline()
    leaving.send_signal(signal.SIGINT)
    left = user.finish(leaving, timeout_s=5)
    assert left.code == 0
    assert "goes on" in left.err
    assert training.poll() is None
    training.send_signal(signal.SIGINT)
    assert user.finish(training).code == 130
    assert user.finish(watching, timeout_s=10).code == 0
    user.assert_nothing_left()


def test_top_says_that_the_run_of_a_kept_cluster_is_over(user: User) -> None:
    user.write("name: NAME\ntrain: {until: {max_steps: 50}}\n")
    assert user.dsgd("train", "--keep").code == 0
    watching = user.start("top")
    assert watching.stderr is not None
    said = next(line for line in iter(watching.stderr.readline, "") if "is over" in line)
    assert "waiting for the next" in said
    assert user.dsgd("down").code == 0
    assert user.finish(watching, timeout_s=10).code == 0
    user.assert_nothing_left()


def test_a_timeout_is_written_as_durations_are_in_the_file(user: User) -> None:
    user.write(CLUSTER)
    for text, said in (("22:30", "write 22m30s"), ("0s", "at least 0.1s"), ("x", "15s, 10m, 1h")):
        run = user.dsgd("train", "--timeout", text)
        assert run.code == 2
        assert said in run.err
    assert user.dsgd("train", "--timeout", "2m").code == 0
