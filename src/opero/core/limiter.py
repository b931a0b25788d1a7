# this_file: src/opero/core/limiter.py
"""The rate limiter: one slot clock, and how threads and tasks wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from opero.core import ambient
from opero.core.pace import SECOND, Spacing, rule_for
from opero.core.shareable import Shareable, publish_all
from opero.core.thread_line import ThreadLine, Ticket
from opero.core.units import Rate, format_seconds, parse_rate
from opero.errors import OperoUsageError
from opero.utils.switch import switch

if TYPE_CHECKING:
    import asyncio

    from opero.core.loop_queue import LoopQueue
    from opero.core.pace import Rule
    from opero.core.slot import Mark, Slot

__all__ = ["RateLimiter", "Reservation", "limiter_of", "publish_all"]

_LONGEST_NAP: Final = SECOND
"""Who waits looks at least so often: another process may have given a slot back."""
_LOOP_GRAIN: Final = 1_200_000
"""How late an event loop's timer may be: selectors round up to whole milliseconds."""
_THREAD_GRAIN: Final = 80_000
"""How late a sleeping thread may wake."""
_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day", 604800.0: "week"}


# --- decisions ------------------------------------------------------------------------------------


def nap(wait: int, late: int, grain: int) -> float:
    """Decide how long to sleep before looking at the slot clock again.

    Args:
        wait: Nanoseconds until the slot is free.
        late: Nanoseconds that the sleeper may come late without harm to the rate.
        grain: Nanoseconds that the timer may be late.

    Returns:
        Seconds; 0.0 if any sleep would be too long.

    Example:
        >>> nap(100_000_000, late=100_000_000, grain=1_200_000)
        0.1
        >>> nap(100_000, late=100_000, grain=1_200_000)
        0.0
    """
    return max(0, min(wait, _LONGEST_NAP) - max(0, grain - late)) / SECOND


def describe_rate(rate: Rate) -> str:
    """Write a rate for people.

    Example:
        >>> describe_rate(Rate(100, 60)), describe_rate(Rate(5, 10))
        ('100 per minute', '5 per 10 s')
    """
    return f"{rate.count:g} per {_PERIODS.get(rate.period) or format_seconds(rate.period)}"


def describe_spacing(rule: Rule, burst: int) -> str:
    """Write for people how a rule spaces calls out.

    Example:
        >>> describe_spacing(rule_for(Rate(100, 60), burst=1, smooth=None), burst=1)
        'one call each 0.6 s'
    """
    if not isinstance(rule, Spacing):
        return "no spacing"
    at_once = f", {burst + 1} at once after a pause" if burst > 1 else ""
    return f"{rule}{at_once}"


# --- the limiter ----------------------------------------------------------------------------------


class Reservation:
    """A slot that was taken and may be given back.

    Attributes:
        waited: Seconds that it took to get it.
    """

    __slots__ = ("_mark", "_slot", "waited")

    def __init__(self) -> None:
        self._slot: Slot | None = None
        self._mark: Mark | None = None
        self.waited: float = 0.0

    def refund(self) -> bool:
        """Give the slot back, because the call was not made after all.

        Returns:
            True if the limiter is now as if the slot had never been taken. False, without effect,
            if another call has started since: giving back might let one too many into some window.
        """
        slot, mark, self._slot = self._slot, self._mark, None
        return slot is not None and mark is not None and slot.give_back(mark)

    def take_from(self, limiter: RateLimiter) -> int:
        """Try to take a slot; return 0, or the nanoseconds to wait."""
        slot = limiter.current_slot()
        wait, mark = slot.take_marked()
        if not wait:
            self._slot, self._mark = slot, mark
        return wait

    def __repr__(self) -> str:
        return f"<Reservation after {self.waited:.3f} s>"


class RateLimiter(Shareable):
    """A limit on how many calls start in a period; any number of functions may share one.

    At most `N + burst` calls start in any half-open window of the period, from the first second on.
    It holds across threads, event loops (also successive `asyncio.run`s) and the processes that a
    limiter is pickled to, or forked to after `share()`. Who waits is served in order of arrival,
    within an event loop and among the threads.

    A period of up to a minute is smooth: calls are spaced out evenly. A longer one ("1000/day") is
    a sliding quota: no spacing, and never more than N in any window (N rounded up).

    Args:
        rate: Calls per second, or text such as "100/minute". An object with `async wait()` (of
            asynciolimiter, say) is accepted too, without the other arguments: it limits coroutine
            functions in one event loop at a time, in its own way.
        burst: Calls by which a window may exceed N, to make up for a late start. 0 is strict: what
            starts late is lost, and a fractional N is rounded up.
        smooth: True spaces calls out whatever the period, False never, None goes by the period.
        name: Limiters of one name and rate share a slot among all programs of this user. It lies in
            `OPERO_STATE_DIR`, by default the user's state directory, and outlives both programs and
            reboots.

    Raises:
        OperoUsageError: A value cannot work, or the name is in use with another rate.

    Example:
        >>> limiter = RateLimiter("100/minute", burst=0)
        >>> limiter.acquire()
        0.0
        >>> limiter.try_acquire()
        False
        >>> limiter.describe()
        '100 per minute: one call each 0.6 s, shared by all threads'
    """

    direct = True
    """Whether `take_slot` may be called without any of the verbs, by a wrapper's express lane."""

    def __new__(cls, rate: Any, **_: Any) -> Self:
        """Make a `GuestLimiter` where somebody else's limiter is given."""
        kind: Any = cls
        if cls is RateLimiter and callable(getattr(rate, "wait", None)):
            from opero.core.guest_limiter import GuestLimiter

            kind = GuestLimiter
        made: Self = object.__new__(kind)
        return made

    def __init__(
        self,
        rate: float | str | Any,
        *,
        burst: int = 1,
        smooth: bool | None = None,
        name: str | None = None,
    ) -> None:
        _check(burst, smooth, name)
        self.rate: Rate = parse_rate(rate, "rate")
        self.burst = burst
        self._nobody_waits()
        options = {"burst": burst, "smooth": smooth}
        super().__init__(rule_for(self.rate, burst, smooth), name, (rate, options))

    def _nobody_waits(self) -> None:
        self._line = ThreadLine()
        self.tickets: deque[Ticket] = self._line.tickets
        self.queues: dict[asyncio.AbstractEventLoop, LoopQueue] = {}

    # --- verbs ------------------------------------------------------------------------------------

    def acquire(self) -> float:
        """Block until a call may start, and count it as started.

        Returns:
            Seconds waited, 0.0 if the slot was free.
        """
        if switch.on or self.tickets or self.take_slot():
            return self._stand_in_line(self._try)
        return 0.0

    async def wait(self) -> float:
        """Do what `acquire` does, for a task and without blocking its event loop.

        Returns:
            Seconds waited, 0.0 if the slot was free.
        """
        if switch.on or self.queues or self.take_slot():
            return await self._queue_up(self._try)
        return 0.0

    def try_acquire(self) -> bool:
        """Count a call as started if it may start now and overtakes nobody; tell whether."""
        if ambient.disabled():
            return True
        return not self.tickets and not self.queues and not self._try()

    def reserve(self) -> Reservation:
        """Do what `acquire` does, for a slot that may be given back.

        Example:
            >>> limiter = RateLimiter("1/hour")
            >>> limiter.reserve().refund()
            True
            >>> limiter.try_acquire()
            True
        """
        reservation = Reservation()
        reservation.waited = self._stand_in_line(lambda: reservation.take_from(self))
        return reservation

    async def reserve_async(self) -> Reservation:
        """Do what `wait` does, for a slot that may be given back."""
        reservation = Reservation()
        reservation.waited = await self._queue_up(lambda: reservation.take_from(self))
        return reservation

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    async def __aenter__(self) -> Self:
        await self.wait()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    # --- waiting ----------------------------------------------------------------------------------

    def _try(self) -> int:
        return self.current_slot().take()

    def _stand_in_line(self, take: Callable[[], int]) -> float:
        if ambient.disabled() or not (self.tickets or take()):
            return 0.0
        clock = ambient.clock()
        real = isinstance(clock, ambient.RealClock)
        started = clock.monotonic()
        ticket = Ticket()
        try:
            waited = self._line.enter(ticket)
            while wait := take():
                waited = True
                seconds = nap(wait, self._rule.late, _THREAD_GRAIN) if real else wait / SECOND
                if seconds:
                    clock.sleep(seconds)
                else:
                    # So short a wait is spent awake, but other threads get the interpreter.
                    time.sleep(0)
        finally:
            self._line.leave(ticket)
        return clock.monotonic() - started if waited else 0.0

    async def _queue_up(self, take: Callable[[], int]) -> float:
        if ambient.disabled():
            return 0.0
        from asyncio import get_running_loop

        loop = get_running_loop()
        queue = self.queues.get(loop)
        wait = 0
        if queue is None:
            wait = take()
            if not wait:
                return 0.0
        from opero.core.loop_queue import LoopQueue, look_again

        clock = ambient.clock()
        real = isinstance(clock, ambient.RealClock)
        started = clock.monotonic()
        if queue is None:
            self._forget_closed_loops()
            queue = self.queues[loop] = LoopQueue(self._rule.pace if real else None)
        queue.waiting += 1
        try:
            await queue.enter(min(wait, _LONGEST_NAP) / SECOND)
            try:
                while wait := take():
                    seconds = nap(wait, self._rule.late, _LOOP_GRAIN) if real else wait / SECOND
                    await (clock.asleep(seconds) if seconds else look_again())
            finally:
                queue.leave()
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self.queues.pop(loop, None)
                queue.close()
        return clock.monotonic() - started

    def _forget_closed_loops(self) -> None:
        # Tasks of a loop that was closed over their heads never get to their `finally`.
        for loop in list(self.queues):
            if loop.is_closed():
                self.queues.pop(loop, None)

    def _after_fork(self) -> None:
        self._nobody_waits()
        super()._after_fork()

    def require_sync(self) -> None:
        """Raise an error that names the fix if this limiter can only be awaited."""

    # --- telling ----------------------------------------------------------------------------------

    def describe(self) -> str:
        """Tell the limit in one line: rate, spacing and who shares it."""
        by = "all threads"
        if self.shared:
            by = "all threads and processes"
            if self.name is not None:
                by = f"all programs that name it {self.name!r}"
        spacing = describe_spacing(self._rule, self.burst)
        return f"{describe_rate(self.rate)}: {spacing}, shared by {by}"

    def __repr__(self) -> str:
        wait = self.current_slot().look() / SECOND
        return f"<RateLimiter {self.describe()}; {f'{wait:.3g} s to wait' if wait else 'free'}>"


def limiter_of(value: float | str | RateLimiter | Any) -> RateLimiter:
    """Return a limiter as it is, and make one of anything else that `rate_limit=` accepts."""
    return value if isinstance(value, RateLimiter) else RateLimiter(value)


def _check(burst: object, smooth: object, name: object) -> None:
    if isinstance(burst, bool) or not isinstance(burst, int) or burst < 0:
        raise OperoUsageError(f"burst={burst!r} must be a whole number, 0 or more (0 is strict).")
    if not (smooth is None or isinstance(smooth, bool)):
        raise OperoUsageError(f"smooth={smooth!r} must be True, False or None (by the period).")
    if not (name is None or (isinstance(name, str) and name)):
        raise OperoUsageError(f"name={name!r} must be text that is not empty, or None.")
