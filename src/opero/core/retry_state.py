# this_file: src/opero/core/retry_state.py
"""The decisions of retry: whether there is another attempt, and how long the pause before it is.

tenacity, whose stop, wait and retry strategies decide, is loaded at the first failure.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opero.core.strategies import is_retry_strategy, state_class, stop_after
from opero.errors import OperoWarning
from opero.utils.matching import Rejected, asks, is_final, matches
from opero.utils.stack import users_stacklevel
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.core.options import Options

__all__ = ["RetryPolicy", "RetryState", "grown", "pause_bounds"]


def pause_bounds(retry: int, low: float, high: float, factor: float) -> tuple[float, float]:
    """Return the bounds of the pause before retry number `retry`, from 1.

    The pause is drawn uniformly from [low, min(high, low · factor^retry)]: exponential backoff
    whose lower bound keeps a minimum distance, after
    "Exponential Backoff And Jitter" (M. Brooker, AWS Architecture Blog, 2015).

    Args:
        retry: Number of the retry, from 1.
        low: Shortest pause in seconds.
        high: Longest pause in seconds.
        factor: Growth from one retry to the next.

    Example:
        >>> pause_bounds(2, low=1.0, high=30.0, factor=2.0)
        (1.0, 4.0)
    """
    return low, grown(low, high, factor, retry)


def grown(low: float, high: float, factor: float, exponent: int) -> float:
    """Return `low` after so many steps of growth, at most `high`."""
    try:
        return min(high, low * factor**exponent)
    except OverflowError:
        # factor^10000 is more than a float holds, and long past any cap; zero stays zero however often it grows.
        return high if low else 0.0


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again and how long to wait, as tenacity strategies where they matter.

    Attributes:
        retries: Attempts after the first; ignored where `stop` is given.
        low, high, factor, jitter: The pauses, in seconds; ignored where `wait` is given.
        retry_on: Type, tuple of types, predicate on the exception, or tenacity retry strategy.
        wait, stop: tenacity strategies of the user's.
        longest_hint: Longest pause that a service may ask for, in seconds.
    """

    retries: int = 3
    low: float = 0.1
    high: float = 30.0
    factor: float = 1.5
    jitter: bool = True
    retry_on: Any = Exception
    wait: Callable[[Any], float] | None = None
    stop: Callable[[Any], bool] | None = None
    longest_hint: float = 60.0

    @classmethod
    def of(cls, options: Options) -> RetryPolicy:
        """Make the policy that the options describe."""
        return cls(
            retries=options.retries,
            low=parse_seconds(options.min_delay, "min_delay"),
            high=parse_seconds(options.max_delay, "max_delay"),
            factor=options.backoff_factor,
            jitter=options.jitter,
            retry_on=options.retry_on,
            wait=options.wait,
            stop=options.stop,
            longest_hint=parse_seconds(options.retry_after_max, "retry_after_max"),
        )

    @property
    def needs_start(self) -> bool:
        """Whether the clock must be read before the first attempt, because `stop` may ask for the time spent."""
        return self.stop is not None

    def wants(self, error: Exception, state: Callable[[], Any]) -> bool:
        """Tell whether one error of an attempt is a reason for another attempt.

        Args:
            error: The error.
            state: Makes the state in which a tenacity strategy looks for it.
        """
        if isinstance(error, Rejected) or not is_retry_strategy(self.retry_on):
            return matches(self.retry_on, error)
        return asks(self.retry_on, state())

    def retries_on(self, error: Exception) -> bool:
        """Tell whether an error is one that `retry_on` means, outside of any call."""
        made = RetryState(self)
        return self.wants(error, lambda: state_class()(made, error, made.started))

    def pause(self, state: Any) -> float:
        """Seconds before the next attempt; takes a `tenacity.RetryCallState`, so it is a wait strategy itself."""
        if self.wait is not None:
            try:
                return _finite(float(self.wait(state)))
            except Exception as error:  # noqa: BLE001 - the call's own outcome goes before a broken strategy
                _warn_of("wait", error, "the usual pauses are used instead")
        if not self.jitter:
            return grown(self.low, self.high, self.factor, state.attempt_number - 1)
        import random

        return random.uniform(*pause_bounds(state.attempt_number, self.low, self.high, self.factor))

    def pauses(self) -> tuple[float, float]:
        """Shortest and longest sum of all pauses of a call that fails to the end, in seconds."""
        bounds = [
            pause_bounds(n, self.low, self.high, self.factor)
            for n in range(1, min(self.retries, 1000) + 1)
        ]
        if not self.jitter:
            total = sum(
                grown(self.low, self.high, self.factor, n) for n in range(min(self.retries, 1000))
            )
            return total, total
        return sum(b[0] for b in bounds), sum(b[1] for b in bounds)


def _finite(seconds: float) -> float:
    if math.isfinite(seconds):
        return seconds
    raise ValueError(seconds)


def _warn_of(option: str, error: Exception, consequence: str) -> None:
    warnings.warn(
        f"the {option} strategy raised {type(error).__name__}: {consequence}",
        OperoWarning,
        stacklevel=users_stacklevel(),
    )


@dataclass
class RetryState:
    """What a retry knows: small and picklable, so that a map can park it and a journal can keep it.

    Attributes:
        policy: The rules.
        attempt: Attempts begun.
        started: Clock reading at the start of the first attempt, or at its failure where nobody asked for the start.
        slept: Seconds of pauses so far.
        value_index: Place of the fallback value that failed last, None without fallback.
        hints: Seconds that the service asked to wait; the next pause is no shorter than the longest of them.
        deadline: Clock reading by which the call must be over; no pause is begun that would outlast it.
        pause_refused: The pause, in seconds, that was not begun for that reason.
    """

    policy: RetryPolicy
    attempt: int = 1
    started: float = 0.0
    slept: float = 0.0
    value_index: int | None = None
    hints: list[float] = field(default_factory=list)
    deadline: float | None = None
    pause_refused: float | None = None

    def next_delay(self, error: Exception, *, now: float, walk: Sequence[Exception] = ()) -> float:
        """Begin another attempt: count it and return the pause before it, in seconds.

        Args:
            error: What the attempt ended with.
            now: Clock reading.
            walk: All errors of the attempt, where it tried several values; one that matches `retry_on` is enough.

        Raises:
            Exception: `error` itself, when nothing more is to be tried.
        """
        delay = self._decide(error, now, walk)
        if delay is None:
            try:
                raise error
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del error, walk
        self.attempt += 1
        self.slept += delay
        self.hints.clear()
        return delay

    def _decide(self, error: Exception, now: float, walk: Sequence[Exception]) -> float | None:
        """Return the pause before the next attempt, None if there is none."""
        if is_final(error, walk):
            return None
        state = self._tenacity_state(error, now)
        errors = walk if any(e is error for e in walk) else (*walk, error)
        if not any(
            self.policy.wants(e, functools.partial(self._tenacity_state, e, now)) for e in errors
        ):
            return None
        # As in tenacity, the pause comes first: `stop_before_delay` asks whether it still fits.
        state.upcoming_sleep = max(0.0, self.policy.pause(state), *self.hints)
        pause: float = state.upcoming_sleep
        if self._spent(state):
            return None
        if self.deadline is not None and now + pause >= self.deadline:
            self.pause_refused = pause
            return None
        return pause

    def _spent(self, state: Any) -> bool:
        if self.policy.stop is not None:
            try:
                return bool(self.policy.stop(state))
            except Exception as error:  # noqa: BLE001 - the call's own outcome goes before a broken strategy
                _warn_of("stop", error, "no more attempts are made")
                return True
        return bool(stop_after(self.policy.retries + 1)(state))

    def _tenacity_state(self, error: Exception, now: float) -> Any:
        return state_class()(self, error, now)
