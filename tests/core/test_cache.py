# this_file: tests/core/test_cache.py
"""The cache stage: hits and misses, single-flight end to end, isolation, management."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from opero import opero
from opero.caching.handles import CacheHandle
from opero.core.cache import CacheStage, RefreshCall
from opero.core.call import Call
from opero.core.function import FunctionInfo, Stats
from opero.core.options import Options
from opero.errors import OperoUsageError, OperoWarning, Rejected, UnkeyableError
from opero.events import CacheHit, CacheMiss, CacheSkipped
from opero.events.bus import Emitter
from opero.utils import ambient

pytestmark = pytest.mark.internal


class Cached:
    """A function behind the cache stage alone."""

    def __init__(self, fn: Callable[..., Any], *, origin: Cached | None = None, **options: Any):
        self.fn = fn
        self.events: list[Any] = []
        self.stats = origin.stats if origin else Stats()
        info = FunctionInfo(fn)
        self.cache = CacheStage(
            info,
            Options.of("opero", **options),
            stats=self.stats,
            emitter=Emitter(info.qualname, [self.events.append]),
            origin=origin and origin.cache,
        )
        if info.kind == "async":

            async def aproceed(call: Call) -> Any:
                return await fn(*call.args, **call.kwargs)

            self.run = self.cache.wrap_async(aproceed)
        else:
            self.run = self.cache.wrap_sync(lambda call: fn(*call.args, **call.kwargs))
        run = self.run
        self.handle = CacheHandle(self.cache, lambda *sent: run(RefreshCall(*sent)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(Call(args, kwargs))

    def events_of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def waiting(self) -> int:
        return sum(len(f.waiters or ()) for f in list(self.cache.single_flight._open.values()))


def counted(result: Callable[..., Any] = lambda *a, **k: None) -> Callable[..., Any]:
    def fn(*args: Any, **kwargs: Any) -> Any:
        fn.calls += 1
        return result(*args, **kwargs)

    fn.calls = 0
    return fn


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    made = Clock()
    old = ambient.install_clock(made)
    yield made
    ambient.install_clock(old)


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def until(condition: Callable[[], object]) -> None:
    """Wait for something that other threads bring about."""
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def threads(*works: Callable[[], Any]) -> list[Any]:
    """Run each work in a thread of its own and return results or errors in order."""
    results: list[Any] = [None] * len(works)

    def work(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:  # noqa: BLE001 - it is what the test looks at
            results[index] = error

    running = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(works))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(10)
    assert not any(thread.is_alive() for thread in running)
    return results


async def turns(condition: Callable[[], object]) -> None:
    """Let other tasks run until something has come about."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")


# --- hits and misses ------------------------------------------------------------------------------


def test_a_result_is_computed_once():
    f = Cached(fn := counted(lambda x: x + 1))
    assert (f(1), f(1), f(2)) == (2, 2, 3)
    assert fn.calls == 2
    assert (f.stats.hits, f.stats.misses) == (1, 2)
    assert [type(e) for e in f.events] == [CacheMiss, CacheHit, CacheMiss]


@pytest.mark.asyncio
async def test_a_coroutine_function_is_computed_once():
    async def fn(x):
        calls.append(x)
        return x + 1

    calls: list[int] = []
    f = Cached(fn)
    assert [await f(1), await f(1), await f(x=1)] == [2, 2, 2]
    assert calls == [1]


@pytest.mark.parametrize("value", [None, 0, "", [], False, float("nan")], ids=repr)
def test_none_and_falsy_results_are_hits(value):
    f = Cached(fn := counted(lambda: value))
    assert repr([f(), f()]) == repr([value, value])
    assert fn.calls == 1


def test_a_call_knows_where_its_value_came_from():
    f = Cached(lambda x: x)
    first, second = Call((1,), {}), Call((1,), {})
    f.run(first)
    f.run(second)
    assert (first.source, second.source) == ("fresh", "hit")
    assert first.key == second.key == (int, 1)


def test_failures_are_not_cached():
    f = Cached(fn := counted(lambda: 1 / 0))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            f()
    assert fn.calls == 2


def test_rejected_results_are_not_cached():
    def refuse(x):
        raise Rejected(x)

    f = Cached(fn := counted(refuse))
    for _ in range(2):
        with pytest.raises(Rejected):
            f(1)
    assert fn.calls == 2


def test_wrong_arguments_are_left_to_the_function():
    def fn(x):
        return x

    f = Cached(fn, cache_key=lambda x: x)
    with pytest.raises(TypeError, match=r"fn\(\) missing"):
        f()


def test_the_test_switch_turns_the_cache_off():
    f = Cached(fn := counted())
    old = ambient.set_disabled(True)
    try:
        f(), f()
    finally:
        ambient.set_disabled(old)
    assert fn.calls == 2
    assert f.handle.info().size == 0


def test_functions_do_not_share():
    def make(n):
        return Cached(lambda x: x + n)

    assert (make(1)(1), make(2)(1)) == (2, 3)


# --- lifetime -------------------------------------------------------------------------------------


def test_an_entry_expires(clock):
    f = Cached(fn := counted(), cache_ttl="1m")
    f()
    clock.now += 59.9
    f()
    assert fn.calls == 1
    clock.now += 0.2
    f()
    assert fn.calls == 2


def test_an_expired_entry_is_dropped_on_access(clock):
    f = Cached(lambda: 1 / 0 if clock.now > 1060 else 1, cache_ttl="1m")
    f()
    clock.now += 61
    with pytest.raises(ZeroDivisionError):
        f()
    assert f.handle.info().size == 0


def test_without_ttl_an_entry_never_expires(clock):
    f = Cached(fn := counted(), cache_ttl=None)
    f()
    clock.now += 1e12
    f()
    assert fn.calls == 1


@pytest.mark.parametrize(
    ("answer", "lasts"),
    [(True, 100), (30, 30), (30.5, 30.5), ("20s", 20), (1000, 100), (object(), 100), ([1], 100)],
)
def test_cache_if_may_shorten_but_not_lengthen_a_lifetime(clock, answer, lasts):
    f = Cached(fn := counted(), cache_ttl=100, cache_if=lambda result, receipt: answer)
    f()
    clock.now += lasts - 0.1
    f()
    assert fn.calls == 1
    clock.now += 0.2
    f()
    assert fn.calls == 2


@pytest.mark.parametrize("answer", [False, None, 0, ""], ids=repr)
def test_cache_if_may_refuse(answer):
    f = Cached(fn := counted(), cache_if=lambda result, receipt: answer)
    f(), f()
    assert fn.calls == 2


def test_cache_if_sees_result_and_receipt(clock):
    def fn():
        clock.now += 5
        return "r"

    seen: list[Any] = []
    Cached(fn, cache_if=lambda result, receipt: seen.append((result, receipt)))()
    ((result, receipt),) = seen
    assert (result, receipt.value, receipt.source, receipt.seconds) == ("r", "r", "fresh", 5)


@pytest.mark.parametrize(
    "condition", [lambda r, c: 1 / 0, lambda r, c: "nonsense"], ids=["raises", "nonsense"]
)
def test_an_error_in_cache_if_loses_no_result(condition):
    f = Cached(fn := counted(lambda: "r"), cache_if=condition)
    assert (f(), f()) == ("r", "r")
    assert fn.calls == 2
    assert len(f.events_of(CacheSkipped)) == 2


# --- bounds ---------------------------------------------------------------------------------------


def test_entries_are_bounded_in_number():
    f = Cached(lambda x: x, cache_maxsize=10)
    for n in range(50):
        f(n)
    assert f.handle.info().size == 10


def test_an_entry_that_is_used_stays():
    f = Cached(fn := counted(lambda x: x), cache_maxsize=10)
    for n in range(50):
        f("used")
        f(n)
    assert fn.calls == 51


def test_entries_are_bounded_in_bytes():
    f = Cached(lambda x: "r" * 10_000, cache_max_bytes="100kB")
    for n in range(50):
        f(n)
    info = f.handle.info()
    assert 5 <= info.size < 10
    assert 50_000 < info.bytes <= 100_000


def test_long_arguments_count():
    f = Cached(lambda x: None)
    f("x" * 100_000)
    assert f.handle.info().bytes > 100_000
    f(["x" * 100_000] * 3)
    assert f.handle.info().bytes > 400_000


def test_a_result_heavier_than_the_bound_is_returned_but_not_stored():
    f = Cached(lambda: "r" * 10_000, cache_max_bytes="5kB")
    assert len(f()) == 10_000
    assert f.handle.info().size == 0
    assert "heavier than cache_max_bytes" in f.events_of(CacheSkipped)[0].reason


# --- isolation ------------------------------------------------------------------------------------


def test_what_callers_do_to_a_result_reaches_no_other():
    f = Cached(lambda: {"tags": ["a"]})
    for _ in range(3):
        result = f()
        assert result == {"tags": ["a"]}
        result["tags"].append("x")
        result["more"] = 1


def test_what_the_function_does_to_its_result_afterwards_reaches_no_caller():
    kept: list[int] = []
    f = Cached(lambda: kept)
    f()
    kept.append(1)
    assert f() == []


def test_results_are_shared_on_request():
    f = Cached(list, cache_copy=False)
    assert f() is f()


def test_leader_and_followers_share_nothing():
    go = threading.Event()

    def fn():
        go.wait(20)
        return {"tags": ["a"]}

    f = Cached(fn)

    def caller():
        result = f()
        result["tags"].append(threading.get_ident())
        return result

    def opener():
        until(lambda: f.waiting == 3)
        go.set()

    *results, _ = threads(caller, caller, caller, caller, opener)
    assert [len(r["tags"]) for r in results] == [2, 2, 2, 2]
    assert f.stats.shared == 3


def test_what_cannot_be_copied_is_returned_and_not_stored_and_reported_once():
    f = Cached(counted(threading.Lock))
    assert f() is not f()
    assert f.handle.info().size == 0
    assert len(f.events_of(CacheSkipped)) == 1
    assert "cannot be copied" in f.events_of(CacheSkipped)[0].reason


def test_followers_of_what_cannot_be_copied_compute_for_themselves():
    go = threading.Event()

    def fn():
        go.wait(20)
        return iter([1, 2])

    f = Cached(fn := counted(fn))
    opener = lambda: (until(lambda: f.waiting == 2), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(*[lambda: list(f())] * 3, opener)
    assert results == [[1, 2]] * 3
    assert fn.calls == 3


class WithoutLength(list):
    def __len__(self) -> int:
        raise ValueError("no length")


def test_followers_of_what_raises_when_it_is_looked_at_compute_for_themselves():
    f, fn, go = gated(lambda: WithoutLength("ab"))
    opener = lambda: (until(lambda: f.waiting == 2), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(*[f] * 3, opener)
    assert [type(result) for result in results] == [WithoutLength] * 3
    assert fn.calls == 3


# --- single-flight: threads -----------------------------------------------------------------------


def gated(
    result: Callable[[], Any] = lambda: "r",
) -> tuple[Cached, Callable[..., Any], threading.Event]:
    go = threading.Event()

    def wait() -> Any:
        assert go.wait(10)
        return result()

    fn = counted(wait)
    return Cached(fn), fn, go


def test_eight_threads_compute_once():
    f, fn, go = gated()
    opener = lambda: (until(lambda: f.waiting == 7), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(*[f] * 8, opener)
    assert results == ["r"] * 8
    assert fn.calls == 1
    assert (f.stats.misses, f.stats.shared, f.stats.hits) == (1, 7, 0)


def test_a_followers_call_says_shared():
    f, _, go = gated()
    calls = [Call((), {}) for _ in range(2)]
    opener = lambda: (until(lambda: f.waiting == 1), go.set())  # noqa: E731 - one line of a table
    threads(*[lambda c=c: f.run(c) for c in calls], opener)
    assert sorted(c.source for c in calls) == ["fresh", "shared"]


class CustomError(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code


def test_a_failure_reaches_all_waiters_each_with_a_traceback_of_its_own():
    error = CustomError(5, detail="d")
    error.add_note("noted")

    def fail():
        raise error

    f, fn, go = gated(fail)
    opener = lambda: (until(lambda: f.waiting == 3), go.set())  # noqa: E731 - one line of a table
    *errors, _ = threads(f, f, f, f, opener)
    assert fn.calls == 1
    assert sum(e is error for e in errors) == 1  # the leader has the object itself
    assert len({id(e) for e in errors}) == 4
    assert len({id(e.__traceback__) for e in errors}) == 4
    for e in errors:
        assert (type(e), e.code, str(e), e.__notes__) == (CustomError, 5, "5: d", ["noted"])
        frames = [frame.name for frame in traceback.extract_tb(e.__traceback__)]
        assert frames[-1] == "fail"
        assert frames.count("fail") == 1


def test_a_copied_failure_keeps_what_went_before_it_inside_an_except_block():
    def fail():
        try:
            raise KeyError("before")
        except KeyError:
            raise ValueError("now")  # noqa: B904 - the implicit context is the point

    f, _, go = gated(fail)

    def handling():
        try:
            raise OSError("what the caller is handling")
        except OSError:
            return f()

    opener = lambda: (until(lambda: f.waiting == 1), go.set())  # noqa: E731 - one line of a table
    second = lambda: (until(lambda: len(f.cache.single_flight)), handling())  # noqa: E731 - as above
    *errors, _ = threads(f, second, opener)
    assert [type(e.__context__) for e in errors] == [KeyError, KeyError]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_killed_leader_hands_over_to_a_waiter(error):
    deaths = [error]

    def result():
        if deaths:
            raise deaths.pop()
        return "r"

    f, fn, go = gated(result)
    opener = lambda: (until(lambda: f.waiting == 3), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(f, f, f, f, opener)
    assert sorted(map(str, results)) == ["", "r", "r", "r"]
    assert fn.calls == 2


def test_a_rejected_result_reaches_followers_isolated():
    value = ["poor"]

    def refuse():
        raise Rejected(value)

    f, fn, go = gated(refuse)
    opener = lambda: (until(lambda: f.waiting == 2), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(f, f, f, opener)
    assert all(isinstance(r, Rejected) for r in results)
    assert [r.value for r in results] == [["poor"]] * 3
    assert len({id(r.value) for r in results}) == 3
    assert fn.calls == 1


def test_refused_results_reach_followers():
    go = threading.Event()
    fn = counted(lambda: go.wait(20) and ["r"])
    f = Cached(fn, cache_if=lambda result, receipt: False)
    opener = lambda: (until(lambda: f.waiting == 2), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(f, f, f, opener)
    assert results == [["r"]] * 3
    assert len({id(r) for r in results}) == 3
    assert fn.calls == 1


def test_a_leader_that_landed_between_look_and_join_is_not_repeated(monkeypatch):
    f = Cached(fn := counted(lambda: "r"))
    flights = f.cache.single_flight
    start, first = flights.start, [True]

    def late(key, flight):
        if first:
            first.clear()
            assert threads(f) == ["r"]  # another caller does it all between our look and our start
            monkeypatch.undo()
        return start(key, flight)

    monkeypatch.setattr(flights, "start", late)
    run = f.cache.wrap_sync(lambda call: fn())
    call = Call((), {})
    assert run(call) == "r"
    assert call.source == "hit"
    assert fn.calls == 1


def test_recursion_with_the_same_key_does_not_hang():
    depth: list[int] = []

    def fn(x):
        depth.append(x)
        return x if len(depth) == 3 else f(x)

    f = Cached(fn)
    assert threads(lambda: f(1)) == [1]
    assert len(depth) == 3
    assert f(1) == 1
    assert len(depth) == 3


def test_recursion_in_an_empty_context_does_not_hang():
    def fn(x):
        calls.append(x)
        return x if len(calls) == 2 else contextvars.Context().run(f, x)

    calls: list[int] = []
    f = Cached(fn)
    assert threads(lambda: f(1)) == [1]


def test_two_crossing_leaders_do_not_hang():
    both = threading.Barrier(2, timeout=5)

    def fn(x, deep):
        if deep:
            return x
        both.wait()
        return (x, f(3 - x, True), g(3 - x))

    f, g = Cached(fn), Cached(lambda x: x)
    assert threads(lambda: f(1, False), lambda: f(2, False)) == [(1, 2, 2), (2, 1, 1)]


def test_crossing_leaders_of_each_others_keys_do_not_hang():
    both = threading.Barrier(2, timeout=5)
    inside = threading.local()

    def fn(x):
        if getattr(inside, "deep", False):
            return x
        inside.deep = True
        both.wait()
        return x, f(3 - x)

    f = Cached(fn)
    results = threads(lambda: f(1), lambda: f(2))
    # The inner value is the other's finished result if that was quicker.
    assert [result[0] for result in results] == [1, 2]


def test_a_waiting_thread_that_is_interrupted_disturbs_no_other():
    f, fn, go = gated()
    results: list[Any] = []
    leader = threading.Thread(target=lambda: results.append(f()))
    leader.start()
    until(lambda: fn.calls == 1)

    def strike() -> None:
        until(lambda: f.waiting == 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=strike).start()
    with pytest.raises(KeyboardInterrupt):
        f()
    assert f.waiting == 0
    go.set()
    leader.join(20)
    assert results == ["r"]


# --- single-flight: tasks -------------------------------------------------------------------------


class Gate:
    """An async function that waits until it is opened."""

    def __init__(self, result: Callable[[], Any] = lambda: "r") -> None:
        self.calls = 0
        self.open = asyncio.Event()
        self._result = result

    def cached(self, **options: Any) -> Cached:
        async def fn(x: int = 0) -> Any:
            self.calls += 1
            await self.open.wait()
            return self._result()

        return Cached(fn, **options)


async def tasks(f: Cached, number: int) -> list[asyncio.Task[Any]]:
    """Start callers one by one: the first leads, the others wait."""
    made = []
    for n in range(number):
        made.append(asyncio.create_task(f()))
        await turns(lambda n=n: len(f.cache.single_flight) == 1 and f.waiting == n)
    return made


@pytest.mark.asyncio
async def test_fifty_tasks_compute_once():
    gate = Gate(lambda: {"tags": []})
    callers = await tasks(f := gate.cached(), 50)
    gate.open.set()
    results = await asyncio.gather(*callers)
    assert results == [{"tags": []}] * 50
    assert len({id(r["tags"]) for r in results}) == 50
    assert gate.calls == 1
    assert f.stats.shared == 49


@pytest.mark.asyncio
async def test_a_cancelled_leader_hands_over_to_a_waiter():
    gate = Gate()
    leader, *others = await tasks(gate.cached(), 4)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    gate.open.set()
    assert await asyncio.gather(*others) == ["r"] * 3
    assert gate.calls == 2


@pytest.mark.asyncio
async def test_an_heir_that_is_cancelled_at_the_same_time_hands_on():
    gate = Gate()
    leader, heir, *others = await tasks(gate.cached(), 4)
    leader.cancel()
    await turns(leader.done)
    heir.cancel()
    await asyncio.gather(leader, heir, return_exceptions=True)
    assert heir.cancelled()
    gate.open.set()
    assert await asyncio.gather(*others) == ["r"] * 2
    assert gate.calls == 2


@pytest.mark.asyncio
async def test_all_callers_cancelled_leave_nothing_behind():
    gate = Gate()
    f = gate.cached()
    callers = await tasks(f, 4)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert all(caller.cancelled() for caller in callers)
    assert len(f.cache.single_flight) == 0
    gate.open.set()
    assert await f() == "r"


@pytest.mark.asyncio
async def test_a_cancelled_waiter_disturbs_no_other_and_is_not_leaked():
    gate = Gate()
    f = gate.cached()
    leader, follower, other = await tasks(f, 3)
    follower.cancel()
    with pytest.raises(asyncio.CancelledError):
        await follower
    assert f.waiting == 1
    gate.open.set()
    assert await asyncio.gather(leader, other) == ["r", "r"]
    assert gate.calls == 1


@pytest.mark.asyncio
async def test_a_timeout_around_a_waiter_leaves_the_flight_alone():
    gate = Gate()
    f = gate.cached()
    (leader,) = await tasks(f, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(f(), 0.01)
    gate.open.set()
    assert await leader == "r"
    assert gate.calls == 1


@pytest.mark.asyncio
async def test_a_failure_reaches_all_tasks():
    gate = Gate(lambda: 1 / 0)
    callers = await tasks(gate.cached(), 3)
    gate.open.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(e) for e in errors] == [ZeroDivisionError] * 3
    assert len({id(e) for e in errors}) == len({id(e.__traceback__) for e in errors}) == 3
    assert gate.calls == 1


@pytest.mark.asyncio
async def test_what_the_leaders_caller_does_to_the_error_reaches_no_follower():
    gate = Gate(lambda: 1 / 0)
    f = gate.cached()

    async def annotating():
        try:
            await f()
        except ZeroDivisionError as error:
            error.add_note("mine")
            raise

    callers = [asyncio.create_task(annotating()) for _ in range(3)]
    await turns(lambda: f.waiting == 2)
    gate.open.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [error.__notes__ for error in errors] == [["mine"]] * 3


@pytest.mark.asyncio
async def test_recursion_of_a_task_and_its_child_task_does_not_hang():
    async def fn(x, depth):
        calls.append(depth)
        if len(calls) == 3:
            return "r"
        return await asyncio.create_task(f(x, depth)) if len(calls) == 1 else await f(x, depth)

    calls: list[int] = []
    f = Cached(fn)
    assert await asyncio.wait_for(f(1, 1), 5) == "r"
    assert len(calls) == 3


@pytest.mark.asyncio
async def test_two_crossing_tasks_do_not_hang():
    met = asyncio.Event()
    started: list[int] = []

    async def fn(x):
        started.append(x)
        if len(started) == 2:
            met.set()
        if len(started) > 2:
            return x
        await met.wait()
        return x, await f(3 - x)

    f = Cached(fn)
    results = await asyncio.wait_for(asyncio.gather(f(1), f(2)), 5)
    assert [result[0] for result in results] == [1, 2]


@pytest.mark.asyncio
async def test_a_task_that_was_started_by_a_leader_which_is_done_waits_like_others():
    gate, late = Gate(), asyncio.Event()
    inner = gate.cached()
    children: list[asyncio.Task[Any]] = []

    async def child():
        await late.wait()
        return await inner()

    async def parent():
        children.append(asyncio.create_task(child()))

    await Cached(parent)()
    (leader,) = await tasks(inner, 1)
    late.set()
    await turns(lambda: inner.waiting == 1)
    gate.open.set()
    assert await asyncio.gather(leader, *children) == ["r", "r"]
    assert gate.calls == 1


def test_two_loops_in_two_threads_compute_once():
    go = threading.Event()
    calls: list[int] = []

    async def fn():
        calls.append(1)
        while not go.is_set():  # noqa: ASYNC110 - a thread sets it
            await asyncio.sleep(0.001)
        return ["r"]

    f = Cached(fn)

    def loop() -> list[Any]:
        async def main() -> list[Any]:
            return await asyncio.gather(*[f() for _ in range(5)])

        return asyncio.run(main())

    opener = lambda: (until(lambda: f.waiting == 9), go.set())  # noqa: E731 - one line of a table
    *results, _ = threads(loop, loop, opener)
    assert results == [[["r"]] * 5] * 2
    assert len(calls) == 1


def test_a_loop_that_closes_while_its_task_leads_hands_over_to_another_loop():
    calls: list[int] = []

    async def fn():
        calls.append(1)
        if len(calls) == 1:
            await asyncio.sleep(60)
        return "r"

    f = Cached(fn)

    async def short() -> None:
        leader = asyncio.create_task(f())
        while not f.waiting:  # noqa: ASYNC110 - a thread starts waiting
            await asyncio.sleep(0.001)
        del leader  # asyncio.run cancels what is left

    def second() -> Any:
        until(lambda: len(calls) == 1)
        return asyncio.run(f())

    _, result = threads(lambda: asyncio.run(short()), second)
    assert result == "r"
    assert len(calls) == 2


def test_a_waiter_whose_loop_was_closed_does_not_break_the_leader():
    f, _, go = gated()
    arun = f.cache.wrap_async(None)
    leader = threading.Thread(target=f)
    leader.start()
    until(lambda: len(f.cache.single_flight) == 1)
    loop = asyncio.new_event_loop()
    waiter = loop.create_task(arun(Call((), {})))
    loop.run_until_complete(asyncio.sleep(0))
    assert f.waiting == 1
    loop.close()
    go.set()
    leader.join(20)
    assert not leader.is_alive()
    assert f() == "r"
    waiter._log_destroy_pending = False  # it never got its answer, and that is the point
    waiter.get_coro().close()


def test_threads_and_tasks_share_a_flight():
    f, fn, go = gated()

    async def aproceed(call):
        return f.fn()

    arun = f.cache.wrap_async(aproceed)

    async def main() -> list[Any]:
        return await asyncio.gather(*[arun(Call((), {})) for _ in range(3)])

    async_caller = lambda: (until(lambda: fn.calls == 1), asyncio.run(main()))[1]  # noqa: E731 - as below
    opener = lambda: (until(lambda: f.waiting == 3), go.set())  # noqa: E731 - one line of a table
    results = threads(f, async_caller, opener)
    assert results[:2] == ["r", ["r"] * 3]
    assert fn.calls == 1


@pytest.mark.asyncio
async def test_a_blocking_caller_on_the_loop_of_a_leading_task_computes_for_itself():
    gate = Gate()
    f = gate.cached()
    (leader,) = await tasks(f, 1)
    run = f.cache.wrap_sync(lambda call: "mine")
    assert run(Call((), {})) == "mine"
    gate.open.set()
    await leader


# --- nothing is kept alive ------------------------------------------------------------------------


class Big:
    """Something that can be watched."""


@pytest.mark.usefixtures("no_gc")
def test_arguments_die_with_a_failure():
    def fail(x):
        raise ValueError

    f = Cached(fail, cache_ignore=("x",))
    big = Big()
    watch = weakref.ref(big)
    with contextlib.suppress(ValueError):
        f(big)
    del big
    assert watch() is None


@pytest.mark.usefixtures("no_gc")
def test_arguments_of_leader_and_followers_die_with_a_shared_failure():
    go = threading.Event()

    def fail(x):
        go.wait(20)
        raise ValueError

    f = Cached(fail, cache_ignore=("x",))
    watches: list[Any] = []

    def caller() -> None:
        big = Big()
        watches.append(weakref.ref(big))
        with contextlib.suppress(ValueError):
            f(big)

    threads(caller, caller, caller, lambda: (until(lambda: f.waiting == 2), go.set()))
    assert [watch() for watch in watches] == [None] * 3


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int = 3


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [ValueError, FrozenError])
async def test_a_failure_shared_by_tasks_makes_no_cycle(no_gc, kind):
    async def fail(x):
        await asyncio.sleep(0)
        raise kind

    f = Cached(fail, cache_ignore=("x",))
    watches: list[Any] = []

    async def caller() -> None:
        big = Big()
        watches.append(weakref.ref(big))
        with contextlib.suppress(kind):
            await f(big)

    for task in [asyncio.create_task(caller()) for _ in range(3)]:
        await task
    del task
    await asyncio.sleep(0)
    assert f.stats.shared == 2
    assert [watch() for watch in watches] == [None] * 3


@pytest.mark.usefixtures("no_gc")
def test_a_dropped_cache_is_freed():
    f = Cached(lambda x: x)
    f([1])
    watch = weakref.ref(f.cache)
    del f
    assert watch() is None


# --- methods --------------------------------------------------------------------------------------


class Client:
    def __init__(self, name):
        self.name = name

    def fetch(self, x):
        return [self.name, x]


def test_instances_do_not_share():
    f = Cached(Client.fetch)
    one, two = Client("one"), Client("two")
    assert (f(one, 1), f(two, 1), f(one, 1)) == (["one", 1], ["two", 1], ["one", 1])
    assert f.stats.hits == 1


@pytest.mark.usefixtures("no_gc")
def test_an_instance_dies_with_its_entries():
    f = Cached(Client.fetch)
    one, two = Client("one"), Client("two")
    f(one, 1), f(one, [2]), f(two, 1)
    watch = weakref.ref(one)
    del one
    assert watch() is None
    assert f.handle.info().size == 1
    assert not f.cache.keys.instances.tokens.keys() - {id(two)}


def test_a_method_that_returns_its_instance_keeps_nothing_alive(no_gc):
    class Fluent:
        def __init__(self):
            self.items = []

        def me(self):
            return self

    fn = Fluent.me
    fn.__qualname__ = "Fluent.me"  # as if the class stood in a module
    f = Cached(fn)
    one = Fluent()
    assert f(one) is one
    assert f(one) is not one
    watch = weakref.ref(one)
    del one
    assert watch() is None


# --- asked for, or on by default ------------------------------------------------------------------


def test_an_unkeyable_argument_is_an_error_where_the_cache_was_asked_for():
    f = Cached(fn := counted(), cache_ttl=60)
    assert f.cache.asked
    with pytest.raises(UnkeyableError, match="cache_ignore"):
        f(threading.Lock())
    assert fn.calls == 0


def test_an_unkeyable_argument_switches_a_default_cache_off():
    f = Cached(fn := counted(lambda x: "r"), retries=2)
    assert not f.cache.asked
    f(1)
    lock = threading.Lock()
    with pytest.warns(OperoWarning, match="cannot be part of a cache key") as caught:
        assert f(lock) == "r"
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(lock), f(1), f(1)
    assert fn.calls == 5
    assert len(f.events_of(CacheSkipped)) == 1
    assert f.handle.invalidate(lock) is False


def test_a_cache_that_is_switched_off_serves_no_older_results(face):
    calls = []

    @opero
    @face.of
    def f(x):
        calls.append(x)
        return len(calls)

    assert [face.run(f, 1), face.run(f, 1)] == [1, 1]
    with pytest.warns(OperoWarning, match="cannot be part of a cache key"):
        face.run(f, threading.Lock())
    assert [face.run(f, 1), face.run(f, 1)] == [3, 4]


# --- management -----------------------------------------------------------------------------------


def test_invalidate_removes_one_entry():
    f = Cached(fn := counted(lambda x, y=1: x))
    f(1), f(2)
    assert f.handle.invalidate(x=1) is False  # a function that takes anything cannot know x
    assert f.handle.invalidate(1) is True
    assert f.handle.invalidate(1) is False
    f(1), f(2)
    assert fn.calls == 3


def test_invalidate_normalises_arguments():
    f = Cached(lambda x, y=1: x)
    f(1)
    assert f.handle.invalidate(y=1, x=1) is True


def test_invalidate_refuses_arguments_that_do_not_fit():
    with pytest.raises(TypeError, match=r"<lambda>\(\) missing a required argument: 'x'"):
        Cached(lambda x: x).handle.invalidate()


def test_clear_returns_how_many_there_were():
    f = Cached(lambda x: x)
    f(1), f(2)
    assert f.handle.clear() == 2
    assert f.handle.clear() == 0


@pytest.mark.parametrize("how", ["invalidate", "clear"])
def test_what_was_begun_before_an_invalidation_is_not_stored(how):
    f, fn, go = gated()
    opener = lambda: (until(lambda: fn.calls == 1), getattr(f.handle, how)(), go.set())  # noqa: E731
    assert threads(f, opener)[0] == "r"
    assert f.handle.info().size == 0


def test_refresh_computes_stores_and_returns():
    values = iter("abc")
    f = Cached(lambda: next(values))
    assert (f(), f.handle.refresh(), f()) == ("a", "b", "b")
    assert f.stats.misses == 1


def test_a_failing_refresh_keeps_the_old_value():
    values = iter([lambda: "a", lambda: 1 / 0])
    f = Cached(lambda: next(values)())  # noqa: PLW0108 - a new one each time
    f()
    with pytest.raises(ZeroDivisionError):
        f.handle.refresh()
    assert f() == "a"


def test_others_get_the_old_value_during_a_refresh():
    go = threading.Event()
    values = iter([lambda: "old", lambda: go.wait(20) and "new"])
    f = Cached(fn := counted(lambda: next(values)()))  # noqa: PLW0108 - a new one each time
    f()
    other = lambda: (until(lambda: fn.calls == 2), f(), go.set())[1]  # noqa: E731 - one line of a table
    assert threads(f.handle.refresh, other) == ["new", "old"]
    assert f() == "new"


def test_a_refresh_counts_for_more_than_a_flight_that_began_before():
    first, second = threading.Event(), threading.Event()
    values = iter([lambda: first.wait(20) and "old", lambda: second.wait(20) and "new"])
    f = Cached(fn := counted(lambda: next(values)()))  # noqa: PLW0108 - a new one each time

    def refresher() -> Any:
        until(lambda: fn.calls == 1)
        second.set()
        value = f.handle.refresh()
        first.set()
        return value

    assert threads(f, refresher) == ["old", "new"]
    assert f() == "new"


@pytest.mark.asyncio
async def test_refresh_of_a_coroutine_function_is_awaitable():
    values = iter("ab")

    async def fn():
        return next(values)

    f = Cached(fn)
    assert [await f(), await f.handle.refresh(), await f()] == ["a", "b", "b"]


def test_info_describes_what_there_is():
    f = Cached(lambda x: "r" * 1000, cache_ttl="1h", cache_maxsize=5, cache_namespace="geo")
    f(1), f(1)
    info = f.handle.info()
    assert (info.hits, info.misses, info.size, info.maxsize, info.max_bytes) == (
        1,
        1,
        1,
        5,
        256_000_000,
    )
    assert (info.ttl, info.backend, info.namespace) == (3600, "memory", "geo")
    assert 1000 < info.bytes < 2000
    assert repr(info).startswith("<CacheInfo memory 'geo': 1 entries, 1.")
    assert "1 hits (50%), 1 misses, ttl 1 h>" in repr(info)
    assert "cache of" in repr(f.handle)


def test_describe_says_what_will_be_done():
    f = Cached(
        lambda x, client: x,
        cache_ttl=None,
        cache_ignore=("client",),
        cache_copy=False,
        cache_if=lambda result, receipt: True,
    )
    reported = f.cache.describe()
    for part in (
        "memory, for ever",
        "10,000 entries, 256 MB",
        "without client",
        "cache_if",
        "not copied",
    ):
        assert part in reported


def test_caches_of_one_function_can_share_their_store():
    f = Cached(fn := counted(lambda x: x))
    g = Cached(fn, origin=f, cache_ttl=5)
    assert (f(1), g(1)) == (1, 1)
    assert fn.calls == 1
    assert g.cache.store is f.cache.store


# --- what a generated wrapper relies on -----------------------------------------------------------


def test_a_wrapper_finds_the_entry_by_types_and_values():
    f = Cached(lambda x, y=2: [x, y])
    f("a")
    assert f.cache.keys.fast_parameters == ("x", "y")
    get = f.cache.store.entries.get
    entry = get((str, "a", int, 2))
    assert entry.expires > time.monotonic()
    assert entry.copier(entry.value) == ["a", 2]
    f.handle.clear()
    assert get((str, "a", int, 2)) is None
    f("a")
    assert get((str, "a", int, 2)) is not None


def test_a_wrapper_finds_the_entry_of_a_method_by_its_token():
    f = Cached(Client.fetch)
    one = Client("one")
    token_get = f.cache.keys.instances.tokens.get
    assert token_get(id(one)) is None
    f(one, 1)
    assert f.cache.keys.instances is not None
    assert f.cache.keys.fast_parameters == ("self", "x")
    assert f.cache.store.entries.get((token_get(id(one)), int, 1)).value == ["one", 1]


def test_a_plain_function_has_no_tokens():
    f = Cached(lambda x: x)
    assert f.cache.keys.instances is None


# --- a user's own store ---------------------------------------------------------------------------


class DictStore:
    """The least a store needs."""

    def __init__(self):
        self.data: dict[str, Any] = {}
        self.ttls: list[Any] = []

    def get(self, key):
        return self.data.get(key)

    def set(self, key, value, ttl):
        self.data[key] = value
        self.ttls.append(ttl)

    def delete(self, key):
        return self.data.pop(key, None) is not None

    def clear(self):
        self.data.clear()


class PrefixStore(DictStore):
    def clear(self, prefix=""):
        gone = [key for key in self.data if key.startswith(prefix)]
        for key in gone:
            del self.data[key]
        return len(gone)

    def __len__(self):
        return len(self.data)


def module_function(x):
    return None if x == 0 else [x]


def test_a_users_store_holds_text_keys_and_isolated_values():
    store = DictStore()
    f = Cached(module_function, cache_backend=store, cache_ttl=60)
    first = f(1)
    first.append("x")
    second = f(1)
    assert second == [1]
    second.append("x")
    assert f(x=1) == [1]
    (key,) = store.data
    assert key.startswith(f"opero:{__name__}:module_function:")
    assert store.ttls == [pytest.approx(60, abs=1)]
    assert f.handle.info().backend == "DictStore"
    assert f.cache.keys.fast_parameters == ()


@pytest.mark.parametrize("blocking", [False, True])
def test_what_is_invalidated_while_it_is_stored_does_not_stay(blocking):
    class SlowStore(DictStore):
        def set(self, key, value, ttl):
            f.handle.invalidate(1)  # by another caller, just now
            super().set(key, value, ttl)

    async def later(x):
        return x

    store = SlowStore()
    store.blocking = blocking
    f = Cached(later if blocking else module_function, cache_backend=store)
    assert (asyncio.run(f(1)) if blocking else f(1)) in (1, [1])
    assert not store.data


def test_a_users_store_gets_the_values_themselves():
    store = DictStore()
    f = Cached(lambda: pd.DataFrame({"n": [1]}), cache_backend=store, cache_key=lambda: 1)
    f()
    ((value, _),) = store.data.values()
    assert isinstance(value, pd.DataFrame)
    assert value is not f()


def test_none_is_a_hit_in_a_users_store():
    f = Cached(module_function, cache_backend=DictStore(), cache_ttl=None)
    f(0), f(0)
    assert f.stats.hits == 1


def test_functions_share_a_users_store_without_sharing_entries():
    store = PrefixStore()
    f = Cached(module_function, cache_backend=store)
    g = Cached(until, cache_backend=store, cache_key=lambda condition: 1)
    f(1)
    g(lambda: True)
    assert f.handle.info().size == 2
    assert f.handle.clear() == 1
    assert g.handle.info().size == 1


def test_an_entry_that_a_users_store_should_have_dropped_is_not_served(monkeypatch):
    store = DictStore()
    f = Cached(module_function, cache_backend=store, cache_ttl=60)
    f(1)
    ((key, (value, expires)),) = store.data.items()
    store.data[key] = (value, expires - 61)
    f(1)
    assert f.stats.misses == 2


@pytest.mark.parametrize("junk", ["text", 5, (1,), (1, "soon"), {}], ids=repr)
def test_what_others_left_in_a_users_store_is_a_miss(junk):
    store = DictStore()
    f = Cached(module_function, cache_backend=store)
    f(1)
    store.data[next(iter(store.data))] = junk
    assert f(1) == [1]


def test_a_broken_store_is_a_miss_and_an_event():
    class Broken(DictStore):
        def get(self, key):
            raise ConnectionError

        set = get

    f = Cached(module_function, cache_backend=Broken())
    f.cache.store._store.set = lambda *a: 1 / 0
    assert (f(1), f(1)) == ([1], [1])
    reasons = [e.reason for e in f.events_of(CacheSkipped)]
    assert any("could not be read (ConnectionError)" in r for r in reasons)
    assert any("could not be stored (ZeroDivisionError)" in r for r in reasons)


def test_a_store_of_coroutines_is_refused():
    class Async(DictStore):
        async def get(self, key):
            return None

    with pytest.raises(OperoUsageError, match=r"get\(\) is a coroutine"):
        Cached(module_function, cache_backend=Async())


def test_an_instance_without_content_is_unkeyable_in_a_users_store():
    f = Cached(Client.fetch, cache_backend=DictStore())
    with pytest.raises(UnkeyableError, match="'self'"):
        f(Client("one"), 1)


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_leaders_of_its_parent():
    f, fn, go = gated()
    leader = threading.Thread(target=f)
    leader.start()
    until(lambda: fn.calls == 1)
    read, write = os.pipe()
    with f.cache.store._lock:
        child = os.fork()
        if child == 0:
            go.set()
            answer = json.dumps(threads(f))
            os.write(write, answer.encode())
            os._exit(0)
    go.set()
    leader.join(20)
    os.close(write)
    assert json.loads(os.read(read, 100)) == ["r"]
    os.close(read)
    assert os.waitpid(child, 0)[1] == 0


def test_a_cached_call_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from opero.core.cache import CacheStage\n"
        "from opero.core.options import Options\nfrom opero.core.function import Stats\n"
        "from opero.events.bus import Emitter\nfrom opero.core.call import Call\n"
        "from opero.core.function import FunctionInfo\n"
        "c = CacheStage(FunctionInfo(len), Options(), stats=Stats(), emitter=Emitter('f'))\n"
        "run = c.wrap_sync(lambda call: [1])\n"
        "run(Call(('a',), {})), run(Call(('a',), {}))\n"
        "print([m for m in ('asyncio', 'hashlib', 'pickle', 'logging') if m in sys.modules])"
    )
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p.endswith("src"))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=env, capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "[]"
