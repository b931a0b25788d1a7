# this_file: tests/limits/test_breaker_state.py
"""What a breaker decides: when it opens, for how long, and what its state remembers."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import inspect
import os
import pickle
import random
import signal
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.limits.test_breaker import changes, fail, half_open, succeed

from opero import CircuitBreaker, CircuitState
from opero.errors import (
    CircuitOpenError,
    DeadlineError,
    OperoError,
    OperoUsageError,
    Rejected,
)
from opero.limits.breaker_state import (
    FREE,
    STEPS,
    BreakerRules,
    BreakerState,
    CallWindow,
    Transition,
)
from opero.limits.windows import new_cells

if TYPE_CHECKING:
    from opero.events import CircuitChanged
    from opero.testing import FakeClock

pytestmark = pytest.mark.internal

CLOSED, OPEN, DISABLED = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.DISABLED


REFUSED = ConnectionRefusedError("refused")


@pytest.mark.parametrize(
    ("options", "error", "counted"),
    [
        ({}, REFUSED, True),
        ({}, TypeError(), True),
        ({"counts": OSError}, REFUSED, True),
        ({"counts": OSError}, TypeError(), False),
        ({"counts": (OSError, KeyError)}, KeyError(), True),
        ({"counts": lambda error: "refused" in str(error)}, REFUSED, True),
        ({"counts": lambda error: "refused" in str(error)}, TypeError(), False),
        ({"ignore": TypeError}, TypeError(), False),
        ({"ignore": TypeError}, REFUSED, True),
        ({"counts": OSError, "ignore": ConnectionError}, REFUSED, False),
        ({"ignore": lambda error: isinstance(error, TypeError)}, TypeError(), False),
        ({}, DeadlineError(), False),
        ({}, CircuitOpenError("inner", 1.0), False),
        ({"counts": OperoError}, OperoUsageError(), False),
        ({}, Rejected("poor"), False),
        ({"counts_result": lambda result: result == "poor"}, Rejected("poor"), True),
        ({"counts_result": lambda result: result == "poor"}, Rejected("fair"), False),
    ],
)
def test_what_counts_as_a_failure(options: dict[str, Any], error: Exception, counted: bool) -> None:
    breaker = CircuitBreaker(fail_max=1, **options)
    fail(breaker, error=error)
    assert (breaker.state is OPEN) is counted


def test_a_refused_result_is_an_answer() -> None:
    breaker = CircuitBreaker(fail_max=2)
    fail(breaker)
    fail(breaker, error=Rejected("poor"))
    fail(breaker)
    assert breaker.state is CLOSED


@given(
    outcomes=st.lists(st.booleans(), max_size=60),
    rate=st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]),
    length=st.integers(1, 12),
    least=st.integers(1, 12),
)
@example(outcomes=[True, *[False] * 5], rate=1.0, length=3, least=3)
@example(outcomes=[*[False] * 18, *[True] * 7], rate=0.28, length=25, least=25)
def test_a_count_window_trips_exactly_when_brute_force_does(
    outcomes: list[bool], rate: float, length: int, least: int
) -> None:
    least = min(least, length)
    state = BreakerState(BreakerRules(failure_rate=rate, window=length, minimum_calls=least))
    for place, failed in enumerate(outcomes):
        state.ended(state.generation, 0.0, failed=failed)
        last = outcomes[: place + 1][-length:]
        trips = failed and len(last) >= least and sum(last) / len(last) >= rate
        assert (state.state is OPEN) is trips
        if trips:
            return
        assert state.sums(0.0) == (len(last), sum(last))


def test_a_window_of_many_calls_counts_the_last_ones() -> None:
    window, last = CallWindow(130), deque[int](maxlen=130)
    assert [CallWindow(length).size for length in (1, 62, 63, 124)] == [3, 3, 4, 4]
    cells, rng = new_cells(window.size), random.Random(1)
    for _ in range(400):
        last.append(int(rng.random() < 0.3))
        window.add(cells, 0.0, 1, last[-1])
        assert window.sums(cells, 0.0) == (len(last), sum(last))


@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60),
    rate=st.sampled_from([0.3, 0.5, 1.0]),
    least=st.integers(1, 6),
)
def test_a_time_window_trips_exactly_when_brute_force_does(
    steps: list[tuple[int, bool]], rate: float, least: int
) -> None:
    width = 0.25
    rules = BreakerRules(failure_rate=rate, window=STEPS * width, minimum_calls=least)
    state = BreakerState(rules)
    now, seen = 1000.0, list[tuple[float, bool]]()
    for ticks, failed in steps:
        now += ticks / 16
        seen.append((now, failed))
        state.ended(state.generation, now, failed=failed)
        last = [bad for at, bad in seen if at // width > now // width - STEPS]
        trips = failed and len(last) >= least and sum(last) / len(last) >= rate
        assert (state.state is OPEN) is trips
        if trips:
            return
        assert state.sums(now) == (len(last), sum(last))


def test_a_clock_may_count_from_1970() -> None:
    state, now = BreakerState(BreakerRules(fail_max=1, jitter=0)), 1.8e9
    state.ended(state.generation, now, failed=True)
    assert (state.wait(now + 10), state.wait(now + 31)) == (20, None)
    state.add_probe(1, now + 31)
    assert state.stats(now + 32).probes == 1


@pytest.mark.parametrize(
    ("window", "calls", "seconds"),
    [
        (None, 100, 0),
        (20, 20, 0),
        (20.0, None, 20),
        ("2m", None, 120),
        (datetime.timedelta(minutes=1), None, 60),
    ],
)
def test_a_whole_number_is_calls_and_all_else_is_time(
    window: Any, calls: int | None, seconds: float
) -> None:
    rules = BreakerRules(failure_rate=0.5, window=window)
    assert (rules.window_calls, rules.window_seconds if calls is None else 0) == (calls, seconds)


@given(n=st.integers(0, 100_000), draw=st.floats(0, 1, exclude_max=True), jitter=st.floats(0, 0.9))
def test_jitter_shortens_the_open_time_and_never_lengthens_it(
    n: int, draw: float, jitter: float
) -> None:
    full = BreakerRules(jitter=0).open_seconds(n, 0)
    assert full * (1 - jitter) <= BreakerRules(jitter=jitter).open_seconds(n, draw) <= full


def test_what_rounding_takes_from_the_clock_does_not_matter() -> None:
    state = BreakerState(BreakerRules(fail_max=1, reset_timeout=30, jitter=0))
    state.ended(state.generation, now=0.0, failed=True)
    assert state.wait(now=sum([0.1] * 300) - 1e-9) is None


def test_each_of_several_probes_gives_its_own_place_back() -> None:
    rules = BreakerRules(fail_max=1, jitter=0, half_open_max=3, probe_timeout=20)
    state = BreakerState(rules)
    state.ended(state.generation, now=0.0, failed=True)
    for token in (1, 2, 3):
        assert state.wait(now=30.0) is None
        state.add_probe(token, now=30.0)
    assert [state.wait(now) for now in (30.0, 33.0)] == [20, 17]
    state.end_probe(2)
    assert state.wait(now=30.0) is None
    assert state.stats(now=30.0).probes == 2
    state.end_probe(None)
    assert state.stats(now=30.0).probes == 0


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"window": "1m"}, 10),
        ({"window": 100}, 10),
        ({"window": 5}, 5),
        ({"window": 5, "minimum_calls": 3}, 3),
        ({"window": "1m", "minimum_calls": 30}, 30),
    ],
)
def test_a_rate_means_nothing_before_so_many_calls(options: dict[str, Any], least: int) -> None:
    rules = BreakerRules(failure_rate=0.5, **options)
    assert not rules.trips(least - 1, least - 1)
    assert rules.trips(least, least)


def test_a_disabled_circuit_lets_all_through_and_counts_nothing() -> None:
    breaker = CircuitBreaker(fail_max=1)
    breaker.disable()
    fail(breaker, 10)
    with breaker.acquire():
        pass
    assert breaker.acquire() is FREE
    assert breaker.state is DISABLED
    breaker.close()
    assert breaker.state is CLOSED
    assert breaker.stats.failures == 0


def test_each_stay_in_a_state_has_the_next_number() -> None:
    state, numbers = BreakerState(BreakerRules()), list[int]()
    for change in (lambda: state.open(0.0), state.force_open, state.disable, state.close):
        change()
        numbers.append(state.generation)
    assert numbers == [1, 2, 3, 4]


def test_the_longest_open_time_may_be_the_first() -> None:
    rules = BreakerRules(reset_timeout=20, max_reset_timeout=20, jitter=0)
    assert rules.open_seconds(3, draw=0.0) == 20


def test_a_change_that_comes_while_the_notifier_leaves_is_delivered_too() -> None:
    reported: list[CircuitChanged] = []
    breaker = CircuitBreaker(on_change=reported.append)
    late = [Transition(OPEN, CLOSED, None)]

    class Door:
        def acquire(self, *, blocking: bool) -> bool:
            return not blocking

        def release(self) -> None:
            if late:
                breaker._core.transitions.append(late.pop())

    breaker._notifying = Door()  # type: ignore[assignment]  # as much of a lock as is used
    breaker.open()
    assert changes(list(reported)) == [("closed", "open"), ("open", "closed")]


def test_a_pickle_that_outlives_its_breaker_makes_one_for_this_process() -> None:
    breaker = CircuitBreaker("geocoder", fail_max=2)
    breaker.open()
    data = pickle.dumps(breaker)
    gone = weakref.ref(breaker)
    del breaker
    gc.collect()
    assert gone() is None
    with pytest.warns(RuntimeWarning, match="per process"):
        one = pickle.loads(data)
    two = pickle.loads(data)
    assert one is two
    assert (one.name, one.state, one.rules) == ("geocoder", CLOSED, BreakerRules(fail_max=2))
    assert pickle.loads(pickle.dumps(one)) is one


def test_a_process_killed_while_it_stores_a_circuit_leaves_a_closed_one() -> None:
    breaker = CircuitBreaker(fail_max=1)
    breaker.share()
    fail(breaker)
    file = breaker._file
    assert file is not None
    file._header[1] = 1
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_free_locks_and_no_probes(clock: FakeClock) -> None:
    breaker = half_open(clock)
    breaker.acquire()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with breaker._lock, breaker._notifying:
            held.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(10)
            reported: list[CircuitChanged] = []
            breaker.subscribe(reported.append)
            breaker.acquire().success()
            code = int(changes(list(reported)) != [("half_open", "closed")])
        finally:
            os._exit(code)
    done.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0


def test_the_repr_shows_the_state(clock: FakeClock) -> None:
    breaker = CircuitBreaker("geocoder", fail_max=2, jitter=0)
    assert repr(breaker) == "<CircuitBreaker 'geocoder' closed>"
    fail(breaker)
    assert repr(breaker) == "<CircuitBreaker 'geocoder' closed, 1 failure in a row>"
    fail(breaker)
    assert repr(breaker) == "<CircuitBreaker 'geocoder' open, again in 30 s>"
    clock.advance(30)
    assert repr(breaker) == "<CircuitBreaker 'geocoder' half-open>"
    probe = breaker.acquire()
    assert repr(breaker) == "<CircuitBreaker 'geocoder' half-open, 1 probe under way>"
    assert repr(probe) == "<Permit for a probe>"
    breaker.force_open()
    assert repr(breaker) == "<CircuitBreaker 'geocoder' forced open>"
    rated = CircuitBreaker("routes", failure_rate=0.5)
    succeed(rated)
    fail(rated)
    assert repr(rated) == "<CircuitBreaker 'routes' closed, 1 failure of 2>"
    assert repr(rated.acquire()) == "<Permit of a closed circuit>"
    assert repr(FREE) == "<Permit of a disabled circuit>"


def test_all_options_are_handed_on_with_the_defaults_that_the_signature_shows() -> None:
    assert CircuitBreaker().rules == BreakerRules()
    options = inspect.signature(CircuitBreaker).parameters.values()
    shown = {option.name: option.default for option in options if option.name != "name"}
    assert shown == {field.name: field.default for field in dataclasses.fields(BreakerRules)}
