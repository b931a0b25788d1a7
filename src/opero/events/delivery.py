# this_file: src/opero/events/delivery.py
"""Call asynchronous handlers: a bounded queue for each, a consumer task on an event loop, and draining.

A handler belongs to the loop in which it was subscribed. While that does not run (there was none, or it
has ended), it is called on the loop in which the event happens, then on the one that it was called on
last, else on a background loop in a thread of its own.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from opero.errors import OperoUsageError
from opero.utils.ambient import require_loop, running_loop
from opero.utils.async_utils import LoopThread
from opero.utils.fork import reset_after_fork

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


_SECONDS_AT_EXIT: Final = 5.0
_GLANCE: Final = 0.002
"""Seconds between two looks of a caller that drains queues."""

_consuming: ContextVar[frozenset[int]] = ContextVar("opero_delivery_queues", default=frozenset())
"""The queues whose handlers the calling code is part of: these cannot wait for themselves."""


background_loop: Final = LoopThread("opero-event-handlers")
"""For programs and threads without an event loop."""


# --- queues -----------------------------------------------------------------------------------------------------------


class DeliveryQueue:
    """Bounded queue before an asynchronous handler, with a consumer task that runs while items wait.

    Args:
        size: Most items that wait; when another one comes, the oldest is dropped.
        failed: Called with an error that an item raised, and the item's event.
        home: The loop that the handler belongs to.

    Attributes:
        sent: Items put in so far.
        dropped: Items lost: pushed out by newer ones, or cut off when their loop ended.
    """

    def __init__(
        self, size: int, failed: Callable[[Exception, Any], None], home: AbstractEventLoop | None
    ) -> None:
        self.sent: int = 0
        self.dropped: int = 0
        self._size = size
        self._failed = failed
        self._home = home
        self._context = copy_context()
        self._items: deque[tuple[Callable[[], Any], Any]] = deque()
        self._loop: AbstractEventLoop | None = None  # where a consumer is active
        self._last: AbstractEventLoop | None = None
        self._generation = 0
        self._busy = False
        # Reentrant: an event may be sent by a finalizer that runs in the middle of this.
        self._lock = threading.RLock()
        _queues.add(self)
        reset_after_fork(self)

    def put(self, call: Callable[[], Any], event: Any) -> None:
        """Queue a call, whose result is awaited if it is awaitable; never blocks."""
        with self._lock:
            if len(self._items) >= self._size:
                self._items.popleft()
                self.dropped += 1
            self._items.append((call, event))
            self.sent += 1
        self.start()

    def clear(self) -> None:
        """Discard what waits."""
        with self._lock:
            self._items.clear()

    def is_pending(self, number: int) -> bool:
        """Return whether fewer items than that have been processed; a handler does not wait for itself."""
        with self._lock:
            busy = self._busy and self._loop is not None and self._loop.is_running()
            pending = self.sent - len(self._items) - busy < number
        return pending and id(self) not in _consuming.get()

    # --- the consumer ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a consumer where items wait and none is active."""
        here = running_loop()
        while True:
            with self._lock:
                if not self._items or (self._loop is not None and self._loop.is_running()):
                    return
                self._loop = self._last = loop = self._choose_loop(here)
                self._generation += 1
                self._busy = False
                schedule: Any = loop.call_soon if loop is here else loop.call_soon_threadsafe
                try:
                    # A context can be entered only once at a time, so each consumer has a copy.
                    schedule(self._create_task, self._generation, context=self._context.copy())
                    return
                except RuntimeError:
                    self._loop = None  # it was closed this very moment

    def _choose_loop(self, here: AbstractEventLoop | None) -> AbstractEventLoop:
        for loop in (self._home, here, self._last):
            if loop is not None and loop.is_running():
                return loop
        return background_loop.get()

    def _create_task(self, generation: int) -> None:
        from asyncio import get_running_loop

        task: Any = get_running_loop().create_task(self._consume(generation))
        # As asyncio.gather does: a handler that is cut off when its loop is closed is counted, without a warning.
        task._log_destroy_pending = False  # noqa: SLF001 - there is no public way

    async def _consume(self, generation: int) -> None:
        from asyncio import CancelledError, current_task

        _consuming.set(_consuming.get() | {id(self)})
        try:
            while (item := self._next(generation)) is not None:
                call, event = item
                try:
                    result = call()
                    if hasattr(type(result), "__await__"):
                        await result
                except CancelledError:
                    task = current_task()
                    if task is None or task.cancelling():
                        self.dropped += 1
                        raise
                    # Otherwise only a task of the handler's own was cancelled.
                except Exception as error:  # noqa: BLE001 - a listener must never break anything
                    self._failed(error, event)
        finally:
            self._stopped(generation)

    def _next(self, generation: int) -> tuple[Callable[[], Any], Any] | None:
        with self._lock:
            if generation != self._generation:
                return None
            self._busy = False
            if not self._items:
                # Decided under the lock, so that an item which comes now starts the next consumer.
                self._stopped(generation)
                return None
            self._busy = True
            return self._items.popleft()

    def _stopped(self, generation: int) -> None:
        with self._lock:
            if generation != self._generation:
                return
            self._generation += 1
            self._loop = None
            self._busy = False

    def after_fork(self) -> None:
        """Start empty: in a forked child, items and loops are the parent's."""
        self._lock = threading.RLock()
        self._items.clear()
        self._generation += 1
        self._busy = False
        self._home = self._last = self._loop = None

    def __repr__(self) -> str:
        return f"<DeliveryQueue, {len(self._items)} waiting, {self.dropped} dropped>"


_queues: WeakSet[DeliveryQueue] = WeakSet()


def delivery_queues() -> list[DeliveryQueue]:
    """Return all queues there are."""
    return list(_queues)


# --- draining ---------------------------------------------------------------------------------------------------------


async def drain(queues: Iterable[DeliveryQueue]) -> None:
    """Wait until the items that are in these queues now are processed."""
    import asyncio

    for queue, number in [(queue, queue.sent) for queue in queues]:
        while queue.is_pending(number):
            require_loop("wait for handlers")
            queue.start()  # its loop may have ended meanwhile
            await asyncio.sleep(_GLANCE)


def drain_sync(queues: Iterable[DeliveryQueue], timeout: float | None = None) -> bool:
    """Wait likewise in a thread without an event loop, `timeout` seconds at most.

    Returns:
        Whether all items have been processed.

    Raises:
        OperoUsageError: An event loop runs in this thread: its handlers could not run.
    """
    if running_loop() is not None:
        raise OperoUsageError("drain_sync() would block the event loop: write `await bus.drain()`.")
    end = None if timeout is None else time.monotonic() + timeout
    for queue, number in [(queue, queue.sent) for queue in queues]:
        while queue.is_pending(number):
            if end is not None and time.monotonic() >= end:
                return False
            queue.start()  # as above
            time.sleep(_GLANCE)
    return True


@atexit.register
def _drain_at_exit() -> None:
    """Process what waits at the end of the program, on a loop in this thread where no other one runs any more."""
    waiting = [queue for queue in delivery_queues() if queue.is_pending(queue.sent)]
    if waiting and running_loop() is None:
        import asyncio

        try:
            asyncio.run(asyncio.wait_for(drain(waiting), _SECONDS_AT_EXIT))
        except TimeoutError:
            pass  # a handler that hangs must not keep the interpreter alive
    background_loop.stop(1.0)
