# this_file: tests/decorators/test_operomap.py
"""What users get of `@operomap`, in every mode."""

from __future__ import annotations

import abc
import asyncio
import contextvars
import inspect
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.map_mode import MapMode

from opero import RateLimiter, operomap, orchestrate
from opero.concurrency import ItemResult, MapResult
from opero.errors import MapStopped, OperoUsageError
from opero.testing import fake_clock, set_disabled

MODES = [
    pytest.param(("sync", {"mode": "thread"}), id="threads"),
    pytest.param(("sync", {"sequential": True}), id="sequential"),
    pytest.param(("async", {"mode": "async"}), id="loop"),
    pytest.param(("async", {"mode": "thread"}), id="loops-in-threads"),
    pytest.param(("async", {"sequential": True}), id="async-sequential"),
]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> MapMode:
    kind, options = request.param
    return MapMode(kind, retries=0, min_delay=0, progress=False, **options)


def invert(x: float) -> float:
    return 1 / x


# --- results --------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_input(mode: MapMode) -> None:
    f = mode.of(lambda x: 2 * x, workers=3)
    assert mode.run(f(range(50))) == [2 * x for x in range(50)]
    assert mode.run(f([])) == []


def test_further_arguments_are_the_same_for_all_items(mode: MapMode) -> None:
    f = mode.of(lambda x, k, *, c=0: x * k + c)
    assert mode.run(f([1, 2, 3], 10, c=5)) == [15, 25, 35]


def test_a_stream_yields_the_same(mode: MapMode) -> None:
    f = mode.of(lambda x: -x)
    assert mode.run(f.stream(iter(range(100)))) == [-x for x in range(100)]


def test_one_is_a_single_call_through_the_same_pipeline(mode: MapMode) -> None:
    f = mode.of(invert, retries=2)
    assert mode.run(f.one(4)) == 0.25
    with pytest.raises(ZeroDivisionError):
        mode.run(f.one(0))
    assert f.stats.calls == 4


def test_map_reports_what_succeeded_and_what_failed(mode: MapMode) -> None:
    result = mode.run(mode.of(invert, retries=1).map([1, 0, 4]))
    assert isinstance(result, MapResult)
    assert (result.values, result.indices, result.by_index()) == (
        [1, 0.25],
        [0, 2],
        {0: 1, 2: 0.25},
    )
    (failure,) = result.failures
    assert (failure.index, failure.item, type(failure.error), failure.attempts) == (
        1,
        0,
        ZeroDivisionError,
        2,
    )
    assert (result.status, result.ok, result.total, result.done) == ("complete", False, 3, 3)
    with pytest.raises(ExceptionGroup, match="1 of 3 items failed") as raised:
        result.raise_on_failure()
    assert raised.value.exceptions == (failure.error,)


def test_unordered_stream_passes_a_slow_item() -> None:
    gate = threading.Event()

    @operomap(mode="thread", workers=2, ordered=False, cache=False)
    def f(x: int) -> int:
        if x == 0:
            gate.wait(10)
        return x

    stream = f.stream(range(200))
    seen = list(itertools.islice(stream, 150))
    assert 0 not in seen
    gate.set()
    assert sorted([*seen, *stream]) == list(range(200))


# --- errors ---------------------------------------------------------------------------------------


def test_the_failing_items_own_error_is_raised_with_its_index(mode: MapMode) -> None:
    f = mode.of(invert)
    with pytest.raises(ZeroDivisionError) as raised:
        mode.run(f([1, 2, 0, 4]))
    assert any("for item 2 of the map" in note for note in raised.value.__notes__)


def test_an_error_is_raised_before_slow_items_end() -> None:
    gate = threading.Event()

    @operomap(mode="thread", workers=2, cache=False, retries=0)
    def f(x: int) -> int:
        if x == 0:
            gate.wait(100)
        return 1 // (x - 1)

    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        f([0, 1])
    gate.set()
    assert time.monotonic() - began < 60


def test_a_stream_hands_out_what_comes_before_the_error(mode: MapMode) -> None:
    f = mode.of(invert)
    if mode.kind == "sync":
        stream = f.stream([1, 2, 0, 4])
        assert [next(stream), next(stream)] == [1, 0.5]
        with pytest.raises(ZeroDivisionError):
            next(stream)
        return

    async def consume() -> None:
        stream = f.stream([1, 2, 0, 4])
        assert [await anext(stream), await anext(stream)] == [1, 0.5]
        with pytest.raises(ZeroDivisionError):
            await anext(stream)

    asyncio.run(consume())


def test_errors_can_take_the_results_place_or_none(mode: MapMode) -> None:
    first, error, last = mode.run(mode.of(invert, on_error="return")([1, 0, 4]))
    assert (first, type(error), last) == (1, ZeroDivisionError, 0.25)
    assert mode.run(mode.of(invert, on_error="skip")([1, 0, 4])) == [1, 0.25]
    assert mode.run(mode.of(invert, on_error="skip").stream([1, 0, 4])) == [1, 0.25]


def test_too_many_errors_stop_the_map_and_keep_what_is_done(mode: MapMode) -> None:
    f = mode.of(lambda x: 1 // (x % 2), max_errors=3, on_error="skip", workers=1)
    with pytest.raises(MapStopped, match="max_errors=3") as raised:
        mode.run(f(range(10_000)))
    assert raised.value.result.status == "stopped"
    result = mode.run(f.map(itertools.count()))
    assert (result.status, result.total) == ("stopped", None)
    assert len(result.failures) >= 3
    assert result.reason


def test_a_stop_token_ends_the_map_with_what_is_done(mode: MapMode) -> None:
    token = threading.Event()

    def f(x: int) -> int:
        if x == 20:
            token.set()
        return x

    result = mode.run(mode.of(f, stop_token=token, workers=2).map(itertools.count()))
    assert result.status == "cancelled"
    # Items before it that a worker had at hand may be given back.
    assert 20 in result.values
    assert result.by_index() == {n: n for n in result.indices}
    with pytest.raises(MapStopped):
        result.raise_on_failure()


def test_a_stop_token_takes_items_out_of_the_queue_of_a_rate_limit(mode: MapMode) -> None:
    token, limiter = threading.Event(), RateLimiter("1/hour")
    if not mode.parallel:
        threading.Timer(0.2, token.set).start()
    f = mode.of(
        lambda x: x,
        rate_limit=limiter,
        stop_token=token,
        workers=3,
        ordered=False,
        on_result=lambda one: token.set(),
    )
    began = time.monotonic()
    result = mode.run(f.map(range(6)))
    assert time.monotonic() - began < 30
    assert (result.status, len(result.values), len(result.failures)) == ("cancelled", 1, 0)
    assert not limiter.threads_waiting
    assert not limiter.loops_waiting


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_would_end_the_program_ends_the_map(kind: type[BaseException]) -> None:
    @operomap(mode="thread", cache=False, on_error="skip")
    def f(x: int) -> int:
        if x == 3:
            raise kind
        return x

    with pytest.raises(kind):
        f(range(10))


def test_an_error_of_the_input_is_the_callers(mode: MapMode) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("input")

    with pytest.raises(LookupError, match="input"):
        mode.run(mode.of(lambda x: x)(items()))


@pytest.mark.parametrize("items", ["abc", b"abc", bytearray(b"x")])
def test_text_is_not_taken_apart(mode: MapMode, items: Any) -> None:
    with pytest.raises(OperoUsageError, match=r"would be taken apart: write .*\(\[…\]\)"):
        mode.run(mode.of(lambda x: x)(items))


def test_what_is_no_collection_is_refused_with_the_way_out(mode: MapMode) -> None:
    with pytest.raises(OperoUsageError, match=r"int is not iterable: write .*\.one\(…\)"):
        mode.run(mode.of(lambda x: x)(5))


def test_a_synchronous_map_cannot_wait_for_asynchronous_input() -> None:
    async def items() -> Any:
        yield 1

    with pytest.raises(OperoUsageError, match="asynchronous iterator"):
        operomap(mode="thread")(invert)(items())


def test_a_generator_function_is_refused() -> None:
    def numbers(x: int) -> Iterator[int]:
        yield x

    with pytest.raises(OperoUsageError, match="return a list"):
        operomap(numbers)


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_reads_no_further_than_two_chunks_for_each_worker(ordered: bool) -> None:
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for n in itertools.count():
            read = n + 1
            yield n

    @operomap(mode="thread", workers=3, chunksize=5, cache=False, ordered=ordered)
    def f(x: int) -> int:
        return x

    stream = f.stream(numbers())
    for taken in range(1, 100):
        next(stream)
        assert read - taken <= 2 * 3 * 5
    stream.close()
    assert not list(stream), "what was read is not handed out any more"


def test_asynchronous_input_is_awaited_while_items_run() -> None:
    async def items() -> Any:
        for n in range(20):
            await asyncio.sleep(0.001)
            yield n

    @operomap(workers=4, cache=False)
    async def f(x: int) -> int:
        return -x

    async def consume() -> list[int]:
        assert await f(items()) == [-n for n in range(20)]
        return [value async for value in f.stream(items())]

    assert asyncio.run(consume()) == [-n for n in range(20)]


def test_an_error_of_asynchronous_input_is_the_callers() -> None:
    async def items() -> Any:
        yield 1
        raise LookupError("input")

    @operomap(cache=False)
    async def f(x: int) -> int:
        return x

    with pytest.raises(LookupError):
        asyncio.run(f(items()))


# --- the end --------------------------------------------------------------------------------------


def crowd() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t is not threading.main_thread()}


def settled(before: set[threading.Thread]) -> bool:
    end = time.monotonic() + 100
    while crowd() - before:
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_after_a_map_no_thread_is_left() -> None:
    before = crowd()
    f = operomap(mode="thread", cache=False)(invert)
    f([1, 2, 3])
    with pytest.raises(ZeroDivisionError):
        f.with_options(retries=0)([1, 0])
    stream = f.stream(itertools.count(1))
    next(stream)
    stream.close()
    assert settled(before)


def test_a_cancelled_map_cancels_its_items() -> None:
    begun: list[int] = []
    ended: list[int] = []

    @operomap(workers=3, cache=False)
    async def f(x: int) -> None:
        begun.append(x)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(x)

    async def main() -> int:
        running = asyncio.ensure_future(f(range(10)))
        while len(begun) < 3:  # noqa: ASYNC110 - a list is no event
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1
    assert sorted(ended) == [0, 1, 2]


def test_leaving_an_asynchronous_stream_cancels_its_items() -> None:
    ended: list[int] = []

    @operomap(workers=3, cache=False)
    async def f(x: int) -> int:
        try:
            await asyncio.sleep(60 if x else 0)
        finally:
            ended.append(x)
        return x

    async def main() -> int:
        stream: Any = f.stream(itertools.count())
        async for _ in stream:
            break
        await stream.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1
    assert len(ended) >= 3


def test_threads_never_keep_the_interpreter_alive() -> None:
    script = """if True:
        import time
        from opero import operomap

        @operomap(mode="thread", cache=False)
        def f(x):
            time.sleep(60 if x else 0)
            return x

        next(f.stream(range(10)))
        print("end")
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)
    assert time.monotonic() - began < 30


# --- the rest of the pipeline ---------------------------------------------------------------------


def test_retries_run_beside_the_function(mode: MapMode) -> None:
    seen: dict[int, int] = {}

    def f(x: int) -> int:
        seen[x] = seen.get(x, 0) + 1
        if seen[x] < 3:
            raise ConnectionError(x)
        return x

    mapped = mode.of(f, retries=2)
    assert mode.run(mapped(range(20))) == list(range(20))
    assert set(seen.values()) == {3}
    assert (mapped.stats.calls, mapped.stats.retries) == (60, 40)


def test_an_item_that_waits_for_its_retry_gives_its_place_to_others() -> None:
    order: list[int] = []

    @operomap(mode="thread", workers=1, retries=1, min_delay=0.2, max_delay=0.2, cache=False)
    def f(x: int) -> int:
        order.append(x)
        if order.count(0) < 2 and x == 0:
            raise ConnectionError("x")
        return x

    assert f(range(3)) == [0, 1, 2]
    assert order == [0, 1, 2, 0]
    assert f.stats.slept == pytest.approx(0.2)


def test_long_pauses_take_no_time_under_a_fake_clock(mode: MapMode) -> None:
    broken = iter([True] * 6)

    def f(x: int) -> int:
        if next(broken, False):
            raise ConnectionError("x")
        return x

    began = time.monotonic()
    with fake_clock():
        assert mode.run(mode.of(f, retries=8, min_delay=100, max_delay=100)(range(3))) == [0, 1, 2]
    assert time.monotonic() - began < 60


def test_values_to_fall_back_on_are_tried_for_each_item(mode: MapMode) -> None:
    def f(x: int, model: list[str] = ["a", "b"]) -> str:  # noqa: B006 - never changed
        if model == "a":
            raise ConnectionError("a is down")
        return f"{x}{model}"

    assert mode.run(mode.of(f, arg_fallback="model")([1, 2])) == ["1b", "2b"]


def test_context_variables_reach_the_workers(mode: MapMode) -> None:
    user = contextvars.ContextVar("user", default="nobody")
    user.set("ann")
    assert mode.run(mode.of(lambda x: user.get())([1, 2])) == ["ann", "ann"]


def test_on_result_sees_each_item_in_the_thread_of_the_map(mode: MapMode) -> None:
    seen: list[ItemResult] = []
    threads: set[threading.Thread] = set()

    def note(result: ItemResult) -> None:
        seen.append(result)
        threads.add(threading.current_thread())

    mode.run(mode.of(invert, on_error="skip", on_result=note)([1, 0, 4]))
    by_index = {r.index: r for r in seen}
    assert [by_index[n].item for n in range(3)] == [1, 0, 4]
    assert by_index[2].value == 0.25
    assert type(by_index[1].error) is ZeroDivisionError
    assert threads == {threading.main_thread()}


# --- cache ----------------------------------------------------------------------------------------


def test_cached_items_are_never_dispatched_and_equal_ones_run_once(mode: MapMode) -> None:
    ran: list[int] = []

    def f(x: int) -> list[int]:
        ran.append(x)
        return [x]

    mapped = mode.of(f, cache=True)
    first = mode.run(mapped.map([1, 2, 1, 3, 2, 1]))
    assert first.values == [[1], [2], [1], [3], [2], [1]]
    assert sorted(ran) == [1, 2, 3]
    assert first.shared + first.hits == 3
    first.values[0].append("mine")
    second = mode.run(mapped.map([1, 2, 4]))
    assert second.values == [[1], [2], [4]], "results are isolated"
    assert second.hits == 2
    assert sorted(ran) == [1, 2, 3, 4]
    assert mode.run(mapped.one(3)) == [3]
    assert sorted(ran) == [1, 2, 3, 4]


def test_without_the_cache_every_item_runs(mode: MapMode) -> None:
    ran: list[int] = []
    mode.run(mode.of(ran.append)([1, 1, 1]))
    assert ran == [1, 1, 1]


def test_switched_off_for_a_test_every_item_runs(mode: MapMode) -> None:
    ran: list[int] = []
    with set_disabled():
        mode.run(mode.of(ran.append, cache=True)([1, 1, 1]))
    assert ran == [1, 1, 1]


def test_errors_are_not_cached_and_reach_equal_items(mode: MapMode) -> None:
    ran: list[int] = []

    def f(x: int) -> int:
        ran.append(x)
        raise KeyError(x)

    mapped = mode.of(f, cache=True)
    result = mode.run(mapped.map([1, 1, 1]))
    assert [f.index for f in result.failures] == [0, 1, 2]
    assert len({id(f.error) for f in result.failures}) == len(result.failures)
    mode.run(mapped.map([1]))
    assert len(ran) >= 2


def test_cache_if_sees_the_receipt_of_an_item(mode: MapMode) -> None:
    seen: list[Any] = []

    def f(x: int, model: list[str] = ["a", "b"]) -> str:  # noqa: B006 - never changed
        if model == "a" and x == 2:
            raise ConnectionError("a is down")
        return model

    def only_the_best(value: Any, receipt: Any) -> bool:
        seen.append(receipt)
        return bool(receipt.fallback == "a")

    mapped = mode.of(f, cache=True, cache_if=only_the_best, arg_fallback="model")
    assert mode.run(mapped([1, 2])) == ["a", "b"]
    assert sorted(r.fallback for r in seen) == ["a", "b"]
    assert mapped.cache.info().size == 1


def test_an_argument_without_content_is_the_failure_of_its_item(mode: MapMode) -> None:
    result = mode.run(mode.of(lambda x: 1, cache=True, cache_ttl=5).map([1, threading.Lock(), 2]))
    assert result.values == [1, 1]
    assert "cannot be part of a cache key" in str(result.failures[0].error)


def test_two_maps_at_once_compute_an_equal_item_once() -> None:
    ran: list[int] = []
    gate = threading.Event()

    @operomap(mode="thread", workers=2)
    def f(x: int) -> int:
        ran.append(x)
        gate.wait(10)
        return x

    found: list[list[int]] = []
    maps = [threading.Thread(target=lambda: found.append(f(range(4)))) for _ in range(3)]
    for thread in maps:
        thread.start()
    time.sleep(0.2)
    gate.set()
    for thread in maps:
        thread.join(20)
    assert found == [[0, 1, 2, 3]] * 3
    assert sorted(ran) == [0, 1, 2, 3]


def test_a_map_takes_over_what_a_cancelled_one_has_begun() -> None:
    ran: list[int] = []

    @operomap(workers=2)
    async def f(x: int) -> int:
        ran.append(x)
        await asyncio.sleep(60 if len(ran) == 1 else 0)
        return x

    async def main() -> list[int]:
        first = asyncio.ensure_future(f([1]))
        while not ran:  # noqa: ASYNC110 - a list is no event
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(f([1]))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert asyncio.run(main()) == [1]
    assert ran == [1, 1]


def test_a_function_that_maps_itself_does_not_wait_for_itself() -> None:
    @operomap(mode="thread", workers=2)
    def count_down(n: int) -> int:
        return 0 if n == 0 else 1 + max(count_down([n - 1, n - 1]))

    assert count_down([3, 3, 2]) == [3, 3, 2]


def test_consumer_of_a_stream_may_call_for_its_items() -> None:
    @operomap(mode="thread", workers=2)
    def f(x: int) -> int:
        return x

    assert [f.one(9) + x for x in f.stream(range(10))] == [9 + x for x in range(10)]


# --- company --------------------------------------------------------------------------------------


def test_four_threads_map_at_once(mode: MapMode) -> None:
    f = mode.of(lambda x: -x)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(mode.run(f(range(50))))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [[-x for x in range(50)]] * 4


def test_maps_nest() -> None:
    inner = operomap(mode="thread", workers=2, cache=False)(lambda x: x + 1)
    outer = operomap(mode="thread", workers=2, cache=False)(lambda n: sum(inner(range(n))))
    assert outer([1, 2, 3]) == [1, 3, 6]


def test_a_synchronous_map_works_inside_a_running_loop() -> None:
    async def main() -> list[float]:
        return operomap(mode="thread", cache=False)(invert)([1, 2])

    assert asyncio.run(main()) == [1, 0.5]


# --- what a decorated function is -----------------------------------------------------------------


def test_kind_name_and_signature_are_kept(mode: MapMode) -> None:
    def fetch(item: int, model: str = "a") -> int:
        """Fetch it."""
        return item

    f = mode.of(fetch)
    assert inspect.iscoroutinefunction(f) == (mode.kind == "async")
    assert f.__name__ == "fetch"
    if mode.kind == "sync":
        assert str(inspect.signature(f)) == "(items, /, model: 'str' = 'a')"
        assert f.__doc__ == "Fetch it."


class Client:
    def __init__(self, base: int) -> None:
        self.base = base

    @operomap(mode="thread")
    def add(self, x: int, more: int = 0) -> int:
        return self.base + x + more

    @operomap(mode="thread", cache=False)
    @classmethod
    def name(cls, x: int) -> str:
        return f"{cls.__name__}{x}"

    @operomap
    @staticmethod
    async def later(x: int) -> int:
        return -x

    @staticmethod
    @operomap(mode="thread")
    def double(x: int) -> int:
        return 2 * x


def test_methods_see_their_instance() -> None:
    one, ten = Client(1), Client(10)
    assert (one.add([1, 2]), ten.add([1, 2], 5)) == ([2, 3], [16, 17])
    assert list(ten.add.stream([1, 2])) == [11, 12]
    assert ten.add.map([1]).values == [11]
    assert ten.add.one(7, more=1) == 18
    assert Client.name([1, 2]) == ["Client1", "Client2"]
    assert asyncio.run(Client.later([1])) == [-1]
    assert (Client.double([1]), one.double([1])) == ([2], [2])


def test_a_method_is_one_whatever_its_first_parameter_is_called() -> None:
    each = operomap(mode="thread", retries=0)

    class Base(abc.ABC):
        factor = 10

        @abc.abstractmethod
        @each
        def scale(me, x): ...  # noqa: N805

    class Scale(Base):
        @each
        def scale(me, x):  # noqa: N805
            return me.factor * x

        any_way = each(lambda _, x: _.factor + x)
        other = scale.with_options(workers=1)

        @staticmethod
        @each
        def outer(me):
            return -me

        @each
        @staticmethod
        def inner(self):  # noqa: PLW0211
            return -self

        @each
        @classmethod
        def of_class(kind, x):  # noqa: N804
            return kind.factor - x

        @orchestrate
        def orchestrated(me, x):  # noqa: N805
            return me.factor * x

    assert inspect.isabstract(Base)
    one: Any = Scale()
    assert one.scale([1, 2]) == Scale.scale(one, [1, 2]) == one.other([1, 2]) == [10, 20]
    assert list(one.scale.stream([3])) == one.scale.map([3]).values == [one.scale.one(3)] == [30]
    assert str(inspect.signature(one.scale)) == "(items, /)"
    assert (one.any_way([1]), one.outer([1]), one.inner([1]), one.of_class([1])) == (
        [11],
        [-1],
        [-1],
        [9],
    )
    assert one.orchestrated.process(1, 2) == [10, 20]


def test_with_options_shares_counters_and_cache() -> None:
    f = operomap(mode="thread")(invert)
    f([1, 2])
    g = f.with_options(workers=1, on_error="skip")
    assert g.map([1, 2, 0]).hits == 2
    assert f.stats is g.stats
    assert (g.options.workers, f.options.workers) == (1, 4)


def test_explain_says_how_items_are_run() -> None:
    f = operomap(workers=7, ordered=False, max_errors=0.1, mode="thread")(invert)
    line = f.explain().splitlines()[1]
    assert line == "├─ map         7 threads, as they come, on_error=raise, max_errors=0.1"


def test_a_map_without_items_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"invert\(\) maps over items and got none"):
        operomap(invert)()  # type: ignore[call-arg]
