# this_file: src/opero/core/rate_limit.py
"""Start each real call when its rate limiter has a slot for it.

The stage also stands around the call, so that it sees each failure first, whether there are retries or not: where the
service asks to wait, the limiter is paused for all functions that share it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self

from opero import events
from opero.core.options import standalone
from opero.errors import DeadlineError, OperoUsageError, RefusalError, Rejected
from opero.limits.limiter import RateLimiter, limiter_of
from opero.limits.limiter_state import Reservation
from opero.limits.waiting import WaitBudget
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.decorated import Decorate
    from opero.core.function import FunctionInfo, Stats
    from opero.core.options import Options
    from opero.core.retry_after import Hint
    from opero.events.bus import Emitter

__all__ = ["RateLimiter", "get_rate_limit_decorator"]


# --- decisions ------------------------------------------------------------------------------------


def throttled(call: Call, error: Exception) -> Hint | None:
    """Return how long the service asks all callers to wait, None if it does not.

    It is the service that asks only if its own call has failed just now: the refusal of a guard, of this function or
    of one that it calls, asks for nothing. With several fallback values it asks the callers of this value only.
    """
    if call.has_alternatives or isinstance(error, RefusalError):
        return None
    if not call.failures or call.failures[-1].error is not error:
        return None
    # Loaded at the first failure.
    from opero.core.retry_after import requested_wait

    hint = requested_wait(error.value if isinstance(error, Rejected) else error)
    return hint if hint is not None and hint.seconds > 0 else None


# --- stage ----------------------------------------------------------------------------------------


class RateLimit:
    """Takes a slot before each real call, and pauses the limiter when the service asks to wait.

    Attributes:
        limiter: Where the slots come from; several functions may share it.

    Args:
        limiter: As above.
        stats: Counters of the function.
        emitter: Where events go.
        longest_pause: Longest rest of a pause, in seconds, that a call waits out.
    """

    name = "rate limit"

    def __init__(
        self, limiter: RateLimiter, stats: Stats, emitter: Emitter, *, longest_pause: float = 60.0
    ) -> None:
        self.limiter = limiter
        self._stats = stats
        self._emitter = emitter
        self._longest_pause = longest_pause

    @classmethod
    def of(
        cls,
        wanted: float | str | RateLimiter,
        info: FunctionInfo,
        options: Options,
        stats: Stats,
        emitter: Emitter,
    ) -> Self:
        """Make the stage that the options describe.

        Raises:
            OperoUsageError: The limiter cannot limit this function.
        """
        limiter = limiter_of(wanted)
        if (
            limiter.pricing
            and limiter.pricing.settle
            and info.kind in ("generator", "async_generator")
        ):
            raise OperoUsageError(
                f"rate_limit={limiter!r}: {info.name}() is a generator and has no single result for "
                "settle. Take a reservation by hand, and settle it at the end."
            )
        limiter.guards(info.module, info.qualname, "rate_limit")
        return cls(
            limiter,
            stats,
            emitter,
            longest_pause=parse_seconds(options.retry_after_max, "retry_after_max"),
        )

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Block before `proceed` until a slot is free."""
        limiter, measured = self.limiter, self.limiter.measured
        limiter.require_sync()

        def run(call: Call) -> Any:
            # A call that is already made has had its slot. One that has to wait, or comes while others do, queues.
            if call.prior_outcome is None:
                slot = call.reserved = self._reservation(call) if measured else Reservation(limiter)
                if switch.on or slot.limiter.threads_waiting or slot.take():
                    self._note(call, slot.limiter.fill(slot, self._budget(call)))
            made = call.calls
            try:
                result = proceed(call)
            except Exception as error:
                self._ended(call, made, error)
                raise
            if call.stream is not None:
                call.stream.at_failure(partial(self._ended, call, made))
            elif measured:
                self._settle(call, result)
            return result

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Wait before `proceed` until a slot is free."""
        limiter, measured = self.limiter, self.limiter.measured
        external = not measured and not limiter.direct

        async def run(call: Call) -> Any:
            if call.prior_outcome is None:
                slot = call.reserved = self._reservation(call) if measured else Reservation(limiter)
                if switch.on or external or slot.limiter.loops_waiting or slot.take():
                    self._note(call, await slot.limiter.fill_async(slot, self._budget(call)))
            made = call.calls
            try:
                result = await proceed(call)
            except Exception as error:
                self._ended(call, made, error)
                raise
            if measured:
                self._settle(call, result)
            return result

        return run

    def _reservation(self, call: Call) -> Reservation:
        """Return a reservation for what a call costs, in the bucket that it belongs to."""
        if ambient.disabled():
            return Reservation(self.limiter)
        return self.limiter.reservation_for(call.args, call.kwargs)

    def _settle(self, call: Call, result: object) -> None:
        slot = call.reserved
        if slot is not None and slot.limiter.pricing is not None and not ambient.disabled():
            slot.limiter.pricing.settle_result(slot, result)

    def _ended(self, call: Call, made: int, error: Exception) -> None:
        """Conclude the reservation of a call that failed, or that was not made at all."""
        reservation = None if ambient.disabled() else call.reserved
        if isinstance(error, RefusalError) and call.calls == made:
            # A stage further in did not let the call through.
            if reservation is not None:
                reservation.refund()
            return
        if reservation is not None:
            if isinstance(error, Rejected):
                self._settle(call, error.value)
            elif (pricing := reservation.limiter.pricing) is not None:
                # Loaded at the first failure.
                from opero.core.classify import may_be_billed

                # A refusal that the call itself has met is that of another pipeline; a deadline cuts calls short.
                billed = isinstance(error, DeadlineError) or (
                    not isinstance(error, RefusalError) and may_be_billed(error)
                )
                pricing.settle_failure(reservation, error, billed=billed)
        self._failed(call, error, None if reservation is None else reservation.limiter)

    def _budget(self, call: Call) -> WaitBudget:
        return WaitBudget(call.deadline, self._longest_pause, call.stop_wait)

    def _note(self, call: Call, seconds: float) -> None:
        if seconds:
            call.note_wait(seconds, self._stats, self._emitter)

    def _failed(self, call: Call, error: Exception, limiter: RateLimiter | None = None) -> None:
        """Pause the limiter, or the bucket, for all callers if the service asks to wait."""
        hint = None if ambient.disabled() else throttled(call, error)
        if hint is None or not (limiter or self.limiter).pause(hint.seconds):
            return
        emitter = self._emitter
        if emitter.active:
            emitter.emit(events.LimiterPaused(seconds=hint.seconds, source=hint.source))

    def describe(self) -> str:
        """Return the rate, the spacing and which callers share it, for `explain()`."""
        return self.limiter.describe()


# --- on its own -----------------------------------------------------------------------------------


def get_rate_limit_decorator(
    rate_limit: float | str | RateLimiter | None = None, **options: Any
) -> Decorate:
    """Return a decorator that only limits the rate of calls.

    Args:
        rate_limit: Calls per second, "100/minute", or a shared `RateLimiter`; None for no limit.
        options: retry_after_max.

    Example:
        >>> @get_rate_limit_decorator(rate_limit="1000/s")
        ... def ping():
        ...     return "pong"
        >>> ping()
        'pong'
    """
    made: Decorate = standalone(
        "get_rate_limit_decorator", "rate limit", rate_limit=rate_limit, **options
    )
    return made
