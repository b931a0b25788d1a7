# this_file: src/opero/events/mailbox.py
"""The queue before an asynchronous handler: one event after the other, on an event loop that runs.

A handler belongs to the loop in which it was subscribed. While that does not run (there was none, or it
has ended), it is called on the loop in which the event happens, then on the one that it was called on
last, in the end on a spare one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opero.events.spare_loop import spare_loop

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["Mailbox", "mailboxes", "running_loop"]

_serving: ContextVar[frozenset[int]] = ContextVar("opero_mailboxes", default=frozenset())
"""The mailboxes whose handlers the calling code is part of: these cannot wait for themselves."""


def running_loop() -> AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if any, without loading asyncio for the question."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.get_running_loop()
    except (RuntimeError, AttributeError):
        # None runs, or asyncio is just being imported.
        return None


class Mailbox:
    """Bounded queue of letters, and the pump that takes them to the handler.

    Args:
        size: Most letters that wait; when another one comes, the oldest is dropped.
        failed: Called with what a letter raised, and the letter's subject.
        home: The loop that the handler belongs to.

    Attributes:
        sent: Letters put in so far.
        dropped: Letters lost: pushed out by newer ones, or cut off when their loop ended.
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
        self._letters: deque[tuple[Callable[[], Any], Any]] = deque()
        self._waiters: list[tuple[int, Callable[[], object]]] = []
        self._loop: AbstractEventLoop | None = None  # where a pump is at work
        self._last: AbstractEventLoop | None = None
        self._round = 0
        self._busy = False
        # Reentrant: an event may be sent by a finalizer that runs in the middle of this.
        self._lock = threading.RLock()
        _mailboxes.add(self)

    def put(self, letter: Callable[[], Any], subject: Any) -> None:
        """Queue a letter, a callable whose result is awaited if it is awaitable; never blocks."""
        with self._lock:
            if len(self._letters) >= self._size:
                self._letters.popleft()
                self.dropped += 1
            self._letters.append((letter, subject))
            self.sent += 1
        self._start()

    def clear(self) -> None:
        """Throw away what waits."""
        with self._lock:
            self._letters.clear()
        self._tell()

    def when_done(self, number: int, tell: Callable[[], object]) -> bool:
        """Have `tell` called, in whatever thread, when that many letters are dealt with, or to look again.

        Returns:
            False if there is nothing to wait for; `tell` is not called then.
        """
        with self._lock:
            if self._done >= number or id(self) in _serving.get():
                return False
            self._waiters.append((number, tell))
        self._start()
        return True

    @property
    def waiting(self) -> bool:
        """Whether there are letters that have not been dealt with."""
        return self._done < self.sent

    @property
    def _done(self) -> int:
        busy = self._busy and self._loop is not None and self._loop.is_running()
        return self.sent - len(self._letters) - busy

    def _tell(self, *, all_of_them: bool = False) -> None:
        with self._lock:
            done, waiters = self._done, self._waiters
            self._waiters = [w for w in waiters if w[0] > done and not all_of_them]
            told = [w for w in waiters if w not in self._waiters]
        for _, tell in told:
            tell()

    # --- the pump ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Have a pump at work where letters wait and none is."""
        here = running_loop()
        while True:
            with self._lock:
                if not self._letters or (self._loop is not None and self._loop.is_running()):
                    return
                self._loop = self._last = loop = self._choose(here)
                self._round += 1
                self._busy = False
                schedule: Any = loop.call_soon if loop is here else loop.call_soon_threadsafe
                try:
                    # A context can be entered only once at a time, so each pump has a copy.
                    schedule(self._begin, self._round, context=self._context.copy())
                    return
                except RuntimeError:
                    self._loop = None  # it was closed this very moment

    def _choose(self, here: AbstractEventLoop | None) -> AbstractEventLoop:
        for loop in (self._home, here, self._last):
            if loop is not None and loop.is_running():
                return loop
        return spare_loop.get()

    def _begin(self, number: int) -> None:
        from asyncio import get_running_loop

        task: Any = get_running_loop().create_task(self._pump(number))
        # As asyncio.gather does: a handler that is cut off when its loop is closed is counted, not shouted about.
        task._log_destroy_pending = False  # noqa: SLF001 - there is no public way

    async def _pump(self, number: int) -> None:
        from asyncio import CancelledError, current_task

        _serving.set(_serving.get() | {id(self)})
        try:
            while (item := self._next(number)) is not None:
                letter, subject = item
                try:
                    result = letter()
                    if hasattr(type(result), "__await__"):
                        await result
                except CancelledError:
                    task = current_task()
                    if task is None or task.cancelling():
                        self.dropped += 1
                        raise
                    # Only the handler's own task was cancelled: its affair.
                except Exception as error:  # noqa: BLE001 - a listener must never break anything
                    self._failed(error, subject)
        finally:
            self._stopped(number)

    def _next(self, number: int) -> tuple[Callable[[], Any], Any] | None:
        with self._lock:
            if number != self._round:
                return None
            self._busy = False
            if self._waiters:
                self._tell()
            if not self._letters:
                # Decided under the lock, so that a letter which comes now starts the next pump.
                self._stopped(number)
                return None
            self._busy = True
            return self._letters.popleft()

    def _stopped(self, number: int) -> None:
        with self._lock:
            if number != self._round:
                return
            self._round += 1
            self._loop = None
            self._busy = False
        self._tell(all_of_them=True)

    def forget(self) -> None:
        """Start empty: after a fork, letters and loops are the parent's."""
        self._lock = threading.RLock()
        self._letters.clear()
        self._waiters.clear()
        self._round += 1
        self._busy = False
        self._home = self._last = self._loop = None

    def __repr__(self) -> str:
        return f"<Mailbox, {len(self._letters)} waiting, {self.dropped} dropped>"


_mailboxes: WeakSet[Mailbox] = WeakSet()


def mailboxes() -> list[Mailbox]:
    """Return all mailboxes there are."""
    return list(_mailboxes)


def _after_fork() -> None:
    for mailbox in mailboxes():
        mailbox.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
