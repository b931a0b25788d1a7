# this_file: tests/limits/test_limiter.py
from __future__ import annotations

import asyncio
import copy
import gc
import math
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import asynciolimiter
import pytest

from opero import RateLimiter, opero
from opero.errors import OperoUsageError
from opero.testing import FakeClock, fake_clock, set_disabled


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with fake_clock() as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# --- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate", [0, -1, math.nan, math.inf, "0/s", "fast", "5/fortnight", True, None]
)
def test_a_rate_that_cannot_be_kept_is_refused_with_the_fix(rate):
    with pytest.raises(OperoUsageError, match=r"rate=.*100/minute"):
        RateLimiter(rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"burst": -1}, "burst=-1 must be a whole number"),
        ({"burst": 1.5}, "burst=1.5 must be a whole number"),
        ({"burst": True}, "burst=True must be a whole number"),
        ({"smooth": 1}, "smooth=1 must be True or False"),
        ({"name": ""}, "name='' must be text"),
    ],
)
def test_an_option_that_cannot_work_is_refused_with_the_fix(options, message):
    with pytest.raises(OperoUsageError, match=message):
        RateLimiter(5, **options)


@pytest.mark.parametrize(
    ("rate", "options", "text"),
    [
        ("100/minute", {}, "100 per minute: one call each 0.6 s"),
        (2.5, {}, "2.5 per second: one call each 0.4 s"),
        ("5/10s", {}, "5 per 10 s: one call each 2 s"),
        ("1000/day", {}, "1000 per day: no spacing"),
        ("10/s", {"burst": 2}, "10 per second: one call each 0.1 s, 3 at once after a pause"),
        (
            "60/hour",
            {"smooth": True, "burst": 4},
            "60 per hour: one call each 60 s, 5 at once after a pause",
        ),
    ],
)
def test_a_limiter_describes_itself(rate, options, text):
    limiter = RateLimiter(rate, **options)
    assert limiter.describe() == f"{text}, shared by all threads"
    assert repr(limiter) == f"<RateLimiter {text}, shared by all threads; free>"


def test_the_repr_shows_how_long_a_call_would_wait(clock):
    limiter = RateLimiter("1/minute", burst=0)
    limiter.acquire()
    assert repr(limiter).endswith("; 60 s to wait>")


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1000001/day", "too large to be counted one by one.*smooth=True"),
        ("10000000000000 tokens/s", "count in larger units"),
        (1e-12, "too slow for a clock"),
    ],
)
def test_a_rate_that_cannot_be_counted_is_refused_with_the_fix(rate, message):
    with pytest.raises(OperoUsageError, match=message):
        RateLimiter(rate)
    assert RateLimiter("1000001/day", smooth=True).try_acquire()


# --- one thread -----------------------------------------------------------------------------------


def test_calls_wait_for_their_slots(clock):
    limiter = RateLimiter("10/s")
    assert [limiter.acquire() for _ in range(4)] == pytest.approx([0, 0, 0.1, 0.1])
    assert clock.sleeps == pytest.approx([0.1, 0.1])


def test_a_free_slot_costs_no_sleep(clock):
    limiter = RateLimiter("10/s")
    for _ in range(20):
        assert limiter.acquire() == 0.0
        clock.advance(0.1)
    assert clock.sleeps == []


def test_a_slot_is_tried_without_waiting(clock):
    limiter = RateLimiter("10/s", burst=0)
    assert limiter.try_acquire()
    assert not limiter.try_acquire()
    clock.advance(0.1)
    assert limiter.try_acquire()


def test_a_quota_is_waited_for_in_one_piece_under_a_fake_clock(clock):
    limiter = RateLimiter("2/day")
    assert [limiter.acquire() for _ in range(3)] == [0, 0, pytest.approx(86400)]


def test_a_with_block_takes_a_slot_on_entering(clock):
    limiter = RateLimiter("10/s", burst=0)
    for _ in range(3):
        with limiter as entered:
            assert entered is limiter
    assert clock.elapsed == pytest.approx(0.2)


def test_a_reserved_slot_can_be_given_back(clock):
    limiter = RateLimiter("1/minute", burst=0)
    reservation = limiter.reserve()
    assert reservation.waited == 0
    assert reservation.refund()
    assert limiter.try_acquire()


def test_a_slot_is_given_back_only_once(clock):
    limiter = RateLimiter("3/hour")
    reservation = limiter.reserve()
    assert reservation.refund()
    assert not reservation.refund()


def test_a_slot_is_not_given_back_after_others_have_started(clock):
    limiter = RateLimiter("3/hour")
    reservation = limiter.reserve()
    limiter.acquire()
    assert not reservation.refund()
    assert [limiter.try_acquire() for _ in range(2)] == [True, False]


def test_nothing_waits_and_nothing_is_taken_while_opero_is_disabled():
    limiter = RateLimiter("1/hour")
    with set_disabled():
        assert [limiter.acquire() for _ in range(3)] == [0, 0, 0]
        assert asyncio.run(limiter.wait()) == 0
        assert limiter.try_acquire()
        assert not limiter.reserve().refund()
    assert limiter.try_acquire()
    assert not limiter.try_acquire()


def test_a_fake_clock_never_touches_the_real_slot():
    limiter = RateLimiter("1/hour")
    with fake_clock() as clock:
        limiter.acquire()
        limiter.acquire()
        assert clock.elapsed == pytest.approx(3600)
    with fake_clock():
        assert limiter.try_acquire()
    assert limiter.try_acquire()
    assert not limiter.try_acquire()


def test_ctrl_c_while_waiting_gives_everything_back(clock, monkeypatch):
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    limiter = RateLimiter("10/s", burst=0)
    limiter.acquire()
    monkeypatch.setattr(clock, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        limiter.acquire()
    clock.advance(0.1)
    assert limiter.try_acquire()


def test_a_copy_is_the_limiter_itself():
    limiter = RateLimiter(5)
    assert copy.copy(limiter) is limiter
    assert copy.deepcopy([limiter])[0] is limiter
    assert not limiter.shared


def test_a_limiter_is_freed_with_its_last_user():
    limiter = RateLimiter(5)
    gone = weakref.ref(limiter)
    del limiter
    gc.collect()
    assert gone() is None


# --- threads --------------------------------------------------------------------------------------


def test_threads_together_keep_the_limit():
    limiter, starts = RateLimiter(200), []
    began = time.monotonic()
    end = began + 0.3

    def work() -> None:
        while time.monotonic() < end:
            limiter.acquire()
            starts.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    # A busy machine starves us, and notes a start late.
    assert 10 < len(starts) <= 200 * (max(starts) - began) + 2


def test_a_thread_that_waits_is_not_overtaken_and_sees_a_slot_given_back(monkeypatch):
    monkeypatch.setattr("opero.limits.waiting._LONGEST_SLEEP", 20_000_000)
    limiter = RateLimiter("1/hour")
    reservation = limiter.reserve()
    waiting = threading.Thread(target=limiter.acquire, daemon=True)
    waiting.start()
    until(lambda: len(limiter.threads_waiting) == 1)
    assert reservation.refund()
    assert not limiter.try_acquire()
    waiting.join(10)
    assert not waiting.is_alive()
    assert not limiter.try_acquire()


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_tasks_wait_for_their_slots_in_order_of_arrival(clock):
    limiter, served = RateLimiter("10/s"), []

    async def task(name: int) -> None:
        await limiter.wait()
        served.append((name, round(clock.elapsed, 6)))

    await asyncio.gather(*(task(name) for name in range(5)))
    assert served == [(0, 0), (1, 0), (2, 0.1), (3, 0.2), (4, 0.3)]


@pytest.mark.asyncio
async def test_tasks_are_served_in_order_of_arrival_in_real_time():
    limiter, served = RateLimiter(500), []

    async def task(name: int) -> None:
        await limiter.wait()
        served.append(name)

    await asyncio.gather(*(task(name) for name in range(40)))
    assert served == list(range(40))


@pytest.mark.asyncio
async def test_a_task_that_waits_is_not_overtaken(clock):
    limiter = RateLimiter("1/minute", burst=0)
    await limiter.wait()
    waiting = asyncio.create_task(limiter.wait())
    await asyncio.sleep(0)
    clock.advance(60)
    assert not limiter.try_acquire()
    second = asyncio.create_task(limiter.wait())
    assert await waiting == pytest.approx(60)
    assert await second == pytest.approx(60)


@pytest.mark.asyncio
async def test_a_task_that_comes_when_a_slot_is_free_goes_behind_the_waiters(monkeypatch):
    monkeypatch.setattr("opero.limits.waiting._LONGEST_SLEEP", 20_000_000)
    limiter = RateLimiter("1/hour")
    reservation = await limiter.reserve_async()
    first = asyncio.create_task(limiter.wait())
    await asyncio.sleep(0)
    assert reservation.refund()
    second = asyncio.create_task(limiter.wait())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not second.done()
    first.cancel()
    assert await second > 0
    await asyncio.gather(first, return_exceptions=True)


@pytest.mark.asyncio
async def test_async_with_takes_a_slot_on_entering(clock):
    limiter = RateLimiter("10/s", burst=0)
    for _ in range(3):
        async with limiter as entered:
            assert entered is limiter
    assert clock.elapsed == pytest.approx(0.2)


@pytest.mark.asyncio
async def test_a_task_gives_a_reserved_slot_back(clock):
    limiter = RateLimiter("10/s", burst=0)
    await limiter.wait()
    reservation = await limiter.reserve_async()
    assert reservation.waited == pytest.approx(0.1)
    assert reservation.refund()
    assert await limiter.wait() == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("fake", [True, False])
async def test_cancelled_waiters_cost_nothing(fake):
    with fake_clock() if fake else set_disabled(False) as clock:
        limiter, served = RateLimiter(50, burst=0), []

        async def task(name: int) -> None:
            await limiter.wait()
            served.append((name, clock.elapsed if fake else 0.0))

        tasks = [asyncio.create_task(task(name)) for name in range(12)]
        await asyncio.sleep(0)
        for name in (1, 2, 5, 9, 10):
            tasks[name].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [name for name, _ in served] == [0, 3, 4, 6, 7, 8, 11]
        assert not limiter.loops_waiting
        if fake:
            assert served[-1][1] - served[0][1] == pytest.approx(6 / 50)


@pytest.mark.asyncio
async def test_a_cancelled_waiter_takes_no_slot(clock):
    limiter = RateLimiter("1/minute", burst=0)
    await limiter.wait()
    task = asyncio.create_task(limiter.wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    clock.advance(60)
    assert limiter.try_acquire()


@pytest.mark.asyncio
async def test_a_loop_that_was_blocked_releases_no_burst():
    limiter, starts = RateLimiter(100), []

    async def task() -> None:
        await limiter.wait()
        starts.append(time.monotonic())

    tasks = [asyncio.create_task(task()) for _ in range(30)]
    await asyncio.sleep(0.03)
    time.sleep(0.15)  # noqa: ASYNC251 - this is the fault under test
    unblocked = time.monotonic()
    await asyncio.gather(*tasks)
    assert sum(unblocked <= start < unblocked + 0.005 for start in starts) <= 2


@pytest.mark.asyncio
async def test_a_loop_that_was_blocked_for_long_lets_two_start_and_spaces_the_rest(clock):
    limiter, starts = RateLimiter(100), []

    async def task() -> None:
        await limiter.wait()
        starts.append(round(clock.elapsed, 6))

    tasks = [asyncio.create_task(task()) for _ in range(6)]
    await asyncio.sleep(0)
    clock.advance(0.8)
    await asyncio.gather(*tasks)
    assert starts == [0, 0, 0.8, 0.8, 0.81, 0.82]


def test_two_event_loops_one_after_the_other_keep_one_limit():
    limiter, starts = RateLimiter(100), []

    async def task() -> None:
        await limiter.wait()
        starts.append(time.monotonic())

    async def main() -> None:
        await asyncio.gather(*(task() for _ in range(5)))

    for _ in range(3):
        asyncio.run(asyncio.wait_for(main(), 10))
    assert len(starts) == 15
    assert len(starts) <= 100 * (max(starts) - min(starts) + 0.05) + 2
    assert not limiter.loops_waiting


def test_a_run_that_is_cut_short_does_not_block_the_next():
    limiter = RateLimiter(20, burst=0)

    async def main(seconds: float) -> None:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(limiter.wait() for _ in range(3)))

    with pytest.raises(TimeoutError):
        asyncio.run(main(0.02))
    asyncio.run(main(10))


def test_a_loop_closed_over_its_waiters_is_forgotten():
    limiter = RateLimiter(20, burst=0)
    limiter.acquire()
    loop = asyncio.new_event_loop()
    task = loop.create_task(limiter.wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert list(limiter.loops_waiting) == [loop]
    asyncio.run(asyncio.wait_for(limiter.wait(), 10))
    assert not limiter.loops_waiting
    task._log_destroy_pending = False  # it is left pending on purpose
    task.get_coro().close()


def test_two_loops_and_threads_share_one_limit():
    limiter, starts = RateLimiter(200), []
    began = time.monotonic()
    end = began + 0.4

    def thread() -> None:
        while time.monotonic() < end:
            limiter.acquire()
            starts.append(time.monotonic())

    async def task() -> None:
        while time.monotonic() < end:
            await limiter.wait()
            starts.append(time.monotonic())

    async def main() -> None:
        await asyncio.gather(*(task() for _ in range(4)))

    counts = []

    def loop() -> None:
        before = len(starts)
        asyncio.run(main())
        counts.append(len(starts) - before)

    threads = [threading.Thread(target=target) for target in (loop, loop, thread, thread)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(10)
    assert 10 < len(starts) <= 200 * (max(starts) - began) + 2
    assert all(counts)


# --- limiters of the user's own -------------------------------------------------------------------


class Own:
    """Somebody's limiter that always waits a little."""

    async def wait(self) -> None:
        await asyncio.sleep(0.005)


@pytest.mark.asyncio
async def test_a_limiter_of_ones_own_is_awaited_as_it_is():
    limiter = RateLimiter(Own())
    assert await limiter.wait() > 0.004
    assert (await limiter.reserve_async()).waited > 0.004


@pytest.mark.asyncio
async def test_an_asynciolimiter_is_a_limiter_of_ones_own():
    limiter = RateLimiter(asynciolimiter.Limiter(100))
    assert await limiter.wait() < 5
    assert not limiter.shared
    assert not limiter.share()
    assert "asynciolimiter.Limiter(rate=100)" in limiter.describe()
    assert repr(limiter) == "<RateLimiter around asynciolimiter.Limiter(rate=100)>"


@pytest.mark.parametrize(
    "limiter",
    [
        asynciolimiter.Limiter(100, max_burst=1),
        asynciolimiter.StrictLimiter(100),
        asynciolimiter.LeakyBucketLimiter(100, capacity=1),
    ],
    ids=lambda limiter: type(limiter).__name__,
)
def test_limiters_of_asynciolimiter_are_accepted_as_rate_limit(limiter):
    @opero(cache=False, rate_limit=limiter)
    async def ping(n):
        return n, time.monotonic()

    async def main():
        return await asyncio.gather(*map(ping, range(6)))

    for _ in range(2):  # also in a later event loop
        began = time.monotonic()
        answers = asyncio.run(main())
        assert [n for n, _ in answers] == list(range(6))
        assert max(at for _, at in answers) - began > 0.025

    with pytest.raises(OperoUsageError, match=r"not async.*\"100/minute\""):

        @opero(cache=False, rate_limit=limiter)
        def plain(n):
            return n


def test_an_asynciolimiter_survives_successive_runs():
    limiter = RateLimiter(asynciolimiter.Limiter(50))

    async def main() -> None:
        await asyncio.wait_for(limiter.wait(), 10)

    for _ in range(3):
        asyncio.run(main())


def test_an_asynciolimiter_in_two_live_loops_is_an_error_with_the_fix():
    limiter = RateLimiter(asynciolimiter.Limiter(50))
    loops = [asyncio.new_event_loop() for _ in range(2)]
    loops[0].run_until_complete(limiter.wait())
    with pytest.raises(OperoUsageError, match=r"another event loop.*RateLimiter\("):
        loops[1].run_until_complete(limiter.wait())
    for loop in loops:
        loop.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda limiter: limiter.acquire(),
        lambda limiter: limiter.try_acquire(),
        lambda limiter: limiter.reserve(),
        pickle.dumps,
        lambda _: RateLimiter(asynciolimiter.Limiter(50), burst=3),
    ],
)
def test_what_an_asynciolimiter_cannot_do_is_an_error_with_the_fix(use):
    with pytest.raises(OperoUsageError, match=r'"100/minute"'):
        use(RateLimiter(asynciolimiter.Limiter(50)))


def test_an_asynciolimiter_is_not_used_while_opero_is_disabled():
    limiter = RateLimiter(asynciolimiter.Limiter(0.001))
    with set_disabled():
        assert limiter.acquire() == 0
        assert limiter.try_acquire()
        assert asyncio.run(limiter.wait()) == 0
