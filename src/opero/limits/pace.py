# this_file: src/opero/limits/pace.py
"""When the next call may start: the rules of a limit, pure.

A rule decides from a few whole numbers (its words) and a reading of the clock, nothing else. Times are nanoseconds of a
monotonic clock, because sums of binary fractions drift and would let a call too many into a window now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from opero.errors import OperoUsageError
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.utils.units import Rate

__all__ = [
    "NEVER",
    "SECOND",
    "Quota",
    "Rule",
    "Saved",
    "Spacing",
    "Words",
    "gap_after",
    "rule_for",
    "rule_of",
]

SECOND: Final = 1_000_000_000
LONGEST_SMOOTH: Final = 60.0
"""Periods up to so many seconds are spaced out by default; longer ones are quotas."""
LARGEST_QUOTA: Final = 1_000_000
"""A quota remembers every start, in eight bytes each."""

_LONG_AGO: Final = -(1 << 62)
NEVER: Final = 1 << 62
_LONGEST: Final = 1 << 60
_WHOLE_FROM: Final = 100

Saved = tuple[tuple[int, int], ...]
"""Some words with their places."""


class Words(Protocol):
    """The memory of a rule: a list, or a view of a file that several processes map."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class Rule(Protocol):
    """Decides when calls may start. Word 0 always says before which time none does."""

    @property
    def tolerance(self) -> int:
        """How far ahead of the clock a remembered start may lie."""
        ...

    @property
    def late(self) -> int:
        """How late a waiter may wake without costing more than one per cent of the rate."""
        ...

    @property
    def pace(self) -> float:
        """Calls per second at which waiters may come forward."""
        ...

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Four numbers from which `rule_of` makes the rule again."""
        ...

    def words(self, starts: Iterable[int] = ()) -> list[int]:
        """Return the words of a rule under which calls have started at these times."""
        ...

    def starts(self, words: Words) -> list[int]:
        """Return the starts that are still remembered, oldest first."""
        ...

    def take(self, words: Words, now: int) -> int:
        """Start a call and return 0, or change nothing and return how long to wait.

        Whoever does this may be killed between any two stores, and each leaves a valid state.
        """
        ...

    def look(self, words: Words, now: int) -> int:
        """Return how long the next call would have to wait."""
        ...

    def save(self, words: Words) -> Saved:
        """Return the words that the next `take` will change."""
        ...

    @property
    def spacing(self) -> int:
        """How far apart calls start at least while there is a queue."""
        ...

    def brake(self, words: Words, until: int, length: int) -> int:
        """Make ready for a pause of `length` that ends at `until`.

        Returns:
            How far apart calls have to be kept after it; 0 if the words see to that.
        """
        ...

    def release(self, words: Words, now: int) -> None:
        """Undo what `brake` did, because the pause is over early."""
        ...


@dataclass(frozen=True, slots=True)
class Spacing:
    """One call each `interval`; who comes late may catch up by `tolerance`.

    This is the generic cell rate algorithm (GCRA) in its virtual scheduling form, as described in
    ITU-T Recommendation I.371 and in the ATM Forum's User-Network Interface specification. With the
    theoretical arrival time `tat`, the increment `T` and the limit `tau`, a call at time `t`
    conforms if `t >= tat - tau`, and then `tat = max(t, tat) + T`.

    No window is overfull: a start at `t` puts `tat` at `t + T` or later, each further one adds at
    least `T`, so that the last of `k` starts comes at `t + (k - 1) T - tau` at the earliest. If it
    lies in the same half-open window of `period`, then `k - 1 < (period + tau) / T`; for
    `T = period / N` and `tau = burst T` this gives `k <= N + burst`.

    Attributes:
        period: The window that the rate names.
        interval: `T`.
        tolerance: `tau`.
    """

    period: int
    interval: int
    tolerance: int

    @property
    def late(self) -> int:
        """What the tolerance makes up for, and a little."""
        return self.tolerance + self.interval // 128

    @property
    def pace(self) -> float:
        """The rate itself."""
        return SECOND / self.interval

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Kind 1 and its three numbers."""
        return 1, self.period, self.interval, self.tolerance

    def words(self, starts: Iterable[int] = ()) -> list[int]:
        """Return the one word, `tat`."""
        return [max(starts, default=_LONG_AGO - self.interval) + self.interval]

    def starts(self, words: Words) -> list[int]:
        """Return the theoretical time of the last start."""
        return [words[0] - self.interval] if words[0] > _LONG_AGO else []

    def take(self, words: Words, now: int) -> int:
        """Start a call if it conforms."""
        # Read once: in a mapped file each reading of a word costs as much as a sum.
        tat = words[0]
        if tat <= now:
            words[0] = now + self.interval
            return 0
        ahead = tat - now
        if ahead > self.tolerance:
            return ahead - self.tolerance
        words[0] = tat + self.interval
        return 0

    def look(self, words: Words, now: int) -> int:
        """Return the time until a call conforms."""
        return max(0, words[0] - now - self.tolerance)

    def save(self, words: Words) -> Saved:
        """Return `tat`."""
        return ((0, words[0]),)

    @property
    def spacing(self) -> int:
        """The interval."""
        return self.interval

    def brake(self, words: Words, until: int, length: int) -> int:
        """Let the first call conform at the end of the pause, and none of those missed catch up."""
        words[0] = max(words[0], until + self.tolerance)
        return 0

    def release(self, words: Words, now: int) -> None:
        """Go back to the latest `tat` that a start can have left."""
        words[0] = min(words[0], now + self.tolerance + self.interval)

    def __str__(self) -> str:
        return f"one call each {format_seconds(self.interval / SECOND)}"


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `capacity` calls in any window of `period`, without spacing.

    The words are the time before which nothing starts, the number of starts so far, and a ring of
    the last `capacity` start times. A call may start when the one `capacity` places before it is
    `period` old, which is exact for half-open windows. A `take` that is cut short leaves an entry
    that is not counted yet; the next one overwrites it.

    Attributes:
        period: Length of the window.
        capacity: Calls in it.
    """

    period: int
    capacity: int

    @property
    def tolerance(self) -> int:
        """None: a start is remembered when it was."""
        return 0

    @property
    def late(self) -> int:
        """One per cent of the window, since a late start delays the same one of the next."""
        return self.period // 128

    @property
    def pace(self) -> float:
        """A whole quota in a second: it may have come free at one moment."""
        return max(100.0, self.capacity)

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Kind 2 and its two numbers."""
        return 2, self.period, self.capacity, 0

    def words(self, starts: Iterable[int] = ()) -> list[int]:
        """Return the words with a ring of the newest of these starts."""
        ring = sorted(starts)[-self.capacity :]
        count = len(ring)
        ring += [_LONG_AGO] * (self.capacity - count)
        return [ring[count % self.capacity] + self.period, count, *ring]

    def starts(self, words: Words) -> list[int]:
        """Return what is in the ring."""
        ring = (words[place] for place in range(2, 2 + self.capacity))
        return sorted(start for start in ring if start > _LONG_AGO)

    def take(self, words: Words, now: int) -> int:
        """Start a call if the oldest start in the ring has left the window."""
        if now < words[0]:
            return words[0] - now
        count = words[1]
        words[2 + count % self.capacity] = now
        words[0] = words[2 + (count + 1) % self.capacity] + self.period
        words[1] = count + 1
        return 0

    def look(self, words: Words, now: int) -> int:
        """Return the time until the oldest start leaves the window."""
        return max(0, words[0] - now)

    def save(self, words: Words) -> Saved:
        """Return the oldest entry of the ring and the two words before the ring."""
        oldest = 2 + words[1] % self.capacity
        return (oldest, words[oldest]), (0, words[0]), (1, words[1])

    @property
    def spacing(self) -> int:
        """None."""
        return 0

    def brake(self, words: Words, until: int, length: int) -> int:
        """Ask for a gap, since a quota would let everybody out at once."""
        return gap_after(length, self.period // self.capacity)

    def release(self, words: Words, now: int) -> None:
        """Do nothing: the words know of no pause."""

    def __str__(self) -> str:
        return f"{self.capacity} calls in {format_seconds(self.period / SECOND)}"


def gap_after(length: int, even: int) -> int:
    """Return how far apart calls without spacing start after a pause.

    Ten come in the time that the service has asked for, or as many as would be spread evenly over
    the period if that is more.

    Args:
        length: The pause.
        even: The even spacing of the limit.

    Example:
        >>> gap_after(2_000_000_000, even=86_400_000_000)
        200000000
    """
    return max(1, min(even, length // 10))


def rule_for(rate: Rate, burst: int, smooth: bool | None) -> Spacing | Quota:
    """Choose the rule for a rate.

    Args:
        rate: So many calls in so many seconds; the number need not be whole.
        burst: Calls by which a spaced rate may exceed the count of a window.
        smooth: Space calls out (True), only count them (False), or go by the period (None).

    Raises:
        OperoUsageError: A quota too large to be counted, or times beyond all reason.

    Example:
        >>> from opero.utils.units import Rate
        >>> rule_for(Rate(100, 60), burst=1, smooth=None)
        Spacing(period=60000000000, interval=600000000, tolerance=600000000)
        >>> rule_for(Rate(1000, 86400), burst=1, smooth=None)
        Quota(period=86400000000000, capacity=1000)
    """
    spaced = smooth if smooth is not None else rate.period <= LONGEST_SMOOTH
    period = max(1, round(rate.period * SECOND))
    longest = max(period, math.ceil(period / rate.count) * (burst + 1))
    if longest > _LONGEST:
        raise OperoUsageError(
            f"A rate of {rate.count:g} in {rate.period:g} s is too slow for a clock: "
            "name a shorter period or a larger number."
        )
    return _spacing(rate.count, period, burst) if spaced else _quota(rate.count, period)


def _spacing(count: float, period: int, burst: int) -> Spacing:
    whole = math.floor(count)
    part = count - whole
    # What stands behind the point must not become one call more in some window. A large number
    # loses it (less than one per cent), a small one keeps its rate and pays with tolerance.
    if whole >= _WHOLE_FROM:
        count, part = float(whole), 0.0
    over, under = count.as_integer_ratio()
    interval = -(-period * under // over)
    return Spacing(period, interval, max(0, burst * interval - math.ceil(part * interval)))


def _quota(count: float, period: int) -> Quota:
    capacity = math.ceil(count)
    if capacity > LARGEST_QUOTA:
        raise OperoUsageError(
            f"A quota of {count:g} calls is too large to be counted one by one (at most "
            f"{LARGEST_QUOTA:,}): write smooth=True to space calls out, or name a shorter period."
        )
    # "2.5/hour" is 3 in 72 minutes: never more than 3 in an hour, and 2.5 in the long run.
    return Quota(math.ceil(period * (capacity / count)), capacity)


def rule_of(signature: tuple[int, int, int, int]) -> Spacing | Quota | None:
    """Make the rule with this signature; None if there is none."""
    kind, period, first, second = signature
    if kind == 1 and period > 0 and first > 0 and second >= 0:
        return Spacing(period, first, second)
    if kind == 2 and period > 0 and 0 < first <= LARGEST_QUOTA:
        return Quota(period, first)
    return None
