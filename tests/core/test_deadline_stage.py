# this_file: tests/core/test_deadline_stage.py
"""The stage that bounds a call by its deadline, and the deadline that is in force."""

from __future__ import annotations

import asyncio
import contextvars
import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero import deadline, events, remaining
from opero.core.call import Call
from opero.core.deadline import (
    Deadline,
    current_deadline,
    innermost_scope,
    overdue,
    require_time,
    run_until,
)
from opero.errors import DeadlineError, OperoUsageError
from opero.events.bus import Emitter
from opero.utils import ambient
from opero.utils.ambient import switch

pytestmark = pytest.mark.internal


def test_without_a_block_nothing_is_bounded():
    assert remaining() is None
    assert current_deadline() is None


@pytest.mark.parametrize("seconds", [-1, "soon", None, float("nan"), float("inf"), True])
def test_anything_else_is_refused_where_it_is_written(seconds):
    with pytest.raises(OperoUsageError, match="deadline="):
        deadline(seconds)
    assert current_deadline() is None


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
