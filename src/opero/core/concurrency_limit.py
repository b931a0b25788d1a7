# this_file: src/opero/core/concurrency_limit.py
"""Limit how many calls are in flight at once (a bulkhead)."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.deadline import overdue
from opero.errors import OperoUsageError
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.stats import Stats
    from opero.errors import DeadlineError
    from opero.events.bus import Emitter
    from opero.limits.permits import ConcurrencyLimit

__all__ = ["Bulkhead"]


class Bulkhead:
    """The stage: a permit before, given back afterwards, however the call ends.

    A synchronous call that timed out goes on in its thread, and holds its permit until it is really over.

    Args:
        limit: The permits.
        stats: Counters of the function.
        emitter: Where events go.
    """

    name = "concurrency"

    def __init__(self, limit: ConcurrencyLimit, stats: Stats, emitter: Emitter) -> None:
        self.limit = limit
        self._stats = stats
        self._emitter = emitter

    def describe(self) -> str:
        """Return the line for `explain()`."""
        queue = self.limit.queue
        waits = f"{queue} may wait" if queue else "others are refused"
        if queue is None:
            waits = "others wait"
        return f"at most {self.limit.limit} calls in flight; {waits}"

    def _waited(self, call: Call, began: float) -> None:
        seconds = ambient.clock().monotonic() - began
        call.waited += seconds
        self._stats.add(waited=seconds)
        if self._emitter.active:
            self._emitter.emit(
                events.LimiterWaited(function=self._emitter.function, seconds=seconds)
            )

    def _refuse_reentry(self, task: Hashable = None) -> None:
        """Raise if the calls around this one hold all permits; asked only by a call that has to wait.

        Raises:
            OperoUsageError: It would wait for itself.
        """
        limit = self.limit
        if limit.held_around(task) >= limit.limit:
            raise OperoUsageError(
                f"{self._emitter.function}() is called within itself and would wait for a permit "
                f"of {limit.name!r} that the calls around it hold: raise concurrency="
                f"{limit.limit}, or call what is inside without the limit."
            )

    @staticmethod
    def _left(call: Call, now: float) -> float | None:
        return None if call.deadline is None else call.deadline - now

    def _overdue(self, call: Call, began: float) -> DeadlineError:
        self._waited(call, began)
        return overdue(call, self._emitter, "waiting for a permit")

    def _give_back(self, call: Call, holder: Hashable) -> None:
        """Give the permit back, or have it given back when the stream or the abandoned thread ends."""
        limit = self.limit
        if call.stream is not None:
            limit.end_held(holder)
            call.stream.at_end(lambda _: limit.release())
            return
        orphan, call.orphan_thread = call.orphan_thread, None
        if orphan is None:
            limit.leave(holder)
        else:
            # From now on it is that thread's, until its call is over.
            limit.end_held(holder)
            orphan.then(partial(limit.leave, limit.begin_held(orphan.thread)))

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        limit = self.limit

        def run(call: Call) -> Any:
            if ambient.disabled() or isinstance(call.prior_outcome, Exception):
                return proceed(call)
            began = None
            holder = limit.enter()
            if holder is None:
                self._refuse_reentry()
                began = ambient.clock().monotonic()
                if not limit.acquire(self._left(call, began)):
                    raise self._overdue(call, began)
                holder = limit.begin_held()
            try:
                if began is not None:
                    self._waited(call, began)
                return proceed(call)
            finally:
                self._give_back(call, holder)

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        from opero.limits.permits import task_getter

        limit, current_task = self.limit, task_getter()

        async def run(call: Call) -> Any:
            if ambient.disabled() or isinstance(call.prior_outcome, Exception):
                return await proceed(call)
            began = None
            holder = limit.enter(current_task())
            if holder is None:
                self._refuse_reentry(current_task())
                began = ambient.clock().monotonic()
                if not await limit.wait(self._left(call, began)):
                    raise self._overdue(call, began)
                holder = limit.begin_held(current_task())
            try:
                if began is not None:
                    self._waited(call, began)
                return await proceed(call)
            finally:
                limit.leave(holder)

        return run
