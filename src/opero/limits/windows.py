# this_file: src/opero/limits/windows.py
"""Decide when calls may start under sliding windows: of calls, of cost, with a cap, and several limits as one; pure.

Costs (tokens, money, bytes) are counted in millionths, as whole numbers, so that no sum drifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from opero.errors import OperoUsageError
from opero.limits.gcra import (
    LONG_AGO,
    NEVER,
    SECOND,
    Cells,
    Gcra,
    Rule,
    Stamp,
    check_period,
    gap_after,
    gcra_for,
)
from opero.utils.units import Rate, format_seconds

if TYPE_CHECKING:
    from opero.utils.units import RateWindow


LONGEST_SMOOTH: Final = 60.0
"""Periods up to so many seconds are spaced out by default; longer ones are sliding windows."""
LARGEST_WINDOW: Final = 1_000_000
"""A sliding window remembers every start, in eight bytes each."""

UNIT: Final = 1_000_000
SPENT: Final = NEVER
"""How long a call has to wait that a cap does not let through: no time will help."""
_LARGEST: Final = NEVER // (2 * UNIT)
_GRAINS: Final = 128
"""Parts of a cost window that are counted together; a start stays counted for one of them too long."""


# --- calls ----------------------------------------------------------------------------------------


@dataclass(unsafe_hash=True)
class SlidingWindow(Rule):
    """At most `capacity` calls in any half-open window of `period`, without spacing.

    The state is the time before which nothing starts, the number of starts so far, and a ring of the last `capacity`
    start times. A call may start when the one `capacity` places before it is `period` old. A `take` that is cut
    short leaves an entry that is not counted yet; the next one overwrites it.

    Attributes:
        period: Length of the window.
        capacity: Calls in it.
    """

    period: int
    capacity: int

    def __post_init__(self) -> None:
        self.longest_wait: int = self.period
        self.late: int = self.period // 128
        self.signature: tuple[int, ...] = 2, self.period, self.capacity, 0

    def new_state(self) -> list[int]:
        """Return an empty ring."""
        return [LONG_AGO + self.period, 0, *([LONG_AGO] * self.capacity)]

    def take(self, state: Cells, now: int, units: int = 0) -> int:
        """Start a call if the oldest start in the ring has left the window."""
        free_from = state[0]
        if now < free_from:
            return free_from - now
        count = state[1]
        state[2 + count % self.capacity] = now
        state[0] = state[2 + (count + 1) % self.capacity] + self.period
        state[1] = count + 1
        return 0

    def wait_for(self, state: Cells, now: int, units: int = 0) -> int:
        """Return the time until the oldest start leaves the window."""
        return max(0, state[0] - now)

    def stamp(self, state: Cells) -> int:
        """Return the number of starts."""
        return state[1]

    def undo(self, state: Cells) -> None:
        """Free the newest place. The start that was there before had left the window."""
        count = state[1] = state[1] - 1
        state[0] = LONG_AGO + self.period
        state[2 + count % self.capacity] = LONG_AGO

    def is_idle(self, state: Cells, now: int) -> bool:
        """Return whether all starts have left the window."""
        return all(
            state[place] + self.period <= now for place in range(2, 2 + self.capacity)
        ) and not self.wait_for(state, now)

    def repair(self, state: Cells, now: int) -> None:
        """Order the starts and take none for later than now."""
        ring = sorted(min(state[place], now) for place in range(2, 2 + self.capacity))
        for place, start in enumerate(ring):
            state[2 + place] = max(LONG_AGO, start)
        state[1] = 0
        state[0] = state[2] + self.period

    def before_pause(self, state: Cells, until: int, length: int) -> int:
        """Ask for a gap, since a window would let all waiting calls out at once."""
        return gap_after(length, self.period // self.capacity)

    def __str__(self) -> str:
        return f"{self.capacity} calls in {format_seconds(self.period / SECOND)}"


def rule_for(rate: Rate, burst: int, smooth: bool | None) -> Gcra | SlidingWindow:
    """Choose the rule for a rate of calls.

    Args:
        rate: So many calls in so many seconds; the number need not be whole.
        burst: Calls by which a spaced rate may exceed the count of a window.
        smooth: Space calls out (True), only count them (False), or go by the period (None).

    Raises:
        OperoUsageError: A window too large to be counted, or times too long for a clock.

    Example:
        >>> rule_for(Rate(1000, 86400), burst=1, smooth=None)
        SlidingWindow(period=86400000000000, capacity=1000)
    """
    if smooth if smooth is not None else rate.period <= LONGEST_SMOOTH:
        return gcra_for(rate, burst)
    period, capacity = check_period(rate, burst), math.ceil(rate.count)
    if capacity > LARGEST_WINDOW:
        raise OperoUsageError(
            f"A quota of {rate.count:g} calls is too large to be counted one by one (at most "
            f"{LARGEST_WINDOW:,}): write smooth=True to space calls out, or name a shorter period."
        )
    # "2.5/hour" is 3 in 72 minutes: never more than 3 in an hour, and 2.5 in the long run.
    return SlidingWindow(math.ceil(period * (capacity / rate.count)), capacity)


# --- costs ----------------------------------------------------------------------------------------


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


_HEAD, _TOTAL, _RING = 0, 1, 2


@dataclass(unsafe_hash=True)
class CostWindow(Rule):
    """At most `capacity` of cost in any half-open window of `period`, without spacing.

    A sliding window that is counted in parts ("grains"): a ring holds what was spent in each of them, and a part
    counts until its last moment has left the window. So no window is ever overfull, and what is spent stays counted
    for at most one per cent longer than it must.

    The state is the number of the newest part since time 0, the sum of the ring, and the ring.

    Attributes:
        period: Length of the window.
        capacity: Cost in it, in millionths.
        grain: Length of a part.
        places: Parts in the ring.
    """

    period: int
    capacity: int

    def __post_init__(self) -> None:
        self.grain: int = -(-self.period // _GRAINS)
        # The window, and the part that has begun.
        self.places: int = -(-self.period // self.grain) + 1
        # A grain or two more.
        self.longest_wait: int = self.period + self.period // 32
        self.late: int = self.longest_wait // 128
        self.signature: tuple[int, ...] = 4, self.period, self.capacity, 0

    @classmethod
    def of(cls, rate: Rate) -> CostWindow:
        """Make the window of a rate.

        Raises:
            OperoUsageError: It is too large to be counted in millionths.
        """
        if not UNIT * rate.count < _LARGEST * UNIT:
            raise OperoUsageError(f"A limit of {rate.count:g} is too large: count in larger units.")
        return cls(max(1, round(rate.period * SECOND)), max(1, math.floor(rate.count * UNIT)))

    def new_state(self) -> list[int]:
        """Return the state of an empty window."""
        return [LONG_AGO, 0, *([0] * self.places)]

    def used(self, state: Cells, now: int) -> int:
        """Return what was spent in the window that ends now."""
        head, places = state[_HEAD], self.places
        passed = min(now // self.grain - head, places)
        gone = range(head + 1, head + passed + 1)
        return state[_TOTAL] - sum(state[_RING + part % places] for part in gone)

    def wait_for(self, state: Cells, now: int, units: int = 0) -> int:
        """Return the time until so much may be spent; at the latest when the window is empty."""
        over = self.used(state, now) + units - self.capacity
        if over <= 0:
            return 0
        head, grain, places = state[_HEAD], self.grain, self.places
        oldest = max(head, now // grain) - places + 1
        for part in range(oldest, head + 1):
            over -= state[_RING + part % places]
            if over <= 0:
                return (part + places) * grain - now
        return (head + places) * grain - now

    def take(self, state: Cells, now: int, units: int = 0) -> int:
        """Spend so much if the window has room for it."""
        wait = self.wait_for(state, now, units)
        if not wait:
            self._add(state, now, units)
        return wait

    def _add(self, state: Cells, now: int, units: int) -> None:
        head, places = state[_HEAD], self.places
        newest = max(head, now // self.grain)
        for part in range(max(head, newest - places) + 1, newest + 1):
            place = _RING + part % places
            state[_TOTAL] -= state[place]
            state[place] = 0
        state[_HEAD] = newest
        state[_RING + newest % places] += units
        state[_TOTAL] += units

    def settle(self, state: Cells, now: int, at: int, change: int) -> None:
        """Correct what was counted at a time: a refund takes back, a debt counts from now on."""
        if change > 0:
            self._add(state, now, change)
            return
        part, head, places = at // self.grain, state[_HEAD], self.places
        if head - places < part <= head:
            place = _RING + part % places
            back = min(-change, state[place])
            state[place] -= back
            state[_TOTAL] -= back

    def repair(self, state: Cells, now: int) -> None:
        """Make the sum true and take nothing for later than now."""
        head, places = state[_HEAD], self.places
        if head == LONG_AGO:
            return
        ages = [max(0, state[_RING + (head - age) % places]) for age in range(places)]
        newest = min(head, now // self.grain)
        for age, spent in enumerate(ages):
            state[_RING + (newest - age) % places] = spent
        state[_HEAD], state[_TOTAL] = newest, sum(ages)

    def is_idle(self, state: Cells, now: int) -> bool:
        """Return whether nothing of what was spent counts any more."""
        return not self.used(state, now)

    def before_pause(self, state: Cells, until: int, length: int) -> int:
        """Ask for a gap: what calls will cost is not known."""
        return gap_after(length, self.period // 100)

    def __str__(self) -> str:
        return f"{self.capacity / UNIT:,.10g} in {format_seconds(self.period / SECOND)}"


@dataclass(unsafe_hash=True)
class SpendCap(Rule):
    """At most `limit` of cost, once and for all. The only cell of the state is what was spent.

    Attributes:
        limit: In millionths.
    """

    limit: int

    late = NEVER
    longest_wait = 0

    def __post_init__(self) -> None:
        self.signature: tuple[int, ...] = 5, self.limit, 0, 0

    def new_state(self) -> list[int]:
        """Return the state of an untouched cap."""
        return [0]

    def wait_for(self, state: Cells, now: int, units: int = 0) -> int:
        """Return 0, or `SPENT` if so much is not left."""
        return SPENT if units and state[0] + units > self.limit else 0

    def take(self, state: Cells, now: int, units: int = 0) -> int:
        """Spend so much if it is left."""
        wait = self.wait_for(state, now, units)
        if not wait:
            state[0] += units
        return wait

    def settle(self, state: Cells, now: int, at: int, change: int) -> None:
        """Correct what was counted."""
        state[0] = max(0, state[0] + change)

    def is_idle(self, state: Cells, now: int) -> bool:
        """Return whether nothing was spent."""
        return not state[0]

    def __str__(self) -> str:
        return f"{self.limit / UNIT:,.10g} in all"


# --- counts ---------------------------------------------------------------------------------------


def new_cells(size: int) -> memoryview:
    """Return so many whole numbers in memory, all 0; as in a mapped file, a slice of them is no copy."""
    return memoryview(bytearray(8 * size)).cast("q")


class StepWindow:
    """Two counts over a sliding time, which is forgotten in steps.

    The cells are the number of the newest step plus one (0 if nothing was ever counted), both counts of the window,
    and those of each step.

    Args:
        seconds: Length of the window.
        steps: Steps in it.

    Attributes:
        size: Cells that it needs, all 0 at first.
    """

    def __init__(self, seconds: float, steps: int) -> None:
        self._width = seconds / steps
        self._steps = steps
        self.size: int = 3 + 2 * steps

    def add(self, cells: memoryview, now: float, first: int, second: int) -> None:
        """Count something at a time."""
        number = math.floor(now / self._width) + 1
        if number != cells[0]:
            self._forget(cells, number)
        place = 3 + 2 * (number % self._steps)
        cells[place] += first
        cells[place + 1] += second
        cells[1] += first
        cells[2] += second

    def sums(self, cells: memoryview, now: float) -> tuple[int, int]:
        """Return the counts of the window that ends now; a clock that goes back (a test's) empties it."""
        number = math.floor(now / self._width) + 1
        if number != cells[0]:
            self._forget(cells, number)
        return cells[1], cells[2]

    def _forget(self, cells: memoryview, number: int) -> None:
        """Begin a step, without those that have left the window."""
        steps, newest = self._steps, cells[0]
        oldest = number - steps + 1
        for step in range(max(newest + 1, oldest) if newest <= number else oldest, number + 1):
            place = 3 + 2 * (step % steps)
            cells[place] = cells[place + 1] = 0
        # Summed anew, so that nothing is off for long after the kill of a process between two stores.
        counts = cells.tolist()
        cells[1], cells[2] = sum(counts[3::2]), sum(counts[4::2])
        cells[0] = number


# --- several limits as one ------------------------------------------------------------------------

Part = Gcra | SlidingWindow | CostWindow | SpendCap


@dataclass(unsafe_hash=True)
class CombinedLimit(Rule):
    """Limits that are taken together, so that none of them loses what another refuses.

    The state is a list with the state of each part.

    Attributes:
        parts: The limits.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        self.signature: tuple[int, ...] = tuple(
            number for part in self.parts for number in part.signature
        )
        self.spacing: int = max(part.spacing for part in self.parts)
        self.late: int = min(part.late for part in self.parts)
        self.longest_wait: int = max(part.longest_wait for part in self.parts)

    def new_state(self) -> list[Any]:
        """Return the states of the parts."""
        return [part.new_state() for part in self.parts]

    def _with(self, state: Sequence[Cells]) -> Iterator[tuple[Part, Cells]]:
        return zip(self.parts, state, strict=True)

    def wait_for(self, state: Sequence[Cells], now: int, units: int = 0) -> int:
        """Return how long a call would have to wait at least, `SPENT` if for ever."""
        return max(part.wait_for(cells, now, units) for part, cells in self._with(state))

    def take(self, state: Sequence[Cells], now: int, units: int = UNIT) -> int:
        """Start a call under all limits and return 0, or change nothing and return the wait."""
        wait = self.wait_for(state, now, units)
        if not wait:
            for part, cells in self._with(state):
                part.take(cells, now, units)
        return wait

    def stamp(self, state: Sequence[Cells]) -> Stamp:
        """Return the stamps of the parts."""
        return [part.stamp(cells) for part, cells in self._with(state)]

    def undo(self, state: Sequence[Cells]) -> None:
        """Take back the last start in all parts."""
        for part, cells in self._with(state):
            part.undo(cells)

    def settle(self, state: Sequence[Cells], now: int, at: int, change: int) -> None:
        """Correct what a call has cost in all parts."""
        for part, cells in self._with(state):
            part.settle(cells, now, at, change)

    def caps(self, state: Sequence[Cells]) -> list[Cells]:
        """Return the states of the caps among the parts."""
        return [cells for part, cells in self._with(state) if isinstance(part, SpendCap)]

    def is_idle(self, state: Sequence[Cells], now: int) -> bool:
        """Return whether no part remembers anything that still counts."""
        return all(part.is_idle(cells, now) for part, cells in self._with(state))

    def repair(self, state: Sequence[Cells], now: int) -> None:
        """Make the states of all parts valid."""
        for part, cells in self._with(state):
            part.repair(cells, now)

    def before_pause(self, state: Sequence[Cells], until: int, length: int) -> int:
        """Prepare for a pause: the widest gap that a part asks for."""
        return max(part.before_pause(cells, until, length) for part, cells in self._with(state))

    def end_pause(self, state: Sequence[Cells], now: int) -> None:
        """Undo `before_pause`."""
        for part, cells in self._with(state):
            part.end_pause(cells, now)

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))


def combined(
    windows: Iterable[RateWindow], *, burst: int, smooth: bool | None, cap: int | None = None
) -> Rule:
    """Choose the rule for one or several windows.

    Of several windows that count calls only the shortest is spaced by default: it sets the pace, and a longer one
    that was spaced as well would leave nothing of it.

    Args:
        windows: What is counted, how much, in how many seconds.
        burst: As for `rule_for`.
        smooth: As for `rule_for`, but None spaces the shortest window only.
        cap: Most cost in all, in millionths.

    Raises:
        OperoUsageError: A window cannot be kept.
    """
    windows = tuple(windows)
    calls = [window for window in windows if not window.weighted]
    shortest = min(calls, key=lambda window: window.rate.period, default=None)
    parts: list[Part] = [
        CostWindow.of(window.rate)
        if window.weighted
        else rule_for(
            window.rate, burst, False if smooth is None and window is not shortest else smooth
        )
        for window in windows
    ]
    if cap is not None:
        parts.append(SpendCap(cap))
    only = parts[0] if len(parts) == 1 else None
    return only if isinstance(only, Gcra | SlidingWindow) else CombinedLimit(tuple(parts))


def part_of(signature: tuple[int, ...]) -> Part | None:
    """Make the part with this signature; None if there is none."""
    match signature:
        case (1, period, interval, tolerance) if period > 0 and interval > 0 and tolerance >= 0:
            return Gcra(period, interval, tolerance)
        case (2, period, capacity, _) if period > 0 and 0 < capacity <= LARGEST_WINDOW:
            return SlidingWindow(period, capacity)
        case (4, period, capacity, _) if period > 0 and capacity > 0:
            return CostWindow(period, capacity)
        case (5, limit, _, _) if limit > 0:
            return SpendCap(limit)
    return None


# --- descriptions ---------------------------------------------------------------------------------

_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day", 604800.0: "week"}


def describe_rate(rate: Rate, unit: str = "") -> str:
    """Write a rate for people.

    Example:
        >>> describe_rate(Rate(100, 60)), describe_rate(Rate(5, 10), "tokens")
        ('100 per minute', '5 tokens per 10 s')
    """
    what = unit and f" {unit}"
    return f"{rate.count:g}{what} per {_PERIODS.get(rate.period) or format_seconds(rate.period)}"


def describe_rule(windows: tuple[RateWindow, ...], rule: Rule, burst: int) -> str:
    """Write a whole limit for people, window by window."""
    parts: tuple[object, ...] = rule.parts if isinstance(rule, CombinedLimit) else (rule,)
    # Where all windows count calls, the unit says nothing.
    mixed = any(window.weighted for window in windows)
    lines = [
        f"{describe_rate(window.rate, window.unit if mixed else '')}: {_spacing(part, burst)}"
        for window, part in zip(windows, parts, strict=False)
    ]
    lines += [str(part) for part in parts[len(windows) :]]
    return " & ".join(lines)


def _spacing(part: object, burst: int) -> str:
    if not isinstance(part, Gcra):
        return "no spacing"
    at_once = f", {burst + 1} at once after a pause" if burst > 1 else ""
    return f"{part}{at_once}"
