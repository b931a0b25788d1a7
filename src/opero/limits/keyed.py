# this_file: src/opero/limits/keyed.py
"""Distinguish calls: one bucket for each key (an API key, a host, a tenant), and what a call costs."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Final, cast

from opero.errors import OperoUsageError, warn_user
from opero.limits.windows import CombinedLimit, CostWindow, as_units, describe_rate
from opero.utils.async_utils import is_async_function

if TYPE_CHECKING:
    from opero.limits.limiter_state import Reservation
    from opero.utils.units import RateWindow


_MOST: Final = 10_000
"""Buckets that are kept; as many keys within one period are no keys any more, but requests."""
_SWEEP_FROM: Final = 64


class Buckets:
    """The limiters of single keys.

    A bucket in which nothing is remembered that still counts is dropped. Keys may be secrets: they are never shown,
    and only a keyed hash of them stands in the names of files.

    Args:
        key: Callable of the call's arguments that returns the key.
        make: Makes the bucket of a new key.
        share: Shares a bucket, given the bytes of its key, with other processes, if its limiter is shared.
    """

    def __init__(
        self, key: Any, make: Callable[[], Any], share: Callable[[Any, bytes], None]
    ) -> None:
        if not callable(key) or is_async_function(key):
            raise OperoUsageError(f"key={key!r} must be a plain function of the call's arguments.")
        self._key: Callable[..., Any] = key
        self._make = make
        self._share = share
        self._buckets: OrderedDict[Hashable, Any] = OrderedDict()
        self._all: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._sweep_at = _SWEEP_FROM
        self._lock = threading.RLock()

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the bucket that a call with these arguments belongs to.

        Raises:
            OperoUsageError: `key` raised, or returned what cannot be a key.
        """
        return self.of_key(_asked("key", self._key, args, kwargs, "what has a bucket of its own"))

    def of_key(self, key: object) -> Any:
        """Return the bucket of a key.

        Raises:
            OperoUsageError: The key has no content.
        """
        from opero.caching.keys import Unkeyable, fast_part

        try:
            part = fast_part(key)
        except Unkeyable as signal:
            raise OperoUsageError(f"a value that cannot be a limiter's key: {signal}.") from None
        with self._lock:
            found = self._buckets.get(part)
            if found is not None:
                self._buckets.move_to_end(part)
                return found
            # One that was dropped may still be in use.
            found = self._all.get(part)
            if found is None:
                found = self._make()
                self._share(found, _encoded(part))
                self._all[part] = found
            self._drop_idle()
            self._buckets[part] = found
            return found

    def _drop_idle(self) -> None:
        if len(self._buckets) < self._sweep_at:
            return
        for part in [part for part, bucket in self._buckets.items() if bucket.idle]:
            del self._buckets[part]
        if len(self._buckets) >= _MOST:
            self._buckets.popitem(last=False)
            warn_user(
                f"a limiter has more than {_MOST:,} keys in use at once; the bucket that was not "
                "used for the longest time is forgotten"
            )
        self._sweep_at = min(_MOST, max(_SWEEP_FROM, 2 * len(self._buckets)))

    def all(self) -> list[Any]:
        """Return the buckets that are remembered."""
        with self._lock:
            return list(self._buckets.values())

    def share(self) -> None:
        """Share all buckets with other processes, now that their limiter is."""
        with self._lock:
            for part, bucket in list(self._all.items()):
                self._share(bucket, _encoded(part))

    def after_fork(self) -> None:
        """Replace a lock that another thread of the parent may have held."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._buckets)


def _encoded(part: Hashable) -> bytes:
    from opero.caching.keys import encode

    return encode(part)


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
        cost: float = _asked("cost", self._cost, args, kwargs, "a number")
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
        if self._settle_error is not None:
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


def _asked(option: str, function: Callable[..., Any], args: Any, kwargs: Any, answer: str) -> Any:
    """Return what a user's function says about a call."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise OperoUsageError(
            f"{option}={name_of(function)} raised {type(error).__name__}. "
            f"It gets the call's arguments and returns {answer}."
        ) from error


def name_of(function: object) -> str:
    """Return how a user's function is called in messages."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def _check_callable(option: str, value: object, *, number: bool = False) -> None:
    if value is None or (number and isinstance(value, int | float)):
        return
    if not callable(value) or is_async_function(value):
        either = "a number or " if number else ""
        raise OperoUsageError(f"{option}={value!r} must be {either}a plain function, or None.")
