# this_file: tests/core/test_retry.py
"""Retry: what is tried again, how often, and after which pause."""

from __future__ import annotations

import asyncio
import io
import itertools
import pickle
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import rows

from opero import opero
from opero.core.retry import RetryPolicy, RetryState, grown
from opero.errors import (
    DeadlineError,
    OperoUsageError,
    OperoWarning,
    RefusalError,
    Rejected,
    UnkeyableError,
)
from opero.testing import FakeClock, flaky, set_disabled
from opero.utils import ambient

pytestmark = pytest.mark.internal

# --- decisions: the pauses ------------------------------------------------------------------------

seconds = st.floats(0, 1e9)
factors = st.floats(1, 1e6) | st.integers(1, 10)
attempts = st.integers(1, 10_000)


@given(attempts, seconds, seconds, factors)
def test_every_drawn_pause_lies_in_its_bounds(
    retry: int, a: float, b: float, factor: float
) -> None:
    low, high = sorted((a, b))
    policy = RetryPolicy(retries=retry, min_delay=low, max_delay=high, backoff_factor=factor)
    highest = policy.longest_pause(retry)
    pause = RetryState(policy, retry).next_delay(ValueError(), now=0.0)
    assert pause is not None
    assert low <= pause <= highest <= high


@given(st.integers(1, 40), st.floats(0.001, 10), st.floats(1, 3))
def test_upper_bound_is_the_capped_power(retry: int, low: float, factor: float) -> None:
    assert grown(low, 1e6, factor, retry) == min(1e6, low * factor**retry)


@given(attempts, seconds, seconds, factors)
def test_without_jitter_a_pause_is_the_power_before(
    retry: int, a: float, b: float, factor: float
) -> None:
    low, high = sorted((a, b))
    policy = RetryPolicy(
        retries=retry, min_delay=low, max_delay=high, backoff_factor=factor, jitter=False
    )
    pause = RetryState(policy, retry).next_delay(ValueError(), now=0.0)
    try:
        expected = min(high, low * factor ** (retry - 1))
    except OverflowError:
        expected = high if low else 0.0
    assert pause == expected


@pytest.mark.parametrize(
    ("low", "high", "factor", "expected"),
    [
        (0.1, 30.0, 1.5, 30.0),
        (0.0, 30.0, 2, 0.0),
        (5.0, 5.0, 1e300, 5.0),
        (0.1, 30.0, 1, 0.1),
    ],
)
def test_the_ten_thousandth_pause_does_not_overflow(
    low: float, high: float, factor: float, expected: float
) -> None:
    assert grown(low, high, factor, 10_000) == pytest.approx(expected)


def test_drawn_pauses_fill_their_range() -> None:
    policy = RetryPolicy(min_delay=1.0, max_delay=100.0, backoff_factor=3.0)
    drawn = [RetryState(policy, 2).next_delay(ValueError(), now=0.0) for _ in range(400)]
    assert min(drawn) < 1.5
    assert max(drawn) > 8.5


def test_a_hint_is_a_floor_under_one_pause_only() -> None:
    state = RetryState(RetryPolicy(min_delay=1.0, backoff_factor=1.0, jitter=False))
    assert state.next_delay(ValueError(), now=0.0, hint=7.0) == 7.0
    assert state.next_delay(ValueError(), now=0.0) == 1.0


# --- decisions: the end ---------------------------------------------------------------------------


def test_a_spent_state_gives_no_other_pause() -> None:
    state = RetryState(RetryPolicy(retries=1, min_delay=0.0))
    assert state.next_delay(ValueError(), now=0.0) == 0.0
    assert state.next_delay(ValueError(), now=0.0) is None
    assert state.attempt_number == 2


@pytest.mark.parametrize(
    "refusal", [RefusalError(), DeadlineError(), OperoUsageError(), UnkeyableError()], ids=repr
)
@pytest.mark.parametrize("wanted", [Exception, BaseException, lambda error: True])
def test_a_refusal_is_final_whatever_retry_on_says(refusal: Exception, wanted: Any) -> None:
    state = RetryState(RetryPolicy(retry_on=wanted))
    assert state.next_delay(refusal, now=0.0, attempt_errors=[ValueError()]) is None
    assert state.attempt_number == 1


def test_one_matching_error_of_the_walk_is_enough() -> None:
    state = RetryState(RetryPolicy(retry_on=TimeoutError, min_delay=0.0))
    last = ValueError()
    assert state.next_delay(last, now=0.0, attempt_errors=[TimeoutError(), last]) == 0.0
    assert state.next_delay(last, now=0.0, attempt_errors=[KeyError(), last]) is None


def test_the_final_error_is_asked_about_even_if_the_walk_lacks_it() -> None:
    state = RetryState(RetryPolicy(retry_on=ValueError, min_delay=0.0))
    assert state.next_delay(ValueError(), now=0.0, attempt_errors=[KeyError()]) == 0.0


def test_a_parked_state_goes_on_where_it_was() -> None:
    state = RetryState(RetryPolicy(retries=3, min_delay=1.0, backoff_factor=2.0, jitter=False))
    state.next_delay(ValueError(), now=0.0)
    parked = pickle.loads(pickle.dumps(state))
    assert parked.attempt_number == 2
    assert [parked.next_delay(ValueError(), now=0.0) for _ in range(3)] == [2.0, 4.0, None]


def test_a_parked_state_goes_on_in_another_process() -> None:
    policy = RetryPolicy(
        min_delay=1.0,
        backoff_factor=2.0,
        jitter=False,
        retry_on=KeyError,
        stop=tenacity.stop_after_attempt(4),
    )
    state = RetryState(policy)
    state.next_delay(KeyError(), now=0.0)
    code = (
        "import pickle, sys; state = pickle.load(sys.stdin.buffer); "
        "print(state.attempt_number, state.idle_for, state.next_delay(KeyError(), now=9.0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(state), capture_output=True, check=True
    )
    assert done.stdout.split() == [b"2", b"1.0", b"2.0"]


# --- how often ------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_calls_are_one_plus_retries(face: Any, clock: FakeClock, retries: int) -> None:
    body = flaky("never", failures=99)
    with pytest.raises(ConnectionError, match=f"flaky failure {1 + retries} of"):
        face.run(opero(cache=False, retries=retries)(face.of(body)))
    assert body.calls == 1 + retries


def test_three_retries_are_the_default(face: Any, clock: FakeClock) -> None:
    body = flaky("never", failures=99)
    with pytest.raises(ConnectionError):
        face.run(opero(cache=False)(face.of(body)))
    assert (body.calls, len(clock.sleeps)) == (4, 3)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_it_stops_with_the_first_success(face: Any, clock: FakeClock, failures: int) -> None:
    body = flaky("fine", failures=failures)
    assert face.run(opero(cache=False)(face.of(body))) == "fine"
    assert (body.calls, len(clock.sleeps)) == (failures + 1, failures)


def test_every_call_starts_with_a_fresh_count(face: Any, clock: FakeClock) -> None:
    body = flaky("fine", failures=5)
    fetch = opero(cache=False, retries=2)(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert face.run(fetch) == "fine"
    assert body.calls == 6


def test_no_jitter_gives_the_exact_pauses(face: Any, clock: FakeClock) -> None:
    fetch = opero(
        cache=False,
        retries=5,
        min_delay="500ms",
        max_delay=3,
        backoff_factor=2,
        jitter=False,
    )(face.of(flaky("fine", failures=5)))
    face.run(fetch)
    assert clock.sleeps == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert fetch.stats.slept == 9.5
    assert fetch.stats.retries == 5


def test_the_default_pauses_bridge_about_half_a_second(face: Any, clock: FakeClock) -> None:
    face.run(opero(cache=False)(face.of(flaky("fine", failures=3))))
    for pause, highest in zip(clock.sleeps, (0.15, 0.225, 0.3375), strict=True):
        assert 0.1 <= pause <= highest * 1.000001


class NoSleepClock:
    """A clock on which no call may sleep."""

    monotonic = staticmethod(time.monotonic)

    def sleep(self, seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s")

    async def asleep(self, seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s")


@pytest.fixture
def no_sleep() -> Iterator[None]:
    before = ambient.install_clock(NoSleepClock())
    yield
    ambient.install_clock(before)


@pytest.mark.usefixtures("no_sleep")
@pytest.mark.parametrize(
    "options",
    [
        {"min_delay": 0},
        {"min_delay": 0, "max_delay": 0},
        {"min_delay": 0, "jitter": False},
        {"wait": tenacity.wait_none()},
        {"wait": tenacity.wait_fixed(0)},
        {"wait": lambda state: -3},
    ],
    ids=" ".join,
)
def test_zero_delay_is_no_call_of_sleep(face: Any, options: dict[str, Any]) -> None:
    body = flaky("fine", failures=3)
    assert face.run(opero(cache=False, **options)(face.of(body))) == "fine"
    assert body.calls == 4


@pytest.mark.usefixtures("no_sleep")
def test_success_never_sleeps(face: Any) -> None:
    assert face.run(opero(cache=False)(face.of(flaky("fine", failures=0)))) == "fine"


# --- what is retried ------------------------------------------------------------------------------


def is_busy(error: BaseException) -> bool:
    return "1 of" in str(error)


@rows(
    ("wanted", "calls"),
    [
        (ConnectionError, 4),
        (OSError, 4),
        ((ValueError, ConnectionError), 4),
        (BaseException, 4),
        (ValueError, 1),
        ((ValueError, KeyError), 1),
        (is_busy, 2),
        (lambda error: False, 1),
        (tenacity.retry_if_exception_type(ConnectionError), 4),
        (tenacity.retry_if_exception_type(ValueError), 1),
        (tenacity.retry_if_exception_message(match=".*[12] of"), 3),
        (tenacity.retry_if_not_exception_type(ConnectionError), 1),
        (
            tenacity.retry_if_exception_type(OSError)
            & tenacity.retry_if_exception_message(match=".*1 of"),
            2,
        ),
        (
            tenacity.retry_if_exception_type(KeyError)
            | tenacity.retry_if_exception_message(match=".*1 of"),
            2,
        ),
        (tenacity.retry_never, 1),
        (tenacity.retry_always, 4),
    ],
)
def test_retry_on_decides(face: Any, clock: FakeClock, wanted: Any, calls: int) -> None:
    body = flaky("never", failures=99)
    with pytest.raises(ConnectionError, match=f"flaky failure {calls} of"):
        face.run(opero(cache=False, retry_on=wanted)(face.of(body)))
    assert body.calls == calls


def broken(subject: Any) -> Any:
    raise LookupError("the predicate's own")


class BrokenStrategy(tenacity.retry_base):
    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        raise LookupError("the strategy's own")


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"retry_on": broken}, 1),
        ({"retry_on": BrokenStrategy()}, 1),
        ({"stop": broken}, 1),
        ({"wait": broken}, 4),
        ({"wait": lambda state: float("nan")}, 4),
        ({"wait": lambda state: float("inf")}, 4),
        ({"wait": lambda state: "soon"}, 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_a_broken_predicate_warns_and_never_hides_the_error(
    face: Any, clock: FakeClock, options: dict[str, Any], calls: int
) -> None:
    body = flaky("never", failures=99)
    with (
        pytest.warns(OperoWarning, match=r"raised (LookupError|ValueError)"),
        pytest.raises(ConnectionError),
    ):
        face.run(opero(cache=False, **options)(face.of(body)))
    assert body.calls == calls
    assert all(0.1 <= pause <= 1 for pause in clock.sleeps)


@rows("passing", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
@rows("wanted", [BaseException, lambda error: True])
@rows("failures", [0, 1])
def test_only_exceptions_are_ever_retried(
    face: Any, clock: FakeClock, passing: type[BaseException], wanted: Any, failures: int
) -> None:
    calls = 0

    def body(model: str = "a") -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError if calls <= failures else passing("now")

    fetch = opero(
        cache=False,
        retry_on=wanted,
        fallback_on=wanted,
        arg_fallback="model" if not failures else None,
    )(face.of(body))
    with pytest.raises(passing) as caught:
        face.run(fetch, *([["a", "b"]] if not failures else []))
    assert calls == failures + 1
    assert not hasattr(caught.value, "__notes__")


# --- tenacity's strategies of the user's ----------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "pauses"),
    [
        (tenacity.wait_fixed(2), [2, 2, 2]),
        (tenacity.wait_incrementing(start=1, increment=2), [1, 3, 5]),
        (tenacity.wait_exponential(multiplier=1, max=3), [1, 2, 3]),
        (tenacity.wait_chain(*map(tenacity.wait_fixed, (1, 7))), [1, 7, 7]),
        (tenacity.wait_fixed(1) + tenacity.wait_fixed(0.5), [1.5, 1.5, 1.5]),
        (lambda state: state.attempt_number * 10, [10, 20, 30]),
        (lambda state: float(str(state.outcome.exception())[14]), [1, 2, 3]),
        (lambda state: state.idle_for + 1, [1, 2, 4]),
    ],
    ids=["fixed", "incrementing", "exponential", "chain", "sum", "attempt", "outcome", "idle"],
)
def test_wait_replaces_the_pauses(
    face: Any, clock: FakeClock, wait: Any, pauses: list[float]
) -> None:
    face.run(opero(cache=False, wait=wait)(face.of(flaky("fine", failures=3))))
    assert clock.sleeps == pauses


@pytest.mark.parametrize(
    ("stop", "calls"),
    [
        (tenacity.stop_after_attempt(6), 6),
        (tenacity.stop_after_attempt(1), 1),
        (tenacity.stop_after_delay(25), 4),
        (tenacity.stop_before_delay(25), 3),
        (tenacity.stop_after_delay(25) | tenacity.stop_after_attempt(2), 2),
        (tenacity.stop_after_delay(5) & tenacity.stop_after_attempt(5), 5),
        (lambda state: state.seconds_since_start >= 40, 5),
    ],
    ids=["attempts", "first", "after delay", "before delay", "either", "both", "own"],
)
def test_stop_replaces_the_end(face: Any, clock: FakeClock, stop: Any, calls: int) -> None:
    body = flaky("never", failures=99)
    fetch = opero(cache=False, stop=stop, wait=tenacity.wait_fixed(10))(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert body.calls == calls
    assert clock.sleeps == [10] * (calls - 1)


def test_stop_counts_the_time_of_the_first_call_too(face: Any, clock: FakeClock) -> None:
    def body() -> None:
        clock.advance(20)
        raise ConnectionError

    fetch = opero(cache=False, stop=tenacity.stop_after_delay(15), min_delay=0)(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert fetch.stats.calls == 1


def test_a_strategy_never_sees_the_arguments(face: Any, clock: FakeClock) -> None:
    seen: list[tenacity.RetryCallState] = []

    def body(api_key: str) -> None:
        raise ConnectionError

    fetch = opero(cache=False, wait=lambda state: seen.append(state) or 0.0)(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch, "hunter2")
    assert seen
    assert not any("hunter2" in f"{vars(state)}{state}" for state in seen)


# --- results --------------------------------------------------------------------------------------


def test_a_rejected_result_is_tried_again(face: Any, clock: FakeClock) -> None:
    results = iter(["", "", "full"])
    fetch = opero(cache=False, retry_if_result=lambda r: not r)(face.of(lambda: next(results)))
    assert face.run(fetch) == "full"
    assert (fetch.stats.calls, fetch.stats.failures, fetch.stats.gave_up) == (3, 2, 0)


def test_the_last_result_is_returned_when_all_were_rejected(face: Any, clock: FakeClock) -> None:
    results = iter(range(99))
    fetch = opero(cache=False, retry_if_result=lambda r: True)(face.of(lambda: next(results)))
    receipt = face.run(fetch.call)
    assert (receipt.value, receipt.rejected, receipt.calls, receipt.errors) == (3, True, 4, ())
    assert face.run(fetch) == 7


def test_a_rejected_result_is_retried_whatever_retry_on_says(face: Any, clock: FakeClock) -> None:
    results = iter(["", "full"])
    fetch = opero(cache=False, retry_on=KeyError, retry_if_result=lambda r: not r)(
        face.of(lambda: next(results))
    )
    assert face.run(fetch) == "full"


def test_rejected_results_and_errors_share_the_attempts(face: Any, clock: FakeClock) -> None:
    outcomes = iter([ValueError(), "", ValueError(), ""])

    def body() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    receipt = face.run(opero(cache=False, retry_if_result=lambda r: not r)(face.of(body)).call)
    assert (receipt.value, receipt.rejected, receipt.attempts) == ("", True, 4)
    assert [type(e) for e in receipt.errors] == [ValueError, ValueError]


def test_a_strategy_sees_a_rejected_result(face: Any, clock: FakeClock) -> None:
    seen: list[Any] = []
    numbers = iter(range(9))
    fetch = opero(
        cache=False,
        retry_if_result=lambda r: r < 2,
        wait=lambda state: seen.append(state.outcome.result()) or 0.0,
    )(face.of(lambda: next(numbers)))
    assert face.run(fetch) == 2
    assert seen == [0, 1]


def test_a_broken_result_predicate_warns_and_takes_the_result(face: Any) -> None:
    fetch = opero(cache=False, retry_if_result=broken)(face.of(lambda: "fine"))
    with pytest.warns(OperoWarning, match="predicate broken raised LookupError"):
        assert face.run(fetch) == "fine"


def test_no_caller_ever_sees_the_signal(face: Any) -> None:
    fetch = opero(cache=False, retries=0, retry_if_result=lambda r: True)(face.of(lambda: 1))
    try:
        assert face.run(fetch) == 1
    except Rejected:  # pragma: no cover - the failure that this test looks for
        pytest.fail("the signal got out")


# --- the test switch, and the line of explain() ---------------------------------------------------


def test_switched_off_there_is_one_call_and_no_note(face: Any) -> None:
    body = flaky("never", failures=99)
    with set_disabled(), pytest.raises(ConnectionError) as caught:
        face.run(opero(cache=False)(face.of(body)))
    assert body.calls == 1
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "1 + 3 attempts on any error but final answers, pause 0.1 s to 0.15, 0.225, 0.338 s"),
        (
            {"jitter": False, "retries": 2},
            "1 + 2 attempts on any error but final answers, pause 0.1, 0.15 s",
        ),
        (
            {"retries": 9},
            "1 + 9 attempts on any error but final answers, pause 0.1 s to 0.15, 0.225, 0.338, … s",
        ),
        ({"min_delay": 0}, "1 + 3 attempts on any error but final answers, no pauses"),
        (
            {"retry_on": (OSError, KeyError), "min_delay": 0},
            "1 + 3 attempts on OSError or KeyError",
        ),
        ({"retry_on": is_busy}, "1 + 3 attempts on what is_busy accepts"),
        (
            {"stop": tenacity.stop_never, "wait": tenacity.wait_none()},
            "until the given stop on any error but final answers, pauses by the given wait",
        ),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, dict) else None,
)
def test_explain_prints_the_numbers(options: dict[str, Any], line: str) -> None:
    assert line in opero(cache=False, **options)(lambda: None).explain()


# --- arguments that can be read only once ---------------------------------------------------------


async def _items() -> Any:
    yield 1


SINGLE_USE: dict[str, Callable[[], object]] = {
    "generator": lambda: (n for n in (1, 2)),
    "iterator": lambda: iter([1, 2]),
    "map": lambda: map(str, [1, 2]),
    "file": lambda: io.StringIO("text"),
    "async generator": _items,
    "file in a dict": lambda: {"files": [("a.txt", io.BytesIO(b"text"))]},
}
REUSABLE: dict[str, object] = {
    "list": [1, 2],
    "range": range(2),
    "counter": itertools.count(),
    "cursor": sqlite3.connect(":memory:").cursor(),
}


@rows("kind", SINGLE_USE)
@rows("way", ["positional", "keyword", "starred", "method", "fallback"])
def test_no_second_call_is_made_with_an_argument_that_is_used_up(kind: str, way: str) -> None:
    calls: list[object] = []
    decorate = opero(cache=False, min_delay=0)

    def body(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise ConnectionError("down")

    class Client:
        @decorate
        def send(self, items: object) -> None:
            body()

    @decorate
    def send(items: object, *more: object) -> None:
        body()

    @opero(cache=False, retries=0, arg_fallback="model")
    def fall_back(items: object, model: Any = ("a", "b")) -> None:
        body()

    given = SINGLE_USE[kind]()
    call = {
        "positional": lambda: send(given),
        "keyword": lambda: send(items=given),
        "starred": lambda: send([], given),
        "method": lambda: Client().send(given),
        "fallback": lambda: fall_back(given),
    }[way]
    with pytest.raises(ConnectionError) as caught:
        call()
    assert len(calls) == 1
    if way != "fallback":
        name = "argument 2" if way == "starred" else "items"
        assert f"{name} is an iterator or file" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", REUSABLE)
def test_other_arguments_are_used_again(kind: str) -> None:
    fetch = opero(cache=False, min_delay=0)(flaky("fine", failures=2))
    assert fetch(REUSABLE[kind]) == "fine"


def test_an_iterator_whose_methods_are_decorated_is_no_argument() -> None:
    calls: list[int] = []

    class Pages:
        def __iter__(self) -> Any:
            return self

        @opero(cache=False, min_delay=0)
        def __next__(self) -> int:
            calls.append(1)
            raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        next(Pages())
    assert len(calls) == 4
