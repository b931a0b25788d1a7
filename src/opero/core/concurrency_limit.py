# this_file: src/opero/core/concurrency_limit.py
"""Limit how many calls are in flight at once (a bulkhead)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from opero.core.deadline import overdue
from opero.errors import OperoUsageError
from opero.utils import ambient
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.function import Stats
    from opero.errors import DeadlineError
    from opero.events.bus import Emitter
    from opero.limits.permits import ConcurrencyLimit, ConcurrencyPermit, CurrentTask


class Bulkhead:
    """The stage: a permit before, given back afterwards, however the call ends.

    A synchronous call that timed out goes on in its thread, and holds its permit until it is really over.

    Args:
        limit: The permits.
        stats: Counters of the function.
        emitter: Where events go.
        streams: Whether the calls are asynchronous generators, which may outlive the task that begins them.
    """

    name = "concurrency"

    def __init__(
        self, limit: ConcurrencyLimit, stats: Stats, emitter: Emitter, *, streams: bool = False
    ) -> None:
        self._streams = streams
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
        call.note_wait(ambient.clock().monotonic() - began, self._stats, self._emitter)

    def _refuse_reentry(self, current_task: CurrentTask | None = None) -> None:
        """Raise if the calls around this one hold all permits; asked only by a call that has to wait.

        Raises:
            OperoUsageError: It would wait for itself.
        """
        limit = self.limit
        if limit.held_around(current_task) >= limit.limit:
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

    def leave(self, permit: ConcurrencyPermit, call: Call) -> None:
        """Give a permit back: now, or at the end of the stream, or of the abandoned thread, that goes on."""
        leave = partial(self.limit.leave, permit)
        if call.stream is None and call.orphan_thread is None:
            leave()
        elif call.stream is not None:
            permit.holder = None
            call.stream.at_end(lambda _: leave())
        else:
            orphan, call.orphan_thread = call.orphan_thread, None
            # From now on it is that thread's, until its call is over.
            permit.holder = orphan.thread
            orphan.then(leave)

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        limit = self.limit

        def run(call: Call) -> Any:
            if (switch.on and ambient.disabled()) or isinstance(call.prior_outcome, Exception):
                return proceed(call)
            began = permit = None
            try:
                permit = limit.enter()
                if permit is None:
                    self._refuse_reentry()
                    began = ambient.clock().monotonic()
                    permit = limit.obtain(self._left(call, began))
                    if permit is None:
                        raise self._overdue(call, began)  # noqa: TRY301 - it holds no permit
                try:
                    if began is not None:
                        self._waited(call, began)
                    return proceed(call)
                finally:
                    self.leave(permit, call)
                    permit = None  # this frame may live on in an error's traceback
            except BaseException:
                # Ctrl-C in between.
                limit.drop(permit)
                raise

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        from asyncio import current_task

        limit, streams = self.limit, self._streams

        async def run(call: Call) -> Any:
            if (switch.on and ambient.disabled()) or isinstance(call.prior_outcome, Exception):
                return await proceed(call)
            began = permit = None
            try:
                permit = limit.enter(current_task)
                if permit is None:
                    ambient.require_loop("wait for a permit")
                    self._refuse_reentry(current_task)
                    began = ambient.clock().monotonic()
                    permit = await limit.aobtain(self._left(call, began), current_task)
                    if permit is None:
                        raise self._overdue(call, began)  # noqa: TRY301 - it holds no permit
                try:
                    if streams:
                        permit.note_holder(current_task, outlived=True)
                    if began is not None:
                        self._waited(call, began)
                    return await proceed(call)
                finally:
                    limit.leave(permit)
                    permit = None
            except BaseException:
                # As above.
                limit.drop(permit, current_task)
                raise

        return run
