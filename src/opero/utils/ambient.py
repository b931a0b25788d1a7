# this_file: src/opero/utils/ambient.py
"""Hold what surrounds every call: the clock of all waits, test switches, the branch of a parallel group, the run
that it is part of, and the flag that leaves the fast path.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from opero.errors import OperoUsageError, warn_user
from opero.utils.fork import run_after_fork

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


# --- runs: executions with an id and a parent, which events are stamped with -----------------------

# A call has a run only where there is a listener. The run is kept in a context variable, so that tasks and threads that
# get a copy of the context belong to it.


class Run:
    """One execution of something: a call, a task, a workflow, a map.

    As a context manager it is the current run within the block, and the parent of runs that begin there.

    Args:
        name: What is executed.
        id: Its id, where it is known already (a workflow that continues after a crash); a new one otherwise.
        parent_id: Id of the run that it belongs to; that of the current run by default.
        started: Clock reading at its start, where its duration is wanted.

    Example:
        >>> with Run("outer") as outer, Run("inner") as inner:
        ...     inner.parent_id == outer.id, current_run() is inner
        (True, True)
    """

    __slots__ = ("_token", "id", "name", "parent_id", "started")

    def __init__(
        self,
        name: str,
        *,
        id: str | None = None,
        parent_id: str | None = None,
        started: float | None = None,
    ) -> None:
        self.name: Final = name
        self.id: Final[str] = _next_id() if id is None else id
        self.parent_id: Final[str | None] = run_id() if parent_id is None else parent_id
        self.started: float | None = started
        self._token: Token[Run | None] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            try:
                _current.reset(token)
            except ValueError:
                # A coroutine that is closed by the garbage collector ends in another context
                # than its own, which is gone.
                pass

    def __repr__(self) -> str:
        of = f" of {self.parent_id}" if self.parent_id else ""
        return f"<Run {self.id} {self.name}{of}>"


_current: ContextVar[Run | None] = ContextVar("opero_run", default=None)


def current_run() -> Run | None:
    """Return the run that the calling code is part of; None without a listener or outside of any run."""
    return _current.get()


def run_id() -> str | None:
    """Return the id of the current run."""
    run = _current.get()
    return None if run is None else run.id


def parent_run_id() -> str | None:
    """Return the id of the run that the current one belongs to."""
    run = _current.get()
    return None if run is None else run.parent_id


_numbers = itertools.count(1)
_process = os.urandom(4).hex()


def _next_id() -> str:
    """Return an id that no other run has, in this process or another one."""
    return f"{_process}-{next(_numbers)}"


@run_after_fork
def _renew() -> None:
    global _process  # noqa: PLW0603 - a child process must not give out its parent's ids
    _process = os.urandom(4).hex()
