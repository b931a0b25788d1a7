# this_file: src/opero/core/stats.py
"""Counters of a decorated function."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Final


class FastCounter:
    """A counter for the fast path: one C call to count, no lock.

    `count()` is the bound `__next__` of an `itertools.count`, which is atomic. Its state is read
    from its `repr`, because copying or pickling a count is deprecated since Python 3.12.
    """

    __slots__ = ("_counter", "_zero", "count")

    def __init__(self) -> None:
        self._counter = itertools.count()
        self._zero = 0
        self.count: Callable[[], int] = self._counter.__next__

    @property
    def value(self) -> int:
        """How often `count` was called since the last reset."""
        return self._counted() - self._zero

    def reset(self) -> None:
        """Count from zero again."""
        # Fast paths hold `count`, so the zero moves instead of the counter.
        self._zero = self._counted()

    def add(self, amount: int) -> None:
        """Count what was counted elsewhere; callers hold a lock of their own."""
        self._zero -= amount

    def _counted(self) -> int:
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
        misses: Calls that found nothing fresh in the cache.
        shared: Calls that got the result of another caller's computation.
        stale: Calls that got an expired result, because the function failed.
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

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.call_counter: Final = FastCounter()
        self.hit_counter: Final = FastCounter()
        self.miss_counter: Final = FastCounter()
        self._counters = {
            "calls": self.call_counter,
            "hits": self.hit_counter,
            "misses": self.miss_counter,
        }
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        with self._lock:
            for counter in self._counters.values():
                counter.reset()
            self.failures = self.retries = self.fallbacks = self.gave_up = 0
            self.shared = self.stale = 0
            self.slept: float = 0.0
            self.waited: float = 0.0

    @property
    def calls(self) -> int:
        """Real calls of the function."""
        return self.call_counter.value

    @property
    def hits(self) -> int:
        """Results served from the cache."""
        return self.hit_counter.value

    @property
    def misses(self) -> int:
        """Calls that found nothing in the cache."""
        return self.miss_counter.value

    def add(self, **amounts: float) -> None:
        """Add to several counters at once; off the fast path only."""
        with self._lock:
            for name, amount in amounts.items():
                if name in self._counters:
                    self._counters[name].add(int(amount))
                else:
                    setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        """Return all counters by name."""
        names = ("calls", "failures", "retries", "fallbacks", "gave_up", "hits", "misses", "shared")
        return {name: getattr(self, name) for name in (*names, "stale", "slept", "waited")}

    def take(self) -> dict[str, float]:
        """Return the counters that are not zero, by name, and set them to zero."""
        counted = {name: value for name, value in self.as_dict().items() if value}
        self.reset()
        return counted

    def __repr__(self) -> str:
        counted = {name: value for name, value in self.as_dict().items() if value}
        shown = " ".join(
            f"{name}={value if isinstance(value, int) else format(value, '.4g')}"
            for name, value in counted.items()
        )
        return f"<Stats {shown or 'nothing yet'}>"
