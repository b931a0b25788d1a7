# this_file: src/opero/limits/breaker/tally.py
"""What a closed circuit counts: failures in a row, or their share of the last calls or seconds."""

from __future__ import annotations

import math
from collections import deque
from typing import ClassVar, Final, Protocol

__all__ = ["BUCKETS", "Buckets", "Ring", "Streak", "Tally"]

BUCKETS: Final = 20
"""A time window forgets in steps of a twentieth of its length."""


class Tally(Protocol):
    """The outcomes of one closed period."""

    timed: ClassVar[bool]
    """Whether it asks for the time of a success."""

    @property
    def failures(self) -> int:
        """Failures that it holds at present."""
        ...

    @property
    def calls(self) -> int:
        """Calls that it holds at present."""
        ...

    @property
    def steady(self) -> bool:
        """Whether a success would change nothing."""
        ...

    def settle(self, now: float) -> None:
        """Forget what is too old to count."""
        ...

    def succeeded(self, now: float) -> None:
        """Count a success."""
        ...

    def failed(self, now: float) -> bool:
        """Count a failure and tell whether it trips the circuit."""
        ...


class Streak:
    """Failures in a row."""

    __slots__ = ("_most", "failures")
    timed: ClassVar[bool] = False

    def __init__(self, most: int) -> None:
        self._most = most
        self.failures = 0

    @property
    def calls(self) -> int:
        """As many calls as failures: a success starts afresh."""
        return self.failures

    @property
    def steady(self) -> bool:
        """Whether there is nothing to start afresh from."""
        return not self.failures

    def settle(self, now: float) -> None:
        """Forget nothing: only a success ends a row."""

    def succeeded(self, now: float) -> None:
        """Start afresh."""
        del now
        self.failures = 0

    def failed(self, now: float) -> bool:
        """Count a failure and tell whether it is one too many."""
        del now
        self.failures += 1
        return self.failures >= self._most


class _Window:
    """Failures and calls of a stretch of the past. Only a failure can trip the circuit."""

    steady = False
    timed: ClassVar[bool] = False

    def __init__(self, rate: float, least: int) -> None:
        self._rate = rate
        self._least = least
        self.failures = 0
        self.calls = 0

    def settle(self, now: float) -> None:
        """Forget what is too old to count."""

    def succeeded(self, now: float) -> None:
        """Count a success."""
        self._count(now, 0)

    def failed(self, now: float) -> bool:
        """Count a failure and tell whether the rate is reached."""
        self._count(now, 1)
        return self.calls >= self._least and self.failures / self.calls >= self._rate

    def _count(self, now: float, failures: int) -> None:
        raise NotImplementedError


class Ring(_Window):
    """The last so many calls."""

    def __init__(self, rate: float, least: int, length: int) -> None:
        super().__init__(rate, least)
        self._last: deque[int] = deque(maxlen=length)

    def _count(self, now: float, failures: int) -> None:
        del now
        last = self._last
        if len(last) == last.maxlen:
            self.failures -= last[0]
        last.append(failures)
        self.failures += failures
        self.calls: int = len(last)


class Buckets(_Window):
    """The calls of the last so many seconds, counted in `BUCKETS` steps, the present one included.

    A clock that goes back (a test took its own away) empties it.
    """

    timed: ClassVar[bool] = True

    def __init__(self, rate: float, least: int, seconds: float) -> None:
        super().__init__(rate, least)
        self._width = seconds / BUCKETS
        self._buckets: deque[list[int]] = deque()  # each: number, calls, failures

    def settle(self, now: float) -> None:
        """Forget the buckets that are too old."""
        number = math.floor(now / self._width)
        buckets = self._buckets
        while buckets and not number - BUCKETS < buckets[0][0] <= number:
            _, calls, failed = buckets.popleft()
            self.calls -= calls
            self.failures -= failed

    def _count(self, now: float, failures: int) -> None:
        self.settle(now)
        number = math.floor(now / self._width)
        buckets = self._buckets
        if not buckets or buckets[-1][0] != number:
            buckets.append([number, 0, 0])
        buckets[-1][1] += 1
        buckets[-1][2] += failures
        self.calls += 1
        self.failures += failures
