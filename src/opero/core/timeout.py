# this_file: src/opero/core/timeout.py
"""Timeout: a limit for each real call, and what a deadline leaves of it.

An asynchronous call is cancelled. A synchronous one runs in another thread and is left behind when
its time is over, because a thread cannot be killed: it goes on until the function returns, and its
result is dropped.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.deadline import innermost_scope, overdue, run_until
from opero.errors import CallTimeoutError
from opero.utils import ambient
from opero.utils.threads import ThreadCall, run_in_thread
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from asyncio import Task

    from opero.core.call import Call
    from opero.core.deadline import DeadlineScope
    from opero.errors import DeadlineError
    from opero.events.bus import Emitter


class Timeout:
    """Stands right at the function, inside the step that counts real calls.

    Its clock starts when all other guards have let the call pass.

    Args:
        seconds: The limit; None if only the deadlines of calls are one.
        emitter: Where events go.
    """

    name = "timeout"

    def __init__(self, seconds: float | None, emitter: Emitter) -> None:
        self.seconds = seconds
        self._emitter = emitter

    def describe(self) -> str:
        """Return the line for `explain()`."""
        return "none" if self.seconds is None else f"{format_seconds(self.seconds)} for each call"

    # --- decisions --------------------------------------------------------------------------------

    def left(self, call: Call) -> tuple[float | None, bool]:
        """Return the limit of a call that begins now, and whether its deadline sets it."""
        if call.deadline is None:
            return self.seconds, False
        left = max(0.0, call.deadline - ambient.clock().monotonic())
        if self.seconds is None or left < self.seconds:
            return left, True
        return self.seconds, False

    def expired(self, bounded: Call | DeadlineScope | None) -> CallTimeoutError | DeadlineError:
        """Make the error of a call whose time is over, and notify listeners.

        Args:
            bounded: Whose deadline it was that came first; None if it was the timeout.
        """
        if bounded is not None:
            return overdue(bounded, self._emitter, "during the call")
        seconds = self.seconds or 0.0
        if self._emitter.active:
            self._emitter.emit(events.CallTimedOut(seconds=seconds))
        return CallTimeoutError(self._emitter.function, seconds)

    # --- adapters ---------------------------------------------------------------------------------

    def run(self, work: Callable[[], Any], call: Call) -> Any:
        """Do some work of a call in another thread, and leave that behind when the time is over."""
        seconds, by_deadline = self.seconds, False
        if call.deadline is not None:
            seconds, by_deadline = self.left(call)
            # The thread may outlive the caller's block, and so would what it calls in turn.
            work = functools.partial(run_until, call.deadline, work)
        job = ThreadCall(work)
        run_in_thread(job)
        # A stage that holds a permit for the call keeps it until the thread is done.
        call.orphan_thread = job
        if not job.wait(seconds):
            raise self.expired(call if by_deadline else None)
        call.orphan_thread = None
        return job.outcome()

    def within(self, awaitable: Awaitable[Any], call: Call) -> Awaitable[Any]:
        """Return what waits for a real call that is under way, and cancels it when its time is over."""
        seconds, by_deadline = self.left(call)
        return (
            awaitable
            if seconds is None
            else self._limit(awaitable, seconds, call if by_deadline else None)
        )

    def fast_path(
        self, fn: Callable[..., Awaitable[Any]], budget: float | None
    ) -> Callable[..., Any]:
        """Return the real call of `fn` with the limit around it, for a fast path.

        Args:
            fn: The function.
            budget: Seconds of the deadline that begins with each call, None without one.
        """
        limit = self._limit
        if budget is not None and (self.seconds is None or budget < self.seconds):
            return lambda *args, **kwargs: limit(fn(*args, **kwargs), budget, innermost_scope())
        seconds = self.seconds or 0.0
        return lambda *args, **kwargs: limit(fn(*args, **kwargs), seconds, None)

    async def _limit(
        self, awaitable: Awaitable[Any], seconds: float, bounded: Call | DeadlineScope | None
    ) -> Any:
        # `asyncio.timeout` does the same, at twice the price. As there, `uncancel` returns how many
        # others have asked for a cancellation too.
        loop = ambient.running_loop()
        if loop is None:
            if isinstance(awaitable, CoroutineType):
                awaitable.close()
            loop = ambient.require_loop("limit the time of a call")
        # The loop has imported it, and an `import` costs five times as much.
        asyncio: Any = sys.modules["asyncio"]
        task = asyncio.current_task(loop)
        if task is None:
            return await awaitable
        fired: list[None] = []
        asked = task.cancelling()
        timer = loop.call_at(loop.time() + seconds, _cancel, task, fired)
        try:
            return await awaitable
        except asyncio.CancelledError:
            if not fired:
                raise
            fired.clear()
            if task.uncancel() > asked:
                raise
        finally:
            timer.cancel()
            if fired:
                task.uncancel()
        raise self.expired(bounded)


def _cancel(task: Task[Any], fired: list[None]) -> None:
    """Cancel a task, and note that its cancellation has to be taken back."""
    fired.append(None)
    task.cancel()
