# this_file: src/opero/utils/waiters.py
"""Gates to wait at: each is opened once, from any thread, for a thread or a task of any loop."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

__all__ = ["Gate", "TaskGate", "ThreadGate"]

_PATIENCE: Final = 1.0
"""Seconds after which a waiting thread looks up, so that Ctrl-C reaches it on every platform."""


class Gate(Protocol):
    """Somebody's place to wait, as the one who opens it sees it.

    Attributes:
        opened: Whether what the waiting one waits for is theirs, though they may not know it yet.
    """

    opened: bool

    def open(self) -> bool:
        """Let the waiting one go on; False if nobody can come through now."""
        ...


class ThreadGate:
    """A thread waits here."""

    __slots__ = ("_lock", "opened")

    def __init__(self) -> None:
        self.opened: bool = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> bool:
        """Let the thread go on."""
        self.opened = True
        self._lock.release()
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Block until the gate opens; False if time ran out first."""
        acquire = self._lock.acquire
        if seconds is None:
            while not acquire(timeout=_PATIENCE):
                pass
            return True
        end = time.monotonic() + seconds
        while not acquire(timeout=min(_PATIENCE, max(0.0, seconds))):
            seconds = end - time.monotonic()
            if seconds <= 0:
                return False
        return True


class TaskGate:
    """A task waits here, in the event loop in which the gate was made."""

    __slots__ = ("_future", "_loop", "opened")

    def __init__(self) -> None:
        from asyncio import get_running_loop

        self.opened: bool = False
        self._loop: AbstractEventLoop = get_running_loop()
        self._future: Future[bool] = self._loop.create_future()

    def open(self) -> bool:
        """Let the task go on, from whatever thread.

        Returns:
            False if it was cancelled or its loop does not run. Should the loop run again, the task
            wakes up to a gate that is not `opened`, and has to ask anew.
        """
        if self._future.cancelled():
            return False
        from asyncio import _get_running_loop

        # Said before the task is woken, which may look at once.
        running = self.opened = self._loop.is_running()
        try:
            if _get_running_loop() is self._loop:
                self._settle(True)
            else:
                self._loop.call_soon_threadsafe(self._settle, True)
        except RuntimeError:
            # The loop is closed.
            self.opened = False
            return False
        return running

    def _settle(self, in_time: bool) -> None:
        if not self._future.done():
            self._future.set_result(in_time)

    async def wait(self, seconds: float | None = None) -> bool:
        """Suspend the task until somebody comes to open; False if time ran out first."""
        if seconds is None:
            return await self._future
        timer = self._loop.call_later(max(0.0, seconds), self._settle, False)
        try:
            return await self._future
        finally:
            timer.cancel()
