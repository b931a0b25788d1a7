# this_file: src/opero/utils/async_utils.py
"""Distinguish synchronous and asynchronous functions, and call one kind from the other, in threads and on loops."""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from opero.errors import OperoUsageError
from opero.utils.ambient import require_loop
from opero.utils.fork import reset_after_fork
from opero.utils.parameters import is_bare, unwrap_partial

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Semaphore

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


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
    fn = unwrap_partial(fn)
    if is_bare(fn):
        return bool(cast("Any", fn).__code__.co_flags & _IS_COROUTINE)
    import inspect

    if inspect.iscoroutinefunction(fn):
        return True
    is_plain = inspect.isroutine(fn) or inspect.isclass(fn)
    return not is_plain and inspect.iscoroutinefunction(type(fn).__call__)


def ensure_async(fn: Callable[P, R | Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return `fn` as an async function.

    A synchronous one runs in a thread with the caller's context, as `call_in_thread` does it.

    Example:
        >>> import asyncio
        >>> asyncio.run(ensure_async(len)("abc"))
        3
    """
    if is_async_function(fn):
        return cast("Callable[P, Coroutine[Any, Any, R]]", fn)
    if not callable(fn):
        raise OperoUsageError(f"ensure_async() takes a function, not {type(fn).__name__}.")

    @functools.wraps(fn)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = await call_in_thread(fn, *args, **kwargs)
        return result

    return run


MOST_THREADS: Final = 64
"""Most calls of one event loop that `call_in_thread` runs at once; the others wait in order."""

# One for each loop: a function in a thread may run a loop of its own, and must not wait for itself.
_slots: Final[WeakKeyDictionary[AbstractEventLoop, Semaphore]] = WeakKeyDictionary()


def in_thread_of(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Return the asynchronous variant of a method: the same in a thread, so that the event loop is not held up.

    That of an object whose attribute `_blocking` is false is called at once.
    """

    @functools.wraps(method)
    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not getattr(self, "_blocking", True):
            return method(self, *args, **kwargs)
        from asyncio import to_thread

        require_loop("use a store that blocks")
        return await to_thread(method, self, *args, **kwargs)

    owner, _, name = method.__qualname__.rpartition(".")
    variant.__name__, variant.__qualname__ = f"a{name}", f"{owner}.a{name}"
    variant.__doc__ = f"Do what `{name}` does, without holding up the event loop."
    return variant


async def call_in_thread(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function in another thread, with a copy of the context, and await the result if that is awaitable.

    A cancelled caller waits no longer. The thread runs until the function returns, because it cannot be
    killed, and keeps its slot; it never keeps the interpreter alive.
    """
    import asyncio

    from opero.utils.threads import ThreadCall, run_in_thread

    require_loop("call a synchronous function in a thread")
    loop = asyncio.get_running_loop()
    slots = _slots.get(loop)
    if slots is None:
        slots = _slots[loop] = asyncio.Semaphore(MOST_THREADS)
    await slots.acquire()
    ended: asyncio.Future[None] = loop.create_future()
    ended.add_done_callback(lambda _: slots.release())
    job = ThreadCall(functools.partial(fn, *args, **kwargs))
    try:
        run_in_thread(job)
    except BaseException:
        ended.set_result(None)
        raise
    job.then(functools.partial(_notify, loop, ended))
    try:
        await asyncio.shield(ended)
    except BaseException:
        job.abandon()
        raise
    result = job.outcome()
    return await result if hasattr(type(result), "__await__") else result


def _notify(loop: AbstractEventLoop, ended: Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(ended.set_result, None)
    except RuntimeError:
        pass  # the loop is closed: there is no waiter


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
    import inspect

    if not inspect.isawaitable(awaitable):
        raise OperoUsageError(
            f"run_async() takes a coroutine, not {type(awaitable).__name__}: write run_async(fetch(url))."
        )

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


class LoopThread:
    """An event loop in a thread of its own, started at the first use and after each stop.

    Args:
        name: The thread's.
        thread: Makes the thread: a daemon, so that what never ends does not keep the interpreter alive.
        prepare: Called with each loop before it runs.
    """

    def __init__(
        self,
        name: str,
        *,
        thread: Callable[..., threading.Thread] = threading.Thread,
        prepare: Callable[[AbstractEventLoop], object] | None = None,
    ) -> None:
        self._name = name
        self._make_thread = thread
        self._prepare = prepare
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: AbstractEventLoop | None = None
        reset_after_fork(self)

    def get(self) -> AbstractEventLoop:
        """Return the loop; it is running."""
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                import asyncio

                ready = threading.Event()
                loop = self._loop = asyncio.new_event_loop()
                if self._prepare is not None:
                    self._prepare(loop)
                loop.call_soon(ready.set)
                self._thread = self._make_thread(
                    target=_run_loop, args=(loop,), name=self._name, daemon=True
                )
                self._thread.start()
                ready.wait()
            return self._loop

    def stop(self, timeout: float | None = None) -> None:
        """End the loop and wait for its thread, for `timeout` seconds at most."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None and self._thread is not None and self._thread.is_alive():
                loop.call_soon_threadsafe(loop.stop)
                self._thread.join(timeout)

    def after_fork(self) -> None:
        """Forget the loop: its thread is not there in a forked child."""
        self._lock = threading.Lock()
        self._loop = self._thread = None

    def __repr__(self) -> str:
        return f"<LoopThread {self._name}, {'not started' if self._loop is None else 'running'}>"


def _run_loop(loop: AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then end its tasks as `asyncio.run` does."""
    import asyncio

    while True:
        try:
            loop.run_forever()
            break
        except (KeyboardInterrupt, SystemExit):
            continue  # a task has raised it: it has ended with that, and the others go on
    # Not by `asyncio.run`, which starts a thread for it: the interpreter refuses that at its end.
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=0.5))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
