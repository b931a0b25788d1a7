# this_file: tests/concurrency/test_references.py
"""What a map raises or reports is in no reference cycle, which only a collection would end."""

from __future__ import annotations

import asyncio
import gc
import inspect
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from opero import operomap
from opero.errors import MapStopped


class ItemError(Exception):
    """An item has failed."""


class InputError(Exception):
    """The input has failed."""


def three_then_error() -> Iterator[int]:
    yield from range(3)
    raise InputError


async def three_then_error_later() -> AsyncIterator[int]:
    for n in range(3):
        yield n
    raise InputError


def fail(x: int) -> int:
    if x == 3:
        raise ItemError(x)
    return x


async def fail_later(x: int) -> int:
    return fail(x)


async def use(f: Any, call: str, items: Any) -> list[weakref.ref[BaseException]]:
    """Use a map in one of the three ways; return references to the errors that the caller got."""
    try:
        later = inspect.iscoroutinefunction(f)
        # Without a name for what is returned: the frames of an error lead here.
        if call == "list":
            await f(items) if later else f(items)
        elif call == "map":
            (await f.map(items) if later else f.map(items)).raise_on_failure()
        elif later:
            [value async for value in f.stream(items)]
        else:
            list(f.stream(items))
    except (ItemError, InputError) as error:
        return [weakref.ref(error)]
    except ExceptionGroup as group:
        return [weakref.ref(error) for error in group.exceptions]
    except MapStopped as stopped:
        return [weakref.ref(stopped.__cause__ or stopped)]
    raise AssertionError("nothing was raised")


async def until_gone(watches: list[weakref.ref[Any]]) -> None:
    """Give threads and workers that are on their way out time to end."""
    end = time.monotonic() + 100
    while any(watch() is not None for watch in watches):
        assert time.monotonic() < end, [watch() for watch in watches]
        await asyncio.sleep(0.005)


INPUTS: list[Callable[[], Any]] = [lambda: range(6), three_then_error, three_then_error_later]
MODES: list[Any] = [
    (fail, {"mode": "thread"}),
    (fail, {"mode": "thread", "cache": True}),
    (fail, {"mode": "thread", "retries": 1, "min_delay": 0}),
    (fail, {"mode": "process", "workers": 2}),
    (fail, {"sequential": True}),
    (fail_later, {"mode": "async"}),
    (fail_later, {"mode": "thread"}),
    (fail_later, {"sequential": True}),
]


@pytest.mark.parametrize("call", ["list", "stream", "map"])
@pytest.mark.parametrize(
    ("function", "options", "items"),
    [
        (function, options, items)
        for function, options in MODES
        for items in INPUTS
        # A synchronous map has no asynchronous input.
        if function is fail_later or items is not three_then_error_later
    ],
)
def test_an_error_is_in_no_reference_cycle(
    function: Any, options: dict[str, Any], items: Callable[[], Any], call: str
) -> None:
    f = operomap(**{"cache": False, "retries": 0, "progress": False, **options})(function)

    async def main() -> None:
        await use(f, call, items())  # imports leave cycles of their own
        gc.collect()
        gc.disable()
        try:
            errors = await use(f, call, items())
            assert errors
            await until_gone(errors)
        finally:
            gc.enable()

    asyncio.run(main())


def test_an_input_that_is_still_waited_for_is_in_no_reference_cycle() -> None:
    class Input:
        def __init__(self) -> None:
            self.left = 4

        def __aiter__(self) -> AsyncIterator[int]:
            return self

        async def __anext__(self) -> int:
            self.left -= 1
            if self.left < 0:
                await asyncio.Event().wait()
            return 3 - self.left

    f = operomap(cache=False, retries=0, progress=False)(fail_later)

    async def use_one() -> weakref.ref[Input]:
        items = Input()
        assert await use(f, "list", items)
        return weakref.ref(items)

    async def main() -> None:
        await use_one()
        gc.collect()
        gc.disable()
        try:
            await until_gone([await use_one()])
        finally:
            gc.enable()

    asyncio.run(main())
