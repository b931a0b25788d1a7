# this_file: src/opero/limits/permits.py
"""Hand out permits for calls in flight to threads, tasks and processes.

All threads and event loops count together, and so do the worker processes of a map.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from itertools import repeat
from random import randrange
from threading import get_ident
from types import TracebackType
from typing import Final, Self
from weakref import ref

from opero.errors import BulkheadFullError, OperoUsageError
from opero.limits.state.file import StateFile, private_path, try_lock, unlock
from opero.limits.state.shared import SharedObject
from opero.utils.ambient import warn_on_loop
from opero.utils.threads import waiting_threads
from opero.utils.waiters import HandoffQueue, Waiter

__all__ = ["ConcurrencyLimit", "task_getter"]

_MOST: Final = 1_000_000
"""Far more threads or tasks than one process has."""
_SOON: Final = 0.001
_LATER: Final = 0.02
_SELDOM: Final = 1.0
"""Seconds between two looks at the permits of other processes, which wake no caller here: shorter at first, then
longer; and seldom while there are none."""

_FIRST_PERMIT: Final = 1 << 31
"""The byte that stands for the first permit, far behind any content."""


def task_getter() -> Callable[[], Hashable]:
    """Return what returns the task that calls it, as a weak reference; None outside of asyncio.

    A stream may outlive the task that has begun it, and must not be kept alive by it.
    """
    # Imported here: a synchronous program never pays for asyncio.
    from asyncio import current_task

    def task_of_caller() -> Hashable:
        try:
            task = current_task()
        except RuntimeError:
            return None
        return None if task is None else ref(task)

    return task_of_caller


class ConcurrencyLimit(SharedObject):
    """Permits for calls in flight: first come, first served.

    It may be shared by functions, threads, event loops, and by processes: the workers of a map, and those that it is
    pickled to. Among processes no order is kept, and a process that is killed gives back what it held. A child that is
    forked without `share()` before starts with all permits. A call that waits for a permit while it holds the last
    one waits for itself.

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

    attached: bool

    def __init__(self, limit: int, *, queue: int | None = None, name: str | None = None) -> None:
        self.limit: int = _whole(limit, "concurrency", 1)
        self.queue: int | None = None if queue is None else _whole(queue, "queue", 0)
        self.name: str = name or f"at most {limit}"
        self._permits = _Permits(self)
        # Each holder changes its own entry only.
        self._holders: dict[Hashable, int] = {}
        super().__init__((limit, {"queue": queue}))
        if not self.attached:
            # In a worker they are given out when those of its program have been looked for.
            self._permits.free.clear()

    def begin(self) -> None:
        """Start with all permits and an empty queue; what was taken before does not count."""
        across = self._permits.across
        if across is not None:
            across.begin()
        self._permits = _Permits(self, across)
        self._holders = {}
        self.attached = True

    @property
    def in_flight(self) -> int:
        """Permits that are out in this process."""
        return self.limit - len(self._permits.free) if self.attached else 0

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._permits)

    def try_acquire(self) -> bool:
        """Take a permit if there is one now; no caller in the queue is overtaken."""
        permits = self._permits
        return not permits.waiting and (permits.take() or (not self.attached and self._try_again()))

    def _try_again(self) -> bool:
        self.attach()
        return self._permits.take()

    def release(self) -> None:
        """Give a permit back; it goes to the first in the queue."""
        self._permits.give_back()

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
        warn_on_loop("a permit")
        return bool(self._permits.wait(_Watch(self._permits, timeout)))

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as in `acquire`
        """Wait for a permit in a task; the same as `acquire` otherwise.

        A task whose event loop did not run when its turn came queues again, at the end.
        """
        if self.try_acquire():
            return True
        return bool(await self._permits.wait_async(_Watch(self._permits, timeout)))

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

    # --- reentrancy -------------------------------------------------------------------------------

    def enter(self, task: Hashable = None) -> Hashable:
        """Take a permit if there is one now, and note which thread or task holds it.

        This and `leave` are what a call pays that need not wait: all is written out, one call each.

        Args:
            task: The task that makes the call; None for a synchronous call.

        Returns:
            The holder, for `leave`; None if there is no permit now.
        """
        permits = self._permits
        if permits.waiting or permits.across is not None:
            return self.begin_held(task) if self.try_acquire() else None
        try:
            permits.free.pop()
        except IndexError:
            return self.begin_held(task) if self.try_acquire() else None
        holder, holders = get_ident() if task is None else task, self._holders
        holders[holder] = holders.get(holder, 0) + 1
        return holder

    def leave(self, holder: Hashable) -> None:
        """Give back what `enter` has taken."""
        holders = self._holders
        count = holders.pop(holder, 1)
        if count > 1:
            holders[holder] = count - 1
        permits = self._permits
        if permits.across is None:
            permits.free.append(None)
            if permits.waiting:
                permits.serve()
        else:
            permits.give_back()

    def begin_held(self, task: Hashable = None) -> Hashable:
        """Note the holder of a permit that was waited for, and return it."""
        holder, holders = get_ident() if task is None else task, self._holders
        holders[holder] = holders.get(holder, 0) + 1
        return holder

    def end_held(self, holder: Hashable) -> None:
        """Forget the holder of a permit that is kept: its call goes on in a thread that was abandoned."""
        count = self._holders.pop(holder, 1)
        if count > 1:
            self._holders[holder] = count - 1

    def held_around(self, task: Hashable = None) -> int:
        """Return how many permits the calls around this one hold: those of its task, its thread, and of the threads
        that wait for it because of a `timeout`.
        """
        around = {task, get_ident(), *waiting_threads()}
        return sum(self._holders.get(holder, 0) for holder in around)

    # --- several processes ------------------------------------------------------------------------

    def _begin_attached(self) -> None:
        with self._permits.lock:
            if not self.attached:
                self.attached = True
                self._permits.free.extend(repeat(None, self.limit))

    def _go_to(self, path: str | None, *, create: bool) -> str:
        path, create = path or private_path(self), create or path is None
        self._permits.move(_FilePermits(path, self.limit, create=create))
        return path

    def after_fork(self) -> None:
        """Start with all permits: the calls that are in flight go on in the parent only."""
        super().after_fork()
        self.begin()

    def __repr__(self) -> str:
        return (
            f"<ConcurrencyLimit {self.name}: {self.in_flight} of {self.limit} in flight, "
            f"{self.waiting} waiting>"
        )


class _Permits(HandoffQueue):
    """The permits of this process, and the callers that wait for one.

    Args:
        limit: How many there are, and how many callers may wait.
        across: The permits of all processes.

    Attributes:
        free: Those that are here. Taken and given back by single steps of C, which need no lock; a permit that comes
            back twice finds no room.
        across: As above; None as long as no other process shares them.
    """

    def __init__(self, limit: ConcurrencyLimit, across: _FilePermits | None = None) -> None:
        super().__init__()
        self.free: deque[None] = deque(repeat(None, limit.limit), limit.limit)
        self.across = across
        self._bound = limit.queue
        self._name = limit.name

    def join(self, waiter: Waiter) -> None:
        """Put a caller at the end of the queue.

        Raises:
            BulkheadFullError: The queue is full, and there is no permit now.
        """
        with self.lock:
            bound = self._bound
            if bound is not None and len(self) >= bound:
                if not self.take():
                    raise BulkheadFullError(self._name, self.free.maxlen or 0, bound)
                self.put_back()
            super().join(waiter)

    def take(self) -> bool:
        """Take a permit of this process, and one of all processes."""
        try:
            self.free.pop()
        except IndexError:
            return False
        if self.across is None or self.across.take():
            return True
        self.free.append(None)
        return False

    def put_back(self) -> None:
        """Put a permit back."""
        if self.across is not None:
            self.across.give_back()
        self.free.append(None)

    def give_back(self) -> None:
        """Put a permit back and serve the next caller: what the base class does, in one step."""
        if self.across is not None:
            self.across.give_back()
        self.free.append(None)
        if self.waiting:
            self.serve()

    def move(self, across: _FilePermits) -> None:
        """Share the permits from now on; those that are out are taken there too."""
        limit = self.free.maxlen or 0
        with self.lock:
            # While there is none left, no caller can take one past the file.
            kept = 0
            try:
                while True:
                    self.free.pop()
                    kept += 1
            except IndexError:
                pass
            for _ in range(limit - kept):
                across.take()
            self.across = across
            self.free.extend(repeat(None, kept))
            # Given back meanwhile, when the file was not yet in use.
            for _ in range(across.held - (limit - len(self.free))):
                across.give_back()
        self.serve()


class _Watch:
    """Looks for permits that other processes have given back, between the pauses of a waiting caller."""

    __slots__ = ("_end", "_pause", "_permits")

    def __init__(self, permits: _Permits, timeout: float | None) -> None:
        self._permits = permits
        self._end = None if timeout is None else time.monotonic() + timeout
        self._pause = _SOON

    def __call__(self) -> float:
        """Serve the queue and return the seconds until the next look; 0 or less if the time is up."""
        self._permits.serve()
        shared = self._permits.across is not None
        self._pause = min(2 * self._pause, _LATER) if shared else _SELDOM
        return self._pause if self._end is None else min(self._pause, self._end - time.monotonic())


class _FilePermits:
    """Permits that several processes share: locks on the bytes of a file, one byte for each permit.

    They are record locks, which the kernel takes back from the dead: a process that is killed with a permit has given
    it back. They belong to a process, so which of its threads holds which is of no importance; they are counted here.

    Args:
        path: The file.
        limit: How many there are.
        create: Whether the file may be new.
    """

    def __init__(self, path: str, limit: int, *, create: bool) -> None:
        self._limit = limit
        self._file = StateFile.open(path, "pe", lambda old, file: old or [limit], create=create)
        self.begin()

    def begin(self) -> None:
        """Hold nothing: a forked child has none of its parent's locks."""
        self._held: list[int] = []
        self._last = _FIRST_PERMIT + randrange(self._limit)

    @property
    def held(self) -> int:
        """How many this process holds."""
        return len(self._held)

    def take(self) -> bool:
        """Take a permit if any is free, in whatever process."""
        with self._file.thread_lock:
            for step in range(self._limit):
                place = _FIRST_PERMIT + (self._last - _FIRST_PERMIT + step) % self._limit
                if place not in self._held and try_lock(self._file.fd, place):
                    self._held.append(place)
                    self._last = place
                    return True
            return False

    def give_back(self) -> None:
        """Give a permit back; nothing happens if this process holds none."""
        with self._file.thread_lock:
            if self._held:
                unlock(self._file.fd, self._held.pop())


def _whole(value: object, option: str, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST:
        return value
    raise OperoUsageError(
        f"{option}={value!r} must be a whole number, {least} to {_MOST:,}. None means no limit."
    )
