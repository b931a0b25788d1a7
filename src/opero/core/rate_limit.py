# this_file: src/opero/core/rate_limit.py
"""The rate limit stage: a real call starts when its limiter has a slot for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.limiter import RateLimiter, Reservation, limiter_of, publish_all

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.stage import Emitter
    from opero.core.stats import Stats

__all__ = ["RateLimit", "RateLimiter", "Reservation", "limiter_of", "publish_all"]


class RateLimit:
    """Takes a slot before each real call.

    Attributes:
        limiter: Where the slots come from; several functions may share it.
    """

    name = "rate limit"

    def __init__(self, limiter: RateLimiter, stats: Stats, emitter: Emitter) -> None:
        self.limiter = limiter
        self._stats = stats
        self._emitter = emitter

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Block before `proceed` until a slot is free."""
        self.limiter.require_sync()
        acquire = self.limiter.acquire

        def run(call: Call) -> Any:
            # A call that is already made has had its slot.
            waited = acquire() if call.begun is None else 0.0
            if waited:
                self._waited(call, waited)
            return proceed(call)

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Wait before `proceed` until a slot is free."""
        wait = self.limiter.wait

        async def run(call: Call) -> Any:
            waited = await wait() if call.begun is None else 0.0
            if waited:
                self._waited(call, waited)
            return await proceed(call)

        return run

    def _waited(self, call: Call, seconds: float) -> None:
        call.waited += seconds
        self._stats.add(waited=seconds)
        emitter = self._emitter
        if emitter.active:
            emitter.emit(events.LimiterWaited(function=emitter.function, seconds=seconds))

    def describe(self) -> str:
        """Tell the rate, the spacing and who shares it."""
        return self.limiter.describe()
