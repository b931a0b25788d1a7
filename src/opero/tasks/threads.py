# this_file: src/opero/tasks/threads.py
"""Synchronous functions off the event loop: in spare threads, a bounded number at once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

from opero.utils.threads import ThreadCall, run_in_thread

__all__ = ["MOST_THREADS", "in_thread"]

MOST_THREADS: Final = 64
"""Synchronous tasks of one event loop that are at work at once; the others wait in order."""

# Of each loop by itself: a function in a thread may run tasks on a loop of its own, and must not wait for itself.
_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def in_thread(call: Callable[[], Any]) -> Any:
    """Call a function in another thread, with a copy of the context, and return its result.

    Who is cancelled waits no longer. The thread goes on until the function returns, because it cannot be
    killed, and keeps its slot; it never keeps the interpreter alive.
    """
    loop = asyncio.get_running_loop()
    slots = _slots.get(loop)
    if slots is None:
        slots = _slots[loop] = asyncio.Semaphore(MOST_THREADS)
    await slots.acquire()
    job = ThreadCall(call)
    try:
        run_in_thread(job)
    except BaseException:
        slots.release()
        raise
    over = loop.create_future()
    job.then(functools.partial(_tell, loop, slots, over))
    try:
        await over
    except BaseException:
        job.abandon()
        raise
    return job.outcome()


def _tell(
    loop: asyncio.AbstractEventLoop, slots: asyncio.Semaphore, over: asyncio.Future[None]
) -> None:
    try:
        loop.call_soon_threadsafe(_end, slots, over)
    except RuntimeError:
        pass  # the loop is closed: nobody waits


def _end(slots: asyncio.Semaphore, over: asyncio.Future[None]) -> None:
    slots.release()
    if not over.done():
        over.set_result(None)
