# this_file: src/opero/limits/reservation.py
"""Reserve slots before calls, and refund or settle them afterwards: what calls cost, and what is given back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, cast

from opero.errors import OperoUsageError, RefusalError, SpendCapError, warn_user
from opero.limits.gcra import Gcra, LimitPause, Rule
from opero.limits.state.base import LimiterState, TakenSlot, undo, unless_paused
from opero.limits.windows import SPENT, UNIT, CombinedLimit, CostWindow, SpendCap, as_units
from opero.utils.async_utils import is_async_function
from opero.utils.units import Rate, RateWindow, format_seconds

__all__ = ["Pricing", "Reservation", "cost_left", "describe_rate", "describe_rule", "name_of"]


class Reservation:
    """A slot that was taken and may be given back.

    Args:
        limiter: The limiter that it is of.
        rule: Its rule.
        units: Cost in millionths.

    Attributes:
        limiter: As above.
        waited: Seconds that it took to get it.
    """

    __slots__ = ("_at", "_rule", "_taken", "_units", "limiter", "waited")

    def __init__(self, limiter: Any, rule: Rule, units: int = UNIT) -> None:
        self.limiter: Any = limiter
        self.waited: float = 0.0
        self._rule = rule
        self._units = units
        self._taken: TakenSlot | None = None
        self._at = 0

    @property
    def cost(self) -> float:
        """What counts for it now: the reserved cost, or the settled one."""
        return self._units / UNIT

    def _state(self) -> LimiterState:
        state: LimiterState = self.limiter.current_state()
        return state

    def take(self) -> int:
        """Try to take the slot; return 0, or the nanoseconds to wait.

        Raises:
            SpendCapError: The cap has no room for it.
        """
        state = self._state()
        rule = self._rule
        if not isinstance(rule, CombinedLimit):
            wait, taken = state.take_marked()
        else:
            units = self._units

            def begin(cells: Any, pause: LimitPause, now: int) -> tuple[int, TakenSlot]:
                before = rule.snapshot(cells)
                wait = unless_paused(
                    lambda cells, now: rule.take(cells, now, units), cells, pause, now
                )
                self._at = now
                return wait, TakenSlot(before, rule.snapshot(cells))

            wait, taken = state.update(begin)
            if wait == SPENT:
                cap = next(part.limit for part in rule.parts if isinstance(part, SpendCap)) / UNIT
                raise SpendCapError(self.cost, self.limiter.spent, cap)
        if not wait:
            self._taken = taken
        return wait

    def refund(self) -> bool:
        """Give the slot back, because the call was not made after all.

        What it costs is given back in any case.

        Returns:
            True if the limiter is now as if the slot had never been taken. False if another call has started since: to
            count this one out might let one too many into some window.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return False
        rule, state = self._rule, self._state()
        if not isinstance(rule, CombinedLimit):
            return state.give_back(taken)
        at, units, self._units = self._at, self._units, 0

        def change(cells: Any, pause: LimitPause, now: int) -> bool:
            rule.settle(cells, now, at, -units)
            return undo(rule, cells, taken)

        return state.update(change)

    def settle(self, cost: float) -> None:
        """Correct what the call has cost: the difference is given back, or becomes a debt.

        That is final: a slot that was settled or given back stays so.

        Args:
            cost: The real cost.

        Raises:
            OperoUsageError: It is no number of 0 or more, or the limiter counts calls.

        Example:
            >>> from opero import RateLimiter
            >>> limiter = RateLimiter("1000 tokens/minute")
            >>> reservation = limiter.reserve(cost=900)
            >>> limiter.try_acquire(cost=900)
            False
            >>> reservation.settle(100)
            >>> limiter.try_acquire(cost=900)
            True
        """
        self.limiter.check_cost(cost)
        units = as_units(cost, "cost")
        taken, self._taken = self._taken, None
        rule, at = self._rule, self._at
        if taken is None or not isinstance(rule, CombinedLimit):
            return
        change, self._units = units - self._units, units
        if change:
            self._state().update(lambda cells, pause, now: rule.settle(cells, now, at, change))

    def __repr__(self) -> str:
        return f"<Reservation after {self.waited:.3f} s>"


# --- prices ---------------------------------------------------------------------------------------


class Pricing:
    """What calls cost before they are made, and what they have cost afterwards.

    Args:
        rule: The limits, of which one counts cost.
        windows: The windows of it.
        cost: A number, or a callable of the call's arguments.
        settle: Callable of the result that returns the real cost.
        settle_error: Callable of the error that returns the real cost of a failed call.
    """

    def __init__(
        self,
        rule: CombinedLimit,
        windows: tuple[RateWindow, ...],
        cost: float | Callable[..., float] | None,
        settle: Callable[[Any], float] | None,
        settle_error: Callable[[Exception], float | None] | None,
    ) -> None:
        _check_callable("cost", cost, number=True)
        _check_callable("settle", settle)
        _check_callable("settle_error", settle_error)
        self._rule = rule
        self._cost = 1.0 if cost is None else cost
        if not callable(self._cost):
            as_units(self._cost, "cost")
        self._settle = settle
        self._settle_error = settle_error
        # A cap without costs counts calls, and a call that failed was one.
        self._refunds = cost is not None or any(window.weighted for window in windows)
        self._bounds = [
            (window, part.capacity)
            for window, part in zip(windows, rule.parts, strict=False)
            if isinstance(part, CostWindow)
        ]

    @property
    def settles(self) -> bool:
        """Whether the cost of calls is known from their results."""
        return self._settle is not None

    def units(self, cost: float | None) -> int:
        """Return a cost in millionths; that of every call where none is given.

        Raises:
            OperoUsageError: It is no cost, or more than the limit will ever allow.
        """
        if cost is None:
            if callable(self._cost):
                raise OperoUsageError("say what the call costs: acquire(cost=...).")
            cost = self._cost
        units = as_units(cost, "cost")
        for window, capacity in self._bounds:
            if units > capacity:
                raise OperoUsageError(
                    f"cost={cost:g} is more than {describe_rate(window.rate, window.unit)} will "
                    "ever allow: split the call, or raise the rate."
                )
        return units

    def price(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Return what a call with these arguments costs.

        Raises:
            OperoUsageError: `cost` raised, or returned no number of 0 or more.
        """
        if not callable(self._cost):
            return self._cost
        try:
            cost = self._cost(*args, **kwargs)
        except Exception as error:
            raise OperoUsageError(
                f"cost={name_of(self._cost)} raised {type(error).__name__}. "
                "It gets the call's arguments and returns a number."
            ) from error
        as_units(cost, "cost")
        return cost

    def settle_result(self, reservation: Reservation, result: object) -> None:
        """Correct what a call has cost; a `settle` that fails costs no caller a result."""
        if self._settle is not None:
            _settle(reservation, "settle", self._settle, result)

    def settle_failure(self, reservation: Reservation, error: Exception, *, billed: bool) -> None:
        """Correct what a failed call has cost.

        Args:
            reservation: What was reserved for it.
            error: What it raised.
            billed: Whether it may have been billed; where `settle_error` is not given, the cost is given back if not.
        """
        if self._settle_error is not None and not isinstance(error, RefusalError):
            _settle(reservation, "settle_error", self._settle_error, error)
        elif self._refunds and not billed:
            reservation.settle(0)


def _settle(
    reservation: Reservation, option: str, cost_of: Callable[[Any], float | None], outcome: object
) -> None:
    try:
        cost = cost_of(outcome)
        if cost is not None or option == "settle":
            reservation.settle(cast("float", cost))  # what `settle=` returns is checked there
    except Exception as error:  # noqa: BLE001 - the call has its own outcome
        warn_user(
            f"{option}={name_of(cost_of)} raised {type(error).__name__}: what was reserved counts"
        )


def name_of(function: object) -> str:
    """Return how a user's function is called in messages."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def _check_callable(option: str, value: object, *, number: bool = False) -> None:
    if value is None or (number and isinstance(value, int | float)):
        return
    if not callable(value) or is_async_function(value):
        either = "a number or " if number else ""
        raise OperoUsageError(f"{option}={value!r} must be {either}a plain function, or None.")


# --- descriptions ---------------------------------------------------------------------------------

_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day", 604800.0: "week"}


def describe_rate(rate: Rate, unit: str = "") -> str:
    """Write a rate for people.

    Example:
        >>> describe_rate(Rate(100, 60)), describe_rate(Rate(5, 10), "tokens")
        ('100 per minute', '5 tokens per 10 s')
    """
    what = unit and f" {unit}"
    return f"{rate.count:g}{what} per {_PERIODS.get(rate.period) or format_seconds(rate.period)}"


def describe_rule(windows: tuple[RateWindow, ...], rule: Rule, burst: int) -> str:
    """Write a whole limit for people, window by window."""
    parts: tuple[object, ...] = rule.parts if isinstance(rule, CombinedLimit) else (rule,)
    # Where all windows count calls, the unit says nothing.
    mixed = any(window.weighted for window in windows)
    lines = [
        f"{describe_rate(window.rate, window.unit if mixed else '')}: {_spacing(part, burst)}"
        for window, part in zip(windows, parts, strict=False)
    ]
    lines += [str(part) for part in parts[len(windows) :]]
    return " & ".join(lines)


def _spacing(part: object, burst: int) -> str:
    if not isinstance(part, Gcra):
        return "no spacing"
    at_once = f", {burst + 1} at once after a pause" if burst > 1 else ""
    return f"{part}{at_once}"


def cost_left(limit: int | None, spent: int) -> float:
    """Return what is left under a cap, infinity without one."""
    return math.inf if limit is None else max(0, limit - spent) / UNIT
