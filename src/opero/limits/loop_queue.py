# this_file: src/opero/limits/loop_queue.py
"""The waiters of one event loop, queued by asynciolimiter.

asynciolimiter (1.2.0) paces the waiters of a single loop well. But a limiter of it deadlocks when a
second `asyncio.run` uses it, starves one of two live loops, and knows nothing of other threads and
processes. So each loop has a limiter of its own, only while somebody waits in it, and whom it lets
through still has to take a slot from the clock that all share.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from asynciolimiter import Limiter

from opero.errors import OperoUsageError

__all__ = ["Ear", "Guest", "LoopQueue", "look_again"]

_FASTEST: Final = 50_000.0
"""Calls per second; a step of asynciolimiter takes longer than the pause at a higher rate."""


class Ear:
    """Where a waiting task hears of a pause.

    Attributes:
        paused: Seconds of a pause that it will not wait out, 0.0 as long as there is none.
    """

    __slots__ = ("_alarm", "_longest", "paused")

    def __init__(self, alarm: asyncio.Timeout, longest: float) -> None:
        self._alarm = alarm
        self._longest = longest
        self.paused: float = 0.0

    def hear(self, paused: float) -> None:
        """Wake the task if the pause is longer than it would wait."""
        if paused > self._longest and not self._alarm.expired() and not self.paused:
            self.paused = paused
            self._alarm.reschedule(asyncio.get_running_loop().time())


class LoopQueue:
    """The waiters of one event loop, in order of arrival; only the first looks at the slot clock.

    Attributes:
        waiting: How many there are; the one who leaves last closes the queue.
    """

    __slots__ = ("_door", "_ears", "_pace", "_turn", "waiting")

    def __init__(self, pace: float | None) -> None:
        """Make a queue from which `pace` tasks per second come forward; None (a test) lets all."""
        self._turn = asyncio.Lock()
        self._pace = None if pace is None else min(pace, _FASTEST)
        self._door: Limiter | None = None
        self._ears: set[Ear] = set()
        self.waiting: int = 0

    @contextmanager
    def hears(self, alarm: asyncio.Timeout, longest: float) -> Iterator[Ear]:
        """Have `warn` end the wait of the task that entered `alarm`.

        Args:
            alarm: The task's timeout.
            longest: Longest pause, in seconds, that it waits out.
        """
        ear = Ear(alarm, longest)
        self._ears.add(ear)
        try:
            yield ear
        finally:
            self._ears.discard(ear)

    def warn(self, paused: float) -> None:
        """Tell all who wait behind how many seconds are left of a pause."""
        if paused:
            for ear in tuple(self._ears):
                ear.hear(paused)

    async def enter(self, wait: float) -> None:
        """Come back when it is this task's turn; the slot of the first is `wait` seconds away."""
        if self._pace is not None:
            if self._door is None:
                # After the loop was blocked it may let many through: the slot clock holds them.
                self._door = Limiter(self._pace, max_burst=max(5, int(self._pace / 20)))
                # It opens next one interval after this call, whose slot is still `wait` away. With
                # a first interval that is longer by as much, each opening falls on a slot.
                self._door.rate = 1 / (1 / self._pace + wait)
                await self._door.wait()
                self._door.rate = self._pace
            else:
                await self._door.wait()
        await self._turn.acquire()

    def leave(self) -> None:
        """Let the next one have its turn."""
        self._turn.release()

    def close(self) -> None:
        """Stop the timer of a queue in which nobody waits."""
        if self._door is not None:
            self._door.close()


async def look_again() -> None:
    """Let the loop turn once, without its timer, which is no finer than a millisecond."""
    await asyncio.sleep(0)


class Guest:
    """A user's own limiter: an object with `async wait()`, for example of asynciolimiter.

    Such an object belongs to one event loop at a time. Its `reset()`, if it has one, frees it from
    a loop that has ended, where asynciolimiter would wait for a timer that never fires.
    """

    __slots__ = ("_loop", "limiter")

    def __init__(self, limiter: Any) -> None:
        self.limiter = limiter
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None

    async def wait(self) -> None:
        """Wait as the user's limiter does."""
        running = asyncio.get_running_loop()
        before = self._loop() if self._loop is not None else running
        if before is not running:
            if before is not None and not before.is_closed():
                raise OperoUsageError(
                    f"{self.limiter!r} is already used in another event loop that is still open: "
                    "it can serve one at a time. "
                    'Write rate_limit="100/minute", or share a RateLimiter("100/minute").'
                )
            reset = getattr(self.limiter, "reset", None)
            if callable(reset):
                reset()
        if before is not running or self._loop is None:
            self._loop = weakref.ref(running)
        await self.limiter.wait()
