# this_file: src/opero/limits/concurrency_limit.py
"""Permits for calls in flight, and how threads and tasks wait for them.

All threads and event loops count together, and so do the worker processes of a map.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from opero.errors import BulkheadFullError, OperoUsageError
from opero.limits.shareable import Shareable
from opero.utils.waiters import TaskWaiter, ThreadWaiter, Waiter

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from opero.limits.shared_permits import SharedPermits

__all__ = ["ConcurrencyLimit"]

_MOST: Final = 1_000_000
"""Far more threads or tasks than one process has."""
_SOON: Final = 0.001
_LATER: Final = 0.02
_SELDOM: Final = 1.0
"""Seconds between two looks at the permits of other processes, which wake nobody: shorter at first, then longer; and
seldom while there are none."""


class ConcurrencyLimit(Shareable):
    """Permits for calls in flight: first come, first served.

    It may be shared by functions, threads, event loops, and by processes: the workers of a map, and those that it is
    pickled to. Among processes nobody keeps the order, and a process that is killed gives back what it held. A child
    that is forked without `share()` before starts with all permits. A call that waits for a permit while it holds
    the last one waits for itself.

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
        self._across: SharedPermits | None = None
        self.begin()
        super().__init__((limit, {"queue": queue}))

    def begin(self) -> None:
        """Start with all permits and an empty queue; what was taken before does not count."""
        if self._across is not None:
            self._across.begin()
        # Taken and given back by single steps of C, which need no lock; a permit that comes back
        # twice finds no room.
        self._permits: deque[None] = deque(repeat(None, self.limit), self.limit)
        self._waiting: OrderedDict[Waiter, None] = OrderedDict()
        # Reentrant, because a collected coroutine may give its permit back at any allocation.
        self._lock = threading.RLock()

    @property
    def in_flight(self) -> int:
        """Permits that are out in this process."""
        return self.limit - len(self._permits)

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._waiting)

    # --- decisions --------------------------------------------------------------------------------

    def try_acquire(self) -> bool:
        """Take a permit if there is one now; nobody in the queue is overtaken."""
        return not self._waiting and self._take()

    def _take(self) -> bool:
        """Take a permit of this process, and one of all processes."""
        try:
            self._permits.pop()
        except IndexError:
            return False
        if self._across is None or self._across.take():
            return True
        self._permits.append(None)
        return False

    def _put_back(self) -> None:
        if self._across is not None:
            self._across.give()
        self._permits.append(None)

    def release(self) -> None:
        """Give a permit back; it goes to the first in the queue."""
        # First the permit, then the look at the queue: who queues does it the other way round, so
        # that one of the two sees the other.
        self._put_back()
        if self._waiting:
            self._serve()

    def _serve(self) -> None:
        """Hand permits to those in the queue, in order, while there are both."""
        with self._lock:
            while self._waiting:
                if not self._take():
                    return
                try:
                    gate, _ = self._waiting.popitem(last=False)
                except KeyError:
                    # A coroutine that was collected just now has served the last one.
                    self._put_back()
                    continue
                if not gate.wake():
                    # A task that was cancelled, or whose loop does not run: the next one is served.
                    self._put_back()

    def _queue_up(self, gate: Waiter, *, again: bool = False) -> None:
        """Put a gate at the end of the queue; it may be open when this returns.

        Raises:
            BulkheadFullError: The queue is full.
        """
        with self._lock:
            bound = None if again or self._free() else self.queue
            if bound is not None and len(self._waiting) >= bound:
                raise BulkheadFullError(self.name, self.limit, bound)
            self._waiting[gate] = None
        self._serve()

    def _free(self) -> bool:
        """Tell whether there is a permit now."""
        if self._across is None:
            return bool(self._permits)
        if self._take():
            self._put_back()
            return True
        return False

    def _withdraw(self, gate: Waiter) -> bool:
        """Take a gate out of the queue; False if the permit has come meanwhile."""
        with self._lock:
            self._waiting.pop(gate, None)
            return not gate.granted

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
        gate = ThreadWaiter()
        try:
            self._queue_up(gate)
            return self._stand(gate, timeout) or not self._withdraw(gate)
        except BaseException:
            if not self._withdraw(gate):
                self.release()
            raise

    def _stand(self, gate: ThreadWaiter, timeout: float | None) -> bool:
        """Wait at a gate, and look for permits that other processes have given back."""
        end = None if timeout is None else time.monotonic() + timeout
        pause = _SOON
        while True:
            pause = _SELDOM if self._across is None else min(2 * pause, _LATER)
            left = None if end is None else end - time.monotonic()
            if gate.wait(pause if left is None else min(pause, left)):
                return True
            if left is not None and left <= pause:
                return False
            self._serve()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Look for permits that other processes have given back, while a task waits."""
        from asyncio import get_running_loop

        loop = get_running_loop()
        timer: list[TimerHandle] = []

        def watch(pause: float) -> None:
            pause = _SELDOM if self._across is None else pause
            timer[:] = [loop.call_later(pause, look, min(2 * pause, _LATER))]

        def look(pause: float) -> None:
            self._serve()
            watch(pause)

        watch(_SOON)
        try:
            yield
        finally:
            timer[0].cancel()

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as in `acquire`
        """Wait for a permit in a task; the same as `acquire` otherwise.

        A task whose event loop stood still when its turn came queues again, at the end.
        """
        if self.try_acquire():
            return True
        end = None if timeout is None else time.monotonic() + timeout
        gate = TaskWaiter()
        again = False
        while True:
            try:
                self._queue_up(gate, again=again)
                with self._looking():
                    in_time = await gate.wait(None if end is None else end - time.monotonic())
                if not in_time:
                    return not self._withdraw(gate)
                if gate.granted:
                    return True
            except BaseException:
                if not self._withdraw(gate):
                    self.release()
                raise
            gate, again = TaskWaiter(), True

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

    # --- several processes --------------------------------------------------------------------------

    def _go_to(self, path: str | None, *, create: bool) -> str:
        from opero.limits.shared_file import private_path
        from opero.limits.shared_permits import open_permits

        path, create = path or private_path(self), create or path is None
        across = open_permits(path, self.limit, create=create)
        with self._lock:
            # While there is none left, nobody can take one past the file.
            kept = 0
            try:
                while True:
                    self._permits.pop()
                    kept += 1
            except IndexError:
                pass
            for _ in range(self.limit - kept):
                across.take()
            self._across = across
            self._permits.extend(repeat(None, kept))
            # Given back meanwhile, when the file was not yet in use.
            for _ in range(across.held - self.in_flight):
                across.give()
        self._serve()
        return path

    def _after_fork(self) -> None:
        # The calls that are in flight go on in the parent only.
        super()._after_fork()
        self.begin()

    def __repr__(self) -> str:
        return (
            f"<ConcurrencyLimit {self.name}: {self.in_flight} of {self.limit} in flight, "
            f"{self.waiting} waiting>"
        )


def _whole(value: object, option: str, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST:
        return value
    raise OperoUsageError(
        f"{option}={value!r} must be a whole number, {least} to {_MOST:,}. None means no limit."
    )
