# this_file: src/opero/limits/limiter.py
"""The rate limiter: one slot clock, and how threads and tasks wait for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from opero.errors import OperoUsageError
from opero.limits.joint import is_idle, joined
from opero.limits.pace import SECOND
from opero.limits.reservation import Reservation, describe_rule
from opero.limits.shareable import publish_all
from opero.limits.slotted import Slotted
from opero.limits.waiting_room import PATIENT, Patience, WaitingRoom, patience_of
from opero.utils import ambient, checks
from opero.utils.ambient import switch
from opero.utils.units import Duration, Window, parse_seconds, parse_windows

if TYPE_CHECKING:
    import asyncio

    from opero.limits.loop_queue import LoopQueue
    from opero.limits.pace import Rule
    from opero.limits.thread_line import Ticket

__all__ = ["RateLimiter", "Reservation", "limiter_of", "publish_all"]

_LONGEST_PAUSE: Final = 1e9
"""Seconds, more than 30 years: what a service asks for may be anything."""
# --- the limiter ----------------------------------------------------------------------------------


class RateLimiter(Slotted):
    """A limit on how many calls start in a period; any number of functions may share one.

    At most `N + burst` calls start in any half-open window of the period, from the first second on.
    It holds across threads, event loops (also successive `asyncio.run`s) and the processes that a
    limiter is pickled to, or forked to after `share()`. Who waits is served in order of arrival,
    within an event loop and among the threads.

    A period of up to a minute is smooth: calls are spaced out evenly. A longer one ("1000/day") is
    a sliding quota: no spacing, and never more than N in any window (N rounded up).

    Args:
        rate: Calls per second, or text such as "100/minute"; several of them with "&" between them
            hold together ("10/s & 500/minute"): a call starts under all or waits. A word says what
            is counted ("500 requests/minute & 30000 tokens/minute"): calls, or what they cost.
            None only with a `cap`. An object with `async wait()` (of asynciolimiter, say) is
            accepted too, without the other arguments: it limits coroutine functions in one event
            loop at a time, in its own way.
        burst: Calls by which a window may exceed N, to make up for a late start. 0 is strict: what
            starts late is lost, and a fractional N is rounded up.
        smooth: True spaces calls out whatever the period, False never, None goes by the period, and
            of several windows spaces the shortest only. A window of cost is never spaced.
        name: Limiters of one name and rate share a slot among all programs of this user. It lies in
            `OPERO_STATE_DIR`, by default the user's state directory, and outlives both programs and
            reboots.
        cost: What a call costs (tokens, money), a number or a callable of the call's arguments. It
            is reserved before the call; without a word in `rate`, that is what is counted.
        settle: Callable of the result that returns the real cost. The difference is given back, or
            counted as a debt from now on. A call that failed keeps what was reserved, because it
            may have been billed; one that was never made gets it back.
        cap: Most cost (calls, without `cost`) in all, until `reset_spent()`: then `SpendCapError`.
        key: Callable of the call's arguments: one bucket (with all of the above) for each value that
            it returns, an API key or a host, say. It sees the fallback value in use.

    Raises:
        OperoUsageError: A value cannot work, or the name is in use with another rate.

    A subclass is made where the arguments ask for it: `WeightedLimiter`, `KeyedLimiter`,
    `GuestLimiter`.

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

    measured = False
    """Whether calls differ: in what they cost, or in the bucket that they belong to."""
    settles = False
    """Whether results tell what calls have cost."""

    def __new__(cls, rate: Any = None, **options: Any) -> Self:
        """Make a limiter of the kind that the arguments ask for."""
        kind: Any = cls
        if cls is not RateLimiter:
            pass
        elif callable(getattr(rate, "wait", None)):
            from opero.limits.guest_limiter import GuestLimiter

            kind = GuestLimiter
        elif options.get("key") is not None:
            from opero.limits.keyed_limiter import KeyedLimiter

            kind = KeyedLimiter
        elif rate is None or _weighted(rate, options):
            from opero.limits.weighted_limiter import WeightedLimiter

            kind = WeightedLimiter
        made: Self = object.__new__(kind)
        return made

    def __init__(
        self,
        rate: float | str | Any = None,
        *,
        burst: int = 1,
        smooth: bool | None = None,
        name: str | None = None,
        cost: float | Callable[..., float] | None = None,
        settle: Callable[[Any], float] | None = None,
        cap: float | None = None,
        key: Callable[..., Any] | None = None,
    ) -> None:
        check_shape(burst, smooth, name)
        windows = parse_windows(rate, "rate")
        rule = joined(windows, burst=burst, smooth=smooth)
        self._begin(windows, rule, name, (rate, {"burst": burst, "smooth": smooth}))

    def _begin(
        self,
        windows: tuple[Window, ...],
        rule: Rule,
        name: str | None,
        made_from: tuple[Any, dict[str, Any]],
    ) -> None:
        self.windows = windows
        self.burst: int = made_from[1]["burst"]
        super().__init__(rule, name, made_from)
        self._nobody_waits()

    def _nobody_waits(self) -> None:
        self._room = WaitingRoom(self._rule)
        self.tickets: deque[Ticket] = self._room.tickets
        self.queues: dict[asyncio.AbstractEventLoop, LoopQueue] = self._room.queues

    # --- verbs ------------------------------------------------------------------------------------

    def acquire(self, timeout: Duration | None = None, *, cost: float | None = None) -> float:
        """Block until a call may start, and count it as started.

        Args:
            timeout: How long to wait at most. A wait that would take longer is not even begun.
            cost: What the call costs, where that is counted.

        Returns:
            Seconds waited, 0.0 if the slot was free.

        Raises:
            DeadlineError: There is no slot within `timeout`.
        """
        if switch.on or self.tickets or cost is not None or self.take_slot():
            self.check_cost(cost)
            return self.line_up(patience_of(timeout))
        return 0.0

    async def wait(
        self,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `acquire`
        *,
        cost: float | None = None,
    ) -> float:
        """Do what `acquire` does, for a task and without blocking its event loop.

        Args:
            timeout: How long to wait at most. A wait that would take longer is not even begun.
            cost: What the call costs, where that is counted.

        Returns:
            Seconds waited, 0.0 if the slot was free.

        Raises:
            DeadlineError: There is no slot within `timeout`.
        """
        if switch.on or self.queues or cost is not None or self.take_slot():
            self.check_cost(cost)
            return await self.queue_up(patience_of(timeout))
        return 0.0

    def try_acquire(self, *, cost: float | None = None) -> bool:
        """Count a call as started if it may start now and overtakes nobody; tell whether."""
        self.check_cost(cost)
        if ambient.disabled():
            return True
        return not self.tickets and not self.queues and not self._try()

    def reserve(self, timeout: Duration | None = None, *, cost: float | None = None) -> Reservation:
        """Do what `acquire` does, for a slot that may be given back.

        Example:
            >>> limiter = RateLimiter("1/hour")
            >>> limiter.reserve().refund()
            True
            >>> limiter.try_acquire()
            True
        """
        return self.reserve_within(patience_of(timeout), cost)

    async def reserve_async(
        self,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `acquire`
        *,
        cost: float | None = None,
    ) -> Reservation:
        """Do what `wait` does, for a slot that may be given back."""
        return await self.reserve_async_within(patience_of(timeout), cost)

    def check_cost(self, cost: float | None) -> None:
        """Raise if a call cannot cost that here; without windows of cost it can cost nothing."""
        if cost is not None:
            raise OperoUsageError(
                f"cost={cost!r}: this limiter counts calls, all alike. Say what is counted, as in "
                'RateLimiter("30000 tokens/minute").'
            )

    # --- verbs of the stage -----------------------------------------------------------------------

    def bucket_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RateLimiter:
        """Return the limiter that a call belongs to: this one, unless there is one for each key."""
        return self

    def price(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """Return what a call costs, None where calls are counted."""
        return None

    def settle_with(self, reservation: Reservation, result: object) -> None:
        """Put right what a call has cost, now that its result is there."""

    def reserve_within(self, patience: Patience, cost: float | None = None) -> Reservation:
        """Do what `reserve` does, for a caller whose patience has other bounds than a timeout."""
        reservation = self._reservation(cost)
        reservation.waited = self._room.stand_in_line(reservation.take, self.current_slot, patience)
        return reservation

    async def reserve_async_within(
        self, patience: Patience, cost: float | None = None
    ) -> Reservation:
        """Do what `reserve_async` does, likewise."""
        reservation = self._reservation(cost)
        reservation.waited = await self._room.queue_up(
            reservation.take, self.current_slot, patience
        )
        return reservation

    def _reservation(self, cost: float | None) -> Reservation:
        self.check_cost(cost)
        return Reservation(self, self._rule)

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

    @property
    def spent(self) -> float:
        """Cost that was counted under the `cap`, 0.0 without one."""
        return 0.0

    @property
    def left(self) -> float:
        """Cost that is left under the `cap`, infinity without one."""
        return math.inf

    def reset_spent(self) -> None:
        """Begin the `cap` anew: nothing counts as spent."""

    def describe(self) -> str:
        """Tell the limit in one line: rate, spacing and who shares it."""
        return f"{describe_rule(self.windows, self._rule, self.burst)}, shared by {self._by()}"

    def _by(self) -> str:
        if not self.shared:
            return "all threads"
        if self.name is not None:
            return f"all programs that name it {self.name!r}"
        return "all threads and processes"

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nothing is remembered that still counts."""
        if self.tickets or self.queues or self.paused:
            return False
        rule = self._rule
        return self.current_slot().change(lambda words, now: is_idle(rule, words, now))

    def __repr__(self) -> str:
        wait = self.current_slot().look() / SECOND
        paused = self.paused
        state = f"paused for {paused:.3g} s" if paused else f"{wait:.3g} s to wait"
        return f"<RateLimiter {self.describe()}; {state if wait or paused else 'free'}>"


def limiter_of(value: float | str | RateLimiter | Any) -> RateLimiter:
    """Return a limiter as it is, and make one of anything else that `rate_limit=` accepts."""
    return value if isinstance(value, RateLimiter) else RateLimiter(value)


def _weighted(rate: object, options: dict[str, Any]) -> bool:
    if any(options.get(name) is not None for name in ("cost", "settle", "cap")):
        return True
    return any(window.weighted for window in parse_windows(rate, "rate"))


def check_shape(burst: object, smooth: object, name: object) -> None:
    """Refuse what no limiter can be made of."""
    checks.whole(0)("burst", burst)
    if smooth is not None:
        checks.boolean("smooth", smooth)
    checks.text_or_none("name", name)
