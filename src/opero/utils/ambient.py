# this_file: src/opero/utils/ambient.py
"""Hold what surrounds every call: the clock of all waits, test switches, the branch of a parallel group, and the flag
that leaves the fast path.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero.errors import OperoUsageError, warn_user

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


class Switch:
    """A counted flag: on while at least one holder wants it on.

    The fast path of a decorated function reads `switch.on` once per call. Everything that can
    change how calls run from the outside (listeners, the test switch, a fake clock, an ambient
    deadline) holds the switch while it is active, so that a process in which none of them is used
    pays for none of them.

    Attributes:
        on: True while there is a holder, as an `if` sees it: a list with an item for each holder,
            because a list grows and shrinks by single steps of C, which need no lock.

    Example:
        >>> s = Switch()
        >>> s.turn_on(); bool(s.on)
        True
        >>> s.turn_off(); bool(s.on)
        False
    """

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on: Final[list[None]] = []

    def turn_on(self) -> None:
        """Turn the flag on until the matching `turn_off`."""
        self.on.append(None)

    def turn_off(self) -> None:
        """Undo one `turn_on`; the flag goes off with the last one."""
        self.on.pop()


switch: Final = Switch()


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

    monotonic: staticmethod[[], float] = staticmethod(time.monotonic)

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for `seconds`."""
        warn_on_loop("a pause")
        time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Suspend the calling task for `seconds`."""
        require_loop("wait")
        # Imported here: a synchronous program never pays for asyncio.
        from asyncio import sleep

        await sleep(seconds)


_REAL = RealClock()


def running_loop() -> AbstractEventLoop | None:
    """Return the asyncio event loop that runs in this thread, if any, without importing asyncio for it."""
    # Another thread may be importing it just now. This costs a tenth of the error of `get_running_loop`.
    find: Any = getattr(sys.modules.get("asyncio.events"), "_get_running_loop", None)
    found: AbstractEventLoop | None = None if find is None else find()
    return found


def require_loop(what: str) -> AbstractEventLoop:
    """Return the asyncio event loop that runs in this thread, where opero has to wait in a coroutine.

    Args:
        what: What needs the loop, to follow "to".

    Raises:
        OperoUsageError: There is none, as under trio.
    """
    loop = running_loop()
    if loop is None:
        raise OperoUsageError(
            f"opero needs a running asyncio event loop to {what}, and none runs in this thread. "
            "Under trio, call the function in asyncio (trio-asyncio, or anyio with its asyncio backend), "
            "or leave out the options that wait."
        )
    return loop


_warned: Final[set[str]] = set()


def warn_on_loop(what: str) -> None:
    """Warn, once for each kind of wait, if a synchronous call is about to block the thread of a running event loop.

    Args:
        what: What is waited for.
    """
    if what in _warned or running_loop() is None:
        return
    _warned.add(what)
    warn_user(
        f"a synchronous function waits for {what} in the thread of a running event loop, which is blocked "
        "meanwhile: call it with `await asyncio.to_thread(function, ...)`, or decorate an `async def`"
    )


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


class Branches(Protocol):
    """The branches of one parallel group. Both verbs change the calling context, which must be a copy."""

    def enter(self, index: int) -> object:
        """From now on this context belongs to the branch of that number, from 0."""
        ...

    def aside(self) -> object:
        """From now on this context belongs to what only serves the branches, a worker say, and is itself none."""
        ...


fork: Final[ContextVar[Callable[[], Branches] | None]] = ContextVar("opero_fork", default=None)
"""Called, once, where a parallel group begins; None where no branches are recorded."""


def clock() -> Clock:
    """Return the clock in force: the real one, unless a test has installed another."""
    return _ambient.clock


def _put(name: str, new: Any, usual: object) -> Any:
    """Replace a part of the state and return what was there; what is not usual holds the switch."""
    old = getattr(_ambient, name)
    setattr(_ambient, name, new)
    if (new is usual) != (old is usual):
        (switch.turn_off if new is usual else switch.turn_on)()
    return old


def install_clock(new: Clock | None) -> Clock:
    """Put `new` in force (None: the real clock) and return the one that was."""
    old: Clock = _put("clock", _REAL if new is None else new, _REAL)
    return old


def wall_offset() -> float:
    """Return what has to be added to a reading of `clock` to get seconds since the epoch.

    A clock that a test has installed moves both times.
    """
    return time.time() - time.monotonic()


def disabled() -> bool:
    """Return whether retries, waits and caches are switched off (`opero.testing`, `OPERO_DISABLE=1`)."""
    return _ambient.disabled


def set_disabled(value: bool) -> bool:
    """Switch retries, waits and caches off or on again and return the old setting."""
    old: bool = _put("disabled", value, False)
    return old


def tape() -> Tape | None:
    """Return what calls are recorded on or replayed from, None if neither is done."""
    return _ambient.tape


def install_tape(new: Tape | None) -> Tape | None:
    """Put a tape between callers and pipelines and return the one that was there."""
    old: Tape | None = _put("tape", new, None)
    return old


if os.environ.get("OPERO_DISABLE", "").strip().lower() in {"1", "true", "yes", "on"}:
    set_disabled(True)


# --- the program ------------------------------------------------------------------------------------------------------

_NOTEBOOK: Final = "JPY_SESSION_NAME"
"""The variable in which Jupyter says what the notebook is called."""
adopted_scripts: Final[list[str]] = []
"""In a worker process, whose own `__main__` is none of the program's: the file of the program, if it has one."""


def main_script() -> str | None:
    """Return the file of the running program, in its workers too; None if it was typed into an interpreter."""
    script = getattr(sys.modules["__main__"], "__file__", None) or os.environ.get(_NOTEBOOK)
    script = next(iter(adopted_scripts), script)
    # Not by pathlib, which is costly to import.
    return os.path.realpath(script) if script else None
