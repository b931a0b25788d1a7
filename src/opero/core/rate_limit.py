# this_file: src/opero/core/rate_limit.py
"""The rate limit stage: a real call starts when its limiter has a slot for it.

It also stands around the call, and so hears of each failure first, whether there are retries or
not: where the service asks to wait, the limiter is paused for all who share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.core import ambient
from opero.core.call import Rejected
from opero.core.limiter import RateLimiter, Reservation, limiter_of, publish_all
from opero.core.waiting_room import Patience
from opero.errors import RefusalError
from opero.utils.switch import switch

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.hints import Hint
    from opero.core.stage import Emitter
    from opero.core.stats import Stats

__all__ = ["RateLimit", "RateLimiter", "Reservation", "limiter_of", "publish_all", "throttled"]


# --- decisions ------------------------------------------------------------------------------------


def throttled(call: Call, error: Exception) -> Hint | None:
    """Return how long the service asks everybody to wait, None if it does not.

    It is the service that asks only if its own call has failed just now: the refusal of a guard, of
    this function or of one that it calls, is nobody's request. With several fallback values it
    asks those who use this value only.
    """
    if call.several or isinstance(error, RefusalError):
        return None
    if not call.failures or call.failures[-1].error is not error:
        return None
    # Loaded at the first failure.
    from opero.core.hints import requested_wait

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

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Block before `proceed` until a slot is free."""
        limiter = self.limiter
        limiter.require_sync()

        def run(call: Call) -> Any:
            # A call that is already made has had its slot. Who has to wait, or comes when others
            # do, stands in line.
            if call.begun is None and (switch.on or limiter.tickets or limiter.take_slot()):
                self._waited(call, limiter.line_up(self._patience(call)))
            try:
                return proceed(call)
            except Exception as error:
                self._failed(call, error)
                raise

        def run_refundable(call: Call) -> Any:
            if call.begun is not None:
                return run(call)
            made, reservation = call.calls, limiter.reserve(self._patience(call))
            self._waited(call, reservation.waited)
            try:
                return proceed(call)
            except RefusalError:
                _refund(reservation, call, made)
                raise
            except Exception as error:
                self._failed(call, error)
                raise

        return run_refundable if self._refused_within else run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Wait before `proceed` until a slot is free."""
        limiter = self.limiter

        async def run(call: Call) -> Any:
            if call.begun is None and (switch.on or limiter.queues or limiter.take_slot()):
                self._waited(call, await limiter.queue_up(self._patience(call)))
            try:
                return await proceed(call)
            except Exception as error:
                self._failed(call, error)
                raise

        async def run_refundable(call: Call) -> Any:
            if call.begun is not None:
                return await run(call)
            made, reservation = call.calls, await limiter.reserve_async(self._patience(call))
            self._waited(call, reservation.waited)
            try:
                return await proceed(call)
            except RefusalError:
                _refund(reservation, call, made)
                raise
            except Exception as error:
                self._failed(call, error)
                raise

        return run_refundable if self._refused_within else run

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

    def _failed(self, call: Call, error: Exception) -> None:
        """Pause the limiter for everybody if the service asks to wait."""
        hint = None if ambient.disabled() else throttled(call, error)
        if hint is None or not self.limiter.pause(hint.seconds):
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


def _refund(reservation: Reservation, call: Call, made: int) -> None:
    """Give the slot of a call back that a stage further in did not let through."""
    if call.calls == made:
        reservation.refund()
