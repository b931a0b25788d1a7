# this_file: src/opero/core/strategies.py
"""tenacity's strategies: the room in which tenacity lives, loaded when the first call fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opero.errors import Rejected

__all__ = [
    "ExponentialWait",
    "is_retry_error",
    "is_retry_strategy",
    "retry_error",
    "state_class",
    "stop_after",
]


def is_retry_strategy(wanted: object) -> bool:
    """Return whether `retry_on` is one of tenacity's retry strategies, which ask for a state instead of an error."""
    if isinstance(wanted, type | tuple | str):
        return False
    from tenacity.retry import retry_base

    return isinstance(wanted, retry_base)


@functools.cache
def stop_after(attempts: int) -> Callable[[Any], bool]:
    """Return the stop strategy of so many attempts."""
    from tenacity.stop import stop_after_attempt

    return stop_after_attempt(attempts)


@dataclass(frozen=True, slots=True)
class ExponentialWait:
    """tenacity's `wait_exponential`: min(high, multiplier · 2^(n-1)), and at least low, before retry n.

    Attributes:
        multiplier: Seconds before the first retry; it is no growth factor, each pause is twice the one before.
        low, high: Shortest and longest pause in seconds.
    """

    multiplier: float
    low: float
    high: float

    def __call__(self, state: Any) -> float:
        """Return the seconds before the next attempt."""
        return float(_exponential(self.multiplier, self.low, self.high)(state))


@functools.cache
def _exponential(multiplier: float, low: float, high: float) -> Callable[[Any], float]:
    from tenacity.wait import wait_exponential

    return wait_exponential(multiplier=multiplier, min=low, max=high)


def retry_error(error: Exception, attempts: int) -> Exception:
    """Return the `tenacity.RetryError` that stands for the last error of so many attempts."""
    from tenacity import Future, RetryError

    last = Future(attempts)
    last.set_exception(error)
    return RetryError(last)


def is_retry_error(error: Exception) -> bool:
    """Return whether an error is tenacity's own, which stands for another one already."""
    from tenacity import RetryError

    return isinstance(error, RetryError)


@functools.cache
def state_class() -> type[Any]:
    """Return the class of the state that tenacity's strategies read."""
    from tenacity import Future, RetryCallState

    class State(RetryCallState):
        """It knows no arguments of the call, which may be secret, and makes its outcome when a strategy looks at it."""

        def __init__(self, retry: Any, error: Exception, now: float) -> None:
            self.retry_object = self.fn = self.next_action = None  # type: ignore[assignment]  # there is no Retrying
            self.args, self.kwargs = (), {}
            self.attempt_number = retry.attempt
            self.start_time = retry.started
            self.outcome_timestamp = now
            self.idle_for = retry.slept
            self.upcoming_sleep = 0.0
            self._error = error

        @functools.cached_property
        def outcome(self) -> Future:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
            # Read-only, other than in the class above: nothing sets the outcome of this state.
            future = Future(self.attempt_number)
            if isinstance(self._error, Rejected):
                future.set_result(self._error.value)
            else:
                future.set_exception(self._error)
            return future

    return State
