# this_file: src/opero/limits/limiter.py
"""Limit how many calls start in a period, and what they cost, for threads, tasks and processes."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Final

from opero.errors import OperoUsageError
from opero.limits.gcra import SECOND, Rule
from opero.limits.keyed import Buckets, Pricing
from opero.limits.limiter_state import LimiterState, Reservation
from opero.limits.shared import SharedGuard
from opero.limits.waiting import UNLIMITED, ExternalLimiter, SlotQueue, WaitBudget, budget_of
from opero.limits.windows import (
    UNIT,
    CombinedLimit,
    SlidingWindow,
    as_units,
    combined,
    describe_rule,
)
from opero.utils import ambient, checks
from opero.utils.ambient import switch
from opero.utils.secrets import mask_urls
from opero.utils.units import Duration, RateWindow, format_seconds, parse_seconds, parse_windows

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections import OrderedDict

    from opero.limits.gcra import Cells
    from opero.utils.ambient import Clock
    from opero.utils.waiters import Waiter, WaitingLine


_LONGEST_PAUSE: Final = 1e9
"""Seconds, more than 30 years: what a service asks for may be anything."""
_NO_RULE: Final = SlidingWindow(1, 1)
"""That of a limiter whose slots are those of its buckets, or of the user's own limiter."""


class RateLimiter(SharedGuard):
    """A limit on how many calls start in a period; any number of functions may share one.

    At most `N + burst` calls start in any half-open window of the period, from the first second on. It holds across
    threads, event loops (also successive `asyncio.run`s) and the processes that a limiter is pickled to, or forked to
    after `share()`. Callers are served in order of arrival, within an event loop and among the threads.

    A period of up to a minute is smooth: calls are spaced out evenly. A longer one ("1000/day") is a sliding quota: no
    spacing, and never more than N in any window (N rounded up).

    Args:
        rate: Calls per second, or text such as "100/minute"; several of them with "&" between them hold together
            ("10/s & 500/minute"): a call starts under all or waits. A word says what is counted ("500 requests/minute
            & 30000 tokens/minute"): calls, or what they cost. None only with a `cap`. An object with `async wait()`
            (of asynciolimiter, say) is accepted too, without the other arguments: it limits coroutine functions in one
            event loop at a time, in its own way.
        burst: Calls by which a window may exceed N, to make up for a late start. 0 is strict: what starts late is lost,
            and a fractional N is rounded up.
        smooth: True spaces calls out whatever the period, False never, None goes by the period, and of several windows
            spaces the shortest only. A window of cost is never spaced.
        name: Limiters of one name and rate share a slot among all programs of this user. It lies in `OPERO_STATE_DIR`,
            by default the user's state directory, outlives programs and reboots, and goes by the wall clock.
        cost: What a call costs (tokens, money), a number or a callable of the call's arguments. It is reserved before
            the call; without a word in `rate`, that is what is counted.
        settle: Callable of the result that returns the real cost. The difference is given back, or counted as a debt
            from now on.
        settle_error: Callable of the error that returns the real cost of a call that failed, None to keep what was
            reserved. Without it a call that cannot have been billed (no connection, 401, 403, 404, 429, 5xx, a refusal
            of opero's) gives its cost back, and any other failed call keeps it.
        cap: Most cost (calls, without `cost`) in all, until `reset_spent()`: then `SpendCapError`.
        key: Callable of the call's arguments: one bucket (with all of the above) for each value that it returns, an API
            key or a host, say. It sees the fallback value in use.

    Raises:
        OperoUsageError: A value cannot work, or the name is in use with another rate.

    Attributes:
        name: As above.
        burst: As above.
        windows: What is counted, how much, in how many seconds.
        take_slot: Takes a slot and returns 0, or returns the nanoseconds to wait. Its caller must have looked at
            `threads_waiting` or `loops_waiting`.
        threads_waiting: Truthy while threads wait.
        loops_waiting: The event loops in which tasks wait.
        direct: Whether `take_slot` may be called without any of the verbs, by a wrapper's fast path.
        pricing: What calls cost, None where they are counted.
        measured: Whether calls differ: in what they cost, or in the bucket that they belong to.
        state: The state under the real clock; None in a worker that has not looked for that of its program yet.

    Example:
        >>> limiter = RateLimiter("100/minute", burst=0)
        >>> limiter.acquire()
        0.0
        >>> limiter.try_acquire()
        False
        >>> limiter.describe()
        '100 per minute: one call each 0.6 s, shared by all threads'
    """

    name: str | None
    take_slot: Callable[[], int]
    threads_waiting: OrderedDict[Waiter, None]
    loops_waiting: dict[AbstractEventLoop, WaitingLine]
    state: LimiterState | None

    def __init__(
        self,
        rate: float | str | Any = None,
        *,
        burst: int = 1,
        smooth: bool | None = None,
        name: str | None = None,
        cost: float | Callable[..., float] | None = None,
        settle: Callable[[Any], float] | None = None,
        settle_error: Callable[[Exception], float | None] | None = None,
        cap: float | None = None,
        key: Callable[..., Any] | None = None,
    ) -> None:
        shape: dict[str, Any] = {
            "burst": burst, "smooth": smooth, "cost": cost, "settle": settle,
            "settle_error": settle_error, "cap": cap, "key": key,
        }  # fmt: skip
        checks.whole(0)("burst", burst)
        checks.none_or(checks.boolean)("smooth", smooth)
        checks.text_or_none("name", name)
        self.name = name
        self.burst: int = burst
        self.windows: tuple[RateWindow, ...] = ()
        self._of_named = False
        self._external: ExternalLimiter | None = None
        self.pricing: Pricing | None = None
        self._buckets: Buckets | None = None
        self.cap: float | None = cap
        if callable(getattr(rate, "wait", None)):
            rule = self._use_external(rate, {"name": name, **shape})
        else:
            rule = self._use_windows(rate, shape)
            if key is not None:
                # What is wrong with a bucket shows now, and not in the first call.
                bucket = {**shape, "key": None}
                self._described = describe_rule(self.windows, rule, burst)
                self._buckets = Buckets(
                    key, lambda: RateLimiter(rate, **bucket), self._share_bucket
                )
                # Its file shows other processes where those of the buckets are.
                rule = _NO_RULE
        self.direct: bool = rule is not _NO_RULE and self.pricing is None
        self.measured: bool = self._buckets is not None or self.pricing is not None
        self._rule: Rule = rule
        self._test: tuple[Clock, LimiterState] | None = None
        self._state: LimiterState = LimiterState(rule)
        super().__init__((rate, shape))
        self._cannot_share = self._external is not None
        self._publish_state()
        self._begin_queue()
        if name is not None:
            self.share()

    def _use_windows(self, rate: Any, shape: dict[str, Any]) -> Rule:
        cost, cap = shape["cost"], shape["cap"]
        most = None if cap is None else as_units(cap, "cap")
        priced = any(shape[option] is not None for option in ("cost", "settle", "settle_error"))
        if most == 0:
            raise OperoUsageError(f"cap={cap!r} lets nothing through: write more than 0.")
        if rate is not None or cap is None:
            self.windows = parse_windows(rate, "rate", weighted=cost is not None)
        rule = combined(self.windows, burst=shape["burst"], smooth=shape["smooth"], cap=most)
        weighted = cap is not None or any(window.weighted for window in self.windows)
        if priced and not weighted:
            raise OperoUsageError(
                f"rate={rate!r} counts calls only, so that nothing can cost more or less. "
                'Say what else is counted, as in "30000 tokens/minute", or give a cap.'
            )
        if weighted and isinstance(rule, CombinedLimit):
            self.pricing = Pricing(rule, self.windows, cost, shape["settle"], shape["settle_error"])
        return rule

    def _use_external(self, limiter: Any, options: dict[str, Any]) -> Rule:
        usual = {"burst": 1}
        if given := [name for name, value in options.items() if value != usual.get(name)]:
            raise OperoUsageError(
                f"{', '.join(given)} cannot be given together with a limiter of your own "
                f'({limiter!r}), which has its own rules: write RateLimiter("100/minute", ...).'
            )
        self.burst = 0
        self._external = ExternalLimiter(limiter)
        return _NO_RULE

    def _begin_queue(self) -> None:
        self._queue = SlotQueue(self._rule)
        self.threads_waiting = self._queue.threads.waiting
        self.loops_waiting = self._queue.loops

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
        if switch.on or self.threads_waiting or cost is not None or self.take_slot():
            return self.reserve(timeout, cost=cost).waited
        return 0.0

    async def wait(self, timeout: Duration | None = None, *, cost: float | None = None) -> float:  # noqa: ASYNC109 - as in `acquire`
        """Do what `acquire` does, for a task and without blocking its event loop.

        Args:
            timeout: How long to wait at most. A wait that would take longer is not even begun.
            cost: What the call costs, where that is counted.

        Returns:
            Seconds waited, 0.0 if the slot was free.

        Raises:
            DeadlineError: There is no slot within `timeout`.
        """
        if switch.on or self.loops_waiting or cost is not None or self.take_slot():
            return (await self.reserve_async(timeout, cost=cost)).waited
        return 0.0

    def try_acquire(self, *, cost: float | None = None) -> bool:
        """Count a call as started if it may start now and overtakes no other; return whether."""
        if ambient.disabled():
            return True
        self.require_sync("be tried without waiting")
        reservation = self.reservation(cost)
        return not self.threads_waiting and not self.loops_waiting and not reservation.take()

    def reserve(self, timeout: Duration | None = None, *, cost: float | None = None) -> Reservation:
        """Do what `acquire` does, for a slot that may be given back.

        Example:
            >>> limiter = RateLimiter("1/hour")
            >>> limiter.reserve().refund()
            True
            >>> limiter.try_acquire()
            True
        """
        reservation = self.reservation(cost)
        self.fill(reservation, budget_of(timeout))
        return reservation

    async def reserve_async(
        self,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `acquire`
        *,
        cost: float | None = None,
    ) -> Reservation:
        """Do what `wait` does, for a slot that may be given back."""
        reservation = self.reservation(cost)
        await self.fill_async(reservation, budget_of(timeout))
        return reservation

    # --- waiting ----------------------------------------------------------------------------------

    def fill(self, reservation: Reservation, budget: WaitBudget = UNLIMITED) -> float:
        """Block until a reservation has its slot; return the seconds waited."""
        if not ambient.disabled():
            self.require_sync()
            reservation.waited = self._queue.wait(reservation.take, self.current_state, budget)
        return reservation.waited

    async def fill_async(self, reservation: Reservation, budget: WaitBudget = UNLIMITED) -> float:
        """Do what `fill` does, for a task and without blocking its event loop."""
        if not ambient.disabled():
            state = self.current_state
            reservation.waited = (
                await self._queue.wait_async(reservation.take, state, budget)
                if self._external is None
                else await self._external.wait(state(), budget)  # it takes nothing back
            )
        return reservation.waited

    def reservation(self, cost: float | None = None) -> Reservation:
        """Return a reservation for a call that costs so much, to be filled."""
        self._require_key()
        self.check_cost(cost)
        units = UNIT if self.pricing is None else self.pricing.units(cost)
        return Reservation(self, units)

    # --- buckets and prices -----------------------------------------------------------------------

    def bucket(self, key: object) -> RateLimiter:
        """Return the bucket of a key, to use, pause or ask it by hand.

        Args:
            key: Text, a number, or anything else with content.

        Raises:
            OperoUsageError: The key has no content, or the limiter has no buckets.

        Example:
            >>> limiter = RateLimiter("1/hour", key=lambda host: host)
            >>> limiter.bucket("a.example").try_acquire()
            True
            >>> limiter.bucket("a.example").try_acquire()
            False
            >>> limiter.bucket("b.example").try_acquire()
            True
        """
        if self._buckets is None:
            raise OperoUsageError("this limiter has no buckets: make it with key=.")
        bucket: RateLimiter = self._buckets.of_key(key)
        return bucket

    def reservation_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reservation:
        """Return a reservation for a call, to be filled: in the bucket that it belongs to, for what it costs.

        Raises:
            OperoUsageError: `key` or `cost` raised, or returned what cannot be one.
        """
        limiter: RateLimiter = (
            self if self._buckets is None else self._buckets.of_call(args, kwargs)
        )
        pricing = limiter.pricing
        return limiter.reservation(None if pricing is None else pricing.price(args, kwargs))

    def __len__(self) -> int:
        return 0 if self._buckets is None else len(self._buckets)

    def __bool__(self) -> bool:
        return True

    def check_cost(self, cost: float | None) -> None:
        """Raise if a call cannot cost that here; without windows of cost it can cost nothing."""
        if cost is not None and self.pricing is None:
            raise OperoUsageError(
                f"cost={cost!r}: this limiter counts calls, all alike. Say what is counted, as in "
                'RateLimiter("30000 tokens/minute").'
            )

    def _require_key(self) -> None:
        if self._buckets is not None and not ambient.disabled():
            raise OperoUsageError(
                "this limiter has one bucket for each key: say which, as in "
                "limiter.bucket(key).acquire()."
            )

    def require_sync(self, what: str = "limit a function that is not async") -> None:
        """Raise an error that names the fix if this limiter can only be awaited."""
        if self._external is not None:
            raise self._external.refusal(what)

    @property
    def spent(self) -> float:
        """Cost that was counted under the `cap` (those of all buckets that are remembered), 0.0 without one."""
        if self._buckets is not None:
            return float(sum(bucket.spent for bucket in self._buckets.all()))
        return self._spent() / UNIT

    @property
    def left(self) -> float:
        """Cost that is left under the `cap`, infinity without one."""
        self._require_key()
        return inf if self.cap is None else max(0, as_units(self.cap, "cap") - self._spent()) / UNIT

    def _spent(self) -> int:
        return sum(self._with_caps(lambda cells: cells[0]))

    def reset_spent(self) -> None:
        """Begin the `cap` (those of all buckets) anew: nothing counts as spent."""
        for bucket in () if self._buckets is None else self._buckets.all():
            bucket.reset_spent()
        self._with_caps(lambda cells: cells.__setitem__(0, 0))

    def _with_caps(self, do: Callable[[Cells], Any]) -> list[Any]:
        """Return what comes out for the state of the `cap`; nothing without one."""
        rule = self._rule
        if not isinstance(rule, CombinedLimit):
            return []
        return self.current_state().update(
            lambda state, pause, now: [do(cells) for cells in rule.caps(state)]
        )

    # --- pauses -----------------------------------------------------------------------------------

    def pause(self, seconds: Duration) -> bool:
        """Let no call start for a while, in any thread, event loop or process of this limit.

        Callers that wait keep their places. After the pause calls come out one by one: spaced as the rate says, or,
        under a quota, ten in the time that the pause took until no caller waits any more.

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
        self._require_key()
        length = round(min(parse_seconds(seconds, "seconds"), _LONGEST_PAUSE) * SECOND)
        return self.current_state().pause(length)

    def resume(self) -> None:
        """End a pause before its time; waiting callers notice within a second."""
        self._require_key()
        self.current_state().resume()

    @property
    def paused(self) -> float:
        """Seconds that are left of a pause, 0.0 without."""
        return self.current_state().paused() / SECOND

    @property
    def next_free(self) -> float:
        """Seconds until another call may start, 0.0 if that is now; an estimate while others wait."""
        return self.current_state().wait_for() / SECOND

    # --- where the state is -----------------------------------------------------------------------

    def _publish_state(self) -> None:
        state = self._state
        self.state = state if self.attached else None
        if not self.direct:
            self.take_slot = _not_directly
        elif not self.attached:
            self.take_slot = self._take_first
        else:
            self.take_slot = state.take

    def _take_first(self) -> int:
        """Take the first slot of a worker, whose program may have this limiter too."""
        self.current_state()
        return self.take_slot()

    def current_state(self) -> LimiterState:
        """Return the state under the clock in force; a test's clock never touches the real one."""
        if self.attached and not switch.on:
            return self._state
        clock = ambient.clock()
        if isinstance(clock, ambient.RealClock):
            if not self.attached:
                self.attach()
            return self._state
        test = self._test
        if test is None or test[0] is not clock:
            test = self._test = (clock, LimiterState(self._rule, _nanoseconds_of(clock)))
        return test[1]

    def _begin_attached(self) -> None:
        super()._begin_attached()
        self._publish_state()

    def _new_path(self) -> str:
        from opero.limits.state_file import state_path

        return super()._new_path() if self.name is None else state_path(self.name)

    def _go_to(self, path: str, *, create: bool) -> None:
        named = self.name is not None or self._of_named
        self._state.move(path, create=create or named, named=named)
        self._publish_state()
        if self._buckets is not None:
            self._path = path
            self._buckets.share()

    def _share_bucket(self, bucket: RateLimiter, key: bytes) -> None:
        bucket._of_named = self.name is not None
        self._share_part(bucket, self.name or self.uid, key)

    def __reduce__(self) -> tuple[Any, ...]:
        self.require_sync("be sent to another process")
        return super().__reduce__()

    def after_fork(self) -> None:
        """Replace locks that another thread of the parent may have held, and forget those that wait there."""
        super().after_fork()
        self._begin_queue()
        self._state.after_fork()
        if self._buckets is not None:
            self._buckets.after_fork()

    # --- descriptions -----------------------------------------------------------------------------

    def describe(self) -> str:
        """Describe the limit in one line: rate, spacing and which callers share it."""
        if self._external is not None:
            return f"{self._external.limiter!r}, in one event loop at a time"
        by = "all threads and processes" if self.shared else "all threads"
        if self.shared and self.name is not None:
            by = f"all programs that name it {mask_urls(repr(self.name))}"
        if self._buckets is not None:
            return f"{self._described}, for each key by itself, shared by {by}"
        return f"{describe_rule(self.windows, self._rule, self.burst)}, shared by {by}"

    @property
    def idle(self) -> bool:
        """Whether no caller waits and nothing is remembered that still counts."""
        if self.threads_waiting or self.loops_waiting or self.paused:
            return False
        return self.current_state().is_idle()

    def __repr__(self) -> str:
        if self._external is not None:
            return f"<RateLimiter around {self._external.limiter!r}>"
        if self._buckets is not None:
            count = len(self._buckets)
            return f"<RateLimiter {self.describe()}; {count} bucket{'s' * (count != 1)}>"
        wait = self.current_state().wait_for() / SECOND
        paused = self.paused
        state = (
            f"paused for {format_seconds(paused)}" if paused else f"{format_seconds(wait)} to wait"
        )
        return f"<RateLimiter {self.describe()}; {state if wait or paused else 'free'}>"


def limiter_of(value: float | str | RateLimiter | Any) -> RateLimiter:
    """Return a limiter as it is, and make one of anything else that `rate_limit=` accepts."""
    return value if isinstance(value, RateLimiter) else RateLimiter(value)


def _not_directly() -> int:
    """Say that there is no slot, so that the caller takes one of the other ways."""
    return 1


def _nanoseconds_of(clock: Clock) -> Callable[[], int]:
    # Counted from here: large floats are too coarse to hit the same nanosecond from two sides.
    zero = clock.monotonic()
    return lambda: round((clock.monotonic() - zero) * SECOND)
