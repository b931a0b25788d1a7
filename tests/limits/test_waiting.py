# this_file: tests/limits/test_waiting.py
"""No wait for a slot is begun that would outlast a deadline."""

from __future__ import annotations

import asyncio
import types

import asynciolimiter
import pytest

from opero import ConcurrencyLimit, RateLimiter, opero
from opero.errors import DeadlineError, OperoUsageError


def acquire(face, limiter: RateLimiter, timeout: float | None = None) -> float:
    return face.run(limiter.wait if face.asynchronous else limiter.acquire, timeout=timeout)


def test_a_wait_longer_than_the_timeout_is_not_begun(face, clock):
    limiter = RateLimiter("1/minute", burst=0)
    assert acquire(face, limiter, 0) == 0
    with pytest.raises(DeadlineError, match=r"no slot for 60 s, and the deadline is in 5 s"):
        acquire(face, limiter, 5)
    assert clock.sleeps == []
    assert acquire(face, limiter, 60) == pytest.approx(60)


@pytest.mark.asyncio
async def test_the_waiters_ahead_count_when_a_task_comes(clock):
    limiter = RateLimiter("1/s", burst=0)
    await limiter.wait()
    waiting = [asyncio.create_task(limiter.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match="no slot for 4 s"):
        await limiter.wait(timeout=3.5)
    assert clock.elapsed == 0
    await asyncio.gather(*waiting)
    assert await limiter.wait(timeout=1) == pytest.approx(1)


def test_a_timeout_that_is_no_duration_is_refused(face):
    limiter = RateLimiter("1/hour")
    acquire(face, limiter)
    with pytest.raises(ValueError, match="timeout='soon' is no duration"):
        acquire(face, limiter, "soon")


# --- without an event loop of asyncio, as under trio ----------------------------------------------


def outcome_without_a_loop(coroutine):
    """Drive a coroutine by hand, as another library would, to its first suspension at most."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    finally:
        coroutine.close()
    raise AssertionError("it waits for what never comes")


def test_who_need_not_wait_needs_no_event_loop():
    assert outcome_without_a_loop(RateLimiter("1/hour").wait()) == 0
    assert outcome_without_a_loop(ConcurrencyLimit(1).wait()) is True


@pytest.mark.parametrize("options", [{"rate_limit": "1/hour"}, {"concurrency": 1}])
def test_who_has_to_wait_is_told_at_once_that_asyncio_is_needed(options):
    called = []

    @opero(cache=False, retries=0, **options)
    async def inner(n):
        called.append(n)
        await suspended()

    first, second = inner(1), inner(2)
    first.send(None)
    with pytest.raises(OperoUsageError, match="needs a running asyncio event loop"):
        second.send(None)
    first.close()
    assert called == [1]


@types.coroutine
def suspended():
    yield


@pytest.mark.parametrize(
    "make", [lambda: asynciolimiter.Limiter(10), lambda: asynciolimiter.StrictLimiter(10)]
)
def test_an_own_limiter_is_not_even_asked_without_asyncio(make):
    with pytest.raises(OperoUsageError, match="needs a running asyncio event loop"):
        outcome_without_a_loop(RateLimiter(make()).wait())
