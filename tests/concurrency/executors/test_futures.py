# this_file: tests/concurrency/executors/test_futures.py
"""Maps on executors that are the user's own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import multiprocessing
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import twat_mp

from opero import RateLimiter, deadline, event_bus, opero, operomap, remaining
from opero.concurrency.executors.futures import PROTOCOL, run_chunk
from opero.errors import (
    DeadlineError,
    MapError,
    MapStopped,
    OperoError,
    OperoUsageError,
    WorkerLostError,
)

pytestmark = pytest.mark.internal

place: contextvars.ContextVar[str] = contextvars.ContextVar("place")


class Courier(Executor):
    """Runs everything at once, in this thread, as far as bytes show; loses what it is asked to lose."""

    def __init__(self, lose: Callable[[int], BaseException | None] = lambda n: None) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self._lose = lose

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.sent.append((fn, *args))
        future: Future[Any] = Future()
        lost = self._lose(len(self.sent))
        if lost is not None:
            future.set_exception(lost)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(params=["threads", "processes", "courier"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "courier":
        return Courier()
    found: Executor = request.getfixturevalue(request.param)
    return found


def mapped(executor: Any, body: Callable[..., Any], **options: Any) -> Any:
    given = {"executor": executor, "cache": False, "retries": 0, **options}
    return operomap(**given)(body)


def test_results_come_in_the_order_of_the_input(executor: Executor) -> None:
    assert mapped(executor, lambda x, y: x + y)(range(500), 1) == list(range(1, 501))


def test_coroutine_functions_give_awaitable_maps(executor: Executor) -> None:
    async def fetch(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    async def main() -> Any:
        return await mapped(executor, fetch)(range(20))

    assert asyncio.run(main()) == [2 * x for x in range(20)]


def test_failures_are_themselves_and_are_retried_there(executor: Executor) -> None:
    def fail(x: int) -> int:
        raise KeyError(x)

    broken = mapped(executor, fail, retries=2, min_delay=0)
    (failure,) = broken.map([7]).failures
    assert repr(failure.error) == "KeyError(7)"
    assert failure.attempts == 3
    assert broken.stats.calls == 3


def test_items_that_pause_long_are_sent_again_with_what_they_know(executor: Executor) -> None:
    def fail(x: int) -> int:
        raise OSError(x)

    broken = mapped(executor, fail, retries=1, min_delay=0.1, jitter=False)
    (failure,) = broken.map([7]).failures
    assert failure.attempts == 2


def test_cached_items_are_never_dispatched() -> None:
    courier = Courier()
    double = mapped(courier, lambda x: 2 * x, cache=True)
    double([1, 2, 1])
    sent = len(courier.sent)
    assert double([2, 1]) == [4, 2]
    assert len(courier.sent) == sent


def test_arrays_and_what_cannot_travel_are_each_items_own_affair(executor: Executor) -> None:
    local = isinstance(executor, ThreadPoolExecutor)
    result = mapped(executor, lambda x: x).map([np.ones(200_000), threading.Lock(), 3])
    assert result.values[0].sum() == 200_000
    assert result.values[-1] == 3
    assert result.done - len(result.failures) == (3 if local else 2)


def test_only_bytes_and_numbers_cross_the_wire() -> None:
    courier = Courier()
    mapped(courier, lambda x: x)([1, [2]])
    assert all(one[0] is run_chunk for one in courier.sent)
    assert {type(part) for one in courier.sent for part in one[1:]} == {int, str, bytes}


def test_a_worker_of_another_version_says_so() -> None:
    with pytest.raises(OperoError, match="same version of opero"):
        run_chunk(PROTOCOL + 1, "", b"", b"")


def test_context_variables_reach_threads(threads: Executor) -> None:
    token = place.set("here")
    try:
        assert mapped(threads, lambda x: place.get())([1]) == ["here"]
    finally:
        place.reset(token)


def test_the_executor_lives_on(threads: Executor) -> None:
    for _ in range(3):
        assert mapped(threads, abs)([-1]) == [1]
    assert threads.submit(abs, -1).result() == 1


def test_an_executor_that_breaks_ends_the_map_with_what_is_done() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as executor:

        def fatal(x: int) -> int:
            if x == 3:
                os._exit(1)
            return x

        broken = mapped(executor, fatal, chunksize=1, workers=1)
        with pytest.raises(MapError, match="BrokenProcessPool") as raised:
            broken(range(8))
        assert raised.value.result.values[:2] == [0, 1]
        assert raised.value.result.status == "stopped"
        assert "BrokenProcessPool" in raised.value.result.reason
        with pytest.raises(MapStopped):
            broken([1])


def test_a_closed_executor_is_an_error() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(MapError, match="shutdown"):
        mapped(executor, abs)([1])


def test_a_task_that_the_executor_loses_is_halved_until_the_item_is_known() -> None:
    # As on a cluster that gives up a task when its workers died of it; the item is unknown.
    def lose(n: int) -> BaseException | None:
        payload = courier.sent[-1][-1]
        return RuntimeError("KilledWorker") if b"poison" in payload else None

    courier = Courier(lose)
    result = mapped(courier, lambda x: x, chunksize=8).map([*range(5), "poison", *range(6, 16)])
    assert result.values == [0, 1, 2, 3, 4, *range(6, 16)]
    (failure,) = result.failures
    assert isinstance(failure.error, WorkerLostError)
    assert "KilledWorker" in str(failure.error)


def test_a_shared_rate_limit_holds_in_all_of_them(executor: Executor) -> None:
    limited = mapped(executor, lambda x: time.monotonic(), rate_limit=RateLimiter("50/s"))
    began = time.monotonic()  # a start may be noted long after it was admitted
    assert max(limited(range(12))) - began > 0.9 * 10 / 50


def test_events_of_items_reach_listeners_here(executor: Executor) -> None:
    received: list[str] = []
    subscription = event_bus.subscribe(lambda event: received.append(type(event).__name__))
    try:
        mapped(executor, lambda x: 1 / x, retries=1, min_delay=0).map([0])
    finally:
        subscription.cancel()
    assert received.count("AttemptFailed") == 2


def test_stopping_leaves_the_rest_undone(threads: Executor) -> None:
    stop = threading.Event()
    slow = mapped(
        threads,
        lambda x: time.sleep(0.002) or x,
        stop_token=stop,
        on_result=lambda one: stop.set(),
    )
    assert slow.map(range(10_000)).status == "cancelled"


def test_care_of_workers_is_the_executors(threads: Executor) -> None:
    with pytest.raises(OperoUsageError, match="runs in your executor"):
        mapped(threads, abs, worker_init=print)


def test_the_description_names_the_executor(threads: Executor) -> None:
    assert "in a ThreadPoolExecutor" in str(mapped(threads, abs).explain())


class StubbornFuture(Future[Any]):
    """A future that cannot be cancelled, and says so with an error of its own."""

    def cancel(self) -> bool:
        raise NotImplementedError


class Stubborn(Executor):
    """Never runs anything."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return StubbornFuture()


def test_futures_that_refuse_to_be_cancelled_do_not_keep_a_map_from_ending() -> None:
    mapped_here = mapped(Stubborn(), abs, workers=1)

    def items() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_here(items())


# --- deadlines ------------------------------------------------------------------------------------


def test_a_deadline_ends_a_map_on_an_executor_that_never_runs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opero.concurrency.executors.futures._LATE", 0)
    never = mapped(Stubborn(), abs, workers=1)
    with deadline(0.05), pytest.raises(DeadlineError):
        never(range(9))
    with deadline(0.05):
        assert len(never.map(range(9)).failures) == 9


def test_a_deadline_ends_a_map_whose_threads_are_busy_with_other_things() -> None:
    free = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(free.wait)
        with deadline(0.05), pytest.raises(DeadlineError):
            mapped(executor, abs)(range(9))
        with deadline(0.05):
            assert len(mapped(executor, abs).map(range(9)).failures) == 9
        free.set()


def test_a_deadline_holds_for_the_calls_in_workers(executor: Executor) -> None:
    with deadline(1000):
        (left,) = mapped(executor, lambda x: remaining())([1])
    assert 0 < left <= 1000


# --- executors that a map makes for itself --------------------------------------------------------


def fresh_processes() -> Executor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver"))


def test_a_factory_makes_an_executor_for_each_map_which_ends_with_it() -> None:
    made: list[ThreadPoolExecutor] = []

    def pool() -> ThreadPoolExecutor:
        made.append(ThreadPoolExecutor(3))
        return made[-1]

    double = mapped(pool, lambda x: 2 * x)
    assert "in an executor that pool() makes" in str(double.explain())
    assert double(range(20)) == double(range(20)) == [2 * x for x in range(20)]
    assert len(made) == 2
    for executor in made:
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(abs, 1)


def test_a_broken_executor_of_a_factory_is_replaced_and_costs_the_guilty_items_alone() -> None:
    def fatal(x: int) -> int:
        if x in (3, 11):
            os._exit(1)
        return 2 * x

    result = mapped(fresh_processes, fatal, workers=2, chunksize=4).map(range(20))
    assert result.by_index() == {x: 2 * x for x in range(20) if x not in (3, 11)}
    assert [failure.index for failure in result.failures] == [3, 11]
    assert {type(failure.error) for failure in result.failures} == {WorkerLostError}
    assert result.status == "complete"


def test_an_item_that_breaks_an_executor_is_retried_in_the_next_one(tmp_path: Path) -> None:
    mark = tmp_path / "broken"

    def fatal_once(x: int) -> int:
        if x == 2 and not mark.exists():
            mark.touch()
            os._exit(1)
        return x

    assert mapped(fresh_processes, fatal_once, retries=1)(range(5)) == list(range(5))


def test_a_broken_executor_of_a_factory_is_replaced_also_where_it_takes_no_task() -> None:
    made: list[Executor] = []

    class Breaks(Courier):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            if len(made) == 1 and self.sent:
                raise BrokenExecutor
            future = super().submit(fn, *args, **kwargs)
            return Future() if len(made) == 1 else future

    def pool() -> Executor:
        made.append(Breaks())
        return made[-1]

    assert mapped(pool, lambda x: -x, chunksize=1)(range(5)) == [0, -1, -2, -3, -4]
    assert len(made) == 2


def test_an_executor_of_a_factory_that_does_not_shut_down_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opero.concurrency.loop._GRACE", 0.05)
    free = threading.Event()

    class Hangs(Courier):
        # Not every executor knows `cancel_futures`.
        def shutdown(self, wait: bool = True, **unknown: object) -> None:
            assert not unknown
            free.wait()

    def make() -> Executor:
        return Hangs()

    assert mapped(make, lambda x: -x)(range(5)) == [0, -1, -2, -3, -4]
    free.set()


def test_what_a_factory_makes_must_be_an_executor() -> None:
    with pytest.raises(OperoUsageError, match="is no executor"):
        mapped(lambda: 5, abs)([1])
    with pytest.raises(OperoUsageError, match="a function that makes one"):
        mapped(5, abs)


@pytest.mark.parametrize("kind", ["ProcessPool", "ThreadPool"])
@pytest.mark.parametrize("entered", [True, False])
def test_pools_of_twat_mp_are_executors_entered_or_not(kind: str, entered: bool) -> None:
    block = getattr(twat_mp, kind)(nodes=2)
    with block if entered else contextlib.nullcontext(block) as pool:
        double = mapped(pool, lambda x, y: 2 * x + y, chunksize=3)
        assert double(range(50), 1) == [2 * x + 1 for x in range(50)]
        (failure,) = mapped(pool, lambda x: 1 / x, retries=1, min_delay=0).map([1, 0]).failures
        assert isinstance(failure.error, ZeroDivisionError)
        assert failure.attempts == 2
        if entered:
            assert list(pool.map(abs, [-1])) == [1], "it lives on"
    assert block.pool is None


def test_context_variables_reach_the_threads_of_twat_mp() -> None:
    token = place.set("here")
    try:
        assert mapped(twat_mp.ThreadPool(nodes=2), lambda x: place.get())([1]) == ["here"]
    finally:
        place.reset(token)


@pytest.mark.parametrize("entered", [True, False])
def test_a_killed_process_of_twat_mp_costs_its_item_and_the_pool_still_ends(entered: bool) -> None:
    def fatal(x: int) -> int:
        if x == 3:
            os._exit(1)
        return 2 * x

    block = twat_mp.ProcessPool(nodes=2)
    with block if entered else contextlib.nullcontext(block) as pool:
        result = mapped(pool, fatal, chunksize=2).map(range(9))
        assert result.by_index() == {x: 2 * x for x in range(9) if x != 3}
        (failure,) = result.failures
        assert isinstance(failure.error, WorkerLostError)


def test_a_pool_of_interpreters_gets_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    # As from Python 3.14 on, where it is a ThreadPoolExecutor by inheritance.
    class InterpreterPoolExecutor(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            assert {type(arg) for arg in args} <= {int, str, bytes}
            return super().submit(fn, *args, **kwargs)

    module = types.ModuleType("concurrent.futures.interpreter")
    monkeypatch.setattr(module, "InterpreterPoolExecutor", InterpreterPoolExecutor, raising=False)
    monkeypatch.setitem(sys.modules, "concurrent.futures.interpreter", module)

    class Mine(InterpreterPoolExecutor):
        pass

    with Mine(2) as executor:
        assert mapped(executor, lambda x: 2 * x)(range(50)) == [2 * x for x in range(50)]
        (failure,) = mapped(executor, lambda x: 1 / x, retries=1, min_delay=0).map([0]).failures
        assert isinstance(failure.error, ZeroDivisionError)
        assert failure.attempts == 2


def test_an_executor_within_the_program_does_not_attach_the_program_to_itself() -> None:
    def made() -> RateLimiter:
        limiter = RateLimiter("1/hour")
        opero(rate_limit=limiter, cache=False)(abs)
        return limiter

    first = made()
    assert first.try_acquire()
    assert operomap(executor=Courier(), cache=False)(abs)([1, -2]) == [1, 2]
    assert first.shared
    # A function that is decorated again has a limiter of its own, and what is made later works at once.
    assert made().try_acquire()
    assert made().attached
