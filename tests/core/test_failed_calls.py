# this_file: tests/core/test_failed_calls.py
"""Which errors move a call on, and the note about calls that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from opero.core.call import Call, FailedCall
from opero.core.failures import story
from opero.errors import (
    DeadlineError,
    OperoUsageError,
    OperoWarning,
    Rejected,
    asks,
    is_final,
    matches,
)

if TYPE_CHECKING:
    from opero.testing import FakeClock

pytestmark = pytest.mark.internal


@pytest.mark.parametrize(
    ("error", "final"),
    [(DeadlineError(), True), (OperoUsageError(), True), (TimeoutError(), False)],
    ids=repr,
)
def test_only_our_own_refusals_are_final(error: Exception, final: bool) -> None:
    assert is_final(error) is final


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (OSError, True),
        (KeyError, False),
        ((KeyError, OSError), True),
        ((), False),
        (lambda error: error.errno == 5, True),
        (lambda error: "", False),
    ],
)
def test_an_error_is_matched_by_type_tuple_or_predicate(wanted: Any, expected: bool) -> None:
    assert matches(wanted, OSError(5, "x")) is expected


def test_a_rejected_result_always_matches() -> None:
    assert matches(KeyError, Rejected("x"))


def test_a_raising_predicate_is_a_no_with_a_warning() -> None:
    def hasty(error: Any) -> bool:
        return bool(error.missing)

    with pytest.warns(OperoWarning, match=r"hasty raised AttributeError and was taken as False"):
        assert asks(hasty, ValueError()) is False


def failed_call(*failures: FailedCall, **state: Any) -> Call:
    call = Call((), {})
    call.failures = list(failures)
    call.calls = len(failures)
    vars(call).update(state)
    return call


def test_the_story_groups_by_value_and_kind(clock: FakeClock) -> None:
    call = failed_call(
        FailedCall("m='a'", ValueError()),
        FailedCall("m='b'", Rejected("x")),
        FailedCall("m='a'", KeyError()),
        FailedCall("m='a'", ValueError()),
        attempts=2,
        started=clock.monotonic() - 1.25,
    )
    assert story(call) == (
        "gave up after 2 attempts, 4 calls in 1.25 s\n"
        "  m='a': ValueError ×2, KeyError ×1\n"
        "  m='b': rejected result ×1"
    )


@pytest.mark.parametrize(
    ("state", "seconds", "expected"),
    [
        ("first_failed", 0.0, ""),
        ("started", 0.0, ""),
        ("first_failed", 0.5, ", 0.5 s after the first failure"),
        ("started", 120.0, " in 2 min"),
    ],
)
def test_the_note_shows_the_time_it_knows(
    clock: FakeClock, state: str, seconds: float, expected: str
) -> None:
    call = failed_call(FailedCall(None, ValueError()), **{state: clock.monotonic() - seconds})
    assert story(call) == f"gave up after 1 attempt, 1 call{expected}\n  ValueError ×1"


def test_a_call_shows_no_arguments() -> None:
    assert "hunter2" not in repr(Call(("hunter2",), {"key": "hunter2"}))
