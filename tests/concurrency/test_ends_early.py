# this_file: tests/concurrency/test_ends_early.py
"""Maps whose input raises, and maps that `stop_on` ends: what is done is not lost."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from opero import operomap
from opero.errors import MapStopped, OperoUsageError, RateLimitPausedError
from opero.testing import fake_clock

if TYPE_CHECKING:
    from tests.conftest import Face

    from opero.concurrency import MapResult


def broken_input() -> Iterator[int]:
    yield from range(20)
    raise ValueError("the input broke")


async def broken_async_input() -> AsyncIterator[int]:
    for n in range(20):
        yield n
    raise ValueError("the input broke")


def taken(stream: Any) -> tuple[list[int], BaseException | None]:
    """Return what a stream gives and what it raises."""
    found: list[int] = []
    try:
        if hasattr(stream, "__aiter__"):

            async def take() -> None:
                async for value in stream:
                    found.append(value)  # noqa: PERF401 - what comes before an error counts

            asyncio.run(take())
        else:
            found.extend(stream)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return found, error
    return found, None


OPTIONS = [
    {"mode": "thread"},
    {"mode": "thread", "ordered": False},
    {"mode": "thread", "cache": True},
    {"sequential": True},
    {"mode": "process"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stream_gives_everything_pulled_before_the_input_raised(
    options: dict[str, Any], face: Face
) -> None:
    given = {"cache": False, "retries": 0, "workers": 2, **options}
    mapped = operomap(**given)(face.of(lambda x: 2 * x))
    found, error = taken(mapped.stream(broken_input()))
    assert sorted(found) == [2 * x for x in range(20)]
    if options.get("ordered", True):
        assert found == sorted(found)
    assert isinstance(error, ValueError)


def test_stream_over_an_asynchronous_input_does_so_too() -> None:
    @operomap(cache=False, retries=0, workers=2)
    async def double(x: int) -> int:
        await asyncio.sleep(0.001)
        return 2 * x

    found, error = taken(double.stream(broken_async_input()))
    assert found == [2 * x for x in range(20)]
    assert isinstance(error, ValueError)


def test_map_result_holds_what_is_done_and_the_error(face: Face) -> None:
    mapped = operomap(mode="thread", cache=False, retries=0)(face.of(lambda x: x))
    result: MapResult[int] = face.run(mapped.map, broken_input())
    assert (result.status, result.values, result.total) == ("stopped", list(range(20)), None)
    assert result.reason == "its input raised ValueError: the input broke"
    assert isinstance(result.input_error, ValueError)
    with pytest.raises(MapStopped) as raised:
        result.raise_on_failure()
    assert raised.value.__cause__ is result.input_error


def test_list_of_results_raises_the_error_of_the_input(face: Face) -> None:
    mapped = operomap(mode="thread", cache=False, retries=0)(face.of(lambda x: x))
    with pytest.raises(ValueError, match="the input broke"):
        face.run(mapped, broken_input())


def test_interrupt_of_the_input_ends_a_stream_at_once() -> None:
    def interrupted() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    stream = operomap(mode="thread", cache=False)(abs).stream(interrupted())
    with pytest.raises(KeyboardInterrupt):
        list(stream)


def test_error_of_the_input_leaves_no_reference_cycle() -> None:
    class BrokenError(Exception):
        pass

    def items() -> Iterator[int]:
        yield 1
        raise BrokenError

    gc.disable()
    try:
        mapped = operomap(mode="thread", cache=False)(abs)
        try:
            list(mapped.stream(items()))
        except BrokenError as error:
            seen = weakref.ref(error)
        assert seen() is None
        found = weakref.ref(mapped.map(items()).input_error)  # type: ignore[type-var]
        assert found() is None
    finally:
        gc.enable()


# --- stop_on --------------------------------------------------------------------------------------


def quota(x: int) -> int:
    if x >= 5:
        raise RateLimitPausedError(12.345678901)
    return x


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_stop_on_ends_a_map_with_what_is_done(mode: Any, face: Face) -> None:
    mapped = operomap(
        mode=mode, cache=False, retries=0, workers=2, chunksize=1, stop_on=RateLimitPausedError
    )(face.of(quota))
    result: MapResult[int] = face.run(mapped.map, range(1_000))
    assert result.status == "stopped"
    assert result.reason == (
        "an item failed with RateLimitPausedError, and stop_on ends the map there"
    )
    # A worker that has taken item 4, and has not begun it, gives it back.
    assert result.values in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert 1 <= len(result.failures) < 20


EVERYWHERE = [
    {"mode": "thread"},
    {"mode": "thread", "chunksize": 50},
    {"mode": "process"},
    {"mode": "process", "chunksize": 500},
    {"mode": "async_process", "chunksize": 500},
    {"mode": "auto"},
    {"sequential": True},
    {"sequential": True, "chunksize": 50},
]


def used_up(x: int) -> int:
    if x >= 700:
        raise RateLimitPausedError(12.0)
    return x


@pytest.mark.parametrize("options", EVERYWHERE, ids=str)
def test_no_item_begins_after_the_one_that_ends_the_map(
    options: dict[str, Any], face: Face
) -> None:
    given = {"cache": False, "retries": 0, "workers": 2, "stop_on": RateLimitPausedError}
    mapped = operomap(**{**given, **options})(face.of(used_up))
    result: MapResult[int] = face.run(mapped.map, range(5_000))
    assert result.status == "stopped"
    # Those at work: one in each thread; in a process also the first one of a chunk that is there already, and with an
    # event loop 32 at once.
    several = options.get("mode") == "async_process" and face.asynchronous
    assert 1 <= len(result.failures) <= (128 if several else 8)
    assert set(result.values) <= set(range(700))
    assert len(result.indices) == len(set(result.indices))


@pytest.mark.parametrize("options", [{"mode": "thread"}, {"mode": "async"}, {"sequential": True}])
def test_no_item_begins_after_the_one_whose_error_is_raised(
    options: dict[str, Any], face: Face
) -> None:
    def fail(x: int) -> None:
        begun.append(x)
        raise OSError(x)

    begun: list[int] = []
    given = {"cache": False, "retries": 0, "workers": 2, "chunksize": 100}
    with pytest.raises(OSError, match=r"^\d+"):
        face.run(operomap(**{**given, **options})(face.of(fail)), range(1_000))
    assert len(begun) <= 2


def test_items_at_hand_do_not_begin_once_there_are_too_many_errors() -> None:
    def fail(x: int) -> None:
        begun.append(x)
        time.sleep(0.05)
        raise OSError(x)

    begun: list[int] = []
    mapped = operomap(
        mode="thread", cache=False, retries=0, workers=1, chunksize=200, max_errors=1
    )(fail)
    assert mapped.map(range(1_000)).status == "stopped"
    assert len(begun) < 200


def test_item_that_gets_an_expired_result_instead_ends_no_map() -> None:
    calls: list[int] = []

    def quota_later(x: int) -> int:
        calls.append(x)
        if len(calls) > 20:
            raise RateLimitPausedError(12.0)
        return x

    with fake_clock() as clock:
        mapped = operomap(
            mode="thread",
            cache_ttl=1,
            cache_stale_ttl=60,
            retries=0,
            workers=2,
            chunksize=10,
            stop_on=RateLimitPausedError,
        )(quota_later)
        assert mapped.map(range(20)).status == "complete"
        clock.advance(2)
        result = mapped.map(range(20))
    assert (result.status, result.values, result.stale) == ("complete", list(range(20)), 20)


def test_list_of_results_raises_map_stopped_with_what_is_done() -> None:
    mapped = operomap(
        mode="thread", cache=False, retries=0, workers=1, stop_on=(RateLimitPausedError, OSError)
    )(quota)
    with pytest.raises(MapStopped, match="stop_on") as raised:
        mapped(range(1_000))
    assert raised.value.result.values == list(range(5))


@pytest.mark.parametrize("on_error", ["raise", "return", "skip"])
def test_stream_gives_what_is_done_and_raises_map_stopped(on_error: Any) -> None:
    mapped = operomap(
        mode="thread",
        cache=False,
        retries=0,
        workers=1,
        chunksize=1,
        on_error=on_error,
        stop_on=RateLimitPausedError,
    )(quota)
    found, error = taken(mapped.stream(range(1_000)))
    assert [value for value in found if isinstance(value, int)] == list(range(5))
    assert any(isinstance(value, Exception) for value in found) == (on_error == "return")
    assert isinstance(error, MapStopped)


def test_stop_on_leaves_other_errors_to_on_error() -> None:
    mapped = operomap(mode="thread", cache=False, retries=0, stop_on=OSError)(quota)
    with pytest.raises(RateLimitPausedError):
        mapped(range(10))
    assert len(mapped.map(range(10)).failures) == 5


@pytest.mark.parametrize("wrong", [OSError(), "OSError", (OSError, 5), None])
def test_stop_on_takes_exception_types_only(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match="stop_on="):
        operomap(stop_on=wrong)(abs)


@pytest.mark.parametrize("options", [{}, {"mode": "thread"}, {"chunksize": 5}], ids=str)
def test_an_item_that_cancels_its_own_task_ends_the_map(options: dict[str, Any]) -> None:
    @operomap(workers=2, cache=False, retries=0, progress=False, **options)
    async def fetch(number: int) -> int:
        task = asyncio.current_task()
        assert task is not None
        if number == 3:
            task.cancel()
        await asyncio.sleep(0)
        return number

    async def run() -> list[int]:
        async with asyncio.timeout(20):
            return await fetch(range(10))

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
