# this_file: tests/core/test_timeout.py
"""Timeout: a limit for each real call, by cancellation or by leaving a thread behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import threading
import time
import weakref

import pytest

from opero import events
from opero.core.call import Call
from opero.core.timeout import Timeout
from opero.errors import CallTimeoutError
from opero.events.bus import Emitter

pytestmark = pytest.mark.internal


@pytest.fixture
def received():
    return []


@pytest.fixture
def limit(received):
    """So many seconds as limit for a function named `f`."""
    return lambda seconds: Timeout(seconds, Emitter("f", [received.append]))


@pytest.fixture
def hang():
    """A function that does not end before the test does."""
    end, ended = threading.Event(), threading.Event()

    def hung(*args):
        end.wait(20)
        ended.set()

    hung.end, hung.ended = end, ended
    yield hung
    end.set()


class Argument:
    """Something whose end can be watched."""


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def limited(timeout, fn):
    """The real call of `fn` with the limit around it."""
    return lambda call: timeout.run(functools.partial(fn, *call.args, **call.kwargs), call)


def gone(watch):
    end = time.monotonic() + 100
    while watch() is not None and time.monotonic() < end:
        time.sleep(0.001)
    return watch() is None


def test_it_describes_itself(limit):
    assert limit(90).describe() == "90 s for each call"


def test_our_error_is_a_timeout_error_with_name_and_limit():
    error = CallTimeoutError("f", 2.5)
    assert isinstance(error, TimeoutError)
    assert (error.function, error.seconds) == ("f", 2.5)
    assert str(error) == "f() took longer than 2.5 s"


# --- threads --------------------------------------------------------------------------------------


def test_a_quick_call_gives_its_value(limit, received):
    run = limited(limit(10), lambda a, *, b: (a, b))
    call = Call((1,), {"b": 2})
    assert run(call) == (1, 2)
    assert call.orphan_thread is None
    assert received == []


@pytest.mark.parametrize("kind", [KeyError, TimeoutError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_function_stays_itself(limit, received, kind):
    error = kind("so")

    def fail():
        raise error

    call = Call((), {})
    with pytest.raises(kind) as caught:
        limited(limit(10), fail)(call)
    assert caught.value is error
    assert call.orphan_thread is None
    assert received == []


def test_a_hung_call_is_left_behind(limit, received, hang):
    call = Call((), {})
    with pytest.raises(CallTimeoutError) as caught:
        limited(limit(0.005), hang)(call)
    assert (caught.value.function, caught.value.seconds) == ("f", 0.005)
    (event,) = received
    assert isinstance(event, events.CallTimedOut)
    assert (event.function, event.seconds) == ("f", 0.005)
    # Who holds something for the call learns of its real end.
    reported = threading.Event()
    call.orphan_thread.then(reported.set)
    assert not reported.is_set()
    hang.end.set()
    assert reported.wait(10)
    assert hang.ended.is_set()


def test_ten_hung_calls_do_not_stop_the_eleventh(limit, hang):
    run = limited(limit(0.002), hang)
    for _ in range(10):
        with pytest.raises(CallTimeoutError):
            run(Call((), {}))
    assert limited(limit(10), lambda: "done")(Call((), {})) == "done"


def test_context_variables_reach_the_function(limit):
    variable = contextvars.ContextVar("variable")
    variable.set("mine")
    assert limited(limit(10), variable.get)(Call((), {})) == "mine"


def test_nested_limits_keep_to_the_tighter_one(limit, hang):
    inner = limited(Timeout(0.005, Emitter("inner")), hang)
    outer = limited(limit(10), lambda: inner(Call((), {})))
    with pytest.raises(CallTimeoutError) as caught:
        outer(Call((), {}))
    assert caught.value.function == "inner"


@pytest.mark.parametrize("fails", [False, True])
def test_arguments_die_with_the_call(limit, fails, no_collector):
    argument = Argument()
    watch = weakref.ref(argument)

    def work(argument):
        if fails:
            raise KeyError(argument)
        return type(argument)

    # By hand, because pytest keeps what it catches.
    with contextlib.suppress(KeyError):
        limited(limit(10), work)(Call((argument,), {}))
    del argument
    assert gone(watch)


@pytest.mark.parametrize("fails", [False, True])
def test_arguments_die_with_the_thread_that_was_left_behind(limit, hang, fails, no_collector):
    argument = Argument()
    watch = weakref.ref(argument)

    def work(argument):
        hang()
        if fails:
            raise KeyError(argument)
        return argument

    call = Call((argument,), {})
    with contextlib.suppress(CallTimeoutError):
        limited(limit(0.005), work)(call)
    behind = call.orphan_thread
    del argument, call
    assert watch() is not None
    hang.end.set()
    assert gone(watch)
    del behind


def test_no_thread_means_no_call_behind(limit, monkeypatch):
    def refuse(job):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("opero.core.timeout.run_in_thread", refuse)
    call = Call((), {})
    with pytest.raises(RuntimeError, match="can't start"):
        limited(limit(10), int)(call)
    assert call.orphan_thread is None


# --- tasks ----------------------------------------------------------------------------------------


async def forever():
    await asyncio.Event().wait()


@pytest.mark.asyncio
async def test_a_quick_task_gives_its_value(limit, received):
    async def quick():
        await asyncio.sleep(0)
        return "value"

    assert await limit(10).within(quick(), Call((), {})) == "value"
    assert received == []


@pytest.mark.asyncio
async def test_anything_awaitable_will_do(limit):
    future = asyncio.get_running_loop().create_future()
    future.set_result("value")
    assert await limit(10).within(future, Call((), {})) == "value"

    class Awaitable:
        def __await__(self):
            yield from asyncio.sleep(0).__await__()
            return "value"

    assert await limit(10).within(Awaitable(), Call((), {})) == "value"


@pytest.mark.asyncio
async def test_a_hung_task_is_cancelled(limit, received):
    seen = []

    async def hung():
        try:
            await forever()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(CallTimeoutError) as caught:
        await limit(0.005).within(hung(), Call((), {}))
    assert (caught.value.function, caught.value.seconds) == ("f", 0.005)
    assert seen == ["cancelled"]
    assert [type(event) for event in received] == [events.CallTimedOut]
    # The task that called goes on as if nothing had happened.
    assert not asyncio.current_task().cancelling()
    await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [KeyError, TimeoutError, SystemError])
async def test_an_error_of_the_coroutine_stays_itself(limit, received, kind):
    error = kind("so")

    async def fail():
        raise error

    with pytest.raises(kind) as caught:
        await limit(10).within(fail(), Call((), {}))
    assert caught.value is error
    assert received == []


@pytest.mark.asyncio
async def test_an_inner_timeout_stays_itself(limit, received):
    async def inner():
        async with asyncio.timeout(0.002):
            await forever()

    with pytest.raises(TimeoutError) as caught:
        await limit(10).within(inner(), Call((), {}))
    assert not isinstance(caught.value, CallTimeoutError)
    inner_limit = Timeout(0.002, Emitter("inner"))
    with pytest.raises(CallTimeoutError) as caught:
        await limit(10).within(inner_limit.within(forever(), Call((), {})), Call((), {}))
    assert caught.value.function == "inner"
    assert received == []


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [TimeoutError, KeyError])
async def test_an_error_that_answers_the_cancellation_stays_itself(limit, kind):
    error = kind("cleaning up failed")

    async def stubborn():
        try:
            await forever()
        except asyncio.CancelledError:
            raise error from None

    with pytest.raises(kind) as caught:
        await limit(0.002).within(stubborn(), Call((), {}))
    assert caught.value is error
    assert not asyncio.current_task().cancelling()


@pytest.mark.asyncio
async def test_a_value_that_comes_in_spite_of_the_cancellation_is_kept(limit):
    async def stubborn():
        try:
            await forever()
        except asyncio.CancelledError:
            return "value"

    assert await limit(0.002).within(stubborn(), Call((), {})) == "value"
    assert not asyncio.current_task().cancelling()


@pytest.mark.asyncio
async def test_cancellation_from_outside_is_not_swallowed(limit, received):
    task = asyncio.create_task(limit(10).within(forever(), Call((), {})))
    await asyncio.sleep(0)
    task.cancel("outside")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert received == []


@pytest.mark.asyncio
async def test_cancellation_from_outside_that_comes_together_with_the_end_wins(limit, received):
    async def slow_to_leave():
        try:
            await forever()
        finally:
            left.set()
            await asyncio.sleep(0.002)

    left = asyncio.Event()
    task = asyncio.create_task(limit(0.002).within(slow_to_leave(), Call((), {})))
    await left.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert received == []


@pytest.mark.asyncio
async def test_arguments_of_a_cancelled_task_die_with_it(limit, no_collector):
    argument = Argument()
    watch = weakref.ref(argument)

    async def hung(argument):
        await asyncio.sleep(10)

    async def attempt(argument):
        try:
            await limit(0.002).within(hung(argument), Call((), {}))
        except CallTimeoutError:
            return
        raise AssertionError

    await attempt(argument)
    del argument
    # What the loop itself remembers of the last round is none of ours.
    await asyncio.sleep(0.002)
    assert watch() is None
