# this_file: src/opero/limits/breaker/rules.py
"""The options of a circuit breaker, checked, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from opero.errors import OperoUsageError
from opero.events import CircuitChanged
from opero.limits.breaker.tally import Buckets, Ring, Streak, Tally
from opero.utils.checks import callable_or_none, factor, failure_filter, whole
from opero.utils.matching import FailureFilter, Rejected, asks, is_final, matches
from opero.utils.units import Duration, format_seconds, parse_seconds

__all__ = ["Rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The options of a circuit breaker, as given, checked when they are made.

    `CircuitBreaker` tells what each of them means.
    """

    fail_max: int = 5
    failure_rate: float | None = None
    window: int | Duration | None = None
    minimum_calls: int | None = None
    reset_timeout: Duration = 30
    backoff: float = 2.0
    max_reset_timeout: Duration | None = None
    jitter: float = 0.1
    half_open_max: int = 1
    success_threshold: int = 1
    probe_timeout: Duration = 60
    counts: FailureFilter = Exception
    ignore: FailureFilter | None = None
    counts_result: Callable[[Any], object] | None = None
    on_change: Callable[[CircuitChanged], object] | None = None
    draw: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        for name in ("fail_max", "half_open_max", "success_threshold"):
            whole(1)(name, getattr(self, name))
        for name in ("counts_result", "on_change", "draw"):
            callable_or_none(name, getattr(self, name))
        factor("backoff", self.backoff)
        failure_filter("counts", self.counts)
        if self.ignore is not None:
            failure_filter("ignore", self.ignore)
        _share("jitter", self.jitter, 0 <= _number(self.jitter) < 1, "0 or more and less than 1")
        self._check_times()
        self._check_rate()

    def _check_times(self) -> None:
        if self.probe_seconds <= 0:
            raise OperoUsageError(f"probe_timeout={self.probe_timeout!r} must be longer than 0.")
        if self.longest_open < self.first_open:
            raise OperoUsageError(
                f"max_reset_timeout={self.max_reset_timeout!r} is shorter than "
                f"reset_timeout={self.reset_timeout!r}: raise it, or leave it out."
            )

    def _check_rate(self) -> None:
        if self.failure_rate is None:
            for name in ("window", "minimum_calls"):
                if getattr(self, name) is not None:
                    raise OperoUsageError(
                        f"{name}={getattr(self, name)!r} needs failure_rate, a share such as 0.5; "
                        "without it the circuit counts failures in a row."
                    )
            return
        in_range = 0 < _number(self.failure_rate) <= 1
        _share("failure_rate", self.failure_rate, in_range, "more than 0, up to 1 (0.5 is half)")
        if self.minimum_calls is not None:
            whole(1)("minimum_calls", self.minimum_calls)
        if self.window_calls is None:
            if self.window_seconds <= 0:
                raise OperoUsageError(f"window={self.window!r} must be longer than 0.")
            return
        whole(1)("window", self.window_calls)
        if self.least_calls > self.window_calls:
            raise OperoUsageError(
                f"minimum_calls={self.minimum_calls!r} never fit into window={self.window!r}."
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name, as they were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def first_open(self) -> float:
        """Seconds that the circuit stays open when it trips."""
        return parse_seconds(self.reset_timeout, "reset_timeout")

    @property
    def longest_open(self) -> float:
        """Seconds beyond which the open time does not grow."""
        if self.max_reset_timeout is None:
            return 10 * self.first_open
        return parse_seconds(self.max_reset_timeout, "max_reset_timeout")

    @property
    def probe_seconds(self) -> float:
        """Seconds after which a probe is given up for lost."""
        return parse_seconds(self.probe_timeout, "probe_timeout")

    @property
    def window_calls(self) -> int | None:
        """Length of a window of calls; None for a window of time."""
        if self.window is None:
            return 100
        return self.window if isinstance(self.window, int) else None

    @property
    def window_seconds(self) -> float:
        """Length of a window of time."""
        return parse_seconds(self.window or 0, "window")

    @property
    def least_calls(self) -> int:
        """Calls that a window must hold before their rate means anything."""
        if self.minimum_calls is not None:
            return self.minimum_calls
        return min(10, self.window_calls or 10)

    def blames(self, error: Exception) -> bool | None:
        """Tell what an error says about the service.

        Returns:
            True: it failed. False: it answered (a result that `retry_if_result` refused is judged
            by `counts_result` only). None: nothing; that is so for what is not counted or ignored,
            and for opero's own refusals, because no call was made.
        """
        if isinstance(error, Rejected):
            return self.blames_result(error.value)
        if is_final(error) or not matches(self.counts, error):
            return None
        return None if self.ignore is not None and matches(self.ignore, error) else True

    def blames_result(self, result: object) -> bool:
        """Tell whether a result counts as a failure."""
        return self.counts_result is not None and asks(self.counts_result, result)

    def tally(self) -> Tally:
        """Return an empty count of what these rules count."""
        if self.failure_rate is None:
            return Streak(self.fail_max)
        if self.window_calls is None:
            return Buckets(self.failure_rate, self.least_calls, self.window_seconds)
        return Ring(self.failure_rate, self.least_calls, self.window_calls)

    def open_seconds(self, failed_recoveries: int, draw: float) -> float:
        """Return how long the circuit stays open.

        reset_timeout · backoff^n, at most max_reset_timeout, shortened by up to the jitter's share:
        exponential backoff, spread so that not all clients of a service probe it at once.

        Args:
            failed_recoveries: How often half-open has gone back to open since it was last closed.
            draw: Random number from [0, 1).

        Example:
            >>> [Rules(jitter=0).open_seconds(n, draw=0.5) for n in (0, 1, 2, 10_000)]
            [30.0, 60.0, 120.0, 300.0]
        """
        try:
            full = min(self.longest_open, self.first_open * self.backoff**failed_recoveries)
        except OverflowError:
            full = self.longest_open
        return full * (1 - self.jitter * draw)

    def __str__(self) -> str:
        if self.failure_rate is None:
            opens = f"{self.fail_max} failures in a row"
        else:
            length = (
                f"{self.window_calls} calls"
                if self.window_calls is not None
                else format_seconds(self.window_seconds)
            )
            share = f"{100 * self.failure_rate:g} %"
            opens = f"{share} failures in the last {length} ({self.least_calls} calls at least)"
        first, longest = format_seconds(self.first_open), format_seconds(self.longest_open)
        grows = f", growing to {longest}" if self.backoff > 1 and longest != first else ""
        probes = f"{self.half_open_max} probe{'s' * (self.half_open_max != 1)} at once"
        return f"opens after {opens}, for {first}{grows}, then {probes}"


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _share(name: str, value: object, in_range: bool, wanted: str) -> None:
    if not in_range:
        raise OperoUsageError(f"{name}={value!r} must be a number, {wanted}.")
