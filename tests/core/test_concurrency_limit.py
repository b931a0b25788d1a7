# this_file: tests/core/test_concurrency_limit.py
"""Concurrency limit: never more in flight than allowed, in order, and no permit lost or doubled."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from opero import ConcurrencyLimit, opero
from opero.errors import BulkheadFullError, OperoUsageError


def until(condition):
    """Wait until another thread has got there."""
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def full(size=1, **options):
    """A limit whose permits are all out."""
    limit = ConcurrencyLimit(size, **options)
    for _ in range(size):
        assert limit.try_acquire()
    return limit


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, None, 1_000_001])
def test_a_limit_is_a_whole_number_of_at_least_one(value):
    with pytest.raises(OperoUsageError, match=r"concurrency=.* must be a whole number, 1 to"):
        ConcurrencyLimit(value)


@pytest.mark.parametrize("value", [-1, 1.5, "3", False])
def test_a_queue_is_a_whole_number(value):
    with pytest.raises(OperoUsageError, match=r"queue=.* must be a whole number, 0 to"):
        ConcurrencyLimit(1, queue=value)


def test_it_shows_its_state():
    limit = full(2, name="db")
    assert repr(limit) == "<ConcurrencyLimit db: 2 of 2 in flight, 0 waiting>"
    limit.release()
    assert repr(limit) == "<ConcurrencyLimit db: 1 of 2 in flight, 0 waiting>"


# --- threads --------------------------------------------------------------------------------------


def test_permits_are_taken_and_given_back():
    limit = ConcurrencyLimit(2)
    assert limit.try_acquire()
    assert limit.acquire()
    assert limit.in_flight == 2
    assert not limit.try_acquire()
    limit.release()
    assert limit.acquire()


def test_a_permit_that_is_given_back_twice_counts_once():
    limit = ConcurrencyLimit(1)
    limit.release()
    assert limit.in_flight == 0
    assert limit.try_acquire()
    assert not limit.try_acquire()


def test_a_with_block_gives_its_permit_back_whatever_happens():
    limit = ConcurrencyLimit(1)
    with pytest.raises(ZeroDivisionError), limit:
        1 / (1 - limit.in_flight)
    assert limit.in_flight == 0


def test_threads_come_through_in_order_of_arrival():
    limit, served, threads = full(), [], []

    def come(name):
        limit.acquire()
        served.append(name)
        limit.release()

    for name in range(6):
        threads.append(in_thread(functools.partial(come, name)))
        until(lambda: limit.waiting == name + 1)  # noqa: B023 - called in this very round
    limit.release()
    for thread in threads:
        thread.join(10)
    assert served == list(range(6))
    assert (limit.in_flight, limit.waiting) == (0, 0)


def test_no_waiter_overtakes_a_thread_that_is_served_but_not_awake():
    limit = full()
    waiting = threading.Event()
    thread = in_thread(lambda: (limit.acquire(), waiting.wait(10)))
    until(lambda: limit.waiting == 1)
    limit.release()
    assert not limit.try_acquire()
    waiting.set()
    thread.join(10)


@pytest.mark.parametrize("seconds", [0.005, 0, -1])
def test_a_thread_goes_without_permit_when_its_time_is_over(seconds):
    limit = full()
    assert not limit.acquire(timeout=seconds)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert limit.acquire(timeout=seconds)


def test_a_permit_that_comes_in_the_last_moment_is_kept(monkeypatch):
    limit = full()

    def late(gate, seconds):
        if not gate.granted:
            limit.release()
        assert gate.granted
        return False

    monkeypatch.setattr("opero.utils.waiters.ThreadWaiter.wait", late)
    assert limit.acquire(timeout=1)
    assert limit.in_flight == 1


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
def test_an_interrupted_thread_leaves_the_queue():
    limit, me = full(), threading.main_thread().ident

    def interrupt():
        until(lambda: limit.waiting == 1)
        signal.pthread_kill(me, signal.SIGINT)

    in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        limit.acquire()
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert limit.in_flight == 0


def test_an_interrupt_after_the_permit_has_come_gives_it_on(monkeypatch):
    limit = full()

    def interrupted(gate, seconds):
        limit.release()
        assert gate.granted
        raise KeyboardInterrupt

    monkeypatch.setattr("opero.utils.waiters.ThreadWaiter.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        limit.acquire()
    assert limit.in_flight == 0


# --- tasks ----------------------------------------------------------------------------------------


async def waiter(limit, **options):
    """A task that waits for a permit."""
    before = limit.waiting
    task = asyncio.create_task(limit.wait(**options))
    await asyncio.sleep(0)
    assert limit.waiting == before + 1
    return task


@pytest.mark.asyncio
async def test_tasks_come_through_in_order_of_arrival():
    limit, served = full(), []

    async def come(name):
        async with limit:
            served.append(name)

    tasks = [asyncio.create_task(come(name)) for name in range(6)]
    await asyncio.sleep(0)
    limit.release()
    await asyncio.gather(*tasks)
    assert served == list(range(6))
    assert limit.in_flight == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [0.005, 0, -1])
async def test_a_task_goes_without_permit_when_its_time_is_over(seconds):
    limit = full()
    assert not await limit.wait(timeout=seconds)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert await limit.wait(timeout=seconds)


@pytest.mark.asyncio
async def test_a_cancelled_task_leaves_the_queue():
    limit = full()
    first, second = await waiter(limit), await waiter(limit)
    first.cancel()
    await asyncio.wait([first])
    assert limit.waiting == 1
    limit.release()
    assert await second
    assert limit.in_flight == 1


@pytest.mark.asyncio
async def test_a_cancelled_task_that_has_not_run_yet_is_passed_over_without_a_second_permit():
    limit = full()
    first, second = await waiter(limit), await waiter(limit)
    first.cancel()
    # It has been cancelled, but does not know yet.
    limit.release()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert limit.in_flight == 1
    limit.release()
    assert limit.in_flight == 0


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_after_the_permit_has_come_gives_it_on():
    limit = full()
    first, second = await waiter(limit), await waiter(limit)
    limit.release()
    first.cancel()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert second.result()
    assert limit.in_flight == 1


@pytest.mark.asyncio
async def test_a_permit_that_another_thread_gave_in_the_last_moment_is_kept():
    limit = full()
    task = await waiter(limit, timeout=0.1)
    thread = in_thread(limit.release)
    thread.join(10)
    time.sleep(0.11)  # noqa: ASYNC251 - the loop shall miss that the time runs out
    assert await task
    assert limit.in_flight == 1


@pytest.mark.asyncio
async def test_a_task_that_is_closed_by_the_collector_gives_its_place_back():
    limit = full()
    coroutine = limit.wait()
    coroutine.send(None)
    assert limit.waiting == 1
    coroutine.close()
    assert (limit.waiting, limit.in_flight) == (0, 1)
    coroutine = limit.wait()
    coroutine.send(None)
    limit.release()
    del coroutine
    gc.collect()
    assert (limit.waiting, limit.in_flight) == (0, 0)


# --- several loops --------------------------------------------------------------------------------


def waiting_in(loop, limit, count=1):
    """Tasks that wait in `loop`, which stands still afterwards."""

    async def start():
        return [await waiter(limit) for _ in range(count)]

    return loop.run_until_complete(start())


def test_a_blocked_loop_delays_no_other_and_its_tasks_ask_again():
    limit, loop = full(), asyncio.new_event_loop()
    (stalled,) = waiting_in(loop, limit)
    limit.release()
    assert limit.try_acquire()
    loop.run_until_complete(asyncio.sleep(0))
    assert not stalled.done()
    loop.call_soon(limit.release)
    assert loop.run_until_complete(asyncio.wait_for(stalled, 5))
    assert limit.in_flight == 1
    loop.close()


def test_a_task_that_asks_again_is_not_refused():
    limit, loop = full(queue=1), asyncio.new_event_loop()
    (stalled,) = waiting_in(loop, limit)
    limit.release()
    assert limit.try_acquire()
    thread = in_thread(limit.acquire)
    until(lambda: limit.waiting == 1)
    loop.call_later(0.005, limit.release)
    loop.call_later(0.01, limit.release)
    assert loop.run_until_complete(asyncio.wait_for(stalled, 5))
    thread.join(10)
    assert limit.in_flight == 1
    loop.close()


def test_a_loop_that_ends_takes_its_tasks_out_of_the_queue():
    limit = full()

    async def main():
        return await waiter(limit)

    assert asyncio.run(main()).cancelled()
    assert (limit.in_flight, limit.waiting) == (1, 0)


def test_a_permit_on_its_way_to_a_loop_that_stops_comes_back():
    limit = full()

    async def come():
        async with limit:
            await asyncio.sleep(10)

    async def main():
        task = asyncio.create_task(come())
        await asyncio.sleep(0)
        in_thread(limit.release).join(10)
        return task

    assert asyncio.run(main()).cancelled()
    assert limit.in_flight == 0


def test_a_limit_serves_one_loop_after_the_other():
    limit = ConcurrencyLimit(1)

    async def main():
        async with limit:
            task = await waiter(limit)
        assert await task
        limit.release()

    for _ in range(3):
        asyncio.run(main())
    assert limit.in_flight == 0


def test_threads_and_tasks_come_through_in_order_of_arrival():
    limit, served = full(), []

    def come(name):
        limit.acquire()
        served.append(name)
        limit.release()

    async def acome(name):
        async with limit:
            served.append(name)

    threads = []
    for name in range(6):
        work = functools.partial(come, name)
        if name % 2:
            work = lambda name=name: asyncio.run(acome(name))  # noqa: E731 - as short as its twin
        threads.append(in_thread(work))
        until(lambda: limit.waiting == name + 1)  # noqa: B023 - called in this very round
    limit.release()
    for thread in threads:
        thread.join(10)
    assert served == list(range(6))


# --- bounded queue --------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_name_and_numbers():
    limit = full(queue=0, name="db")
    with pytest.raises(BulkheadFullError) as caught:
        limit.acquire()
    assert "db" in str(caught.value)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert limit.acquire()


@pytest.mark.asyncio
async def test_a_full_queue_refuses_tasks_too():
    limit = full(queue=2)
    tasks = [await waiter(limit), await waiter(limit)]
    with pytest.raises(BulkheadFullError):
        await limit.wait()
    assert limit.waiting == 2
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    third = await waiter(limit)
    limit.release()
    limit.release()
    assert await tasks[1]
    assert await third


# --- permits are never lost or doubled ------------------------------------------------------------


def test_permits_are_never_lost_or_doubled_by_threads_loops_and_cancellations():
    size, end = 3, time.monotonic() + 1.0
    limit, lock, most, served = ConcurrencyLimit(size), threading.Lock(), [0], [0]
    inside: list[None] = []

    def enter():
        with lock:
            inside.append(None)
            most[0] = max(most[0], len(inside))
            served[0] += 1

    def leave():
        with lock:
            inside.pop()

    def threads_work(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            if limit.acquire(chance.choice([None, 0, 0.0005])):
                enter()
                time.sleep(chance.choice([0, 0.0002]))
                leave()
                limit.release()

    async def visit(chance):
        if await limit.wait(chance.choice([None, None, 0, 0.0005])):
            try:
                enter()
                try:
                    await asyncio.sleep(chance.choice([0, 0.0005]))
                finally:
                    leave()
            finally:
                limit.release()

    @opero(cache=False, retries=0, concurrency=limit)
    def call(seconds):
        enter()
        time.sleep(seconds)
        leave()

    @opero(cache=False, retries=0, concurrency=limit)
    async def acall(seconds):
        enter()
        try:
            await asyncio.sleep(seconds)
        finally:
            leave()

    def threads_call(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            call(chance.choice([0, 0.0002]))

    async def loops_work(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            visits = [visit(chance) for _ in range(6)] + [acall(0.0002), acall(0)]
            tasks = [asyncio.create_task(one) for one in visits]
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
            for task in chance.sample(tasks, 4):
                task.cancel()
            await asyncio.wait(tasks)

    works = [functools.partial(threads_work, seed) for seed in range(3)]
    works += [functools.partial(threads_call, seed) for seed in range(2)]
    works += [lambda seed=seed: asyncio.run(loops_work(seed)) for seed in range(2)]
    threads = [in_thread(work) for work in works]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert (limit.in_flight, limit.waiting) == (0, 0)
    assert most[0] == size
    assert served[0] > 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_starts_with_all_permits():
    code = """
import os, threading
from opero.limits.permits import ConcurrencyLimit
limit = ConcurrencyLimit(2)
limit.acquire()
limit.acquire()
thread = threading.Thread(target=limit.acquire, daemon=True)
thread.start()
while not limit.waiting:
    pass
limit._permits.lock.acquire()
child = os.fork()
if not child:
    assert (limit.in_flight, limit.waiting) == (0, 0)
    assert limit.acquire(timeout=0)
    limit.release()
    # The one that the forking thread had in the parent.
    limit.release()
    assert limit.acquire(timeout=0) and limit.acquire(timeout=0) and not limit.acquire(timeout=0)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (limit.in_flight, limit.waiting) == (2, 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=100)
