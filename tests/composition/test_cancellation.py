# this_file: tests/composition/test_cancellation.py
"""Cancellation is sacred: it ends a call at once, wherever the call is, and counts nothing more."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from opero import opero
from opero.events import CallGaveUp, CallSucceeded, RetryScheduled
from opero.testing import FakeClock, capture_events, flaky


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for knows of no event
        await asyncio.sleep(0)


async def fails() -> None:
    raise ConnectionError


@pytest.mark.asyncio
async def test_a_task_cancelled_during_a_pause_ends_within_50_ms() -> None:
    fetch = opero(cache=False, min_delay=20, max_delay=20)(fails)
    took = []
    for _ in range(5):  # the quickest counts: the machine may be busy
        fetch.stats.reset()
        task = asyncio.ensure_future(fetch())
        await until(lambda: fetch.stats.retries)
        await asyncio.sleep(0.001)
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        took.append(time.monotonic() - begin)
        assert task.cancelled()
    assert min(took) < 0.05


@pytest.mark.asyncio
async def test_after_a_cancellation_nothing_more_is_counted() -> None:
    fetch = opero(cache=False, min_delay=20, max_delay=20, arg_fallback="model")(
        lambda model=("a", "b"): fails()
    )
    with capture_events(RetryScheduled, CallSucceeded, CallGaveUp) as events:
        task = asyncio.ensure_future(fetch())
        await until(lambda: fetch.stats.retries)
        before = fetch.stats.as_dict()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
    assert fetch.stats.as_dict() == before
    assert (fetch.stats.calls, fetch.stats.slept, fetch.stats.gave_up) == (2, 0, 0)
    assert [type(e) for e in events] == [RetryScheduled]


@pytest.mark.asyncio
async def test_a_task_cancelled_during_a_call_makes_no_other_call() -> None:
    calls = []

    @opero(
        cache=False,
        min_delay=0,
        retry_on=BaseException,
        fallback_on=BaseException,
        arg_fallback="model",
    )
    async def fetch(model: str) -> None:
        calls.append(model)
        await asyncio.Event().wait()

    task = asyncio.ensure_future(fetch(["a", "b"]))
    await until(lambda: calls)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == ["a"]
    assert (fetch.stats.failures, fetch.stats.retries, fetch.stats.fallbacks) == (0, 0, 0)


@pytest.mark.asyncio
async def test_a_timeout_around_a_pause_is_a_timeout() -> None:
    fetch = opero(cache=False, min_delay=20, max_delay=20)(fails)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await fetch()


@pytest.mark.asyncio
async def test_a_task_cancelled_in_the_rate_limiter_makes_no_call() -> None:
    calls = 0

    @opero(cache=False, rate_limit="1/minute")
    async def fetch() -> None:
        nonlocal calls
        calls += 1

    tasks = [asyncio.ensure_future(fetch()) for _ in range(4)]
    await until(lambda: calls)
    await asyncio.sleep(0.01)
    made = calls
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert calls == made < 4
    assert sum(isinstance(e, asyncio.CancelledError) for e in ended) == 4 - made


@pytest.mark.asyncio
async def test_a_cancelled_receipt_is_cancelled_too() -> None:
    fetch = opero(cache=False, min_delay=20, max_delay=20)(fails)
    task = asyncio.ensure_future(fetch.call())
    await until(lambda: fetch.stats.retries)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_a_cancelled_leader_hands_over_no_retries() -> None:
    """The waiter begins with a full set of attempts of its own."""
    body = flaky("fine", failures=2)

    @opero(retries=1, min_delay=20, max_delay=20)
    async def fetch(x: int) -> Any:
        return body()

    leader = asyncio.ensure_future(fetch(1))
    await until(lambda: fetch.stats.retries)
    waiter = asyncio.ensure_future(fetch(1))
    await asyncio.sleep(0)
    leader.cancel()
    await until(lambda: body.calls == 2)
    assert not waiter.done()
    await until(lambda: fetch.stats.retries == 2)
    waiter.cancel()
    await asyncio.gather(leader, waiter, return_exceptions=True)
    assert leader.cancelled()


def test_ctrl_c_in_a_pause_ends_the_call(
    face: Any, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    async def interrupted_in_task(seconds: float) -> None:
        raise KeyboardInterrupt

    body = flaky("never", failures=99)
    fetch = opero(cache=False)(face.of(body))
    monkeypatch.setattr(clock, "sleep", interrupted)
    monkeypatch.setattr(clock, "asleep", interrupted_in_task)
    with pytest.raises(KeyboardInterrupt):
        face.run(fetch)
    assert (body.calls, fetch.stats.slept, fetch.stats.gave_up) == (1, 0, 0)


def test_a_pause_holds_up_no_other_thread() -> None:
    slow = opero(cache=False, retries=1, min_delay=0.05, jitter=False)(flaky("slow", failures=1))
    quick = opero(cache=False)(flaky("quick", failures=0))
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(slow()))
    thread.start()
    done.append(quick())
    thread.join()
    assert done == ["quick", "slow"]
