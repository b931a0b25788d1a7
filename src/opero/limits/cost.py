# this_file: src/opero/limits/cost.py
"""What calls cost, as against how many there are: a window of cost, and a cap on all of it; pure.

Costs (tokens, money, bytes) are counted in millionths, as whole numbers, so that no sum drifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opero.errors import OperoUsageError
from opero.limits.pace import NEVER, SECOND, gap_after
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.limits.pace import Words
    from opero.utils.units import Rate

__all__ = ["SPENT", "UNIT", "CostCap", "CostWindow", "as_units"]

UNIT: Final = 1_000_000
SPENT: Final = NEVER
"""How long a call has to wait that a cap does not let through: no time will help."""

_LARGEST: Final = NEVER // (2 * UNIT)
_GRAINS: Final = 128
"""Parts of a window that are counted together; a start stays counted for one of them too long."""
_HEAD, _TOTAL, _RING = 0, 1, 2
_LONG_AGO: Final = -NEVER


def as_units(amount: object, name: str) -> int:
    """Return an amount in millionths; something is never nothing.

    Raises:
        OperoUsageError: It is no number of 0 or more.

    Example:
        >>> as_units(0.0031, "cost"), as_units(1e-9, "cost")
        (3100, 1)
    """
    if (
        isinstance(amount, bool)
        or not isinstance(amount, int | float)
        or not 0 <= amount < _LARGEST
    ):
        raise OperoUsageError(f"{name}={amount!r} must be a number, 0 or more.")
    return max(round(amount * UNIT), 1 if amount else 0)


@dataclass(frozen=True, slots=True)
class CostWindow:
    """At most `capacity` of cost in any half-open window of `period`, without spacing.

    A sliding window that is counted in parts ("grains"): a ring holds what was spent in each of
    them, and a part counts until its last moment has left the window. So no window is ever
    overfull, and what is spent stays counted for at most one per cent longer than it must.

    The words are the number of the newest part since time 0, the sum of the ring, and the ring.

    Attributes:
        period: Length of the window.
        capacity: Cost in it, in millionths.
    """

    period: int
    capacity: int

    @classmethod
    def of(cls, rate: Rate) -> CostWindow:
        """Make the window of a rate.

        Raises:
            OperoUsageError: It is too large to be counted in millionths.
        """
        if not UNIT * rate.count < _LARGEST * UNIT:
            raise OperoUsageError(f"A limit of {rate.count:g} is too large: count in larger units.")
        return cls(max(1, round(rate.period * SECOND)), max(1, math.floor(rate.count * UNIT)))

    @property
    def grain(self) -> int:
        """Length of a part."""
        return -(-self.period // _GRAINS)

    @property
    def places(self) -> int:
        """Parts in the ring: the window, and the part that has begun."""
        return -(-self.period // self.grain) + 1

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Kind 4 and its two numbers."""
        return 4, self.period, self.capacity, 0

    def words(self) -> list[int]:
        """Return the words of an empty window."""
        return [_LONG_AGO, 0, *([0] * self.places)]

    def used(self, words: Words, now: int) -> int:
        """Return what was spent in the window that ends now."""
        head, places = words[_HEAD], self.places
        passed = now // self.grain - head
        if passed <= 0:
            return words[_TOTAL]
        if passed >= places:
            return 0
        gone = range(head + 1, head + passed + 1)
        return words[_TOTAL] - sum(words[_RING + grain % places] for grain in gone)

    def look(self, words: Words, now: int, cost: int) -> int:
        """Return the time until so much may be spent; at the latest when the window is empty."""
        over = self.used(words, now) + cost - self.capacity
        if over <= 0:
            return 0
        head, grain, places = words[_HEAD], self.grain, self.places
        oldest = max(head, now // grain) - places + 1
        for part in range(oldest, head + 1):
            over -= words[_RING + part % places]
            if over <= 0:
                return (part + places) * grain - now
        return (head + places) * grain - now

    def add(self, words: Words, now: int, cost: int) -> None:
        """Count what is spent."""
        head, places = words[_HEAD], self.places
        newest = max(head, now // self.grain)
        for part in range(max(head, newest - places) + 1, newest + 1):
            place = _RING + part % places
            words[_TOTAL] -= words[place]
            words[place] = 0
        words[_HEAD] = newest
        words[_RING + newest % places] += cost
        words[_TOTAL] += cost

    def correct(self, words: Words, now: int, at: int, change: int) -> None:
        """Put right what was counted at a time: a refund takes back, a debt counts from now on."""
        if change > 0:
            self.add(words, now, change)
            return
        part, head, places = at // self.grain, words[_HEAD], self.places
        if head - places < part <= head:
            place = _RING + part % places
            back = min(-change, words[place])
            words[place] -= back
            words[_TOTAL] -= back

    def carried(self, words: Words, by: int, now: int) -> list[int]:
        """Return the words with all times moved, none of them into the future, and a true sum."""
        head, places = words[_HEAD], self.places
        made = self.words()
        if head == _LONG_AGO:
            return made
        # Rounded up: what is counted a little too long does no harm.
        made[_HEAD] = newest = min(head - (-by // self.grain), now // self.grain)
        for age in range(places):
            spent = max(0, words[_RING + (head - age) % places])
            made[_RING + (newest - age) % places] = spent
            made[_TOTAL] += spent
        return made

    def brake(self, length: int) -> int:
        """Return how far apart calls shall start after a pause; nobody knows what they will cost."""
        return gap_after(length, self.period // 100)

    def __str__(self) -> str:
        return f"{self.capacity / UNIT:,.10g} in {format_seconds(self.period / SECOND)}"


@dataclass(frozen=True, slots=True)
class CostCap:
    """At most `limit` of cost, once and for all. The only word is what was spent.

    Attributes:
        limit: In millionths.
    """

    limit: int

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Kind 5 and its number."""
        return 5, self.limit, 0, 0

    def words(self) -> list[int]:
        """Return the words of an untouched cap."""
        return [0]

    def used(self, words: Words, now: int) -> int:
        """Return what was spent."""
        return words[0]

    def look(self, words: Words, now: int, cost: int) -> int:
        """Return 0, or `SPENT` if so much is not left."""
        return SPENT if cost and words[0] + cost > self.limit else 0

    def add(self, words: Words, now: int, cost: int) -> None:
        """Count what is spent."""
        words[0] += cost

    def correct(self, words: Words, now: int, at: int, change: int) -> None:
        """Put right what was counted."""
        words[0] = max(0, words[0] + change)

    def carried(self, words: Words, by: int, now: int) -> list[int]:
        """Return the word as it is: money knows no clock."""
        return [max(0, words[0])]

    def brake(self, length: int) -> int:
        """Return 0: a cap has no pace."""
        return 0

    def __str__(self) -> str:
        return f"{self.limit / UNIT:,.10g} in all"
