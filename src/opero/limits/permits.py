# this_file: src/opero/limits/permits.py
"""Hand out permits for calls in flight to threads, tasks and processes.

All threads and event loops count together, and so do the worker processes of a map.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from random import randrange
from threading import get_ident, local
from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast
from weakref import ref

from opero.errors import BulkheadFullError, OperoUsageError
from opero.limits.shared import SharedGuard
from opero.limits.state_file import StateFile, try_lock, unlock
from opero.utils.ambient import warn_on_loop
from opero.utils.checks import text_or_none
from opero.utils.secrets import mask_urls
from opero.utils.threads import waiting_threads
from opero.utils.waiters import HandoffQueue, Waiter

_MOST: Final = 1_000_000
"""Far more threads or tasks than one process has."""
_SOON: Final = 0.001
_LATER: Final = 0.02
_SELDOM: Final = 1.0
"""Seconds between two looks at the permits of other processes, which wake no caller here: shorter at first, then
longer; and seldom while there are none."""

_FIRST_PERMIT: Final = 1 << 31
"""The byte that stands for the first permit, far behind any content."""

CurrentTask = Callable[[], object]
"""`asyncio.current_task`, handed in by asynchronous callers: a synchronous program never pays for asyncio."""


class ConcurrencyPermit:
    """The right to be in flight.

    Attributes:
        holder: The thread (its ident) or task (its id, or a weak reference) whose call it is; None if it is free, or
            taken by a caller that is not known.
        permits: Those that it is one of.
    """

    __slots__ = ("__weakref__", "holder", "permits")

    def __init__(self, permits: _Permits) -> None:
        self.holder: Hashable = None
        self.permits: _Permits = permits

    def note_holder(self, current_task: CurrentTask | None, *, outlived: bool = False) -> None:
        """Note which thread or task holds it.

        Args:
            current_task: See `CurrentTask`; None for a synchronous call.
            outlived: Whether the call may outlive its task, as a stream does; a later task may have the same id then.
        """
        task = None if current_task is None else _task(current_task)
        self.holder = get_ident() if task is None else ref(task) if outlived else id(task)

    def is_held_by(self, callers: set[Hashable], task: object) -> bool:
        """Return whether it is one of these callers, or this task, that holds it."""
        holder = self.holder
        return holder in callers if not isinstance(holder, ref) else holder() is task is not None


def _task(current_task: CurrentTask) -> Any:
    try:
        return current_task()
    except RuntimeError:
        return None  # no event loop of asyncio runs


class _BlockEnd:
    """`__exit__` of a limit, which the interpreter looks up just before a block begins.

    What it finds has the only reference to the permit of the block: that of a block which Ctrl-C has left is lost, and
    another one is made in its place.

    Args:
        end: Called at the end of a block.
    """

    def __init__(self, end: Callable[..., Any]) -> None:
        self._end = end

    def __get__(self, limit: ConcurrencyLimit | None, owner: type) -> Any:
        if limit is None:
            return self
        end = partial(self._end, limit, [])
        _latest.end = ref(end)
        return end

    def __call__(self, limit: ConcurrencyLimit, *error: object) -> Any:
        return self._end(limit, [], *error)


_latest: Final = local()
"""What was found last in this thread, by a weak reference."""


def _end_block(limit: ConcurrencyLimit, found: list[ref[ConcurrencyPermit]], *_: object) -> None:
    permits = limit._permits  # noqa: SLF001 - a matter of this module
    try:
        permits.lent.remove(found[0])
    except (IndexError, ValueError):
        limit.release()  # it was begun by hand, or has given back its permit
    else:
        # No name for the permit: the traceback of Ctrl-C would keep it.
        permits.free.append(cast("ConcurrencyPermit", found[0]()))
        permits.balance()
        permits.serve()


class _Ended:
    """The end of an `async with` block, which has come before it is awaited."""

    def __init__(self, *args: Any) -> None:
        _end_block(*args)

    def __await__(self) -> Iterator[None]:
        return iter(())


class ConcurrencyLimit(SharedGuard):
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

    if not TYPE_CHECKING:
        __exit__, __aexit__ = _BlockEnd(_end_block), _BlockEnd(_Ended)

    def __init__(self, limit: int, *, queue: int | None = None, name: str | None = None) -> None:
        self.limit: int = _whole(limit, "concurrency", 1)
        self.queue: int | None = None if queue is None else _whole(queue, "queue", 0)
        text_or_none("name", name)
        self.name: str = name or f"at most {limit}"
        self._use(_Permits(self))
        super().__init__((limit, {"queue": queue}))
        # In a worker permits are given out when those of its program have been looked for.
        self._permits.most = self.limit if self.attached else 0

    def begin(self) -> None:
        """Start with all permits and an empty queue; what was taken before does not count."""
        across, self._permits.across = self._permits.across, None
        if across is not None:
            across.begin()
        self._use(_Permits(self, across))
        self.attached = True

    def _use(self, permits: _Permits) -> None:
        self._permits = permits
        # What `enter` looks at: whether a caller may not just take one that is free.
        self._free = permits.free
        self._busy: object = permits.waiting if permits.across is None else True

    @property
    def in_flight(self) -> int:
        """Permits that are out in this process."""
        return self._permits.out

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._permits)

    def try_acquire(self) -> bool:
        """Take a permit if there is one now; no caller in the queue is overtaken."""
        return self._take_now(counted=True) is True

    def release(self) -> None:
        """Give a permit back, which goes to the first in the queue; nothing happens if no caller has one."""
        self._permits.give_back(True)

    # --- blocks -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._begin_block(getattr(_latest, "end", None), self.enter() or self.obtain())
        return self

    async def __aenter__(self) -> Self:
        end = getattr(_latest, "end", None)
        self._begin_block(end, self.enter() or await self.aobtain(None, lambda: None))
        return self

    def _begin_block(self, latest: ref[Any] | None, permit: ConcurrencyPermit | None) -> None:
        """Leave a permit to the block that begins; to nothing if `__enter__` was called by hand."""
        end = None if latest is None else latest()
        if permit is not None:
            permit.holder = None  # what is called in the block is no part of it
            if end is None or end.args[0] is not self or end.args[1]:
                self._permits.taken.append(permit)
            else:
                end.permit = permit
                end.args[1].append(ref(permit))
                self._permits.lent.append(end.args[1][0])

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
        return bool(self._permits.wait(_watch(self._permits, timeout), True))

    async def wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as in `acquire`
        """Wait for a permit in a task; the same as `acquire` otherwise.

        A task whose event loop did not run when its turn came queues again, at the end.
        """
        if self.try_acquire():
            return True
        return bool(await self._permits.wait_async(_watch(self._permits, timeout), True))

    # --- permits of calls -------------------------------------------------------------------------

    def obtain(self, timeout: float | None = None) -> ConcurrencyPermit | None:
        """Block until there is a permit, and note the thread as its holder; None if time ran out first."""
        warn_on_loop("a permit")
        permit = self._permits.wait(_watch(self._permits, timeout)) or None
        if permit:
            permit.note_holder(None)
        return permit

    async def aobtain(
        self,
        timeout: float | None,  # noqa: ASYNC109 - as in `acquire`
        current_task: CurrentTask,
    ) -> ConcurrencyPermit | None:
        """Do what `obtain` does, in a task."""
        permit = await self._permits.wait_async(_watch(self._permits, timeout)) or None
        if permit:
            permit.note_holder(current_task)
        return permit

    def enter(self, current_task: CurrentTask | None = None) -> ConcurrencyPermit | None:
        """Take a permit if there is one now, and note which thread or task holds it.

        This and `leave` are what a call pays that need not wait.

        Args:
            current_task: See `CurrentTask`; None for a synchronous call.

        Returns:
            The permit, for `leave`; None if there is none now.
        """
        # What `note_holder` does, without another call; before the permit is taken, so that Ctrl-C cannot come after.
        if current_task is None:
            holder = get_ident()
        else:
            try:
                holder = id(current_task())
            except RuntimeError:
                holder = get_ident()
        if not self._busy:
            try:
                permit = self._free.pop()
            except IndexError:
                pass
            else:
                permit.holder = holder
                return permit
        taken: ConcurrencyPermit | None = self._take_now()
        if taken is not None:
            taken.holder = holder
        return taken

    def _take_now(self, *, counted: bool = False) -> Any:
        if not self.attached:
            self.attach()
        permits = self._permits
        return None if permits.waiting else permits.take(counted)

    def leave(self, permit: ConcurrencyPermit) -> None:
        """Give a permit back."""
        permit.holder = None
        permits = permit.permits
        # What `give_back` does, without another call.
        permits.free.append(permit)
        if permits.across is not None:
            permits.balance()
        if permits.waiting:
            permits.serve()

    def drop(
        self, permit: ConcurrencyPermit | None, current_task: CurrentTask | None = None
    ) -> None:
        """Give a permit back whose call goes on with an error, unless that was done, wherever Ctrl-C came.

        Args:
            permit: The permit; None if the call had none.
            current_task: See `CurrentTask`.
        """
        task = None if current_task is None else _task(current_task)
        if permit is not None and permit.is_held_by({get_ident(), id(task)}, task):
            self.leave(permit)

    def held_around(self, current_task: CurrentTask | None = None) -> int:
        """Return how many permits the calls around this one hold: those of its task, its thread, and of the threads
        that wait for it because of a `timeout`.
        """
        task = None if current_task is None else _task(current_task)
        around: set[Hashable] = {get_ident(), *waiting_threads()}
        if task is not None:
            around.add(id(task))
        made = [permit for found in list(self._permits.made) if (permit := found()) is not None]
        return sum(permit.is_held_by(around, task) for permit in made)

    # --- several processes ------------------------------------------------------------------------

    def _begin_attached(self) -> None:
        self.attached = True
        self._permits.most = self.limit

    def _go_to(self, path: str, *, create: bool) -> None:
        file = _FilePermits(path, self.limit, create=create)
        # From here on `enter` asks the queue, which looks at the file as soon as that is in use.
        self._busy = True
        self._permits.move(file)

    def after_fork(self) -> None:
        """Start with all permits: the calls that are in flight go on in the parent only."""
        super().after_fork()
        self.begin()

    def __repr__(self) -> str:
        return mask_urls(
            f"<ConcurrencyLimit {self.name}: {self.in_flight} of {self.limit} in flight, "
            f"{self.waiting} waiting>"
        )


class _Permits(HandoffQueue):
    """The permits of this process, and the callers that wait for one.

    A caller has its permit only by the names in its frames: one that Ctrl-C has cut off at whatever instruction leaves
    none behind, and another one is made in its place.

    Args:
        limit: How many there are, and how many callers may wait.
        across: The permits of all processes.

    Attributes:
        most: How many there are.
        made: Those that were needed so far and are not lost, by weak references.
        free: Those of them that are here. Taken and given back by single steps of C, which need no lock.
        taken: Those of callers that only know how many they have.
        lent: Those of `with` blocks.
        across: As above; None as long as no other process shares them.
    """

    def __init__(self, limit: ConcurrencyLimit, across: _FilePermits | None = None) -> None:
        super().__init__()
        self.most: int = limit.limit
        self.made: set[ref[ConcurrencyPermit]] = set()
        self.free: list[ConcurrencyPermit] = []
        self.taken: list[ConcurrencyPermit] = []
        self.lent: list[ref[ConcurrencyPermit]] = []
        self.across = across
        self._limit = limit

    @property
    def out(self) -> int:
        """How many are out."""
        return len(self.made) - len(self.free)

    def join(self, waiter: Waiter) -> None:
        """Put a caller at the end of the queue.

        Raises:
            BulkheadFullError: The queue is full, and there is no permit now.
        """
        with self.lock:
            bound = self._limit.queue
            if bound is not None and len(self) >= bound:
                if (permit := self.take(None)) is None:
                    raise BulkheadFullError(self._limit.name, self._limit.limit, bound)
                self.put_back(permit)
            super().join(waiter)

    def take(self, request: bool | None) -> Any:
        """Take a permit of this process, and one of all processes.

        Args:
            request: True for a caller that only knows how many it has: it gets True, and the permit is among `taken`.
        """
        with self.lock:
            try:
                permit = self.free.pop()
            except IndexError:
                if len(self.made) >= self.most:
                    return None
                permit = ConcurrencyPermit(self)
                self.made.add(ref(permit, self.made.discard))
            if not self.balance():
                self.free.append(permit)
                return None
            if request:
                self.taken.append(permit)
                return True
            return permit

    def balance(self) -> bool:
        """Hold as many permits of all processes as are out here; False if there are not so many."""
        across = self.across
        if across is None:
            return True
        with self.lock:
            while len(across.held) > self.out:
                across.give_back()
            while len(across.held) < self.out and across.take():
                pass
            return len(across.held) >= self.out

    def put_back(self, taken: ConcurrencyPermit | Literal[True]) -> None:
        """Put a permit back, or (True) one of the callers that only know how many they have, if they have any."""
        permit = self._counted() if taken is True else taken
        if permit is not None:
            self.free.append(permit)
        self.balance()

    def _counted(self) -> ConcurrencyPermit | None:
        """Take a permit from those callers, or else from one of the blocks, which gets one that is taken in it."""
        with contextlib.suppress(IndexError):
            while True:
                permit = self.taken.pop() if self.taken else self.lent.pop()()
                if permit is not None:
                    return permit
        return None

    def move(self, across: _FilePermits) -> None:
        """Share the permits from now on; those that are out are taken there too."""
        self.across = across
        self.balance()
        self.serve()


def _watch(permits: _Permits, timeout: float | None) -> Callable[[], float]:
    """Look for permits that other processes have given back, between the pauses of a waiting caller.

    Returns:
        What serves the queue and returns the seconds until the next look; 0 or less if the time is up.
    """
    end = math.inf if timeout is None else time.monotonic() + timeout
    pause = _SOON

    def look() -> float:
        nonlocal pause
        permits.serve()
        pause = _SELDOM if permits.across is None else min(2 * pause, _LATER)
        return min(pause, end - time.monotonic())

    return look


class _FilePermits:
    """Permits that several processes share: locks on the bytes of a file, one byte for each permit.

    They are record locks, which the kernel takes back from the dead: a process that is killed with a permit has given
    it back. They belong to a process, so which of its threads holds which is of no importance; they are counted here.

    Args:
        path: The file.
        limit: How many there are.
        create: Whether the file may be new.

    Attributes:
        held: The bytes whose permits this process has.
    """

    def __init__(self, path: str, limit: int, *, create: bool) -> None:
        self._limit = limit
        self._file = StateFile.open(path, "pe", lambda old, file: old or [limit], create=create)
        self.begin()

    def begin(self) -> None:
        """Hold nothing: a forked child has none of its parent's locks."""
        self.held: list[int] = []
        self._last = _FIRST_PERMIT + randrange(self._limit)

    def take(self) -> bool:
        """Take a permit if any is free, in whatever process."""
        with self._file.thread_lock:
            for step in range(self._limit):
                place = _FIRST_PERMIT + (self._last - _FIRST_PERMIT + step) % self._limit
                if place not in self.held and try_lock(self._file.fd, place):
                    self.held.append(place)
                    self._last = place
                    return True
            return False

    def give_back(self) -> None:
        """Give a permit back; nothing happens if this process holds none."""
        with self._file.thread_lock:
            if self.held:
                unlock(self._file.fd, self.held.pop())


def _whole(value: object, option: str, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST:
        return value
    raise OperoUsageError(
        f"{option}={value!r} must be a whole number, {least} to {_MOST:,}{', or None' * (not least)}."
    )
