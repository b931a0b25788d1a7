# this_file: src/opero/core/report.py
"""What a call tells in the end: the note on its final error, and the events and counters of its outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.deadline import overdue
from opero.core.failures import attach, raise_again, story
from opero.core.watch import elapsed
from opero.errors import DeadlineError, RefusalError
from opero.utils import ambient
from opero.utils.matching import Rejected, is_final

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Failure, Proceed
    from opero.core.function import FunctionInfo
    from opero.core.stats import Stats
    from opero.events.bus import Emitter

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
        self,
        info: FunctionInfo,
        stats: Stats,
        emitter: Emitter,
        *,
        retried: bool,
        needs_start: bool,
    ) -> None:
        self._name = info.name
        self._owner = info.owner
        self._stats = stats
        self._emitter = emitter
        self._retried = retried
        self.needs_start = needs_start

    def describe(self) -> str:
        """Report has no line of its own in `explain()`."""
        return ""

    def failed(self, call: Call, error: Exception) -> Exception | None:
        """Conclude a call that ends with `error`: chain what came before, add the note, count, tell.

        Returns:
            What the caller gets instead: where a stage refused to go on after real calls had failed,
            the last call's own error. None if it is `error` itself.
        """
        if isinstance(error, Rejected):
            # A result is returned in the end, and its receipt tells the errors on the way.
            return None
        made = call.failures or []
        real = [f.error for f in made if not isinstance(f.error, Rejected)]
        refused = isinstance(error, RefusalError) and is_final(error, real)
        final = real[-1] if refused and real else error
        if refused and isinstance(error, DeadlineError):
            overdue(call, self._emitter, "before the call")
        if made:
            text = self._text(call, made, error, refused=refused)
            attach(
                final,
                self._name,
                text,
                [e for e in real if e is not final],
                owner=self._owner,
                attempts=call.attempts,
                calls=call.calls,
            )
        self._stats.add(gave_up=1)
        if self._emitter.active:
            function = self._emitter.function
            self._emitter.emit(
                events.CallGaveUp(
                    function=function,
                    attempts=call.attempts,
                    calls=call.calls,
                    error=final,
                    seconds=elapsed(call),
                )
            )
        return None if final is error else final

    def _text(self, call: Call, made: list[Failure], error: Exception, *, refused: bool) -> str:
        """Write the note; nothing where there is nothing to add to the error."""
        # Where a user's `stop` decides, a single failure may have been enough for it.
        final = is_final(error, [f.error for f in made])
        alone = len(made) == 1 and self._retried and not final and not ambient.disabled()
        if len(made) > 1 or refused or (alone and self.needs_start):
            since_first = call.started is None
            begin = call.first_failed if since_first else call.started
            seconds = None if begin is None else ambient.clock().monotonic() - begin
            told = story(
                made,
                attempts=call.attempts,
                calls=call.calls,
                seconds=seconds,
                since_first=since_first,
                owner=self._owner,
            )
            end = f"then {type(error).__name__}: {error}" if refused else call.remark
            return f"{told}\n  {end}" if end else told
        if alone:
            kind = type(error).__name__
            return f"was not retried: {call.remark or f'{kind} is not what retry_on asks for'}"
        return ""

    def succeeded(self, call: Call) -> None:
        """Tell listeners of a value that was computed."""
        if self._emitter.active:
            function = self._emitter.function
            self._emitter.emit(
                events.CallSucceeded(
                    function=function,
                    attempts=call.attempts,
                    calls=call.calls,
                    seconds=elapsed(call),
                )
            )

    # --- adapters ----------------------------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        needs_start = self.needs_start

        def run(call: Call) -> Any:
            if needs_start and call.started is None:
                call.started = ambient.clock().monotonic()
            try:
                value = proceed(call)
            except Exception as error:
                instead = self.failed(call, error)
                if instead is None:
                    raise
            else:
                self.succeeded(call)
                return value
            try:
                raise_again(instead)
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del instead

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        needs_start = self.needs_start

        async def run(call: Call) -> Any:
            if needs_start and call.started is None:
                call.started = ambient.clock().monotonic()
            try:
                value = await proceed(call)
            except Exception as error:
                instead = self.failed(call, error)
                if instead is None:
                    raise
            else:
                self.succeeded(call)
                return value
            try:
                raise_again(instead)
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del instead

        return run
