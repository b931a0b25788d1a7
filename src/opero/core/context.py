# this_file: src/opero/core/context.py
"""Track calls that are listened to, and number the branches of parallel groups."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol

from opero import events
from opero.events.runs import Run
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.core.call import Call
    from opero.events.bus import Emitter

__all__ = ["Branches", "CallObserver", "elapsed", "fork"]


def elapsed(call: Call) -> float | None:
    """Return the seconds since a call began, None without a listener then."""
    if call.run is None or call.run.started is None:
        return None
    return ambient.clock().monotonic() - call.run.started


class CallObserver:
    """One watched call.

    Args:
        call: The call; it gets a run.
        emitter: Where events of its start and end go.
    """

    __slots__ = ("_call", "_emitter", "_started")

    def __init__(self, call: Call, emitter: Emitter) -> None:
        self._call = call
        self._emitter = emitter
        self._started = False
        call.run = Run(emitter.function, started=ambient.clock().monotonic())

    def begin(self) -> None:
        """Make the call the current run, and emit once that it has started."""
        if self._call.run is not None:
            self._call.run.__enter__()
        if not self._started and self._emitter.wants(events.CallStarted):
            self._emitter.emit(events.CallStarted(function=self._emitter.function))
        self._started = True

    def pause(self) -> None:
        """The call goes on later, and maybe elsewhere: it is not the current run until the next `begin`."""
        if self._call.run is not None:
            self._call.run.__exit__(None, None, None)

    def end(self, error: BaseException | None = None) -> None:
        """Emit how the call has ended."""
        call = self._call
        if call.run is not None and self._emitter.wants(events.CallEnded):
            made = call.source == "fresh"
            self._emitter.emit(
                events.CallEnded(
                    function=self._emitter.function,
                    # A coroutine that is closed ends in another context, where its run is not the current one.
                    run_id=call.run.id,
                    parent_id=call.run.parent_id,
                    source=call.source,
                    attempts=call.attempts if made else 0,
                    calls=call.calls,
                    # A stream that is dropped has not failed.
                    error=None if isinstance(error, GeneratorExit) else error,
                    seconds=elapsed(call) or 0.0,
                    slept=call.slept,
                    waited=call.waited,
                )
            )
        self.pause()


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
