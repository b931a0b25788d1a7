# this_file: tests/core/test_call_reports.py
"""Notes on the error of a failed call, its events, its counters."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import tenacity

from opero import failures, opero
from opero.errors import OperoUsageError
from opero.events import (
    AttemptFailed,
    CallGaveUp,
    CallSucceeded,
    Event,
    FallbackUsed,
    RetryScheduled,
)
from opero.testing import FakeClock, capture_events, flaky, set_disabled


def caught(face: Any, begin: Callable[..., Any], *args: Any) -> Exception:
    try:
        face.run(begin, *args)
    except Exception as error:  # noqa: BLE001 - any error may be asked for
        return error
    raise AssertionError("nothing was raised")


def always(*kinds: type[Exception]) -> Callable[..., Any]:
    """A body that raises the given kinds in turn."""
    turn = 0

    def charge(model: str = "a") -> None:
        nonlocal turn
        turn += 1
        raise kinds[(turn - 1) % len(kinds)](f"call {turn}")

    return charge


# --- notes ----------------------------------------------------------------------------------------


def test_the_note_names_attempts_calls_and_time(face: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False, retries=2, min_delay=60, max_delay=60)(face.of(always(OSError)))
    assert caught(face, fetch).__notes__ == [
        (
            "opero: charge() gave up after 3 attempts, 3 calls, 2 min after the first failure\n"
            "  OSError ×3"
        )
    ]


@pytest.mark.parametrize("way", ["stop", "receipt"])
def test_where_the_start_is_known_the_note_counts_from_there(
    face: Any, clock: FakeClock, way: str
) -> None:
    failing = always(OSError)

    def charge(model: str = "a") -> None:
        clock.advance(10)
        failing()

    options: dict[str, Any] = {"stop": tenacity.stop_after_attempt(3)} if way == "stop" else {}
    fetch = opero(cache=False, retries=2, min_delay=5, jitter=False, backoff_factor=1, **options)(
        face.of(charge)
    )
    (note,) = caught(face, fetch if way == "stop" else fetch.call).__notes__
    assert note.splitlines()[0] == "opero: charge() gave up after 3 attempts, 3 calls in 40 s"


def test_the_note_names_for_each_value_its_error(face: Any, clock: FakeClock) -> None:
    body = always(ConnectionError, TimeoutError, KeyError, TimeoutError)
    fetch = opero(cache=False, retries=1, min_delay=0, arg_fallback="model")(face.of(body))
    (note,) = caught(face, fetch, ["a", "b"]).__notes__
    assert note.splitlines() == [
        "opero: charge() gave up after 2 attempts, 4 calls",
        "  model='a': ConnectionError ×1, KeyError ×1",
        "  model='b': TimeoutError ×2",
    ]


def test_the_note_counts_rejected_results(face: Any, clock: FakeClock) -> None:
    outcomes = iter(["", "", ValueError()])

    def charge() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    fetch = opero(cache=False, retries=2, min_delay=0, retry_if_result=lambda r: not r)(
        face.of(charge)
    )
    error = caught(face, fetch)
    assert error.__notes__[0].splitlines()[1] == "  rejected result ×2, ValueError ×1"
    assert failures(error) == [error]


def test_an_error_that_is_not_retried_says_why(face: Any) -> None:
    error = caught(face, opero(cache=False, retry_on=KeyError)(face.of(always(ValueError))))
    assert error.__notes__ == [
        "opero: charge() was not retried: ValueError is not what retry_on asks for"
    ]


def test_an_error_that_stop_ended_at_once_does_not_blame_retry_on(face: Any) -> None:
    fetch = opero(cache=False, stop=tenacity.stop_after_attempt(1))(face.of(always(ValueError)))
    (note,) = caught(face, fetch).__notes__
    assert "gave up after 1 attempt, 1 call" in note
    assert "retry_on" not in note


@pytest.mark.parametrize(
    "options", [{"retries": 0}, {"retries": 0, "arg_fallback": "model"}], ids=len
)
def test_a_single_call_without_retries_has_no_note(face: Any, options: Any) -> None:
    assert not hasattr(
        caught(face, opero(cache=False, **options)(face.of(always(OSError)))), "__notes__"
    )


def test_the_note_of_a_method_names_it() -> None:
    class Client:
        @opero(cache=False, retries=1, min_delay=0)
        def fetch(self) -> None:
            raise OSError

    with pytest.raises(OSError, match=r"fetch\(\) gave up"):
        Client().fetch()


# --- tracebacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_the_traceback_ends_at_the_users_raise(face: Any, retries: int) -> None:
    fetch = opero(cache=False, min_delay=0, retries=retries, arg_fallback="model")(
        face.of(always(OSError))
    )
    frames = traceback.extract_tb(caught(face, fetch, ["a", "b"]).__traceback__)
    assert frames[-1].name == "charge"
    ours = [f for f in frames if "/opero/core/" in f.filename or f.filename.startswith("<opero")]
    assert len(ours) <= 9


def test_the_first_calls_error_shows_where_it_was_raised(face: Any) -> None:
    error = caught(face, opero(cache=False, retry_on=KeyError)(face.of(always(OSError))))
    frames = traceback.extract_tb(error.__traceback__)
    assert frames[-1].name == "charge"
    assert all(frame.line for frame in frames)


# --- events ---------------------------------------------------------------------------------------


def told(event: Event) -> tuple[Any, ...]:
    """An event as a tuple, without its time."""
    match event:
        case AttemptFailed():
            return ("failed", event.attempt, event.value, type(event.error).__name__)
        case RetryScheduled():
            return ("retry", event.attempt, event.delay)
        case FallbackUsed():
            return ("fallback", event.value, event.index)
        case CallSucceeded():
            return ("succeeded", event.attempts, event.calls)
        case CallGaveUp():
            return ("gave up", event.attempts, event.calls, type(event.error).__name__)
        case _:
            return (type(event).__name__,)


def test_events_come_in_order_with_the_right_numbers(face: Any, clock: FakeClock) -> None:
    outcomes = iter([OSError(), KeyError(), ValueError(), "fine"])

    def body(model: str) -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    fetch = opero(cache=False, min_delay=2, jitter=False, arg_fallback="model")(face.of(body))
    with capture_events() as events:
        face.run(fetch, ["a", "b"])
    assert [told(e) for e in events] == [
        ("failed", 1, "model='a'", "OSError"),
        ("fallback", "model='b'", 1),
        ("failed", 1, "model='b'", "KeyError"),
        ("retry", 2, 2.0),
        ("failed", 2, "model='a'", "ValueError"),
        ("fallback", "model='b'", 1),
        ("succeeded", 2, 4),
    ]


def test_giving_up_is_the_last_event_and_carries_the_error(face: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False, retries=1, min_delay=1, jitter=False)(face.of(always(OSError)))
    with capture_events() as events:
        error = caught(face, fetch)
    assert [told(e) for e in events] == [
        ("failed", 1, None, "OSError"),
        ("retry", 2, 1.0),
        ("failed", 2, None, "OSError"),
        ("gave up", 2, 2, "OSError"),
    ]
    assert isinstance(events[-1], CallGaveUp)
    assert events[-1].error is error
    assert [type(e) for e in failures(error)] == [OSError, OSError]


def test_a_rejected_result_is_a_failed_attempt_without_an_error(
    face: Any, clock: FakeClock
) -> None:
    results = iter([0, 1])
    fetch = opero(cache=False, min_delay=0, retry_if_result=lambda n: not n)(
        face.of(lambda: next(results))
    )
    with capture_events(AttemptFailed, CallSucceeded) as events:
        face.run(fetch)
    assert [told(e) for e in events] == [("failed", 1, None, "NoneType"), ("succeeded", 2, 2)]


def test_an_event_names_the_function_by_its_qualified_name(face: Any) -> None:
    fetch = opero(cache=False)(face.of(always(OSError)))
    with capture_events() as events, set_disabled():
        caught(face, fetch)
    assert {e.function for e in events} == {"always.<locals>.charge"}


def test_a_functions_own_listener_gets_its_own_calls_only(face: Any) -> None:
    heard: list[Event] = []
    mine = opero(cache=False, on_event=heard.append)(face.of(flaky("fine", failures=0)))
    face.run(opero(cache=False)(face.of(flaky("fine", failures=0))))
    assert heard == []
    face.run(mine)
    assert [told(e) for e in heard] == [("succeeded", 1, 1)]


def test_a_listener_that_raises_breaks_nothing(
    face: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def listener(event: Event) -> None:
        raise RuntimeError("the listener's own")

    fetch = opero(cache=False, min_delay=0, on_event=listener)(face.of(flaky("fine", failures=1)))
    assert face.run(fetch) == "fine"
    assert "the listener's own" in capsys.readouterr().err


# --- counters -------------------------------------------------------------------------------------


def test_counters_tell_what_happened(face: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False, retries=1, min_delay=2, jitter=False)(
        face.of(flaky("fine", failures=3))
    )
    caught(face, fetch)
    assert face.run(fetch) == "fine"
    assert fetch.stats.as_dict() == {
        "calls": 4, "failures": 3, "retries": 2, "fallbacks": 0, "gave_up": 1, "slept": 4.0,
        "hits": 0, "misses": 0, "shared": 0, "stale": 0, "waited": 0.0,
    }  # fmt: skip


def test_a_refusal_before_the_first_call_is_given_up_without_a_note(face: Any) -> None:
    fetch = opero(cache=False, arg_fallback="model")(face.of(always(OSError)))
    with capture_events() as events:
        error = caught(face, fetch, [])
    assert isinstance(error, OperoUsageError)
    assert not hasattr(error, "__notes__")
    assert [told(e) for e in events] == [("gave up", 1, 0, "OperoUsageError")]
    assert fetch.stats.gave_up == 1
