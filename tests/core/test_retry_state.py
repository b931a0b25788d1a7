# this_file: tests/core/test_retry_state.py
"""What a retry decides: whether to try again, and after which pause."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from opero import RetryBudget, opero
from opero.core.call import Call, RetryParked
from opero.core.retry import RetryPolicy, RetryState, grown, is_retry_error, retry_error
from opero.errors import (
    DeadlineError,
    OperoUsageError,
    RefusalError,
    Rejected,
    UnkeyableError,
)
from opero.testing import fake_clock, flaky
from opero.utils import ambient

pytestmark = pytest.mark.internal


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


def test_no_caller_ever_sees_the_signal(face: Any) -> None:
    fetch = opero(cache=False, retries=0, retry_if_result=lambda r: True)(face.of(lambda: 1))
    try:
        assert face.run(fetch) == 1
    except Rejected:  # pragma: no cover - the failure that this test looks for
        pytest.fail("the signal got out")


def test_a_policy_says_which_errors_it_retries() -> None:
    policy = RetryPolicy(retry_on=KeyError)
    assert [policy.retries_on(error) for error in (KeyError(), ValueError())] == [True, False]


def test_before_the_first_failure_no_time_has_passed() -> None:
    assert RetryState(RetryPolicy(), start_time=5.0).seconds_since_start == 0.0


def test_the_error_that_stands_for_the_last_one_is_tenacitys() -> None:
    last = ValueError("no")
    error = retry_error(last, 3)
    assert isinstance(error, tenacity.RetryError)
    assert error.last_attempt.exception() is last
    assert error.last_attempt.attempt_number == 3
    assert (is_retry_error(error), is_retry_error(last)) == (True, False)


# --- parked pauses --------------------------------------------------------------------------------


def run(pipeline: Any, call: Call) -> Any:
    value = pipeline.run(call)
    return asyncio.run(value) if pipeline.awaits else value


def retried(*, awaits: bool, failures: int = 1) -> Any:
    async def answer() -> str:
        return "ok"

    made = flaky(answer if awaits else "ok", failures=failures)
    return opero(cache=False, retries=2, min_delay=60, max_delay=60)(made)


@pytest.mark.parametrize("awaits", [False, True])
def test_a_pause_that_is_too_long_parks_the_call_which_goes_on_later(awaits: bool) -> None:
    fetch, call = retried(awaits=awaits), Call((), {})
    call.park_after = 59.9
    with pytest.raises(RetryParked) as parked:
        run(fetch.__opero__, call)
    assert parked.value.seconds == call.slept == fetch.stats.slept == 60.0
    assert (call.attempts, call.calls) == (2, 1)
    assert run(fetch.__opero__, call) == "ok"
    assert (call.attempts, call.calls, call.slept) == (2, 2, 60.0)


@pytest.mark.parametrize(
    ("options", "started"),
    [
        ({"stop": tenacity.stop_after_attempt(2)}, 5.0),
        ({"retry_budget": RetryBudget()}, None),
    ],
    ids=["known", "not asked for"],
)
def test_the_clock_is_read_before_an_attempt_only_where_the_start_is_asked_for(
    options: dict[str, Any], started: float | None
) -> None:
    fetch, call = opero(cache=False, **options)(lambda: "ok"), Call((), {})
    call.started = started
    assert run(fetch.__opero__, call) == "ok"
    assert call.started == started


@pytest.mark.parametrize("awaits", [False, True])
def test_a_pause_that_is_just_short_enough_is_made_here(awaits: bool) -> None:
    fetch, call = retried(awaits=awaits, failures=2), Call((), {})
    call.park_after = 60.0
    with fake_clock() as clock:
        assert run(fetch.__opero__, call) == "ok"
    assert clock.sleeps == [60.0, 60.0]
    assert (call.attempts, call.calls, call.slept, fetch.stats.slept) == (3, 3, 120.0, 120.0)
