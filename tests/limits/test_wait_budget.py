# this_file: tests/limits/test_wait_budget.py
"""How long a caller is ready to wait for a slot, and how long it sleeps."""

from __future__ import annotations

import asyncio
import threading
import time

import asynciolimiter
import pytest

from opero import RateLimiter
from opero.core.call import Call
from opero.core.function import Stats
from opero.core.rate_limit import RateLimit
from opero.errors import DeadlineError, RateLimitPausedError
from opero.events.bus import Emitter
from opero.limits.waiting import WaitBudget, check_budget, sleep_time
from opero.utils import ambient

pytestmark = pytest.mark.internal

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("patience", "wait", "paused", "error"),
    [
        (WaitBudget(), 10**18, 10**18, None),
        (WaitBudget(deadline=11.0), SECOND, 0, None),
        (WaitBudget(deadline=11.0), SECOND + 2000, 0, DeadlineError),
        (WaitBudget(deadline=9.0), 0, 0, DeadlineError),
        (WaitBudget(longest_pause=60.0), 0, 60 * SECOND, None),
        (WaitBudget(longest_pause=60.0), 0, 61 * SECOND, RateLimitPausedError),
        (WaitBudget(11.0, 60.0), 61 * SECOND, 61 * SECOND, RateLimitPausedError),
    ],
)
def test_a_caller_waits_as_long_as_it_is_ready_to(patience, wait, paused, error):
    if error is None:
        check_budget(patience, 10.0, wait=wait, paused=paused)
    else:
        with pytest.raises(error):
            check_budget(patience, 10.0, wait=wait, paused=paused)


def test_a_call_waits_no_longer_than_its_deadline(face, clock):
    limiter = RateLimiter("1/minute", burst=0)
    stage = RateLimit(limiter, Stats(), Emitter("f"))
    body = face.of(lambda call: "done")
    run = (stage.wrap_async if face.asynchronous else stage.wrap_sync)(body)
    first, late, second = (Call((), {}) for _ in range(3))
    late.deadline = ambient.clock().monotonic() + 59
    second.deadline = ambient.clock().monotonic() + 61
    assert face.run(run, first) == "done"
    with pytest.raises(DeadlineError):
        face.run(run, late)
    assert late.waited == 0
    assert face.run(run, second) == "done"
    assert second.waited == pytest.approx(60)


def test_the_waiters_ahead_count_when_a_thread_comes():
    limiter = RateLimiter("6/minute", burst=0)
    limiter.acquire()
    threads = [threading.Thread(target=limiter.acquire, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(limiter._queue.threads) < 3:
        time.sleep(0.001)
    begun = time.monotonic()
    with pytest.raises(DeadlineError, match="no slot for"):
        limiter.acquire(timeout=25)
    assert time.monotonic() - begun < 20
    assert len(limiter._queue.threads) <= 3
    while any(thread.is_alive() for thread in threads):
        limiter._state._state[0] = 0  # nobody has taken a slot
        time.sleep(0.01)


def test_a_thread_in_line_leaves_when_its_deadline_comes_up():
    # A quota has no spacing, so that a place in line tells nothing about the wait.
    limiter = RateLimiter("1/hour")
    limiter.acquire()
    first = threading.Thread(target=limiter.acquire, daemon=True)
    first.start()
    while not limiter.threads_waiting:
        time.sleep(0.001)
    limiter._state._state[0] = time.monotonic_ns() + SECOND // 10
    held = threading.Event()
    errors = []

    def hurry() -> None:
        held.set()
        try:
            limiter.acquire(timeout=0.2)
        except DeadlineError as error:
            errors.append(str(error))

    second = threading.Thread(target=hurry)
    second.start()
    held.wait(20)
    second.join(10)
    assert not second.is_alive()
    assert errors
    limiter._state._state[0] = 0
    first.join(10)
    assert not limiter.threads_waiting


@pytest.mark.asyncio
async def test_a_task_in_line_leaves_when_its_deadline_comes_up():
    limiter = RateLimiter("1/hour")
    limiter.acquire()
    first = asyncio.create_task(limiter.wait())
    await asyncio.sleep(0)
    # The first one sleeps; by the time the second comes, its slot looks near.
    limiter._state._state[0] = time.monotonic_ns() + SECOND // 100
    second = asyncio.create_task(limiter.wait(timeout=0.05))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match="the deadline passed"):
        await asyncio.wait_for(second, 10)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not limiter.loops_waiting


@pytest.mark.asyncio
async def test_a_limiter_of_ones_own_is_not_waited_for_past_a_deadline():
    limiter = RateLimiter(asynciolimiter.Limiter(0.01))
    await limiter.wait()
    stage = RateLimit(limiter, Stats(), Emitter("f"))

    async def body(call: Call) -> str:
        return "done"

    call = Call((), {})
    call.deadline = time.monotonic() + 0.02
    with pytest.raises(DeadlineError):
        await stage.wrap_async(body)(call)
    call.deadline = time.monotonic() - 1
    with pytest.raises(DeadlineError):
        await stage.wrap_async(body)(call)


@pytest.mark.parametrize(
    ("wait", "late", "grain", "seconds"),
    [
        (100_000_000, 100_000_000, 1_200_000, 0.1),
        (100_000_000, 200_000, 1_200_000, 0.099),
        (100_000, 100_000, 1_200_000, 0.0),
        (3_600_000_000_000, 10**9, 1_200_000, 1.0),
    ],
)
def test_a_sleep_ends_so_early_that_a_late_timer_does_no_harm(wait, late, grain, seconds):
    assert sleep_time(wait, late, grain) == seconds
