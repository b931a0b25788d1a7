# this_file: src/opero/testing/controls.py
"""Control what surrounds calls in a test: switches, the clock, events, functions that fail at first."""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opero.events import Event, event_bus
from opero.utils import ambient

if TYPE_CHECKING:
    import asyncio


class set_disabled:  # noqa: N801 - used as a function and as a context manager
    """Switch retries, waits and caches of all decorated functions off (or on again), at once and
    for the whole process.

    Every call is made exactly once then; argument fallback still tries its values.

    Args:
        value: False switches them on again.

    Example:
        >>> from opero import opero
        >>> from opero.testing import flaky, set_disabled
        >>> fetch = opero(cache=False)(flaky("ok", failures=1))
        >>> with set_disabled():
        ...     fetch()
        Traceback (most recent call last):
        ...
        ConnectionError: flaky failure 1 of 1
    """

    def __init__(self, value: bool = True) -> None:
        self._before = ambient.set_disabled(value)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        ambient.set_disabled(self._before)


def is_disabled() -> bool:
    """Return whether retries, waits and caches are switched off."""
    return ambient.disabled()


@contextmanager
def capture_events(*types: type[Event]) -> Iterator[list[Event]]:
    """Collect the events of the default bus within the block.

    Args:
        types: Event classes wanted; all of them by default.
    """
    events: list[Event] = []
    with event_bus.subscribe(events.append, types):
        yield events


def flaky(
    value: Any, failures: int = 2, error: type[BaseException] | BaseException = ConnectionError
) -> Callable[..., Any]:
    """Make a function that fails at first and works then.

    Args:
        value: What it returns; a callable is called with the arguments instead. With a coroutine
            function the result is one.
        failures: How many calls fail.
        error: Exception type (gets a message) or instance to raise.

    Returns:
        A function of any arguments, with the number of its calls in its own `.calls` (a decorated function
        has a copy of the number, which does not change).

    Example:
        >>> fetch = flaky("ok", failures=1)
        >>> fetch()
        Traceback (most recent call last):
        ...
        ConnectionError: flaky failure 1 of 1
        >>> fetch()
        'ok'
    """

    def attempt() -> None:
        fetch.calls += 1
        if fetch.calls <= failures:
            raise (
                error(f"flaky failure {fetch.calls} of {failures}")
                if isinstance(error, type)
                else error
            )

    def sync_fetch(*args: Any, **kwargs: Any) -> Any:
        attempt()
        return value(*args, **kwargs) if callable(value) else value

    async def async_fetch(*args: Any, **kwargs: Any) -> Any:
        attempt()
        return await value(*args, **kwargs)

    fetch: Any = async_fetch if inspect.iscoroutinefunction(value) else sync_fetch
    fetch.calls = 0
    fetch.__name__ = fetch.__qualname__ = "flaky"
    made: Callable[..., Any] = fetch
    return made


# --- the clock ----------------------------------------------------------------------------------------

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
