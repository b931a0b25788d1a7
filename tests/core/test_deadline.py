# this_file: tests/core/test_deadline.py
"""Deadlines: the tighter one holds, in nested blocks, threads and tasks, and no longer than its block."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero import events
from opero.core.call import Call
from opero.core.deadline import (
    Deadline,
    current_deadline,
    deadline,
    innermost_scope,
    overdue,
    remaining,
    require_time,
    run_until,
)
from opero.errors import DeadlineError, OperoUsageError
from opero.events.bus import Emitter
from opero.utils import ambient
from opero.utils.ambient import switch

pytestmark = pytest.mark.internal

# --- the block ------------------------------------------------------------------------------------


def test_without_a_block_nothing_is_bounded():
    assert remaining() is None
    assert current_deadline() is None


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


@pytest.mark.parametrize("seconds", [-1, "soon", None, float("nan"), float("inf"), True])
def test_anything_else_is_refused_where_it_is_written(seconds):
    with pytest.raises(OperoUsageError, match="deadline="):
        deadline(seconds)
    assert current_deadline() is None


def test_a_budget_of_nothing_is_spent_at_once():
    with deadline(0):
        assert remaining() == 0


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=6))
def test_of_nested_blocks_the_tightest_one_holds(budgets):
    blocks, ends = [deadline(seconds) for seconds in budgets], []
    before = bool(switch.on)
    for block in blocks:
        block.__enter__()
        ends.append(current_deadline())
    assert ends == sorted(ends, reverse=True)
    assert remaining() <= min(budgets)
    for block in reversed(blocks):
        assert current_deadline() == ends.pop()
        block.__exit__(None, None, None)
    assert current_deadline() is None
    assert bool(switch.on) is before


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


def test_a_block_that_is_left_by_an_error_is_left():
    before = bool(switch.on)
    with pytest.raises(ZeroDivisionError), deadline(30):
        1 / (not switch.on)
    assert remaining() is None
    assert bool(switch.on) is before


def test_fast_paths_are_closed_while_a_block_is_open():
    before = bool(switch.on)
    with deadline(30):
        assert switch.on
        with deadline(30):
            assert switch.on
        assert switch.on
    assert bool(switch.on) is before


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
async def test_blocks_that_were_left_are_not_kept_alive():
    async def child():
        await left.wait()
        with deadline(5):
            return innermost_scope().outer

    left = asyncio.Event()
    with deadline(10), deadline(20):
        task = asyncio.create_task(child())
        await asyncio.sleep(0)
    left.set()
    assert await task is None


@pytest.mark.asyncio
async def test_a_coroutine_that_begins_after_the_block_is_not_bounded_by_it():
    async def child():
        return remaining()

    with deadline(10):
        coroutine = child()
    assert await coroutine is None


def test_a_coroutine_that_is_collected_elsewhere_leaves_no_mark():
    before = bool(switch.on)

    async def work():
        with deadline(30):
            await asyncio.get_running_loop().create_future()

    async def main():
        coroutine = work()
        contextvars.Context().run(coroutine.send, None)
        return coroutine

    coroutine = asyncio.run(main())
    del coroutine
    gc.collect()
    assert bool(switch.on) is before
    assert remaining() is None


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


# --- when time is up ------------------------------------------------------------------------------


def test_a_call_whose_time_is_up_says_so_once(clock):
    received = []
    emitter = Emitter("f", [received.append])
    call = Call((), {})
    call.deadline = ambient.clock().monotonic() + 10
    require_time(call, emitter, "before the call")
    assert not call.overdue
    clock.advance(10)
    with pytest.raises(DeadlineError, match=r"f\(\) ran out of time before the call"):
        require_time(call, emitter, "before the call")
    assert call.overdue
    overdue(call, emitter, "later")
    (event,) = received
    assert isinstance(event, events.DeadlinePassed)
    assert (event.function, event.where) == ("f", "before the call")


def test_work_may_run_until_a_moment(clock):
    end = ambient.clock().monotonic() + 10
    assert run_until(end, lambda a, *, b: (a, b, current_deadline()), 1, b=2) == (1, 2, end)
    assert current_deadline() is None


# --- the stage ------------------------------------------------------------------------------------


def run_stage(face, stage, body, call):
    """Run `body` behind the stage, in one of the two faces."""
    if not face.asynchronous:
        return stage.wrap_sync(lambda call: body())(call)

    async def proceed(call):
        await asyncio.sleep(0)
        return body()

    return asyncio.run(stage.wrap_async(proceed)(call))


def test_it_describes_itself():
    reported = "90 s for the whole call, waits included"
    assert Deadline(90).describe() == reported
    late = f"{reported}; without timeout= a call under way is not cut short"
    assert Deadline(90, cuts=False).describe() == late


def test_a_call_and_what_it_calls_have_the_same_deadline(face, clock):
    call = Call((), {})
    assert run_stage(face, Deadline(30), current_deadline, call) == call.deadline
    assert call.started == clock.monotonic()
    assert call.deadline == clock.monotonic() + 30
    assert remaining() is None


@pytest.mark.parametrize(("around", "left"), [(10, 10), (50, 30)])
def test_the_tighter_of_the_block_and_the_option_holds(face, clock, around, left):
    call = Call((), {})
    with deadline(around):
        call.deadline = current_deadline()
        assert run_stage(face, Deadline(30), remaining, call) == pytest.approx(left)
        assert remaining() == pytest.approx(around)
    assert call.deadline == pytest.approx(clock.monotonic() + left)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_its_deadline(face, error):
    before = bool(switch.on)

    def fail():
        assert switch.on
        raise error

    with pytest.raises(error):
        run_stage(face, Deadline(30), fail, Call((), {}))
    assert bool(switch.on) is before
    assert remaining() is None
