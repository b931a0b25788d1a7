# this_file: src/opero/core/deadline.py
"""Deadlines: a budget of time for a call, or for everything within a block, waits included.

A deadline travels down: into the stages of a call, into the opero calls that the function makes,
and through `remaining()` into whatever the function itself calls. The tighter one always holds.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from opero import events
from opero.errors import DeadlineError, OperoUsageError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.units import Duration, format_seconds, parse_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.events.bus import Emitter


class DeadlineScope:
    """A stretch of time within which a deadline holds, in one context and those copied from it.

    Attributes:
        end: Clock reading at its end.
        outer: The scope around it.
        over: Whether it has been left.
        overdue: Whether the end of time has ended the call that it bounds, where that has no other
            place to write it down.
    """

    __slots__ = ("end", "outer", "over", "overdue")

    def __init__(self, end: float, outer: DeadlineScope | None) -> None:
        self.end: float = end
        self.outer: DeadlineScope | None = outer
        self.over: bool = False
        self.overdue: bool = False


_innermost: contextvars.ContextVar[DeadlineScope | None] = contextvars.ContextVar(
    "opero_deadline", default=None
)
"""The scope around the caller. It may be over: a task, a thread or a generator inherits the context
of the place where it began, and may outlive that place."""


def _live(scope: DeadlineScope | None) -> DeadlineScope | None:
    while scope is not None and scope.over:
        scope = scope.outer
    return scope


def _enter(end: float) -> DeadlineScope:
    outer = _innermost.get()
    scope = DeadlineScope(end, outer if outer is None else _live(outer))
    try:
        # Fast paths know no deadline.
        switch.on.append(None)
        _innermost.set(scope)
    except BaseException:
        leave(scope)  # Ctrl-C in between
        raise
    return scope


def leave(scope: DeadlineScope | None) -> None:
    """End a scope, in whatever context: a collected coroutine ends in another one than its own.

    Nothing happens if it has ended, or there is none.
    """
    if scope is None:
        return
    if not scope.over:
        scope.over = True
        # Not by `turn_off`: Ctrl-C could come as that begins.
        switch.on.pop()
    outer = scope.outer if _innermost.get() is scope else _innermost.get()
    _innermost.set(outer if outer is None else _live(outer))


def innermost_scope() -> DeadlineScope | None:
    """Return the scope that was entered last."""
    return _innermost.get()


def current_deadline() -> float | None:
    """Return the clock reading by which the caller must be done; None without a deadline."""
    scope, end = _live(_innermost.get()), None
    while scope is not None:
        if not scope.over and (end is None or scope.end < end):
            end = scope.end
        scope = scope.outer
    return end


def remaining() -> float | None:
    """Return the seconds that are left, never less than 0; None where there is no deadline.

    For code that can hand it on, as a client's own timeout for instance.

    Example:
        >>> from opero import deadline, remaining
        >>> remaining() is None
        True
        >>> with deadline(30):
        ...     0 < remaining() <= 30
        True
    """
    end = current_deadline()
    return None if end is None else max(0.0, end - ambient.clock().monotonic())


class deadline:  # noqa: N801 - used as a function is
    """Bound every opero call in a `with` block, in plain and in asynchronous code.

    It holds in this thread or task and in what inherits its context, until the block is left. Of
    nested blocks the tighter one holds. Code that is not opero's is not interrupted: it may ask
    `remaining()`.

    Args:
        seconds: The budget, as a duration; it counts from the entry.

    Raises:
        OperoUsageError: It is no duration.

    Example:
        >>> from opero import deadline, opero
        >>> @opero(cache=False, retries=9, min_delay=60, max_delay=60)
        ... def fetch():
        ...     raise ConnectionError("no route")
        >>> with deadline("30s"):
        ...     fetch()  # fails now: the pause before the next attempt would outlast the deadline
        Traceback (most recent call last):
        ...
        ConnectionError: no route
        opero: fetch() was not retried: the deadline comes before the end of a pause of 60 s
    """

    __slots__ = ("_scope", "seconds")

    def __init__(self, seconds: Duration) -> None:
        self.seconds: float = parse_seconds(seconds, "deadline")
        self._scope: DeadlineScope | None = None

    def __enter__(self) -> None:
        if self._scope is not None:
            raise OperoUsageError(
                "This deadline is already under way: make another one, with deadline(...)."
            )
        self._scope = _enter(ambient.clock().monotonic() + self.seconds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        leave(self._scope)
        self._scope = None

    def __del__(self) -> None:
        # Ctrl-C came just as the block ended.
        leave(getattr(self, "_scope", None))

    def __call__(self, fn: object) -> NoReturn:
        """Refuse to decorate: the block would be left before a coroutine begins."""
        raise OperoUsageError(
            f"deadline() is for `with` blocks: write @opero(deadline={self.seconds:g}) instead."
        )


def run_until(end: float, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `work` with a deadline at `end` for what it calls in turn."""
    scope = _enter(end)
    try:
        return work(*args, **kwargs)
    finally:
        leave(scope)


def forget_deadlines() -> None:
    """Forget the deadlines of the context that this one was copied from: they are a caller's."""
    _innermost.set(None)


# --- when time is up ------------------------------------------------------------------------------


def overdue(call: Call | DeadlineScope, emitter: Emitter, where: str) -> DeadlineError:
    """Note that its deadline ends a call, notify listeners, and return the error for it.

    Args:
        call: The call; its scope, where it has come by the fast path.
        emitter: The function's name and listeners.
        where: Where the call was then, to follow "ran out of time".
    """
    if not call.overdue:
        call.overdue = True
        if emitter.active:
            emitter.emit(events.DeadlinePassed(where=where))
    return DeadlineError(f"{emitter.function}() ran out of time {where}")


def require_time(call: Call, emitter: Emitter, where: str) -> None:
    """Raise if the deadline of a call, which must have one, has passed.

    Raises:
        DeadlineError: It has.
    """
    if ambient.clock().monotonic() >= (call.deadline or 0.0):
        raise overdue(call, emitter, where)


class Deadline:
    """The outermost stage of a function with `deadline=`.

    The waits of all other stages look at `call.deadline`.

    Args:
        seconds: The budget of each call.
        cuts: Whether a real call that is under way ends with it.
    """

    name = "deadline"

    def __init__(self, seconds: float, *, cuts: bool = True) -> None:
        self.seconds = seconds
        self._cuts = cuts

    def describe(self) -> str:
        """Return the line for `explain()`."""
        late = "" if self._cuts else "; without timeout= a call under way is not cut short"
        return f"{format_seconds(self.seconds)} for the whole call, waits included{late}"

    def begin(self) -> DeadlineScope:
        """Enter the deadline of a call that begins now, on the fast path."""
        return _enter(monotonic() + self.seconds)

    def note(self, call: Call, scope: DeadlineScope) -> None:
        """Write on a call that failed on the fast path when it began, and whether the deadline has cut it short."""
        call.started = scope.end - self.seconds
        call.overdue = scope.overdue

    def _begin(self, call: Call) -> DeadlineScope:
        """Set the call's deadline, for its stages and for what the function calls."""
        # A call that was parked in a pause goes on with what is left of its budget.
        if call.started is None:
            call.started = ambient.clock().monotonic()
        end = call.started + self.seconds
        call.deadline = end if call.deadline is None else min(call.deadline, end)
        return _enter(end)

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        begin = self._begin

        def run(call: Call) -> Any:
            scope = None
            try:
                scope = begin(call)
                try:
                    return proceed(call)
                finally:
                    leave(scope)
            except BaseException:
                # Ctrl-C just as that began.
                leave(scope)
                raise

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        begin = self._begin

        async def run(call: Call) -> Any:
            scope = None
            try:
                scope = begin(call)
                try:
                    return await proceed(call)
                finally:
                    leave(scope)
            except BaseException:
                # As above.
                leave(scope)
                raise

        return run
