# this_file: src/opero/core/stats.py
"""Counters of a decorated function."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

__all__ = ["Stats", "Tally"]


class Tally:
    """A counter for the express lane: one C call to count, no lock.

    `count()` is the bound `__next__` of an `itertools.count`, which is atomic. Its state is read
    from its `repr`, because copying or pickling a count is deprecated since Python 3.12.
    """

    __slots__ = ("_counter", "count")

    def __init__(self) -> None:
        self._counter = itertools.count()
        self.count: Callable[[], int] = self._counter.__next__

    @property
    def value(self) -> int:
        """How often `count` was called."""
        return int(repr(self._counter)[6:-1])


class Stats:
    """What happened to a decorated function since it was decorated (or since `reset()`).

    Attributes:
        calls: Real calls of the function, failed ones included.
        failures: Real calls that raised, or whose result was rejected.
        retries: Attempts after the first.
        fallbacks: Steps to another fallback value.
        gave_up: Calls that failed for good.
        hits: Results served from the cache.
        misses: Calls that found nothing in the cache.
        shared: Calls that got the result of another caller's computation.
        slept: Seconds of pauses between attempts, of all calls together.
        waited: Seconds in the rate limiter, of all calls together.

    Example:
        >>> from opero import opero
        >>> @opero
        ... def double(x):
        ...     return 2 * x
        >>> double(1), double(1)
        (2, 2)
        >>> double.stats
        <Stats calls=1 hits=1 misses=1>
    """

    _FIELDS = (
        "calls",
        "failures",
        "retries",
        "fallbacks",
        "gave_up",
        "hits",
        "misses",
        "shared",
        "slept",
        "waited",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.call_tally = Tally()
        self.hit_tally = Tally()
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        with self._lock:
            # Express lanes hold the tallies' bound methods, so a reset moves the zero instead of
            # the tally.
            self._calls_before = self.call_tally.value
            self._hits_before = self.hit_tally.value
            self.failures = self.retries = self.fallbacks = self.gave_up = self.misses = (
                self.shared
            ) = 0
            self.slept = self.waited = 0.0

    @property
    def calls(self) -> int:
        """Real calls of the function."""
        return self.call_tally.value - self._calls_before

    @property
    def hits(self) -> int:
        """Results served from the cache."""
        return self.hit_tally.value - self._hits_before

    def add(self, **amounts: float) -> None:
        """Add to several counters at once; off the express lane only."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        """Return all counters by name."""
        return {name: getattr(self, name) for name in self._FIELDS}

    def __repr__(self) -> str:
        told = " ".join(f"{name}={value:.4g}" for name, value in self.as_dict().items() if value)
        return f"<Stats {told or 'nothing yet'}>"
