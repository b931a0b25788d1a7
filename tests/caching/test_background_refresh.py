# this_file: tests/caching/test_background_refresh.py
"""`cache_refresh`: a result is computed anew before it expires, while callers get the old one."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opero import deadline, opero, remaining
from opero.caching import refresh as background
from opero.caching.refresh import FRESH_FAILURE_SECONDS
from opero.events import CacheRefreshed
from opero.testing import FakeClock, capture_events

pytestmark = pytest.mark.internal


def until(condition: Callable[[], object]) -> None:
    """Wait for something that other threads bring about."""
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


class Gated:
    """A synchronous function whose calls after the first one wait for a gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls = 0
        self.fails: Exception | None = None

    def __call__(self, x: int = 0) -> int:
        self.calls += 1
        if self.calls > 1:
            assert self.gate.wait(10)
        if self.fails is not None:
            raise self.fails
        return self.calls


@pytest.fixture
def body() -> Any:
    made = Gated()
    yield made
    made.gate.set()
    assert background._drain(10)


def decorated(body: Gated, **options: Any) -> Any:
    def fetch(x: int = 0) -> int:
        return body(x)

    return opero(**({"cache_ttl": 100, "cache_refresh": 0.8, "retries": 0} | options))(fetch)


def test_an_old_entry_is_served_at_once_and_renewed_by_one_call(
    body: Gated, clock: FakeClock
) -> None:
    fetch = decorated(body)
    fetch()
    clock.advance(79)
    fetch()
    assert body.calls == 1
    clock.advance(1.5)
    assert [fetch.call().source for _ in range(5)] == ["hit"] * 5
    until(lambda: body.calls == 2)
    with capture_events(CacheRefreshed) as events:
        body.gate.set()
        assert background._drain(10)
    assert (fetch(), body.calls) == (2, 2)
    assert [(event.renewed, event.error) for event in events] == [(True, None)]
    clock.advance(79)
    fetch()
    assert body.calls == 2


def test_the_fast_path_notices_the_age_with_the_real_clock(body: Gated) -> None:
    fetch = decorated(body, cache_ttl=100, cache_refresh=1e-9)
    body.gate.set()
    fetch()
    assert fetch() == 1
    assert background._drain(10)
    assert body.calls == 2


def test_tasks_are_served_at_once_and_one_task_renews(clock: FakeClock) -> None:
    calls = 0

    @opero(cache_ttl=100, cache_refresh=0.8)
    async def fetch() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return calls

    async def main() -> None:
        await fetch()
        clock.advance(81)
        assert await asyncio.gather(*(fetch() for _ in range(100))) == [1] * 100
        await asyncio.gather(*background._tasks)
        assert await fetch() == 2

    asyncio.run(main())
    assert calls == 2


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_a_renewal_that_fails_keeps_the_old_result_and_is_not_tried_by_all(
    body: Gated, clock: FakeClock, error: type[Exception]
) -> None:
    fetch = decorated(body, retry_on=ConnectionError)
    fetch()
    body.fails = error()
    body.gate.set()
    clock.advance(81)
    with capture_events(CacheRefreshed) as events:
        for _ in range(5):
            assert fetch() == 1
            assert background._drain(10)
    assert body.calls == 2
    assert [(event.renewed, type(event.error)) for event in events] == [(False, error)]
    clock.advance(FRESH_FAILURE_SECONDS)
    fetch()
    assert background._drain(10)
    assert body.calls == 3


def test_a_rejected_renewal_keeps_the_old_result(body: Gated, clock: FakeClock) -> None:
    fetch = decorated(body, retry_if_result=lambda value: value > 1)
    fetch()
    body.gate.set()
    clock.advance(81)
    with capture_events(CacheRefreshed) as events:
        fetch()
        assert background._drain(10)
    assert fetch() == 1
    assert [event.renewed for event in events] == [False]


def test_a_call_after_the_expiry_waits_for_the_renewal(body: Gated, clock: FakeClock) -> None:
    fetch = decorated(body)
    fetch()
    clock.advance(81)
    fetch()
    clock.advance(20)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(fetch.call()), daemon=True)
    waiting.start()
    flights = fetch.__opero__.cache.single_flight
    until(lambda: any(flight.waiters for flight in list(flights._open.values())))
    body.gate.set()
    waiting.join(10)
    assert [(receipt.value, receipt.source) for receipt in found] == [(2, "shared")]
    assert body.calls == 2


def test_an_explicit_refresh_counts_for_more(body: Gated, clock: FakeClock) -> None:
    fetch = decorated(body)
    fetch()
    clock.advance(81)
    fetch()
    until(lambda: body.calls == 2)
    body.gate.set()
    renewed = fetch.cache.refresh()
    assert background._drain(10)
    assert fetch() == renewed


def test_a_renewal_has_the_context_of_its_caller_but_leads_nothing_of_his(
    clock: FakeClock,
) -> None:
    name = contextvars.ContextVar("name", default="nobody")
    seen: list[Any] = []

    @opero(cache_ttl=100, cache_refresh=0.8)
    def inner() -> None:
        seen.append((name.get(), len(list(flight._flights_led())), threading.current_thread().name))

    @opero
    def outer() -> None:
        inner()

    from opero.caching import single_flight as flight

    inner()
    clock.advance(81)
    name.set("Ann")
    outer()
    assert background._drain(10)
    assert seen[1][2] != threading.current_thread().name
    # It leads its own flight, and not the caller's.
    assert seen == [("nobody", 1, threading.current_thread().name), ("Ann", 1, seen[1][2])]


@pytest.mark.parametrize("own", [None, 30])
def test_a_renewal_is_not_bound_by_its_callers_deadline(
    clock: FakeClock, own: float | None
) -> None:
    seen: list[float | None] = []

    @opero(cache_ttl=100, cache_refresh=0.8, deadline=own)
    def fetch() -> None:
        seen.append(remaining())

    fetch()
    clock.advance(81)
    with deadline(5):
        fetch()
        assert background._drain(10)
    assert seen == [pytest.approx(own, abs=1)] * 2


def test_arguments_that_change_after_the_call_do_not_reach_the_renewal(clock: FakeClock) -> None:
    begun, gate = threading.Event(), threading.Event()
    seen: list[Any] = []

    @opero(cache_ttl=100, cache_refresh=0.8)
    def total(numbers: list[int]) -> int:
        if seen:
            begun.set()
            gate.wait(10)
        seen.append(list(numbers))
        return sum(numbers)

    numbers = [1, 2]
    total(numbers)
    clock.advance(81)
    total(numbers)
    assert begun.wait(10)
    numbers.append(3)
    gate.set()
    assert background._drain(10)
    assert seen == [[1, 2], [1, 2]]


class Dict(dict[str, Any]):
    """A user's store."""

    def set(self, key: str, value: Any, ttl: float | None) -> None:
        self[key] = value

    def delete(self, key: str) -> bool:
        return self.pop(key, None) is not None


def double(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize("kind", ["user's store", "disk"])
def test_a_store_that_is_shared_reports_the_age(
    clock: FakeClock, tmp_path: Path, kind: str
) -> None:
    backend: Any = Dict() if kind != "disk" else f"disk:{tmp_path}"
    stored = opero(cache_ttl=100, cache_refresh=0.8, cache_backend=backend)(double)
    stored(1)
    clock.advance(79)
    stored(1)
    clock.advance(2)
    assert stored.call(1).source == "hit"
    assert background._drain(10)
    assert stored.stats.calls == 2
    clock.advance(79)
    assert stored.call(1).source == "hit"


def test_when_all_threads_are_busy_nothing_is_queued(body: Gated, clock: FakeClock) -> None:
    fetch = decorated(body)
    body.gate.set()
    for n in range(background._MOST_THREADS + 4):
        fetch(n)
    body.gate.clear()
    clock.advance(81)
    before = body.calls
    for n in range(background._MOST_THREADS + 4):
        fetch(n)
    until(lambda: body.calls == before + background._MOST_THREADS)
    assert len(fetch.__opero__.cache.single_flight) == background._MOST_THREADS
    body.gate.set()
    assert background._drain(10)
    for n in range(background._MOST_THREADS, background._MOST_THREADS + 4):
        fetch(n)
    assert background._drain(10)
    assert body.calls == before + background._MOST_THREADS + 4


def test_a_loop_that_ends_before_the_renewal_leaves_no_flight_behind(clock: FakeClock) -> None:
    @opero(cache_ttl=100, cache_refresh=0.8)
    async def fetch() -> int:
        return 1

    async def main() -> None:
        await fetch()
        clock.advance(81)
        await fetch()

    with warnings.catch_warnings():
        asyncio.run(main())
    gc.collect()
    assert len(fetch.__opero__.cache.single_flight) == 0


def test_a_function_that_turns_out_to_return_awaitables_is_left_to_its_callers(
    clock: FakeClock,
) -> None:
    async def answer() -> int:
        return 1

    def fetch() -> Any:
        return answer()

    decorated = opero(cache_ttl=100, cache_refresh=0.8)(fetch)

    async def main() -> int:
        await decorated()
        clock.advance(81)
        found: int = await decorated()
        await asyncio.gather(*background._tasks)
        return found

    assert asyncio.run(main()) == 1
    assert decorated.stats.calls == 2


SCRIPT = """
import sys, time
from opero import opero
@opero(cache_ttl=1000, cache_refresh=1e-9)
def fetch():
    if fetch.stats.calls > 1:
        time.sleep(float(sys.argv[1]))
        print("renewed", flush=True)
fetch()
fetch()
"""


@pytest.mark.parametrize(("seconds", "printed"), [("0.3", "renewed\n"), ("60", "")])
def test_the_interpreter_waits_for_a_renewal_but_not_for_long(seconds: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, seconds],
        capture_output=True,
        text=True,
        timeout=25,
        check=True,
    )
    assert (done.stdout, done.stderr) == (printed, "")
