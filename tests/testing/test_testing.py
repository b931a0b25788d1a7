# this_file: tests/testing/test_testing.py
"""What users get for tests of their own: the switch, the fake clock, flaky functions."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from opero import ConcurrencyLimit, opero
from opero.errors import DeadlineError
from opero.events import CacheHit, RetryScheduled, event_bus
from opero.testing import (
    FakeClock,
    capture_events,
    fake_clock,
    flaky,
    is_disabled,
    set_disabled,
)
from opero.utils import ambient
from opero.utils.ambient import switch

pytestmark = pytest.mark.internal

# --- set_disabled ---------------------------------------------------------------------------------


def test_disabled_calls_are_made_once_and_not_cached() -> None:
    fetch = flaky("ok", failures=1)
    wrapped = opero(fetch)
    with set_disabled():
        with pytest.raises(ConnectionError):
            wrapped()
        assert (wrapped(), wrapped()) == ("ok", "ok")
    assert fetch.calls == 3  # type: ignore[attr-defined]


def test_disabled_async_calls_are_made_once() -> None:
    async def value() -> str:
        return "ok"

    fetch = opero(flaky(value, failures=1))
    with set_disabled(), pytest.raises(ConnectionError):
        asyncio.run(fetch())
    assert fetch.stats.calls == 1


def test_disabled_calls_do_not_wait_for_the_limiter() -> None:
    @opero(cache=False, rate_limit="1/hour")
    def fetch() -> None: ...

    with fake_clock() as clock, set_disabled():
        for _ in range(5):
            fetch()
    assert clock.elapsed == 0


def test_disabled_calls_still_try_the_fallback_values() -> None:
    @opero(arg_fallback="x")
    def fetch(x: object) -> object:
        if x == 1:
            raise ConnectionError
        return x

    with set_disabled():
        assert fetch([1, 2]) == 2


def test_it_nests_and_gives_back_what_was() -> None:
    assert not is_disabled()
    with set_disabled():
        with set_disabled(False):
            assert not is_disabled()
            with set_disabled(True):
                assert is_disabled()
            assert not is_disabled()
        assert is_disabled()
    assert not is_disabled()


def test_it_gives_back_what_was_after_an_error() -> None:
    with pytest.raises(KeyError), set_disabled():
        raise KeyError
    assert not is_disabled()


def test_it_works_as_a_plain_call_too() -> None:
    set_disabled()
    assert is_disabled()
    set_disabled(False)
    assert not is_disabled()


def test_setting_the_same_twice_holds_the_switch_once() -> None:
    set_disabled()
    set_disabled()
    set_disabled(False)
    assert not switch.on


@pytest.mark.parametrize(
    ("value", "disabled"),
    [("1", True), ("true", True), (" YES ", True), ("on", True), ("0", False), ("", False)],
)
def test_the_environment_switches_it_from_outside(value: str, disabled: bool) -> None:
    code = "from opero.testing import is_disabled; print(is_disabled())"
    received = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPERO_DISABLE": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert received.stdout.strip() == str(disabled)


# --- the fake clock, synchronous ------------------------------------------------------------------


def test_no_pause_takes_time_and_all_are_noted() -> None:
    fetch = opero(cache=False, min_delay=60, max_delay="1h", backoff_factor=2, jitter=False)(
        flaky("ok", failures=3)
    )
    began = time.monotonic()
    with fake_clock() as clock:
        assert fetch() == "ok"
    assert clock.sleeps == [60, 120, 240]
    assert clock.elapsed == 420
    assert time.monotonic() - began < 60


def test_elapsed_is_exactly_the_sum_of_the_pauses() -> None:
    with fake_clock() as clock:
        clock.sleep(0.1)
        clock.sleep(0.2)
        assert clock.elapsed == 0.1 + 0.2


def test_advance_lets_cached_results_expire() -> None:
    fetch = opero(cache_ttl="1h")(flaky("ok", failures=0))
    with fake_clock() as clock:
        fetch()
        clock.advance(3599)
        fetch()
        assert fetch.stats.calls == 1
        clock.advance(2)
        fetch()
        assert fetch.stats.calls == 2


def test_what_was_cached_before_is_still_there_on_a_fake_clock() -> None:
    fetch = opero(flaky("ok", failures=0))
    fetch()
    with fake_clock():
        fetch()
    assert fetch.stats.hits == 1


def test_fake_clock_restores_the_real_clock() -> None:
    before = ambient.clock()
    with pytest.raises(KeyError), fake_clock():
        raise KeyError
    assert ambient.clock() is before
    assert not switch.on


def test_clocks_nest() -> None:
    with fake_clock() as outer:
        with fake_clock() as inner:
            ambient.clock().sleep(5)
        ambient.clock().sleep(7)
    assert (outer.elapsed, inner.elapsed) == (7, 5)
    assert not switch.on


def test_what_a_real_call_takes_is_real_time() -> None:
    limit = ConcurrencyLimit(1)
    fetch = opero(cache=False, retries=0, concurrency=limit, deadline=0.05)(lambda: "value")
    with fake_clock() as clock:
        with limit, pytest.raises(DeadlineError):
            fetch()
        assert clock.elapsed == 0


def test_repr_of_a_fake_clock_shows_its_time() -> None:
    clock = FakeClock()
    clock.sleep(2.5)
    assert repr(clock) == "<FakeClock 2.5 s on, 1 sleeps>"


# --- the fake clock, asynchronous -----------------------------------------------------------------


async def note(
    clock: FakeClock, received: list[tuple[str, float]], name: str, *pauses: float
) -> None:
    for pause in pauses:
        await clock.asleep(pause)
        received.append((name, clock.elapsed))


@pytest.mark.asyncio
async def test_sleepers_wake_in_the_order_of_their_times() -> None:
    clock, received = FakeClock(), list[tuple[str, float]]()
    await asyncio.gather(
        note(clock, received, "a", 3, 3),
        note(clock, received, "b", 1, 1, 5),
        note(clock, received, "c", 2),
    )
    assert received == [("b", 1), ("c", 2), ("b", 2), ("a", 3), ("a", 6), ("b", 7)]


@pytest.mark.asyncio
async def test_sleepers_with_the_same_time_wake_in_the_order_of_arrival() -> None:
    clock, received = FakeClock(), list[tuple[str, float]]()
    await asyncio.gather(*(note(clock, received, name, 5) for name in "abc"))
    assert [name for name, _ in received] == ["a", "b", "c"]
    assert clock.elapsed == 5


@pytest.mark.asyncio
async def test_time_stands_still_while_the_loop_has_work() -> None:
    clock, received = FakeClock(), list[float]()

    async def work() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
            received.append(clock.elapsed)

    await asyncio.gather(clock.asleep(60), work())
    assert set(received) == {0.0}
    assert clock.elapsed == 60


@pytest.mark.asyncio
async def test_a_thread_that_polls_does_not_stop_time_for_ever() -> None:
    clock = FakeClock()
    sleeping = asyncio.create_task(clock.asleep(60))
    while not sleeping.done():  # noqa: ASYNC110 - what is tested
        await asyncio.sleep(0)
    assert clock.elapsed == 60


@pytest.mark.asyncio
async def test_a_cancelled_sleeper_moves_no_time_and_leaves_nothing_behind() -> None:
    clock = FakeClock()
    sleeping = asyncio.create_task(clock.asleep(1000))
    await asyncio.sleep(0)
    sleeping.cancel()
    await clock.asleep(1)
    assert sleeping.cancelled()
    assert clock.elapsed == 1
    await asyncio.sleep(0.01)
    assert clock._sleepers == []
    assert clock._waking == set()


@pytest.mark.asyncio
async def test_a_sleeper_wakes_after_the_clock_was_moved_by_hand() -> None:
    clock = FakeClock()
    sleeping = asyncio.create_task(clock.asleep(5))
    await asyncio.sleep(0)
    clock.advance(10)
    await sleeping
    assert clock.elapsed == 10


@pytest.mark.asyncio
async def test_a_thousand_sleepers_wake() -> None:
    clock = FakeClock()
    await asyncio.gather(*(clock.asleep(n % 10) for n in range(1, 1001)))
    assert clock.elapsed == 9
    assert len(clock.sleeps) == 1000


@pytest.mark.asyncio
async def test_retries_of_several_tasks_interleave_as_in_real_time() -> None:
    made: list[str] = []

    async def fail(name: str) -> None:
        made.append(name)
        raise ConnectionError

    slow = opero(cache=False, retries=2, min_delay=3, jitter=False, backoff_factor=1)(fail)
    fast = opero(cache=False, retries=2, min_delay=2, jitter=False, backoff_factor=1)(fail)
    with fake_clock() as clock:
        await asyncio.gather(slow("slow"), fast("fast"), return_exceptions=True)
    assert made == ["slow", "fast", "fast", "slow", "fast", "slow"]
    assert clock.elapsed == 6


def test_two_loops_in_two_threads_and_successive_loops_work() -> None:
    with fake_clock() as clock:
        received: list[float] = []

        async def sleep(pauses: int) -> None:
            for _ in range(pauses):
                await clock.asleep(1)
            received.append(clock.elapsed)

        def run() -> None:
            asyncio.run(sleep(20))
            asyncio.run(sleep(5))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(received) == 4
        assert len(clock.sleeps) == 50
        assert 25 <= clock.elapsed <= 50


# --- flaky ----------------------------------------------------------------------------------------


def test_flaky_fails_the_given_number_of_times_then_works() -> None:
    fetch: Any = flaky("ok", failures=2)
    for n in (1, 2):
        with pytest.raises(ConnectionError, match=f"flaky failure {n} of 2"):
            fetch()
    assert (fetch(), fetch(), fetch.calls) == ("ok", "ok", 4)


def test_flaky_raises_the_error_that_was_asked_for() -> None:
    error = KeyError("x")
    with pytest.raises(KeyError) as raised:
        flaky("ok", error=error)()
    assert raised.value is error
    with pytest.raises(OSError, match="flaky failure 1 of 2"):
        flaky("ok", error=OSError)()


def test_flaky_calls_a_function_with_the_arguments() -> None:
    add = flaky(lambda x, y=0: x + y, failures=0)
    assert add(1, y=2) == 3


def test_flaky_of_a_coroutine_function_is_one() -> None:
    async def double(x: int) -> int:
        return 2 * x

    fetch = flaky(double, failures=1)
    assert inspect.iscoroutinefunction(fetch)
    with pytest.raises(ConnectionError):
        asyncio.run(fetch(1))
    assert asyncio.run(fetch(1)) == 2


def test_flaky_returns_its_value_as_it_is() -> None:
    value = [1]
    assert flaky(value, failures=0)() is value


# --- events ---------------------------------------------------------------------------------------


def test_events_are_collected_within_the_block_only() -> None:
    fetch = opero(min_delay=0)(flaky("ok", failures=1))
    with capture_events() as events:
        fetch()
        fetch()
    fetch()
    assert [type(e).__name__ for e in events] == [
        "CacheMiss",
        "AttemptFailed",
        "RetryScheduled",
        "CallSucceeded",
        "CacheHit",
    ]
    assert not event_bus.active


def test_events_can_be_picked_by_type() -> None:
    fetch = opero(min_delay=0)(flaky("ok", failures=1))
    with capture_events(RetryScheduled, CacheHit) as events:
        fetch()
        fetch()
    assert [type(e) for e in events] == [RetryScheduled, CacheHit]
