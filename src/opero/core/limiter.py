# this_file: src/opero/core/limiter.py
"""The rate limiter: one slot clock, and how threads and tasks wait for it."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from opero.core import ambient
from opero.core.pace import SECOND, Spacing, rule_for
from opero.core.shareable import Shareable, publish_all
from opero.core.units import Duration, Rate, format_seconds, parse_rate, parse_seconds
from opero.core.waiting_room import PATIENT, Patience, WaitingRoom
from opero.errors import OperoUsageError
from opero.utils.switch import switch

if TYPE_CHECKING:
    import asyncio

    from opero.core.loop_queue import LoopQueue
    from opero.core.pace import Rule
    from opero.core.slot import Mark, Slot
    from opero.core.thread_line import Ticket

__all__ = ["RateLimiter", "Reservation", "limiter_of", "publish_all"]

_LONGEST_PAUSE: Final = 1e9
"""Seconds, more than 30 years: what a service asks for may be anything."""
_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day", 604800.0: "week"}


# --- decisions ------------------------------------------------------------------------------------


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
        options = {"burst": burst, "smooth": smooth}
        super().__init__(rule_for(self.rate, burst, smooth), name, (rate, options))
        self._nobody_waits()

    def _nobody_waits(self) -> None:
        self._room = WaitingRoom(self._rule)
        self.tickets: deque[Ticket] = self._room.tickets
        self.queues: dict[asyncio.AbstractEventLoop, LoopQueue] = self._room.queues

    # --- verbs ------------------------------------------------------------------------------------

    def acquire(self, timeout: Duration | None = None) -> float:
        """Block until a call may start, and count it as started.

        Args:
            timeout: How long to wait at most. A wait that would take longer is not even begun.

        Returns:
            Seconds waited, 0.0 if the slot was free.

        Raises:
            DeadlineError: There is no slot within `timeout`.
        """
        if switch.on or self.tickets or self.take_slot():
            return self.line_up(_patience(timeout))
        return 0.0

    async def wait(self, timeout: Duration | None = None) -> float:  # noqa: ASYNC109 - as in `acquire`
        """Do what `acquire` does, for a task and without blocking its event loop.

        Args:
            timeout: How long to wait at most. A wait that would take longer is not even begun.

        Returns:
            Seconds waited, 0.0 if the slot was free.

        Raises:
            DeadlineError: There is no slot within `timeout`.
        """
        if switch.on or self.queues or self.take_slot():
            return await self.queue_up(_patience(timeout))
        return 0.0

    def try_acquire(self) -> bool:
        """Count a call as started if it may start now and overtakes nobody; tell whether."""
        if ambient.disabled():
            return True
        return not self.tickets and not self.queues and not self._try()

    def reserve(self, patience: Patience = PATIENT) -> Reservation:
        """Do what `acquire` does, for a slot that may be given back.

        Example:
            >>> limiter = RateLimiter("1/hour")
            >>> limiter.reserve().refund()
            True
            >>> limiter.try_acquire()
            True
        """
        reservation = Reservation()
        reservation.waited = self._room.stand_in_line(
            lambda: reservation.take_from(self), self.current_slot, patience
        )
        return reservation

    async def reserve_async(self, patience: Patience = PATIENT) -> Reservation:
        """Do what `wait` does, for a slot that may be given back."""
        reservation = Reservation()
        reservation.waited = await self._room.queue_up(
            lambda: reservation.take_from(self), self.current_slot, patience
        )
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

    # --- pauses -----------------------------------------------------------------------------------

    def pause(self, seconds: Duration) -> bool:
        """Let no call start for a while, in any thread, event loop or process of this limit.

        Who waits keeps its place. After the pause calls come out one by one: spaced as the rate
        says, or, under a quota, ten in the time that the pause took until nobody waits any more.

        `@opero` does this by itself when a service asks to wait.

        Args:
            seconds: How long from now on.

        Returns:
            False if a pause already lasts that long.

        Example:
            >>> limiter = RateLimiter("100/s")
            >>> limiter.pause("1h")
            True
            >>> limiter.try_acquire()
            False
            >>> limiter.resume()
            >>> limiter.paused
            0.0
        """
        length = round(min(parse_seconds(seconds, "seconds"), _LONGEST_PAUSE) * SECOND)
        return self.current_slot().pause(length)

    def resume(self) -> None:
        """End a pause before its time; it takes waiters up to a second to notice."""
        self.current_slot().resume()

    @property
    def paused(self) -> float:
        """Seconds that are left of a pause, 0.0 without."""
        return self.current_slot().paused() / SECOND

    # --- waiting ----------------------------------------------------------------------------------

    def _try(self) -> int:
        return self.current_slot().take()

    def line_up(self, patience: Patience = PATIENT) -> float:
        """Do what `acquire` does, for a caller whose patience has other bounds than a timeout."""
        return self._room.stand_in_line(self._try, self.current_slot, patience)

    async def queue_up(self, patience: Patience = PATIENT) -> float:
        """Do what `wait` does, for a caller whose patience has other bounds than a timeout."""
        return await self._room.queue_up(self._try, self.current_slot, patience)

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
        paused = self.paused
        state = f"paused for {paused:.3g} s" if paused else f"{wait:.3g} s to wait"
        return f"<RateLimiter {self.describe()}; {state if wait or paused else 'free'}>"


def limiter_of(value: float | str | RateLimiter | Any) -> RateLimiter:
    """Return a limiter as it is, and make one of anything else that `rate_limit=` accepts."""
    return value if isinstance(value, RateLimiter) else RateLimiter(value)


def _patience(timeout: Duration | None) -> Patience:
    if timeout is None:
        return PATIENT
    return Patience(ambient.clock().monotonic() + parse_seconds(timeout, "timeout"))


def _check(burst: object, smooth: object, name: object) -> None:
    if isinstance(burst, bool) or not isinstance(burst, int) or burst < 0:
        raise OperoUsageError(f"burst={burst!r} must be a whole number, 0 or more (0 is strict).")
    if not (smooth is None or isinstance(smooth, bool)):
        raise OperoUsageError(f"smooth={smooth!r} must be True, False or None (by the period).")
    if not (name is None or (isinstance(name, str) and name)):
        raise OperoUsageError(f"name={name!r} must be text that is not empty, or None.")
