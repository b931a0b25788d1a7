# this_file: tests/core/test_deadline.py
"""Deadlines: the tighter one holds, in nested blocks, threads and tasks, and no longer than its block."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from datetime import timedelta

import pytest

from opero import deadline, remaining
from opero.errors import OperoUsageError

# --- the block ------------------------------------------------------------------------------------


def test_what_remains_shrinks_and_never_goes_below_zero(clock):
    with deadline(30):
        assert remaining() == pytest.approx(30)
        clock.advance(12.5)
        assert remaining() == pytest.approx(17.5)
        clock.advance(100)
        assert remaining() == 0
    assert remaining() is None


@pytest.mark.parametrize("seconds", [90, 90.0, "90s", "1m 30s", timedelta(seconds=90)])
def test_a_budget_is_a_duration(seconds, clock):
    with deadline(seconds):
        assert remaining() == pytest.approx(90)


def test_a_budget_of_nothing_is_spent_at_once():
    with deadline(0):
        assert remaining() == 0


def test_time_counts_from_the_entry(clock):
    block = deadline(30)
    clock.advance(100)
    for _ in range(2):
        with block:
            assert remaining() == pytest.approx(30)
            clock.advance(5)


def test_a_block_is_not_entered_twice_at_once():
    block = deadline(30)
    with block, pytest.raises(OperoUsageError, match="already under way"), block:
        pass
    assert remaining() is None


def test_a_block_is_no_decorator():
    with pytest.raises(OperoUsageError, match=r"write @opero\(deadline=30\)"):

        @deadline(30)
        async def fetch(): ...


# --- threads, tasks and generators ----------------------------------------------------------------


def test_a_thread_has_none_unless_it_inherits_the_context(clock):
    seen = []

    def look():
        seen.append(remaining())

    with deadline(30):
        context = contextvars.copy_context()
        for surrounding in (contextvars.Context(), context):
            # Said aloud, because free-threaded builds inherit by themselves.
            thread = threading.Thread(target=surrounding.run, args=(look,))
            thread.start()
            thread.join()
    assert seen == [None, pytest.approx(30)]


def test_blocks_of_several_threads_do_not_mix(clock):
    together, seen = threading.Barrier(3, timeout=10), {}

    def work(seconds):
        with deadline(seconds):
            together.wait()
            seen[seconds] = remaining()
            together.wait()

    threads = [threading.Thread(target=work, args=(seconds,)) for seconds in (5, 10, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {seconds: pytest.approx(seconds) for seconds in (5, 10, 15)}


@pytest.mark.asyncio
async def test_tasks_inherit_the_block_and_do_not_mix(clock):
    async def child(seconds):
        first = remaining()
        with deadline(seconds):
            await asyncio.sleep(0)
            return first, remaining()

    with deadline(30):
        tasks = [asyncio.create_task(child(seconds)) for seconds in (10, 20, 40)]
        with deadline(25):
            results = await asyncio.gather(*tasks)
        assert remaining() == pytest.approx(30)
    assert [pytest.approx(result) for result in results] == [(30, 10), (30, 20), (30, 30)]
    assert remaining() is None


@pytest.mark.asyncio
async def test_a_task_that_outlives_the_block_is_not_bounded_by_it(clock):
    async def child():
        with deadline(50):
            first = remaining()
            await go_on.wait()
            return first, remaining()

    go_on = asyncio.Event()
    with deadline(10):
        task = asyncio.create_task(child())
        await asyncio.sleep(0)
        clock.advance(20)
    go_on.set()
    assert await task == (pytest.approx(10), pytest.approx(30))


@pytest.mark.asyncio
async def test_a_coroutine_that_begins_after_the_block_is_not_bounded_by_it():
    async def child():
        return remaining()

    with deadline(10):
        coroutine = child()
    assert await coroutine is None


def test_generators_that_end_in_any_order_leave_no_mark(clock):
    def work(seconds):
        with deadline(seconds):
            yield remaining()

    first, second = work(10), work(20)
    next(first), next(second)
    first.close()
    assert remaining() == pytest.approx(20)
    second.close()
    assert remaining() is None
