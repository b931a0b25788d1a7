# this_file: src/opero/core/bulkhead.py
"""Concurrency limit (bulkhead): how many calls may be in flight at once.

All threads and event loops count together.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from itertools import repeat
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from opero import events
from opero.core import ambient
from opero.core.circle import held_around
from opero.core.deadline import overdue
from opero.core.gate import Gate, TaskGate, ThreadGate
from opero.errors import BulkheadFullError, OperoUsageError

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.stage import Emitter
    from opero.core.stats import Stats
    from opero.errors import DeadlineError

__all__ = ["Bulkhead", "ConcurrencyLimit"]

_MOST: Final = 1_000_000
"""Far more threads or tasks than one process has."""


class ConcurrencyLimit:
    """Permits for calls in flight: first come, first served.

    It may be shared by functions, threads and event loops of one process; a forked child starts
    with all permits. A call that waits for a permit while it holds the last one waits for itself.

    Args:
        limit: Most calls in flight, 1 to 1,000,000.
        queue: Most callers that may wait for a permit; None for any number, 0 to refuse at once.
        name: How it is called in messages.

    Raises:
        OperoUsageError: `limit` or `queue` is no such number.

    Example:
        >>> limit = ConcurrencyLimit(2)
        >>> with limit:
        ...     limit.in_flight
        1
        >>> limit.in_flight
        0
    """

    def __init__(self, limit: int, *, queue: int | None = None, name: str | None = None) -> None:
        self.limit: int = _whole(limit, "concurrency", 1)
        self.queue: int | None = None if queue is None else _whole(queue, "queue", 0)
        self.name: str = name or f"at most {limit}"
        self.begin()
        _limits.add(self)

    def begin(self) -> None:
        """Start with all permits and an empty queue; what was taken before does not count."""
        # Taken and given back by single steps of C, which need no lock; a permit that comes back
        # twice finds no room.
        self._permits: deque[None] = deque(repeat(None, self.limit), self.limit)
        self._waiting: OrderedDict[Gate, None] = OrderedDict()
        # Reentrant, because a collected coroutine may give its permit back at any allocation.
        self._lock = threading.RLock()

    @property
    def in_flight(self) -> int:
        """Permits that are out."""
        return self.limit - len(self._permits)

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._waiting)

    # --- decisions --------------------------------------------------------------------------------

    def try_acquire(self) -> bool:
        """Take a permit if there is one now; nobody in the queue is overtaken."""
        if self._waiting:
            return False
        try:
            self._permits.pop()
        except IndexError:
            return False
        return True

    def release(self) -> None:
        """Give a permit back; it goes to the first in the queue."""
        # First the permit, then the look at the queue: who queues does it the other way round, so
        # that one of the two sees the other.
        self._permits.append(None)
        if self._waiting:
            self._serve()

    def _serve(self) -> None:
        """Hand permits to those in the queue, in order, while there are both."""
        with self._lock:
            while self._waiting:
                try:
                    self._permits.pop()
                except IndexError:
                    return
                try:
                    gate, _ = self._waiting.popitem(last=False)
                except KeyError:
                    # A coroutine that was collected just now has served the last one.
                    self._permits.append(None)
                    continue
                if not gate.open():
                    # A task that was cancelled, or whose loop does not run: the next one is served.
                    self._permits.append(None)

    def _queue_up(self, gate: Gate, *, again: bool = False) -> None:
        """Put a gate at the end of the queue; it may be open when this returns.

        Raises:
            BulkheadFullError: The queue is full.
        """
        with self._lock:
            bound = None if again or self._permits else self.queue
            if bound is not None and len(self._waiting) >= bound:
                raise BulkheadFullError(self.name, self.limit, bound)
            self._waiting[gate] = None
        self._serve()

    def _withdraw(self, gate: Gate) -> bool:
        """Take a gate out of the queue; False if the permit has come meanwhile."""
        with self._lock:
            self._waiting.pop(gate, None)
            return not gate.opened

    # --- waiting ----------------------------------------------------------------------------------

    def acquire(self, timeout: float | None = None) -> bool:
        """Block until there is a permit.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            False if time ran out first.

        Raises:
            BulkheadFullError: The queue is full.
        """
        if self.try_acquire():
            return True
        gate = ThreadGate()
        try:
            self._queue_up(gate)
            return gate.wait(timeout) or not self._withdraw(gate)
        except BaseException:
            if not self._withdraw(gate):
                self.release()
            raise

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as in `acquire`
        """Wait for a permit in a task; the same as `acquire` otherwise.

        A task whose event loop stood still when its turn came queues again, at the end.
        """
        if self.try_acquire():
            return True
        end = None if timeout is None else time.monotonic() + timeout
        gate = TaskGate()
        again = False
        while True:
            try:
                self._queue_up(gate, again=again)
                if not await gate.wait(None if end is None else end - time.monotonic()):
                    return not self._withdraw(gate)
                if gate.opened:
                    return True
            except BaseException:
                if not self._withdraw(gate):
                    self.release()
                raise
            gate, again = TaskGate(), True

    def __enter__(self) -> Self:
        self.acquire()
        return self

    async def __aenter__(self) -> Self:
        await self.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return (
            f"<ConcurrencyLimit {self.name}: {self.in_flight} of {self.limit} in flight, "
            f"{self.waiting} waiting>"
        )


_limits: weakref.WeakSet[ConcurrencyLimit] = weakref.WeakSet()


def _whole(value: object, option: str, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST:
        return value
    raise OperoUsageError(
        f"{option}={value!r} must be a whole number, {least} to {_MOST:,}. None means no limit."
    )


def _after_fork() -> None:
    """The calls that are in flight go on in the parent only."""
    for limit in _limits:
        limit.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Bulkhead:
    """The stage: a permit before, given back afterwards, however the call ends.

    A synchronous call that timed out goes on in its thread, and holds its permit until it is really
    over.

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

    def _refuse_circle(self, code: CodeType) -> None:
        """Raise if the calls around this one hold all permits.

        Looked for only by those who have to wait, so that nobody else pays for it. `code` is that
        of the adapter, whose frames are the calls that hold a permit.

        Raises:
            OperoUsageError: It would wait for itself.
        """
        caller = sys._getframe(2)  # noqa: SLF001 - the only way to see who calls
        if held_around(caller, code, self.limit) >= self.limit.limit:
            raise OperoUsageError(
                f"{self._emitter.function}() is called within itself and would wait for a permit "
                f"of {self.limit.name!r} that the calls around it hold: raise concurrency="
                f"{self.limit.limit}, or call what is inside without the limit."
            )

    @staticmethod
    def _left(call: Call, now: float) -> float | None:
        return None if call.deadline is None else call.deadline - now

    def _overdue(self, call: Call, began: float) -> DeadlineError:
        self._waited(call, began)
        return overdue(call, self._emitter, "waiting for a permit")

    def _give_back(self, call: Call) -> None:
        behind, call.behind = call.behind, None
        if behind is None:
            self.limit.release()
        else:
            behind.then(self.limit.release)

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        limit = self.limit

        def run(call: Call) -> Any:
            if ambient.disabled() or isinstance(call.begun, Exception):
                return proceed(call)
            began = None
            if not limit.try_acquire():
                self._refuse_circle(run.__code__)
                began = ambient.clock().monotonic()
                if not limit.acquire(self._left(call, began)):
                    raise self._overdue(call, began)
            try:
                if began is not None:
                    self._waited(call, began)
                return proceed(call)
            finally:
                self._give_back(call)

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        limit = self.limit

        async def run(call: Call) -> Any:
            if ambient.disabled() or isinstance(call.begun, Exception):
                return await proceed(call)
            began = None
            if not limit.try_acquire():
                self._refuse_circle(run.__code__)
                began = ambient.clock().monotonic()
                if not await limit.wait(self._left(call, began)):
                    raise self._overdue(call, began)
            try:
                if began is not None:
                    self._waited(call, began)
                return await proceed(call)
            finally:
                limit.release()

        return run
