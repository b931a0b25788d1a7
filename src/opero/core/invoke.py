# this_file: src/opero/core/invoke.py
"""The innermost step: the real call of the function, counted, its failure noted, its result judged."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from opero import events
from opero.core.deadline import require_time, run_until
from opero.core.failures import raise_again
from opero.core.stream import read_stream, start_stream
from opero.errors import Rejected, asks
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.function import Stats
    from opero.core.timeout import Timeout
    from opero.events.bus import Emitter


class AwaitableResult(BaseException):
    """A plain function returned an awaitable: the call has to go on in the asynchronous pipeline.

    A BaseException, so that no stage takes it for a failure.
    """

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        super().__init__()
        self.awaitable = awaitable


class Invoke:
    """Calls the function and keeps the books.

    Args:
        fn: The function.
        stats: Its counters.
        emitter: Where its events go.
        rejects: Predicate that refuses results (`retry_if_result`), or None.
        label: Gives the label of the fallback value of a call, or None without fallback.
        timeout: Limit for each real call, or None.
        idle_timeout: Limit for each item of a stream after the first; None for `timeout`.
        stream: Whether the function is a generator function.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        stats: Stats,
        emitter: Emitter,
        *,
        rejects: Callable[[Any], object] | None = None,
        label: Callable[[Call], str | None] | None = None,
        timeout: Timeout | None = None,
        idle_timeout: Timeout | None = None,
        stream: bool = False,
    ) -> None:
        self._idle = idle_timeout or timeout
        self._stream = stream
        self._fn = fn
        self._stats = stats
        self._emitter = emitter
        self._rejects = rejects
        self._label = label
        self._timeout = timeout

    def failed(self, call: Call, error: Exception) -> None:
        """Note a real call that gave no result: in the call, the counters and the events."""
        if self._label is not None:
            call.label = self._label(call)
        call.failed(error)
        if call.first_failed is None:
            call.first_failed = ambient.clock().monotonic()
        self._stats.add(failures=1)
        if self._emitter.active:
            self._emitter.emit(
                events.AttemptFailed(
                    attempt=call.attempts,
                    value=call.label,
                    error=None if isinstance(error, Rejected) else error,
                    seconds=None
                    if call.tried is None
                    else ambient.clock().monotonic() - call.tried,
                )
            )

    @functools.cached_property
    def _deadline_only(self) -> Timeout:
        """The limit of calls that have a deadline, but no `timeout`."""
        # Loaded when a deadline is met first.
        from opero.core.timeout import Timeout

        return Timeout(None, self._emitter)

    def _judge(self, call: Call, result: object) -> None:
        if self._rejects is not None and asks(self._rejects, result):
            rejected = Rejected(result)
            try:
                self.failed(call, rejected)
                raise rejected
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del rejected

    def sync(self, *, probe: Callable[[], None] | None = None) -> Proceed:
        """Return the innermost step for synchronous callers.

        Args:
            probe: Called when a result turned out not to be awaitable; None if that is known already.
        """
        fn, count, judged = self._fn, self._stats.call_counter.count, self._rejects is not None
        probing = probe is not None
        if self._stream:
            fn = functools.partial(start_stream, fn)
        timeout = self._timeout

        def run(call: Call) -> Any:
            nonlocal probing
            if call.deadline is not None and call.prior_outcome is None:
                require_time(call, self._emitter, "before the call")
            try:
                if call.prior_outcome is not None:
                    raise_again(call.take_prior_outcome())
                count()
                call.calls += 1
                if call.run is not None:
                    call.tried = ambient.clock().monotonic()
                if timeout is None:
                    result = fn(*call.args, **call.kwargs)
                else:
                    result = timeout.run(functools.partial(fn, *call.args, **call.kwargs), call)
            except Exception as error:
                # What the deadline cuts short has not failed by itself.
                if not call.overdue:
                    self.failed(call, error)
                raise
            if probing:
                if hasattr(type(result), "__await__"):
                    raise AwaitableResult(cast("Awaitable[Any]", result))
                probing = False
                if probe is not None:
                    probe()
            if judged:
                self._judge(call, result)
            return result

        return self._attached(run) if self._stream else run

    def _attached(self, run: Proceed) -> Proceed:
        """Return a step that makes a started stream part of its call."""
        idle = self._idle

        def run_stream(call: Call) -> Any:
            def step(work: Callable[[], Any]) -> Any:
                if call.deadline is not None:
                    require_time(call, self._emitter, "during the stream")
                if idle is not None:
                    return idle.run(work, call)
                return work() if call.deadline is None else run_until(call.deadline, work)

            def failed(error: Exception) -> None:
                if not call.overdue:
                    self.failed(call, error)

            stream = run(call)
            if not stream.ended:
                stream.attach(call, step)
                stream.at_failure(failed)
            return stream

        return run_stream

    async def _read(self, source: AsyncGenerator[Any, Any], call: Call) -> None:
        """Hand out the items of an asynchronous generator, each within its limit."""

        def limited(step: Callable[..., Awaitable[Any]], *given: Any) -> Awaitable[Any]:
            limit = self._idle if call.items else self._timeout
            if call.deadline is not None:
                # Items that come without a wait give a timer no chance.
                require_time(call, self._emitter, "during the stream")
                limit = limit or self._deadline_only
            awaitable = step(*given)
            return awaitable if limit is None else limit.within(awaitable, call)

        await read_stream(source, call, limited)

    def asynchronous(self) -> AsyncProceed:
        """Return the innermost step for an event loop; a function that returns a plain value is welcome too.

        That of an asynchronous generator lasts until the last item.
        """
        fn, count, judged = self._fn, self._stats.call_counter.count, self._rejects is not None
        timeout, stream = self._timeout, self._stream

        async def run(call: Call) -> Any:
            limit = timeout
            if stream and (self._idle is not None or call.deadline is not None):
                ambient.require_loop("limit the time of a call")
            if call.deadline is not None:
                limit = limit or self._deadline_only
                if call.prior_outcome is None:
                    require_time(call, self._emitter, "before the call")
            try:
                if call.prior_outcome is None:
                    count()
                    call.calls += 1
                    if call.run is not None:
                        call.tried = ambient.clock().monotonic()
                    result = fn(*call.args, **call.kwargs)
                elif isinstance(call.prior_outcome, Exception):
                    raise_again(call.take_prior_outcome())
                else:
                    result = call.take_prior_outcome()
                if stream:
                    return await self._read(result, call)
                if hasattr(type(result), "__await__"):
                    result = await (result if limit is None else limit.within(result, call))
            except Exception as error:
                if not call.overdue:
                    self.failed(call, error)
                raise
            if judged:
                self._judge(call, result)
            return result

        return run
