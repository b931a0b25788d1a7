# this_file: src/opero/core/rate_limit.py
"""The rate limit stage: a real call starts when its limiter has a slot for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.limiter import RateLimiter, Reservation, limiter_of, publish_all
from opero.errors import RefusalError

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.stage import Emitter
    from opero.core.stats import Stats

__all__ = ["RateLimit", "RateLimiter", "Reservation", "limiter_of", "publish_all"]


class RateLimit:
    """Takes a slot before each real call.

    Attributes:
        limiter: Where the slots come from; several functions may share it.

    Args:
        limiter: As above.
        stats: Counters of the function.
        emitter: Where events go.
        refused_within: Whether a stage further in may refuse the call; its slot is given back then.
    """

    name = "rate limit"

    def __init__(
        self, limiter: RateLimiter, stats: Stats, emitter: Emitter, *, refused_within: bool = False
    ) -> None:
        self.limiter = limiter
        self._stats = stats
        self._emitter = emitter
        self._refused_within = refused_within

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Block before `proceed` until a slot is free."""
        self.limiter.require_sync()
        acquire, reserve = self.limiter.acquire, self.limiter.reserve

        def run(call: Call) -> Any:
            # A call that is already made has had its slot.
            waited = acquire() if call.begun is None else 0.0
            if waited:
                self._waited(call, waited)
            return proceed(call)

        def run_refundable(call: Call) -> Any:
            if call.begun is not None:
                return proceed(call)
            made, reservation = call.calls, reserve()
            if reservation.waited:
                self._waited(call, reservation.waited)
            try:
                return proceed(call)
            except RefusalError:
                _refund(reservation, call, made)
                raise

        return run_refundable if self._refused_within else run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Wait before `proceed` until a slot is free."""
        wait, reserve = self.limiter.wait, self.limiter.reserve_async

        async def run(call: Call) -> Any:
            waited = await wait() if call.begun is None else 0.0
            if waited:
                self._waited(call, waited)
            return await proceed(call)

        async def run_refundable(call: Call) -> Any:
            if call.begun is not None:
                return await proceed(call)
            made, reservation = call.calls, await reserve()
            if reservation.waited:
                self._waited(call, reservation.waited)
            try:
                return await proceed(call)
            except RefusalError:
                _refund(reservation, call, made)
                raise

        return run_refundable if self._refused_within else run

    def _waited(self, call: Call, seconds: float) -> None:
        call.waited += seconds
        self._stats.add(waited=seconds)
        emitter = self._emitter
        if emitter.active:
            emitter.emit(events.LimiterWaited(function=emitter.function, seconds=seconds))

    def describe(self) -> str:
        """Tell the rate, the spacing and who shares it."""
        return self.limiter.describe()


def _refund(reservation: Reservation, call: Call, made: int) -> None:
    """Give the slot of a call back that a stage further in did not let through."""
    if call.calls == made:
        reservation.refund()
