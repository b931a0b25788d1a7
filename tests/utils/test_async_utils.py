# this_file: tests/utils/test_async_utils.py
"""Bridges between synchronous and asynchronous functions."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest

from opero.utils import ensure_async, is_async_function, run_async

name = contextvars.ContextVar[str]("name", default="nobody")


async def afetch(x: int = 1) -> int:
    return x


def fetch(x: int = 1) -> int:
    """Fetch."""
    return x


class AsyncCall:
    async def __call__(self) -> int:
        return 1

    async def method(self) -> int:
        return 2


class Call:
    def __call__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("fn", "answer"),
    [
        (afetch, True),
        (functools.partial(afetch, 1), True),
        (functools.partial(functools.partial(afetch), 1), True),
        (AsyncCall(), True),
        (functools.partial(AsyncCall()), True),
        (AsyncCall().method, True),
        (fetch, False),
        (len, False),
        (Call(), False),
        (AsyncCall, False),
        (lambda: afetch(5), False),
    ],
)
def test_is_async_function_recognises_coroutine_functions(
    fn: Callable[..., Any], answer: bool
) -> None:
    assert is_async_function(fn) is answer


@pytest.mark.asyncio
async def test_an_async_function_stays_itself() -> None:
    assert ensure_async(afetch) is afetch
    assert await ensure_async(AsyncCall())() == 1


@pytest.mark.asyncio
async def test_a_synchronous_function_runs_in_a_thread_with_the_callers_context() -> None:
    def where() -> tuple[str, int]:
        return name.get(), threading.get_ident()

    name.set("somebody")
    seen, thread = await ensure_async(where)()
    assert seen == "somebody"
    assert thread != threading.get_ident()


@pytest.mark.asyncio
async def test_what_it_returns_is_awaited_if_it_can_be() -> None:
    assert await ensure_async(lambda: afetch(5))() == 5


@pytest.mark.asyncio
async def test_an_error_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        await ensure_async(lambda: 1 / 0)()


def test_a_function_made_async_keeps_its_name_and_docs() -> None:
    made = ensure_async(fetch)
    assert inspect.iscoroutinefunction(made)
    assert (made.__name__, made.__doc__) == ("fetch", "Fetch.")
    assert inspect.signature(made) == inspect.signature(fetch)


def test_run_async_runs_without_a_loop() -> None:
    assert run_async(afetch(5)) == 5


@pytest.mark.asyncio
async def test_run_async_runs_within_a_loop() -> None:
    assert run_async(afetch(5)) == 5


@pytest.mark.asyncio
async def test_run_async_within_a_loop_has_the_callers_context() -> None:
    async def who() -> str:
        return name.get()

    name.set("caller")
    assert run_async(who()) == "caller"


class Ready:
    def __await__(self) -> Generator[None, None, int]:
        yield
        return 7


def test_run_async_takes_any_awaitable() -> None:
    assert run_async(Ready()) == 7


def raising(error: BaseException) -> Any:
    async def fail() -> None:
        raise error

    return fail()


def test_run_async_passes_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        run_async(raising(ZeroDivisionError()))


@pytest.mark.asyncio
async def test_run_async_passes_errors_on_within_a_loop() -> None:
    with pytest.raises(ZeroDivisionError):
        run_async(raising(ZeroDivisionError()))


@pytest.mark.asyncio
async def test_run_async_leaves_no_thread_behind() -> None:
    before = {*threading.enumerate()}
    run_async(asyncio.sleep(0))
    assert {*threading.enumerate()} <= before
