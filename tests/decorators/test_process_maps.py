# this_file: tests/decorators/test_process_maps.py
"""What users get of `@operomap` on worker processes."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from tests.map_mode import MapMode

from opero import RateLimiter, deadline, event_bus, operomap
from opero.errors import (
    CallTimeoutError,
    DeadlineError,
    MapStopped,
    OperoUsageError,
    WorkerLostError,
)
from opero.testing import set_disabled

MODES = [
    pytest.param(("sync", "auto"), id="auto"),
    pytest.param(("sync", "async_process"), id="sync-async_process"),
    pytest.param(("async", "process"), id="async-process"),
    pytest.param(("async", "async_process"), id="async_process"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Other tests leave idle threads in this process, with which opero would not fork it.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        yield


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> MapMode:
    kind, mode = request.param
    return MapMode(kind, mode=mode, retries=0, workers=2)


def test_results_come_in_the_order_of_the_input_from_elsewhere(mode: MapMode) -> None:
    found = mode.run(mode.of(lambda x: (2 * x, os.getpid()))(range(50)))
    assert [value for value, _ in found] == [2 * x for x in range(50)]
    assert os.getpid() not in {pid for _, pid in found}


def test_further_arguments_and_instances_travel(mode: MapMode) -> None:
    found = mode.run(mode.of(lambda x, a, *, b: (x, a, b))([1, 2], "a", b="b"))
    assert found == [(1, "a", "b"), (2, "a", "b")]


def test_a_dead_worker_costs_its_item_alone(mode: MapMode) -> None:
    def fatal(x: int) -> int:
        if x == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    result = mode.run(mode.of(fatal).map(range(8)))
    assert result.values == [0, 1, 2, 4, 5, 6, 7]
    assert isinstance(result.failures[0].error, WorkerLostError)
    assert result.failures[0].index == 3


def test_a_dead_worker_is_a_failed_call_and_is_retried(mode: MapMode, tmp_path: Any) -> None:
    def fatal_once(x: int) -> int:
        if x == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return x

    double = mode.of(fatal_once, retries=1, min_delay=0)
    assert mode.run(double(range(4))) == [0, 1, 2, 3]
    # Of coroutines that share a worker, the one it died of is unknown, so none is charged with it.
    share = (mode.kind, mode.options["mode"]) == ("async", "async_process")
    assert double.stats.failures >= 1 or share


def test_an_item_without_end_costs_its_time_alone(mode: MapMode) -> None:
    def endless(x: int) -> int:
        if x == 2:
            time.sleep(60)
        return x

    # A call that blocks the loop is found by halving the suspects, each time at the cost of the limit.
    result = mode.run(mode.of(endless, timeout=0.5).map(range(4)))
    assert result.values == [0, 1, 3]
    assert isinstance(result.failures[0].error, CallTimeoutError)


def test_errors_are_themselves_and_bring_their_traceback(mode: MapMode) -> None:
    def look_up(x: int) -> int:
        return {0: 0}[x]

    result = mode.run(mode.of(look_up).map([0, 1]))
    (failure,) = result.failures
    assert type(failure.error) is KeyError
    assert "look_up" in failure.trace
    with pytest.raises(KeyError) as raised:
        mode.run(mode.of(look_up)([0, 1]))
    assert "item 1 of the map" in raised.value.__notes__[-1]


def test_a_stream_reads_no_further_than_it_must() -> None:
    pulled: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(10_000):
            pulled.append(n)
            yield n

    slow = operomap(cache=False, workers=2, chunksize=1)(lambda x: x)
    stream = slow.stream(numbers())
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(pulled) <= 5 + 2 * 2 * 1
    stream.close()


def test_cached_items_are_never_dispatched_and_equal_ones_run_once(mode: MapMode) -> None:
    pid = mode.of(lambda x: (x, os.getpid()), cache=True)
    first = mode.run(pid([1, 2, 1]))
    assert first[0] == first[2]
    assert mode.run(pid([2, 1])) == [first[1], first[0]]
    assert (pid.stats.hits, pid.stats.misses, pid.stats.shared) == (2, 2, 1)


def test_what_workers_count_and_tell_arrives_here(mode: MapMode) -> None:
    def fail(x: int) -> int:
        raise OSError(x)

    seen: list[str] = []
    broken = mode.of(
        fail, retries=2, min_delay=0, on_event=lambda event: seen.append(type(event).__name__)
    )
    mode.run(broken.map([1]))
    assert (broken.stats.calls, broken.stats.retries) == (3, 2)
    assert seen.count("AttemptFailed") == 3


def test_one_rate_limit_holds_for_all_workers(mode: MapMode) -> None:
    now = mode.of(lambda x: time.monotonic(), rate_limit="50/second", workers=4)
    # From before the first one: on a busy machine a start is noted later than it was admitted.
    began = time.monotonic()
    last = max(mode.run(now(range(20))))
    assert last - began >= 18 / 50, "one slot of catch-up at most"


def test_switched_off_for_a_test_nothing_is_retried(mode: MapMode) -> None:
    def fail(x: int) -> int:
        raise OSError(x)

    broken = mode.of(fail, retries=5, min_delay=60, max_delay=60)
    with set_disabled():
        result = mode.run(broken.map([1]))
    assert result.failures[0].attempts == 1


def test_a_deadline_around_the_map_holds_in_its_workers(mode: MapMode) -> None:
    def fail(x: int) -> int:
        raise OSError(x)

    broken = mode.of(fail, retries=3, min_delay=0.01)
    with deadline(60):
        assert mode.run(broken.map([1])).failures[0].attempts == 4

    async def inside() -> Any:
        with deadline(0.001):
            time.sleep(0.01)  # noqa: ASYNC251 - nothing else runs here
            begun = mode.of(lambda x: x, retries=3).map([1])
            return await begun if inspect.isawaitable(begun) else begun

    (failure,) = asyncio.run(inside()).failures
    assert isinstance(failure.error, DeadlineError)


def test_too_much_memory_is_the_items_failure(mode: MapMode) -> None:
    hungry = mode.of(lambda x: len(bytearray(x)), memory_limit="400MB")
    result = mode.run(hungry.map([10, 900_000_000, 20]))
    assert result.values == [10, 20]
    assert isinstance(result.failures[0].error, MemoryError | WorkerLostError)


def test_workers_are_initialised_and_replaced(mode: MapMode) -> None:
    def begin() -> None:
        sys.opero_begun = True  # type: ignore[attr-defined]

    look = mode.of(
        lambda x: (sys.opero_begun, os.getpid()),  # type: ignore[attr-defined]
        worker_init=begin,
        max_tasks_per_worker=2,
        workers=1,
    )
    found = mode.run(look(range(6)))
    assert len({pid for _, pid in found}) == 3
    assert all(begun for begun, _ in found)


def test_a_stop_token_ends_the_map_with_what_is_done(mode: MapMode) -> None:
    stop = threading.Event()
    slow = mode.of(
        lambda x: time.sleep(0.01) or x, stop_token=stop, on_result=lambda one: stop.set()
    )
    result = mode.run(slow.map(range(10_000)))
    assert result.status == "cancelled"
    assert 0 < result.done < 5_000
    assert result.values == result.indices


def test_a_stop_token_takes_items_out_of_the_queue_of_a_rate_limit(mode: MapMode) -> None:
    stop = threading.Event()
    rare = mode.of(
        lambda x: x,
        rate_limit="1/hour",
        stop_token=stop,
        workers=3,
        ordered=False,
        on_result=lambda one: stop.set(),
    )
    began = time.monotonic()
    result = mode.run(rare.map(range(6)))
    assert time.monotonic() - began < 30
    assert (result.status, len(result.values), len(result.failures)) == ("cancelled", 1, 0)


def test_too_many_errors_stop_the_map(mode: MapMode) -> None:
    with pytest.raises(MapStopped) as raised:
        mode.run(mode.of(lambda x: 1 / 0, max_errors=3, on_error="skip")(range(10_000)))
    assert raised.value.result.status == "stopped"


def test_what_cannot_travel_is_named_with_the_way_out() -> None:
    lock = threading.Lock()

    async def inside() -> Any:
        # In a running loop workers are no copies of this process, so everything has to be sent.
        return operomap(cache=False, mode="process")(lambda x: lock.locked())([1])

    with pytest.raises(OperoUsageError, match='mode="thread"'):
        asyncio.run(inside())


def test_a_synchronous_map_works_inside_a_running_loop() -> None:
    async def main() -> Any:
        return operomap(cache=False)(lambda x: x + 1)([1, 2])

    assert asyncio.run(main()) == [2, 3]


def test_an_event_loop_goes_on_while_processes_work() -> None:
    async def sleep(x: float) -> float:
        time.sleep(x)  # noqa: ASYNC251 - in another process
        return x

    async def main() -> int:
        turns = 0
        mapping = asyncio.ensure_future(
            operomap(cache=False, mode="process", workers=2)(sleep)([0.2, 0.2])
        )
        while not mapping.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns

    assert asyncio.run(main()) > 5


def test_a_cancelled_map_ends_its_workers() -> None:
    async def pid(x: int) -> int:
        await asyncio.sleep(0 if x == 0 else 60)
        return os.getpid()

    found: list[int] = []

    async def main() -> None:
        slow = operomap(
            cache=False,
            mode="async_process",
            workers=1,
            on_result=lambda one: found.append(one.value),
        )(pid)
        mapping = asyncio.ensure_future(slow(range(4)))
        while not found:  # noqa: ASYNC110 - `on_result` is no coroutine
            await asyncio.sleep(0.01)
        mapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await mapping

    asyncio.run(main())
    assert gone(found[0])


def gone(pid: int, seconds: float = 100) -> bool:
    """Wait for the end of a process that is not ours to wait for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_four_threads_map_at_once(mode: MapMode) -> None:
    results: list[Any] = [None] * 4

    def one(n: int) -> None:
        results[n] = mode.run(mode.of(lambda x: x + n)(range(20)))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[x + n for x in range(20)] for n in range(4)]


@pytest.mark.parametrize("threads", [0, 1])
def test_maps_nest(threads: int) -> None:
    # With a second thread nothing is forked, so that the inner map has to travel.
    done = threading.Event()
    others = [threading.Thread(target=done.wait) for _ in range(threads)]
    for thread in others:
        thread.start()
    try:
        check_nesting()
    finally:
        done.set()


def check_nesting() -> None:
    inner = operomap(cache=False, workers=2, on_result=lambda one: None)(lambda x: x + 1)
    outer = operomap(cache=False, workers=2)(lambda xs: sum(inner(xs)))
    assert outer([[1, 2], [3, 4]]) == [5, 9]

    def single(x: int) -> int:
        found: int = inner.one(x)
        return found

    assert operomap(cache=False, workers=2)(single)([1, 2]) == [2, 3]


def test_an_unguarded_script_maps_and_leaves_nothing_behind(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import threading
        from opero import operomap
        threading.Thread(target=threading.Event().wait, daemon=True).start()  # no fork is safe now
        shift = 10
        @operomap(cache=False)
        def add(x: int) -> int:
            return x + shift
        print(add([1, 2, 3]))
        shift = 20
        print(add([1, 2, 3]))
        """)
    )
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ran.stdout, ran.stderr) == ("[11, 12, 13]\n[21, 22, 23]\n", "")


def test_ctrl_c_ends_the_program_and_its_workers(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from opero import operomap
        @operomap(cache=False, workers=2)
        def slow(x):
            os.write(1, b"%d\\n" % os.getpid())  # in one piece, beside the other worker's
            time.sleep(60)
        slow([1, 2])
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout
        pids = [int(program.stdout.readline()) for _ in range(2)]
        program.send_signal(signal.SIGINT)
        assert program.wait(100) == -signal.SIGINT
    assert all(map(gone, pids))


def test_events_of_items_in_workers_reach_the_bus(mode: MapMode) -> None:
    received: list[str] = []
    subscription = event_bus.subscribe(lambda event: received.append(type(event).__name__))
    try:
        mode.run(mode.of(lambda x: 1 / x, retries=1, min_delay=0).map([0]))
    finally:
        subscription.cancel()
    assert received.count("AttemptFailed") == 2


def test_a_shared_limiter_is_the_same_in_what_the_function_calls(mode: MapMode) -> None:
    limiter = RateLimiter("40/second")

    def inner(x: int) -> float:
        limiter.acquire()
        return time.monotonic()

    began = time.monotonic()  # a start may be noted long after it was admitted
    starts = mode.run(mode.of(inner, workers=4)(range(12)))
    assert max(starts) - began > 0.9 * 10 / 40
