# this_file: src/opero/core/timeout.py
"""Timeout: a limit for each real call.

An asynchronous call is cancelled. A synchronous one runs in another thread and is left behind when
its time is over, because a thread cannot be killed: it goes on until the function returns, without
anybody waiting for it.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.spare_threads import Job, run_in_thread
from opero.core.units import format_seconds
from opero.errors import CallTimeoutError

if TYPE_CHECKING:
    from opero.core.call import Call, Proceed
    from opero.core.stage import Emitter

__all__ = ["Timeout"]


class Timeout:
    """Stands right at the function, inside the step that counts real calls.

    Its clock starts when all other guards have let the call pass.

    Args:
        seconds: The limit.
        emitter: Where events go.
    """

    name = "timeout"

    def __init__(self, seconds: float, emitter: Emitter) -> None:
        self.seconds = seconds
        self._emitter = emitter

    def describe(self) -> str:
        """Return the line for `explain()`."""
        return f"{format_seconds(self.seconds)} for each call"

    def expired(self) -> CallTimeoutError:
        """Make the error of a call whose time is over, and tell listeners."""
        if self._emitter.active:
            self._emitter.emit(
                events.CallTimedOut(function=self._emitter.function, seconds=self.seconds)
            )
        return CallTimeoutError(self._emitter.function, self.seconds)

    # --- adapters ---------------------------------------------------------------------------------

    def sync(self, fn: Callable[..., Any]) -> Proceed:
        """Return the real call of `fn` with the limit around it."""
        seconds = self.seconds

        def run(call: Call) -> Any:
            job = Job(functools.partial(fn, *call.args, **call.kwargs))
            run_in_thread(job)
            # Who holds something for the call, such as a permit, keeps it until the thread is done.
            call.behind = job
            if not job.wait(seconds):
                raise self.expired()
            call.behind = None
            return job.outcome()

        return run

    async def within(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for a real call that is under way, and cancel it when its time is over."""
        from asyncio import CancelledError, timeout

        scope = timeout(self.seconds)
        try:
            async with scope:
                return await awaitable
        except TimeoutError as error:
            # The function's own TimeoutError stays itself, even if it is its answer to the
            # cancellation; that of the scope was caused by it.
            if not (scope.expired() and isinstance(error.__cause__, CancelledError)):
                raise
        raise self.expired()
