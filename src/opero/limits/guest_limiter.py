# this_file: src/opero/limits/guest_limiter.py
"""A user's own limiter in the place of one of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from opero.errors import DeadlineError, OperoUsageError
from opero.limits.limiter import RateLimiter
from opero.limits.loop_queue import Guest
from opero.limits.pace import SECOND, Quota
from opero.limits.reservation import Reservation
from opero.limits.slot import LocalSlot
from opero.limits.waiting_room import PATIENT, Patience, bear
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.utils.units import Duration

__all__ = ["GuestLimiter"]

_NO_RULE: Final = Quota(1, 1)
"""What stands where one of ours has its rule."""
_UNNOTICED: Final = 0.001
"""A guest does not tell whether it waited; what is shorter than so many seconds is not counted."""


class GuestLimiter(RateLimiter):
    """An object with `async wait()`: `RateLimiter(...)` and `rate_limit=` make one of it."""

    direct = False

    def __init__(self, rate: Any, **others: Any) -> None:
        if others:
            raise OperoUsageError(
                f"{', '.join(others)} cannot be given together with a limiter of your own "
                f'({rate!r}), which has its own rules: write RateLimiter("100/minute", ...).'
            )
        self.name = None
        self.burst = 0
        self._guest = Guest(rate)
        # Never empty, so that nobody takes a slot where there is none.
        self.queues: Any = {"guest": None}
        self._break = LocalSlot(_NO_RULE, lambda: round(ambient.clock().monotonic() * SECOND))

    def _refusal(self, what: str) -> OperoUsageError:
        return OperoUsageError(
            f"{self._guest.limiter!r} can only be awaited in one event loop, so it cannot {what}. "
            'Write rate_limit="100/minute", or share a RateLimiter("100/minute").'
        )

    def require_sync(self) -> None:
        """Refuse: the guest cannot block a thread."""
        raise self._refusal("limit a function that is not async")

    def current_slot(self) -> LocalSlot:
        """Return what remembers a pause; the limit itself is the guest's."""
        return self._break

    def acquire(self, timeout: Duration | None = None, *, cost: float | None = None) -> float:
        """Refuse: the guest cannot block a thread."""
        if not ambient.disabled():
            self.require_sync()
        return 0.0

    def try_acquire(self, *, cost: float | None = None) -> bool:
        """Refuse: the guest knows only how to wait."""
        if ambient.disabled():
            return True
        raise self._refusal("be tried without waiting")

    def reserve_within(self, patience: Patience, cost: float | None = None) -> Reservation:
        """Refuse: the guest cannot block a thread."""
        self.check_cost(cost)
        self.acquire()
        return Reservation(self, _NO_RULE)

    async def queue_up(self, patience: Patience = PATIENT) -> float:
        """Wait as the guest does, and return for how many seconds that was."""
        if ambient.disabled():
            return 0.0
        clock = ambient.clock()
        started = clock.monotonic()
        while paused := self._break.paused():
            bear(patience, clock.monotonic(), wait=paused, paused=paused)
            await clock.asleep(min(1.0, paused / SECOND))
        await self._in_time(patience)
        waited = clock.monotonic() - started
        return waited if waited > _UNNOTICED else 0.0

    async def _in_time(self, patience: Patience) -> None:
        if patience.deadline is None:
            await self._guest.wait()
            return
        from asyncio import timeout

        bear(patience, ambient.clock().monotonic(), wait=0, paused=0)
        alarm = timeout(patience.deadline - ambient.clock().monotonic())
        try:
            async with alarm:
                await self._guest.wait()
        except TimeoutError:
            if not alarm.expired():
                raise  # the guest's own
            raise DeadlineError("the deadline passed while the call waited") from None

    async def reserve_async_within(
        self, patience: Patience, cost: float | None = None
    ) -> Reservation:
        """Do what `wait` does; the guest takes nothing back."""
        self.check_cost(cost)
        reservation = Reservation(self, _NO_RULE)
        reservation.waited = await self.queue_up(patience)
        return reservation

    @property
    def shared(self) -> bool:
        """False: the guest belongs to one event loop."""
        return False

    def share(self) -> bool:
        """Return False."""
        return False

    def __reduce__(self) -> NoReturn:
        raise self._refusal("be sent to another process")

    def describe(self) -> str:
        """Show the guest itself."""
        return f"{self._guest.limiter!r}, in one event loop at a time"

    def __repr__(self) -> str:
        return f"<RateLimiter around {self._guest.limiter!r}>"
