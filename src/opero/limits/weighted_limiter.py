# this_file: src/opero/limits/weighted_limiter.py
"""A limiter of what calls cost: tokens or money, reserved before a call and settled after it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.errors import OperoUsageError, OperoWarning, SpendCapError
from opero.limits.cost import SPENT, UNIT, CostCap, CostWindow, as_units
from opero.limits.joint import Joint, joined
from opero.limits.limiter import RateLimiter, check_shape
from opero.limits.reservation import Reservation, describe_rate
from opero.limits.waiting_room import patience_of
from opero.utils import ambient
from opero.utils.async_utils import is_async_function
from opero.utils.stack import users_stacklevel
from opero.utils.units import Duration, parse_windows

if TYPE_CHECKING:
    from opero.limits.pace import Words

__all__ = ["WeightedLimiter"]


class WeightedLimiter(RateLimiter):
    """A `RateLimiter` with `cost`, `settle` or `cap`, or with a window that counts something else
    than calls: `RateLimiter(...)` makes one.
    """

    direct = False
    measured = True

    def __init__(
        self,
        rate: float | str | None = None,
        *,
        burst: int = 1,
        smooth: bool | None = None,
        name: str | None = None,
        cost: float | Callable[..., float] | None = None,
        settle: Callable[[Any], float] | None = None,
        cap: float | None = None,
    ) -> None:
        check_shape(burst, smooth, name)
        for option, value in (("cost", cost), ("settle", settle)):
            _check_callable(option, value, number=option == "cost")
        if rate is None and cap is None:
            raise OperoUsageError(
                'rate=None: write a rate such as "100/minute", or a cap on all that is spent.'
            )
        windows = () if rate is None else parse_windows(rate, "rate", weighted=cost is not None)
        limit = None if cap is None else as_units(cap, "cap")
        if limit == 0:
            raise OperoUsageError(f"cap={cap!r} lets nothing through: write more than 0.")
        if limit is None and not any(window.weighted for window in windows):
            raise OperoUsageError(
                f"rate={rate!r} counts calls only, so that nothing can cost more or less. "
                'Say what else is counted, as in "30000 tokens/minute", or give a cap.'
            )
        self._cost = 1.0 if cost is None else cost
        self._settle = settle
        self.settles = settle is not None
        self._cap = limit
        rule = joined(windows, burst=burst, smooth=smooth, cap=limit)
        # With a cap or a window of cost, it always is.
        assert isinstance(rule, Joint)  # noqa: S101 - tells the type checkers
        self._joint = rule
        if not callable(self._cost):
            self.check_cost(self._cost)
        shape = {"burst": burst, "smooth": smooth, "cost": cost, "settle": settle, "cap": cap}
        self._begin(windows, rule, name, (rate, shape))

    # --- costs ------------------------------------------------------------------------------------

    def check_cost(self, cost: float | None) -> None:
        """Raise if that is no number of 0 or more."""
        if cost is not None:
            as_units(cost, "cost")

    def _fitting(self, cost: float) -> int:
        units = as_units(cost, "cost")
        windows = [part for part in self._joint.parts if isinstance(part, CostWindow)]
        weighted = [window for window in self.windows if window.weighted] if windows else []
        for window, part in zip(weighted, windows, strict=True):
            if units > part.capacity:
                raise OperoUsageError(
                    f"cost={cost:g} is more than {describe_rate(window.rate, window.unit)} will "
                    "ever allow: split the call, or raise the rate."
                )
        return units

    def price(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
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
                f"cost={_named(self._cost)} raised {type(error).__name__}. "
                "It gets the call's arguments and returns a number."
            ) from error
        self.check_cost(cost)
        return cost

    def settle_with(self, reservation: Reservation, result: object) -> None:
        """Put right what a call has cost; a `settle` that fails costs nobody a result."""
        if self._settle is None:
            return
        try:
            reservation.settle(self._settle(result))
        except Exception as error:  # noqa: BLE001 - the call itself has succeeded
            warnings.warn(
                f"settle={_named(self._settle)} raised {type(error).__name__}: "
                "what was reserved counts",
                OperoWarning,
                stacklevel=users_stacklevel(),
            )

    def _reservation(self, cost: float | None) -> Reservation:
        if cost is None:
            if callable(self._cost):
                raise OperoUsageError("say what the call costs: acquire(cost=...).")
            cost = self._cost
        return _Reservation(self, self._joint, self._fitting(cost))

    # --- verbs ------------------------------------------------------------------------------------

    def acquire(self, timeout: Duration | None = None, *, cost: float | None = None) -> float:
        """Block until a call of this cost may start, and count it."""
        return self.reserve(timeout, cost=cost).waited

    async def wait(
        self,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `acquire`
        *,
        cost: float | None = None,
    ) -> float:
        """Do what `acquire` does, for a task and without blocking its event loop."""
        return (await self.reserve_async_within(patience_of(timeout), cost)).waited

    def try_acquire(self, *, cost: float | None = None) -> bool:
        """Count a call of this cost if it may start now and overtakes nobody; tell whether."""
        reservation = self._reservation(cost)
        if ambient.disabled():
            return True
        return not self.tickets and not self.queues and not reservation.take()

    # --- the cap ----------------------------------------------------------------------------------

    def _spent(self) -> int:
        joint = self._joint

        def spent(words: Words, now: int) -> int:
            return joint.spent(words)

        return self.current_slot().change(spent)

    @property
    def spent(self) -> float:
        """Cost that was counted under the `cap`, 0.0 without one."""
        return self._spent() / UNIT

    @property
    def left(self) -> float:
        """Cost that is left under the `cap`, infinity without one."""
        return math.inf if self._cap is None else max(0, self._cap - self._spent()) / UNIT

    def reset_spent(self) -> None:
        """Begin the `cap` anew: nothing counts as spent."""
        joint = self._joint
        self.current_slot().change(lambda words, now: joint.forget_spent(words))

    def refuse(self, cost: float) -> None:
        """Raise the error of a cap that has no room for a cost.

        Raises:
            SpendCapError: Always.
        """
        cap = next(part.limit for part in self._joint.parts if isinstance(part, CostCap)) / UNIT
        raise SpendCapError(cost, self.spent, cap)


class _Reservation(Reservation):
    """A reservation that a cap may refuse."""

    __slots__ = ()

    def take(self) -> int:
        """Try to take the slot; return 0, or the nanoseconds to wait.

        Raises:
            SpendCapError: The cap has no room for it.
        """
        wait = super().take()
        if wait == SPENT:
            self.limiter.refuse(self.cost)
        return wait


def _named(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _check_callable(option: str, value: object, *, number: bool) -> None:
    if value is None or (number and isinstance(value, int | float)):
        return
    if not callable(value) or is_async_function(value):
        either = "a number or " if number else ""
        raise OperoUsageError(f"{option}={value!r} must be {either}a plain function, or None.")
