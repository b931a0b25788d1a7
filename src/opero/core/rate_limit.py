# this_file: src/opero/core/rate_limit.py
"""The rate limit stage: a real call starts when its limiter has a slot for it.

It also stands around the call, and so hears of each failure first, whether there are retries or
not: where the service asks to wait, the limiter is paused for all who share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from opero import events
from opero.core.options import standalone
from opero.errors import OperoUsageError, RefusalError
from opero.limits.limiter import RateLimiter, limiter_of, publish_all
from opero.limits.reservation import Reservation
from opero.limits.waiting_room import Patience
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.matching import Rejected
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.decorated import Decorate
    from opero.core.function import FunctionInfo
    from opero.core.options import Options
    from opero.core.retry_after import Hint
    from opero.core.stats import Stats
    from opero.events.bus import Emitter

__all__ = [
    "RateLimit",
    "RateLimiter",
    "Reservation",
    "get_rate_limit_decorator",
    "limiter_of",
    "publish_all",
    "throttled",
]


# --- decisions ------------------------------------------------------------------------------------


def throttled(call: Call, error: Exception) -> Hint | None:
    """Return how long the service asks everybody to wait, None if it does not.

    It is the service that asks only if its own call has failed just now: the refusal of a guard, of
    this function or of one that it calls, is nobody's request. With several fallback values it
    asks those who use this value only.
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
        refused_within: Whether a stage further in may refuse the call; its slot is given back then.
        longest_pause: Longest rest of a pause, in seconds, that a call waits out.
    """

    name = "rate limit"

    def __init__(
        self,
        limiter: RateLimiter,
        stats: Stats,
        emitter: Emitter,
        *,
        refused_within: bool = False,
        longest_pause: float = 60.0,
    ) -> None:
        self.limiter = limiter
        self._stats = stats
        self._emitter = emitter
        self._refused_within = refused_within
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
        if limiter.settles and info.kind in ("generator", "async_generator"):
            raise OperoUsageError(
                f"rate_limit={limiter!r}: {info.name}() is a generator and has no single result for "
                "settle. Take a reservation by hand, and settle it at the end."
            )
        return cls(
            limiter,
            stats,
            emitter,
            refused_within=bool(options.circuit_breaker),
            longest_pause=parse_seconds(options.retry_after_max, "retry_after_max"),
        )

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Block before `proceed` until a slot is free."""
        limiter = self.limiter
        limiter.require_sync()

        def run(call: Call) -> Any:
            # A call that is already made has had its slot. Who has to wait, or comes when others
            # do, stands in line.
            if call.prior_outcome is None and (switch.on or limiter.tickets or limiter.take_slot()):
                self._waited(call, limiter.line_up(self._patience(call)))
            try:
                return proceed(call)
            except Exception as error:
                self._failed(call, error)
                raise

        def run_reserved(call: Call) -> Any:
            if call.prior_outcome is None:
                call.reserved = None
                if not ambient.disabled():
                    bucket, cost = self._measure(call)
                    call.reserved = bucket.reserve_within(self._patience(call), cost)
                    self._waited(call, call.reserved.waited)
            made, reservation = call.calls, call.reserved
            try:
                result = proceed(call)
            except Exception as error:
                self._ended(call, made, reservation, error)
                raise
            self._settle(reservation, result)
            return result

        return run_reserved if self._reserves else run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Wait before `proceed` until a slot is free."""
        limiter = self.limiter

        async def run(call: Call) -> Any:
            if call.prior_outcome is None and (switch.on or limiter.queues or limiter.take_slot()):
                self._waited(call, await limiter.queue_up(self._patience(call)))
            try:
                return await proceed(call)
            except Exception as error:
                self._failed(call, error)
                raise

        async def run_reserved(call: Call) -> Any:
            if call.prior_outcome is None:
                call.reserved = None
                if not ambient.disabled():
                    bucket, cost = self._measure(call)
                    call.reserved = await bucket.reserve_async_within(self._patience(call), cost)
                    self._waited(call, call.reserved.waited)
            made, reservation = call.calls, call.reserved
            try:
                result = await proceed(call)
            except Exception as error:
                self._ended(call, made, reservation, error)
                raise
            self._settle(reservation, result)
            return result

        return run_reserved if self._reserves else run

    @property
    def _reserves(self) -> bool:
        """Whether a call's slot may have to be given back or settled."""
        return self._refused_within or self.limiter.measured

    def _measure(self, call: Call) -> tuple[RateLimiter, float | None]:
        """Return the bucket that a call belongs to, and what it costs there."""
        bucket = self.limiter.bucket_for(call.args, call.kwargs)
        return bucket, bucket.price(call.args, call.kwargs)

    def _settle(self, reservation: Reservation | None, result: object) -> None:
        if reservation is not None:
            reservation.limiter.settle_with(reservation, result)

    def _ended(
        self, call: Call, made: int, reservation: Reservation | None, error: Exception
    ) -> None:
        """Conclude the reservation of a call that failed, or that was not made at all."""
        if isinstance(error, RefusalError):
            # A stage further in did not let the call through.
            if reservation is not None and call.calls == made:
                reservation.refund()
            return
        if isinstance(error, Rejected):
            self._settle(reservation, error.value)
        self._failed(call, error, None if reservation is None else reservation.limiter)

    def _patience(self, call: Call) -> Patience:
        return Patience(call.deadline, self._longest_pause)

    def _waited(self, call: Call, seconds: float) -> None:
        if not seconds:
            return
        call.waited += seconds
        self._stats.add(waited=seconds)
        emitter = self._emitter
        if emitter.active:
            emitter.emit(events.LimiterWaited(function=emitter.function, seconds=seconds))

    def _failed(self, call: Call, error: Exception, limiter: RateLimiter | None = None) -> None:
        """Pause the limiter, or the bucket, for everybody if the service asks to wait."""
        hint = None if ambient.disabled() else throttled(call, error)
        if hint is None or not (limiter or self.limiter).pause(hint.seconds):
            return
        emitter = self._emitter
        if emitter.active:
            emitter.emit(
                events.LimiterPaused(
                    function=emitter.function, seconds=hint.seconds, source=hint.source
                )
            )

    def describe(self) -> str:
        """Tell the rate, the spacing and who shares it."""
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
