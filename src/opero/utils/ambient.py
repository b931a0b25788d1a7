# this_file: src/opero/utils/ambient.py
"""What surrounds every call: the clock that all waits go through, the test switch, and a tape.

Every pause of opero's own is a `clock().sleep(s)` or an `await clock().asleep(s)`, so that `opero.testing.fake_clock()`
drives all of them. The express lanes read `time.monotonic` directly; they are left while a clock
is installed or the test switch is on, because both hold `opero.utils.switch.switch`.
"""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

from opero.utils.switch import switch

__all__ = [
    "Clock",
    "RealClock",
    "Tape",
    "clock",
    "disabled",
    "install_clock",
    "install_tape",
    "set_disabled",
    "tape",
    "wall_offset",
]


class Clock(Protocol):
    """Monotonic time in seconds and the two ways to wait for it."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block the calling thread."""
        ...

    async def asleep(self, seconds: float) -> None:
        """Suspend the calling task."""
        ...


class RealClock:
    """The machine's own monotonic clock."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for `seconds`."""
        time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Suspend the calling task for `seconds`."""
        # Imported here: a synchronous program never pays for asyncio.
        from asyncio import sleep

        await sleep(seconds)

    def __repr__(self) -> str:
        return "RealClock()"


_REAL = RealClock()


class Tape(Protocol):
    """Stands between callers and pipelines while calls are recorded or replayed (`opero.testing`)."""

    def take(self, pipeline: Any, call: Any, /) -> Any:
        """Answer a call; what a `Pipeline` would, be it a coroutine."""
        ...


class _Ambient:
    """Process-wide state; a class only so that readers see one object instead of module globals."""

    __slots__ = ("clock", "disabled", "tape")

    def __init__(self) -> None:
        self.clock: Clock = _REAL
        self.disabled = False
        self.tape: Tape | None = None


_ambient = _Ambient()


def clock() -> Clock:
    """Return the clock in force: the real one, unless a test has installed another."""
    return _ambient.clock


def install_clock(new: Clock | None) -> Clock:
    """Put `new` in force (None: the real clock) and return the one that was."""
    old = _ambient.clock
    _ambient.clock = _REAL if new is None else new
    if (_ambient.clock is _REAL) != (old is _REAL):
        (switch.release if _ambient.clock is _REAL else switch.hold)()
    return old


def wall_offset() -> float:
    """Return what has to be added to a reading of `clock` to get seconds since the epoch.

    A clock that a test has installed moves both times.
    """
    return time.time() - time.monotonic()


def disabled() -> bool:
    """Tell whether retries, waits and caches are switched off (`opero.testing`, `OPERO_DISABLE=1`)."""
    return _ambient.disabled


def set_disabled(value: bool) -> bool:
    """Switch retries, waits and caches off or on again and return the old setting."""
    old = _ambient.disabled
    _ambient.disabled = value
    if value != old:
        (switch.hold if value else switch.release)()
    return old


def tape() -> Tape | None:
    """Return what calls are recorded on or replayed from, None if neither is done."""
    return _ambient.tape


def install_tape(new: Tape | None) -> Tape | None:
    """Put a tape between callers and pipelines and return the one that was there."""
    old = _ambient.tape
    _ambient.tape = new
    if (new is None) != (old is None):
        (switch.release if new is None else switch.hold)()
    return old


if os.environ.get("OPERO_DISABLE", "").strip().lower() in {"1", "true", "yes", "on"}:
    set_disabled(True)
