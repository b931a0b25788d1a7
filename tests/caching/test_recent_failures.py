# this_file: tests/caching/test_recent_failures.py
"""Fresh failures by key."""

from __future__ import annotations

from typing import Any

import pytest

from opero.caching.refresh import RecentFailures, excuses
from opero.errors import (
    BulkheadFullError,
    CircuitOpenError,
    DeadlineError,
    OperoUsageError,
    RateLimitPausedError,
    Rejected,
)

pytestmark = pytest.mark.internal

REAL = BulkheadFullError("limit of another function", 1, 0)


def failed(failures: RecentFailures, key: Any, **given: Any) -> None:
    failures.add(key, **({"now": 0.0, "seconds": 5.0, "excused": True} | given))


def test_only_some_failures_excuse_an_expired_entry() -> None:
    failures = RecentFailures()
    failed(failures, "a", excused=False)
    assert failures.fresh("a", 1)
    assert not failures.fresh("a", 1, excused=True)


def test_a_later_failure_counts() -> None:
    failures = RecentFailures()
    failed(failures, "a", excused=False)
    failed(failures, "a", now=3.0)
    assert failures.fresh("a", 7, excused=True)


def test_a_success_ends_it() -> None:
    failures = RecentFailures()
    failed(failures, "a")
    failures.forget("a")
    failures.forget("a")
    assert not failures.fresh("a", 1)


def test_those_that_are_over_take_no_room() -> None:
    failures = RecentFailures()
    for n in range(100):
        failed(failures, n, now=float(n))
    assert len(failures) == 5


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecentFailures, "MOST", 3)
    failures = RecentFailures()
    for key in "abcde":
        failed(failures, key)
    assert [key for key in "abcde" if failures.fresh(key, 1)] == ["c", "d", "e"]


def test_all_are_forgotten_at_once() -> None:
    failures = RecentFailures()
    failed(failures, "a")
    failures.clear()
    assert not failures.fresh("a", 1)


@pytest.mark.parametrize(
    ("error", "walk", "excused"),
    [
        (ConnectionError(), [], True),
        (ValueError(), [], False),
        (ValueError(), [ConnectionError()], True),
        (CircuitOpenError("c", 1), [], True),
        (DeadlineError("over"), [], True),
        (RateLimitPausedError(60), [], True),
        (BulkheadFullError("c", 1, 0), [ConnectionError()], False),
        (REAL, [REAL], False),
        (OperoUsageError("wrong"), [], False),
        (Rejected("x"), [ConnectionError()], False),
    ],
)
def test_which_failures_are_answered_with_an_expired_entry(
    error: Exception, walk: list[Exception], excused: bool
) -> None:
    assert excuses(error, walk, lambda e: isinstance(e, ConnectionError)) is excused
