# this_file: src/opero/utils/async_utils.py
"""Distinguish synchronous and asynchronous functions, and call one kind from the other."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from opero.utils.parameters import is_bare

__all__ = ["ensure_async", "is_async_function", "run_async"]

P = ParamSpec("P")
R = TypeVar("R")


_IS_COROUTINE = 0x80
"""Flag of the code of an `async def` (`inspect.CO_COROUTINE`)."""


def is_async_function(fn: Callable[..., Any]) -> bool:
    """Return whether calling `fn` gives a coroutine.

    So do `async def`, a partial of it, and an object with an `async def __call__`.

    Example:
        >>> async def fetch(): ...
        >>> is_async_function(fetch), is_async_function(len)
        (True, False)
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    if is_bare(fn):
        return bool(cast("Any", fn).__code__.co_flags & _IS_COROUTINE)
    import inspect

    if inspect.iscoroutinefunction(fn):
        return True
    is_plain = inspect.isroutine(fn) or inspect.isclass(fn)
    return not is_plain and inspect.iscoroutinefunction(type(fn).__call__)


def ensure_async(fn: Callable[P, R | Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return `fn` as an async function.

    A synchronous one runs in a worker thread with the caller's context.

    Example:
        >>> import asyncio
        >>> asyncio.run(ensure_async(len)("abc"))
        3
    """
    if is_async_function(fn):
        return cast("Callable[P, Coroutine[Any, Any, R]]", fn)

    @functools.wraps(fn)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import asyncio
        import inspect

        result: Any = await asyncio.to_thread(fn, *args, **kwargs)
        return cast("R", await result if inspect.isawaitable(result) else result)

    return run


def run_async(awaitable: Awaitable[R]) -> R:
    """Run an awaitable to its end from synchronous code, also where a loop runs (a notebook).

    Without a running loop it is `asyncio.run`; within one, the awaitable gets a loop of its own in
    a thread, with the caller's context, and the caller blocks until it is done.

    Args:
        awaitable: A coroutine, for example; it must not belong to the running loop.

    Example:
        >>> async def answer():
        ...     return 42
        >>> run_async(answer())
        42
    """
    import asyncio

    async def main() -> R:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    import contextvars
    from concurrent.futures import ThreadPoolExecutor

    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="opero-run-async") as pool:
        return pool.submit(context.run, asyncio.run, main()).result()
