# this_file: src/opero/testing/clock.py
"""Replace the clock of opero's pauses by one that needs no real time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from opero.utils import ambient

if TYPE_CHECKING:
    import asyncio

__all__ = ["FakeClock", "fake_clock"]

_IDLE_ROUNDS: Final = 3
_MOST_ROUNDS: Final = 1000
"""Rounds of an event loop after which it counts as idle, because a task is polling in it."""


class FakeClock:
    """A clock whose sleepers wake at once, in the order of their times.

    A synchronous sleep moves the clock on and returns. Asynchronous sleepers wait until their loop
    has nothing else to run; then the clock jumps to the earliest of them. So a test sees the same
    order as with real time, only faster.

    The real call takes real time, and none on this clock. So a `timeout`, a wait for a
    permit and a wait for another caller's result are measured in real time, also where a deadline
    bounds them: an idle loop may be waiting for an answer from the network.

    Attributes:
        elapsed: Seconds of fake time since the clock was made.
        sleeps: Every pause that was asked for, in seconds.
    """

    def __init__(self) -> None:
        # It starts at the real time, so that what was stored before the test has not expired.
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._waking: set[asyncio.AbstractEventLoop] = set()
        self.elapsed: float = 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        """Return the fake time in seconds."""
        return self._start + self.elapsed

    def advance(self, seconds: float) -> None:
        """Move the clock on by hand; sleepers whose time has come wake up."""
        with self._lock:
            self.elapsed += seconds

    def sleep(self, seconds: float) -> None:
        """Move the clock on, in no time."""
        with self._lock:
            self.sleeps.append(seconds)
            self.elapsed += seconds

    async def asleep(self, seconds: float) -> None:
        """Wait until the clock has got there."""
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self.sleeps.append(seconds)
            self._sleepers.append((self.elapsed + seconds, next(self._order), future))
            waking = loop in self._waking
            self._waking.add(loop)
        if not waking:
            loop.call_soon(self._wake, loop, 0, 0)
        await future

    def _wake(self, loop: asyncio.AbstractEventLoop, rounds: int, idle: int) -> None:
        """Wake this loop's sleepers one after the other, each once the loop is idle."""
        # asyncio has no public way to ask for it; a loop without the attribute gets a few rounds instead.
        busy = bool(getattr(loop, "_ready", ()))
        if (busy or idle < _IDLE_ROUNDS) and rounds < _MOST_ROUNDS:
            loop.call_soon(self._wake, loop, rounds + 1, 0 if busy else idle + 1)
            return
        with self._lock:
            self._sleepers = [s for s in self._sleepers if not s[2].done()]
            mine = sorted(s for s in self._sleepers if s[2].get_loop() is loop)
            if not mine:
                self._waking.discard(loop)
                return
            due, _, future = mine[0]
            self.elapsed = max(self.elapsed, due)
        future.set_result(None)
        loop.call_soon(self._wake, loop, 0, 0)

    def __repr__(self) -> str:
        return f"<FakeClock {self.elapsed:g} s on, {len(self.sleeps)} sleeps>"


@contextmanager
def fake_clock() -> Iterator[FakeClock]:
    """Let every pause of opero's own, and every wait for a slot, take no real time within the block.

    Example:
        >>> from opero import opero
        >>> from opero.testing import fake_clock, flaky
        >>> fetch = opero(cache=False, min_delay=60, max_delay=60)(flaky("ok", failures=2))
        >>> with fake_clock() as clock:
        ...     fetch(), clock.elapsed
        ('ok', 120.0)
    """
    clock = FakeClock()
    before = ambient.install_clock(clock)
    try:
        yield clock
    finally:
        ambient.install_clock(before)
