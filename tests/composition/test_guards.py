# this_file: tests/composition/test_guards.py
"""The guards next to the call, together: concurrency, rate limit, circuit breaker, timeout, requests to wait."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, events, failures, opero
from opero.errors import BulkheadFullError, CallTimeoutError, CircuitOpenError, OperoUsageError
from opero.testing import capture_events, fake_clock, flaky

NUMBERS = itertools.count()


class ThrottledError(Exception):
    def __init__(self, **headers: str) -> None:
        super().__init__("slow down")
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def broken(*_: Any) -> None:
    raise ConnectionError("no route")


def test_explain_shows_the_guards_in_the_order_in_which_they_are_passed() -> None:
    fetch = opero(
        cache=False, concurrency=2, rate_limit=5, circuit_breaker=True, timeout="2s", retries=0
    )(broken)
    names = [line.split()[1] for line in fetch.explain().splitlines()[1:-1]]
    assert names == ["concurrency", "rate", "circuit", "timeout"]


# --- circuit breaker --------------------------------------------------------------------------------


def test_a_call_that_trips_the_breaker_ends_with_its_own_error(face: Any, clock: Any) -> None:
    breaker = CircuitBreaker.unregistered("svc", fail_max=2, jitter=0)
    fetch = opero(cache=False, retries=5, min_delay=1, circuit_breaker=breaker)(face.of(broken))
    with (
        capture_events(events.RetryScheduled) as reported,
        pytest.raises(ConnectionError) as caught,
    ):
        face.run(fetch)
    assert len(failures(caught.value)) == 2
    # Nobody pauses only to be refused.
    assert len(clock.sleeps) == len(reported) == 1
    assert "circuit 'svc' is open for another 30 s" in caught.value.__notes__[0]
    with pytest.raises(CircuitOpenError):
        face.run(fetch)
    assert fetch.stats.calls == 2


def test_a_pause_that_a_circuit_does_not_outlast_is_made(face: Any, clock: Any) -> None:
    breaker = CircuitBreaker(fail_max=1, reset_timeout=3, jitter=0)
    answer = flaky("value", failures=1)
    fetch = opero(cache=False, min_delay=3, circuit_breaker=breaker)(face.of(lambda: answer()))  # noqa: PLW0108 - a coroutine function is made of it
    assert face.run(fetch) == "value"
    assert breaker.state == "closed"


def test_a_circuit_open_after_a_pause_ends_with_the_last_real_error(face: Any, clock: Any) -> None:
    # Two live breakers of one name are an error, and the other case's may not be collected yet.
    name = f"service {next(NUMBERS)}"
    breaker = CircuitBreaker(name, fail_max=9)

    def opens(event: Any) -> None:
        if isinstance(event, events.RetryScheduled):
            breaker.force_open()

    fetch = opero(cache=False, circuit_breaker=breaker, on_event=opens)(face.of(broken))
    with pytest.raises(ConnectionError) as caught:
        face.run(fetch)
    assert f"then CircuitOpenError: circuit {name!r} is held open" in caught.value.__notes__[0]
    assert (len(clock.sleeps), fetch.stats.calls) == (1, 1)


def test_the_fast_path_of_a_closed_circuit_counts_like_the_stage(face: Any) -> None:
    breaker = CircuitBreaker(failure_rate=0.5, window=4, minimum_calls=4)
    answers = iter([True, True, False, False])

    def body() -> str:
        if not next(answers):
            raise ConnectionError
        return "value"

    fetch = opero(cache=False, retries=0, circuit_breaker=breaker)(face.of(body))
    assert "_opero_permit" in fetch.__code__.co_varnames
    for _ in range(2):
        assert face.run(fetch) == "value"
    for _ in range(2):
        with pytest.raises(ConnectionError):
            face.run(fetch)
    with pytest.raises(CircuitOpenError):
        face.run(fetch)
    assert (breaker.stats.opened, breaker.stats.refused, fetch.stats.calls) == (1, 1, 4)


def test_a_value_whose_circuit_is_open_is_skipped() -> None:
    tried: list[str] = []

    @opero(cache=False, retries=0, arg_fallback="model", circuit_breaker=CircuitBreaker(fail_max=1))
    def ask(model: Any = ("a", "b")) -> str:
        tried.append(model)
        if model == "a":
            raise ConnectionError
        return str(model)

    assert [ask(), ask()] == ["b", "b"]
    assert tried == ["a", "b", "b"]


def test_all_values_open_is_a_refusal_at_once() -> None:
    breaker = CircuitBreaker(fail_max=1)
    ask = opero(cache=False, retries=0, arg_fallback="model", circuit_breaker=breaker)(
        lambda model=("a", "b"): broken()
    )
    with pytest.raises(ConnectionError):
        ask()
    with pytest.raises(CircuitOpenError):
        ask()
    assert ask.stats.calls == 2


def test_no_call_queues_only_to_be_refused(face: Any, clock: Any) -> None:
    breaker, limiter = CircuitBreaker.unregistered("svc"), RateLimiter("1/minute")
    full = ConcurrencyLimit(1, queue=0)
    assert full.try_acquire()
    limiter.pause(30)
    breaker.force_open()
    for guard in ({"concurrency": full}, {"rate_limit": limiter}):
        fetch = opero(cache=False, circuit_breaker=breaker, **guard)(face.of(lambda: None))
        with pytest.raises(CircuitOpenError):
            face.run(fetch)
    assert clock.sleeps == []


def test_a_refused_call_takes_no_slot() -> None:
    breaker, limiter = CircuitBreaker.unregistered("svc"), RateLimiter("1/hour")
    breaker.force_open()
    fetch = opero(cache=False, retries=0, circuit_breaker=breaker, rate_limit=limiter)(broken)
    with pytest.raises(CircuitOpenError):
        fetch()
    assert limiter.try_acquire()


def test_with_options_keeps_breaker_and_limit_unless_they_change() -> None:
    breaker, limit = CircuitBreaker.unregistered("svc", fail_max=1), ConcurrencyLimit(1)
    fetch = opero(cache=False, retries=0, circuit_breaker=breaker, concurrency=limit)(broken)
    with pytest.raises(ConnectionError):
        fetch()
    with pytest.raises(CircuitOpenError):
        fetch.with_options(retries=1)()
    with pytest.raises(ConnectionError):
        fetch.with_options(circuit_breaker=None)()


# --- timeout and concurrency ------------------------------------------------------------------------


def test_a_call_that_timed_out_is_retried_and_holds_its_permit_until_it_is_over() -> None:
    may_end, ended = threading.Event(), threading.Event()
    limit = ConcurrencyLimit(2)

    @opero(cache=False, retries=1, min_delay=0, timeout=0.02, concurrency=limit)
    def fetch() -> str:
        if not may_end.is_set():
            may_end.wait()
            ended.set()
        return "late"

    with (
        capture_events() as reported,
        pytest.raises(CallTimeoutError, match=r"took longer than 0\.02 s"),
    ):
        fetch()
    assert [type(e).__name__ for e in reported].count("CallTimedOut") == 2
    assert limit.in_flight == 2
    may_end.set()
    assert ended.wait(20)
    with limit, limit:
        assert limit.in_flight == 2


def test_an_async_call_that_timed_out_falls_back_to_the_next_value() -> None:
    @opero(cache=False, retries=0, timeout=0.2, arg_fallback="mirror")
    async def fetch(mirror: Any = ("slow", "quick")) -> str:
        if mirror == "slow":
            await asyncio.Event().wait()
        return str(mirror)

    assert asyncio.run(fetch()) == "quick"


def test_a_full_queue_is_a_refusal_that_is_not_retried() -> None:
    limit = ConcurrencyLimit(1, queue=0)
    fetch = opero(cache=False, min_delay=0, concurrency=limit)(flaky("ok", failures=0))
    with limit, pytest.raises(BulkheadFullError):
        fetch()
    assert fetch() == "ok"
    assert (fetch.stats.calls, fetch.stats.retries) == (1, 0)


# --- requests to wait -------------------------------------------------------------------------------


def test_a_request_to_wait_is_a_floor_under_the_pause() -> None:
    fetch = opero(cache=False)(flaky("ok", failures=1, error=ThrottledError(Retry_After="7")))
    with fake_clock() as clock:
        assert fetch() == "ok"
    assert clock.sleeps == [7.0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_response_that_is_rejected_says_how_long_to_wait(
    face: Any, clock: Any, status: int
) -> None:
    busy = SimpleNamespace(status_code=status, headers={"Retry-After": "7"})
    fine = SimpleNamespace(status_code=200, headers={})
    answers = iter([busy, fine])
    fetch = opero(cache=False, retry_if_result=lambda answer: answer.status_code in (429, 503))(
        face.of(lambda: next(answers))
    )
    assert face.run(fetch) is fine
    assert clock.sleeps == [7]


def test_a_request_to_wait_too_long_fails_at_once_and_says_so() -> None:
    fetch = opero(cache=False)(flaky("ok", failures=1, error=ThrottledError(Retry_After="700")))
    with fake_clock() as clock, pytest.raises(ThrottledError) as caught:
        fetch()
    assert clock.sleeps == []
    assert (
        "asks to wait 700 s (retry-after), longer than retry_after_max=60 s"
        in (caught.value.__notes__[0])
    )


def test_a_request_to_wait_of_one_value_does_not_hold_up_the_others() -> None:
    @opero(cache=False, retries=1, jitter=False, arg_fallback="model")
    def ask(model: Any = ("a", "b")) -> str:
        raise ThrottledError(Retry_After="30") if model == "a" else ConnectionError

    with fake_clock() as clock, pytest.raises(ConnectionError):
        ask()
    assert clock.sleeps == [0.1]


# --- a function within itself -----------------------------------------------------------------------


def test_a_function_that_waits_for_its_own_permit_gets_an_error(face: Any) -> None:
    def again(depth: int) -> Any:
        return fetch(depth - 1) if depth else "end"

    async def aagain(depth: int) -> Any:
        return await fetch(depth - 1) if depth else "end"

    body = aagain if face.asynchronous else again
    fetch: Any = opero(cache=False, concurrency=2)(body)
    assert face.run(fetch, 1) == "end"
    with pytest.raises(OperoUsageError, match=r"again\(\) is called within itself"):
        face.run(fetch, 2)
    assert fetch.__opero__.concurrency.limit.in_flight == 0


def test_a_function_that_waits_for_its_own_permit_gets_an_error_through_the_threads_of_a_timeout() -> (
    None
):
    @opero(cache=False, retries=0, concurrency=2, timeout=5)
    def again(depth: int) -> str:
        return again(depth - 1) if depth else "end"

    assert again(1) == "end"
    with pytest.raises(OperoUsageError, match=r"again\(\) is called within itself"):
        again(2)
    assert again.__opero__.concurrency.limit.in_flight == 0


def test_a_call_that_was_left_behind_does_not_wait_for_its_own_permit() -> None:
    left_behind, ended = threading.Event(), queue.SimpleQueue[str]()

    @opero(cache=False, retries=0, concurrency=1, timeout=0.05)
    def again(depth: int) -> None:
        if depth:
            left_behind.wait(20)
            try:
                again(depth - 1)
            except Exception as error:  # noqa: BLE001 - whatever comes is reported
                ended.put(str(error))

    with pytest.raises(CallTimeoutError):
        again(1)
    left_behind.set()
    assert "is called within itself" in ended.get(timeout=20)


def test_a_call_that_waits_for_the_permit_of_another_waits(face: Any) -> None:
    limit = ConcurrencyLimit(1)
    inner = opero(cache=False, concurrency=limit)(lambda: "value")

    def body() -> Any:
        return inner()

    other = opero(cache=False, concurrency=1)(face.of(body))
    limit.acquire()
    timer = threading.Timer(0.01, limit.release)
    timer.start()
    assert face.run(other) == "value"
    timer.join()
