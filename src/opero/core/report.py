# this_file: src/opero/core/report.py
"""What a call tells in the end: the note on its final error, and the events and counters of its outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.core import ambient
from opero.core.call import Rejected
from opero.core.failures import attach, is_final, story

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.function import FunctionInfo
    from opero.core.stage import Emitter
    from opero.core.stats import Stats

__all__ = ["Report"]


class Report:
    """The stage just inside the cache: it sees each computed call once, from its first attempt to its end.

    Args:
        info: The function.
        retried: Whether failures are retried, so that a single failed call deserves an explanation.
        needs_start: Whether the clock must be read before the first attempt.
    """

    name = "report"

    def __init__(
        self, info: FunctionInfo, stats: Stats, emitter: Emitter, *, retried: bool, needs_start: bool
    ) -> None:
        self._name = info.name
        self._owner = f"{info.module}.{info.qualname}"
        self._stats = stats
        self._emitter = emitter
        self._retried = retried
        self.needs_start = needs_start

    def describe(self) -> str:
        """Report has no line of its own in `explain()`."""
        return ""

    def failed(self, call: Call, error: Exception) -> None:
        """Conclude a call that ends with `error`: chain what came before, add the note, count, tell."""
        if isinstance(error, Rejected):
            # A result is returned in the end, and its receipt tells the errors on the way.
            return
        made, call.failures, call.walk = call.failures or [], None, None
        text = ""
        # Where a user's `stop` decides, a single failure may have been enough for it.
        alone = len(made) == 1 and self._retried and not is_final(error, [f.error for f in made]) and not ambient.disabled()
        if len(made) > 1 or (alone and self.needs_start):
            since_first = call.started is None
            begin = call.first_failed if since_first else call.started
            seconds = None if begin is None else ambient.clock().monotonic() - begin
            text = story(
                made, attempts=call.attempts, calls=call.calls, seconds=seconds, since_first=since_first
            )
        elif alone:
            text = f"was not retried: {type(error).__name__} is not what retry_on asks for"
        if made:
            earlier = [f.error for f in made if f.error is not error and not isinstance(f.error, Rejected)]
            attach(error, self._name, text, earlier, owner=self._owner)
        self._stats.add(gave_up=1)
        if self._emitter.active:
            function = self._emitter.function
            self._emitter.emit(
                events.CallGaveUp(function=function, attempts=call.attempts, calls=call.calls, error=error)
            )

    def succeeded(self, call: Call) -> None:
        """Tell listeners of a value that was computed."""
        if self._emitter.active:
            function = self._emitter.function
            self._emitter.emit(events.CallSucceeded(function=function, attempts=call.attempts, calls=call.calls))

    # --- adapters ----------------------------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        needs_start = self.needs_start

        def run(call: Call) -> Any:
            if needs_start:
                call.started = ambient.clock().monotonic()
            try:
                value = proceed(call)
            except Exception as error:
                self.failed(call, error)
                raise
            self.succeeded(call)
            return value

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        needs_start = self.needs_start

        async def run(call: Call) -> Any:
            if needs_start:
                call.started = ambient.clock().monotonic()
            try:
                value = await proceed(call)
            except Exception as error:
                self.failed(call, error)
                raise
            self.succeeded(call)
            return value

        return run
