"""Many hosts at once: each is reported, none holds up the others."""

from __future__ import annotations

import threading

import pytest

from dsgd_cli.contract.errors import ConnectFailed, DeadlinePassed, HostsFailed
from dsgd_cli.launcher.parallel import attempt, on_all


def test_results_and_errors_are_kept_apart() -> None:
    def job(host: str) -> int:
        if host == "b":
            raise ConnectFailed("b", "nobody answers")
        return len(host)

    results, errors = attempt(["a", "b", "cc"], job, phase="connect", deadline_s=5)
    assert results == {"a": 1, "cc": 2}
    assert str(errors["b"]) == "b: nobody answers"


def test_a_host_that_never_answers_is_a_deadline_and_the_others_are_reported() -> None:
    never = threading.Event()
    job = {"a": lambda: 1, "b": lambda: never.wait(30)}
    results, errors = attempt(job, lambda host: job[host](), phase="connect", deadline_s=0.2)
    never.set()
    assert results == {"a": 1}
    assert isinstance(errors["b"], DeadlinePassed)
    assert errors["b"].exit_code == 5


def test_several_failures_are_one_error_with_a_line_each() -> None:
    def job(host: str) -> None:
        raise ConnectFailed(host, "nobody answers", remedy=f"switch {host} on")

    with pytest.raises(HostsFailed) as caught:
        on_all(["a", "b"], job, phase="connect", deadline_s=5)
    assert caught.value.exit_code == 4
    assert caught.value.details == (
        "a: nobody answers",
        "  fix: switch a on",
        "b: nobody answers",
        "  fix: switch b on",
    )


def test_a_bug_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        on_all(["a"], lambda host: 1 / 0, phase="x", deadline_s=5)
