# this_file: src/opero/limits/reservation.py
"""Reserve slots before calls, and refund or settle them afterwards: what calls cost, and what is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from opero.errors import OperoUsageError, RefusalError, SpendCapError, warn_user
from opero.limits.windows import SPENT, UNIT, CombinedLimit, CostWindow, as_units, describe_rate
from opero.utils.async_utils import is_async_function

if TYPE_CHECKING:
    from opero.limits.limiter_state import TakenSlot
    from opero.utils.units import RateWindow

__all__ = ["Pricing", "Reservation", "name_of"]


class Reservation:
    """A slot that was taken and may be given back.

    Args:
        limiter: The limiter that it is of.
        units: Cost in millionths.

    Attributes:
        limiter: As above.
        waited: Seconds that it took to get it.
    """

    __slots__ = ("_taken", "_units", "limiter", "waited")

    def __init__(self, limiter: Any, units: int = UNIT) -> None:
        self.limiter: Any = limiter
        self.waited: float = 0.0
        self._units = units
        self._taken: TakenSlot | None = None

    @property
    def cost(self) -> float:
        """What counts for it now: the reserved cost, or the settled one."""
        return self._units / UNIT

    def take(self) -> int:
        """Try to take the slot; return 0, or the nanoseconds to wait.

        Raises:
            SpendCapError: The cap has no room for it.
        """
        limiter = self.limiter
        wait, taken = limiter.current_state().take_marked(self._units)
        if not wait:
            self._taken = taken
        elif wait == SPENT:
            raise SpendCapError(self.cost, limiter.spent, limiter.cap)
        return int(wait)

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
        units, self._units = self._units, 0
        return bool(self.limiter.current_state().give_back(taken, units))

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
        if taken is not None:
            change, self._units = units - self._units, units
            self.limiter.current_state().settle(taken, change)

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

    Attributes:
        settle: As above.
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
        self._cost = 1.0 if cost is None else cost
        if not callable(self._cost):
            as_units(self._cost, "cost")
        self.settle = settle
        self._settle_error = settle_error
        # A cap without costs counts calls, and a call that failed was one.
        self._refunds = cost is not None or any(window.weighted for window in windows)
        self._bounds = [
            (window, part.capacity)
            for window, part in zip(windows, rule.parts, strict=False)
            if isinstance(part, CostWindow)
        ]

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
        if self.settle is not None:
            _settle(reservation, "settle", self.settle, result)

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
