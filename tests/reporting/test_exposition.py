"""Prometheus text: one family after the other, nothing made up, labels that cannot break a line."""

from __future__ import annotations

import re
from typing import Any

from dsgd_cli.reporting.exposition import exposition

PROCESSES = [
    {"process": "coordinator", "host": "gpu1", "state": "ready", "restarts": 0},
    {"process": "worker/0", "host": "gpu2", "state": "unreachable"},
]
RUN: dict[str, Any] = {
    "step": 120,
    "examples": 3840,
    "examples_per_s": 1234.5,
    "shard_bytes": [7_000_000, 5_000_000],
    "epoch": 2,
    "elapsed_s": 3.25,
    "loss": None,
    "metric": "accuracy",
    "value": 0.9375,
    "workers": 2,
    "finished": False,
}
SAMPLE = re.compile(r'([a-z_]+)(\{[a-z]+="([^"\\]|\\.)*"(,[a-z]+="([^"\\]|\\.)*")*\}) (\S+)')


def status(**more: Any) -> dict[str, Any]:
    about = {"cluster": "lab", "processes": PROCESSES, "unreachable": {"gpu2": "no answer"}}
    return {**about, "run": {}, **more}


def test_a_run_under_way() -> None:
    assert exposition(status(run=RUN)).splitlines()[:12] == [
        "# HELP dsgd_host_reachable Whether the host answers.",
        "# TYPE dsgd_host_reachable gauge",
        'dsgd_host_reachable{cluster="lab",host="gpu1"} 1',
        'dsgd_host_reachable{cluster="lab",host="gpu2"} 0',
        "# HELP dsgd_process_up Whether the process runs and is ready.",
        "# TYPE dsgd_process_up gauge",
        'dsgd_process_up{cluster="lab",process="coordinator",host="gpu1"} 1',
        'dsgd_process_up{cluster="lab",process="worker/0",host="gpu2"} 0',
        "# HELP dsgd_process_restarts_total How often the process was started again.",
        "# TYPE dsgd_process_restarts_total counter",
        'dsgd_process_restarts_total{cluster="lab",process="coordinator",host="gpu1"} 0',
        "# HELP dsgd_run_steps_total Gradient batches of all workers.",
    ]


def test_what_moved_is_told_by_server() -> None:
    lines = exposition(status(run=RUN)).splitlines()
    assert "# TYPE dsgd_run_moved_bytes_total counter" in lines
    assert [line for line in lines if line.startswith("dsgd_run_moved")] == [
        'dsgd_run_moved_bytes_total{cluster="lab",process="server/0"} 7000000',
        'dsgd_run_moved_bytes_total{cluster="lab",process="server/1"} 5000000',
    ]


def test_what_is_not_known_is_not_there() -> None:
    assert "dsgd_run" not in exposition(status())
    text = exposition(status(run=RUN))
    assert "dsgd_run_training_loss" not in text
    assert "dsgd_run_staleness" not in text
    assert 'dsgd_run_metric{cluster="lab",metric="accuracy"} 0.9375' in text
    assert 'dsgd_run_finished{cluster="lab"} 0' in text


def test_a_finished_run_has_its_staleness() -> None:
    staleness = {"median": 1, "p95": 3, "dropped": 7}
    text = exposition(status(run={**RUN, "finished": True, "staleness": staleness}))
    assert 'dsgd_run_staleness{cluster="lab",quantile="0.95"} 3' in text
    assert 'dsgd_run_dropped_pushes{cluster="lab"} 7' in text


def test_every_line_is_of_the_format_whatever_a_metric_is_called() -> None:
    text = exposition(status(run={**RUN, "metric": 'a"b\\c\nd'}))
    assert text.endswith("\n")
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    for line in text.splitlines():
        assert line.startswith("# ") or SAMPLE.fullmatch(line), line
