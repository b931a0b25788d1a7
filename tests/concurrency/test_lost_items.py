# this_file: tests/concurrency/test_lost_items.py
"""An item that was lost with its worker is retried like one that failed: real processes, really killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from opero import RetryBudget, deadline, events, operomap
from opero.errors import WorkerLostError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")


def note(folder: str, what: object) -> None:
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{what}\n")


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def die(x: int, folder: str) -> int:
    note(folder, x)
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def fail(x: int, folder: str) -> int:
    note(folder, x)
    raise ValueError(x)


def fail_or_die(x: int, folder: str) -> int:
    return (die if x % 2 else fail)(x, folder)


def mapped(body: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"retries": 9, "min_delay": 0, "workers": 3, **options}
    return operomap(mode="process", cache=False, **given)(body)


@pytest.mark.parametrize("body", [die, fail, fail_or_die])
def test_lost_items_ask_the_retry_budget(body: Any, tmp_path: Path) -> None:
    budget = RetryBudget(ratio=0, minimum=4, window=3600)
    result = mapped(body, retry_budget=budget).map(range(6), str(tmp_path))
    assert calls(tmp_path) == sum(failure.attempts for failure in result.failures) == 6 + 4
    assert len(result.failures) == 6
    assert (budget.calls, budget.retries, budget.left) == (6, 4, 0)


def test_retry_budget_refuses_a_lost_item_with_an_event(tmp_path: Path) -> None:
    received: list[str] = []

    def receive(event: events.Event) -> None:
        if isinstance(event, events.RetryBudgetSpent):
            received.append(event.budget)

    budget = RetryBudget(ratio=0, minimum=1, window=3600, name="svc")
    f = mapped(die, retry_budget=budget, on_event=receive)
    (failure,) = f.map([1], str(tmp_path)).failures
    assert isinstance(failure.error, WorkerLostError)
    assert "no retry is left in <RetryBudget 'svc'" in "".join(failure.error.__notes__)
    assert (failure.attempts, calls(tmp_path), received) == (2, 2, ["svc"])


def test_functions_share_a_budget_across_all_workers(tmp_path: Path) -> None:
    budget = RetryBudget(ratio=0, minimum=5, window=3600)
    first, second = mapped(die, retry_budget=budget), mapped(fail, retry_budget=budget)
    assert len(first.map([1], str(tmp_path)).failures) == 1
    assert calls(tmp_path) == 6
    assert len(second.map([1, 2], str(tmp_path)).failures) == 2
    assert calls(tmp_path) == 8


def test_a_call_that_comes_back_from_a_pause_is_not_counted_again(tmp_path: Path) -> None:
    budget = RetryBudget(ratio=0, minimum=5, window=3600)
    f = mapped(fail, retries=2, min_delay=0.1, max_delay=0.1, retry_budget=budget)
    assert len(f.map([1], str(tmp_path)).failures) == 1
    assert (budget.calls, budget.retries, calls(tmp_path)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("retry_on", "attempts"),
    [
        (Exception, 3),
        (WorkerLostError, 3),
        ((KeyError, WorkerLostError), 3),
        (lambda error: isinstance(error, WorkerLostError), 3),
        (ValueError, 1),
        (lambda error: "no such" in str(error), 1),
    ],
    ids=["any", "type", "types", "predicate", "another type", "predicate that refuses"],
)
def test_retry_on_decides_about_lost_items_too(
    retry_on: Any, attempts: int, tmp_path: Path
) -> None:
    f = mapped(die, retries=2, retry_on=retry_on)
    (failure,) = f.map([1], str(tmp_path)).failures
    assert (failure.attempts, calls(tmp_path)) == (attempts, attempts)
    assert (f.stats.calls, f.stats.failures, f.stats.retries) == (attempts, attempts, attempts - 1)


def die_twice(x: int, folder: str) -> int:
    note(folder, x)
    if calls(Path(folder)) < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return -x


def test_attempts_count_what_was_lost(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    f = mapped(die_twice, on_result=lambda one: seen.append((one.attempts, one.origin)))
    assert f([7], str(tmp_path)) == [-7]
    assert seen == [(3, "fresh")]


def refuse(x: int, folder: str) -> int:
    """Die first; then return a result that is rejected."""
    note(folder, x)
    if calls(Path(folder)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return -x


def test_a_rejected_result_after_a_lost_worker_uses_up_the_same_attempts(tmp_path: Path) -> None:
    f = mapped(refuse, retries=2, retry_if_result=lambda value: value < 0)
    assert f.map([1], str(tmp_path)).values == [-1]
    assert calls(tmp_path) == 3


@pytest.mark.parametrize("around", [True, False], ids=["around the map", "of each item"])
def test_no_pause_after_a_lost_worker_outlasts_the_deadline(around: bool, tmp_path: Path) -> None:
    pauses = {"min_delay": 300, "max_delay": 300}
    if around:
        with deadline(60):
            (failure,) = mapped(die, **pauses).map([1], str(tmp_path)).failures
    else:
        (failure,) = mapped(die, **pauses, deadline=60).map([1], str(tmp_path)).failures
    assert isinstance(failure.error, WorkerLostError)
    assert "the deadline comes before" in "".join(failure.error.__notes__)
    assert (failure.attempts, calls(tmp_path)) == (1, 1)
