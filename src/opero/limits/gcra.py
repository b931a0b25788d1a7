# this_file: src/opero/limits/gcra.py
"""Decide when spaced calls may start: the generic cell rate algorithm, and pauses of a limit; pure.

A rule decides from a few whole numbers (its state) and a reading of the clock, nothing else. Times are nanoseconds,
because sums of binary fractions drift and would let a call too many into a window now and then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Protocol

from opero.errors import OperoUsageError
from opero.utils.units import Rate, format_seconds

SECOND: Final = 1_000_000_000
NEVER: Final = 1 << 62
LONG_AGO: Final = -NEVER
_LONGEST: Final = 1 << 60
_WHOLE_FROM: Final = 100

Stamp = Any
"""What shows whether anything has started since; to be compared."""


class Cells(Protocol):
    """Whole numbers that hold a state: a list, or a view of a file that several processes map."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class Rule:
    """Decides when calls may start. Its state is `Cells`, or a list of them for rules that combine others.

    A process may be killed between any two stores into the state; each store leaves a valid one, or one that
    `repair` puts right.

    Attributes:
        spacing: How far apart calls start at least while there is a queue.
        longest_wait: The longest wait that a valid state can ask for; a longer one takes `repair`.
        late: How late a waiter may wake: less than one per cent of the wait, which is what it costs of the rate.
        signature: Numbers that distinguish the rule from others: four for each of its parts, the first one its kind.
    """

    spacing: int = 0
    longest_wait: int
    late: int
    signature: tuple[int, ...]

    def new_state(self) -> Any:
        """Return the state of a limit under which nothing has started."""
        raise NotImplementedError

    def take(self, state: Any, now: int, units: int = 0) -> int:
        """Start a call that costs so much and return 0, or change nothing and return how long to wait."""
        raise NotImplementedError

    def wait_for(self, state: Any, now: int, units: int = 0) -> int:
        """Return how long the next call would have to wait."""
        raise NotImplementedError

    def stamp(self, state: Any) -> Stamp:
        """Return what changes with each call that starts."""
        return 0

    def undo(self, state: Any) -> None:
        """Take back the last `take`, but not its cost; nothing may have started since."""

    def settle(self, state: Any, now: int, at: int, change: int) -> None:
        """Correct what a call that started `at` has cost; a `change` less than 0 is a refund."""

    def is_idle(self, state: Any, now: int) -> bool:
        """Return whether the state remembers nothing that still counts."""
        raise NotImplementedError

    def repair(self, state: Any, now: int) -> None:
        """Make a state valid that was damaged, or written under a clock that has gone back since."""

    def before_pause(self, state: Any, until: int, length: int) -> int:
        """Prepare for a pause of `length` that ends at `until`.

        Returns:
            How far apart calls have to be kept after it; 0 if the state sees to that.
        """
        return 0

    def end_pause(self, state: Any, now: int) -> None:
        """Undo `before_pause`, because the pause is over early."""


@dataclass(unsafe_hash=True)
class Gcra(Rule):
    """One call each `interval`; a call that comes late may catch up by `tolerance`.

    This is the generic cell rate algorithm (GCRA) in its virtual scheduling form, as described in ITU-T
    Recommendation I.371 and in the ATM Forum's User-Network Interface specification. With the theoretical arrival
    time `tat`, the increment `T` and the limit `tau`, a call at time `t` conforms if `t >= tat - tau`, and then
    `tat = max(t, tat) + T`.

    No window is overfull: a start at `t` puts `tat` at `t + T` or later, each further one adds at least `T`, so that
    the last of `k` starts comes at `t + (k - 1) T - tau` at the earliest. If it lies in the same half-open window of
    `period`, then `k - 1 < (period + tau) / T`; for `T = period / N` and `tau = burst T` this gives `k <= N + burst`.

    The only cell of the state is `tat`.

    Attributes:
        period: The window that the rate names.
        interval: `T`.
        tolerance: `tau`.
    """

    period: int
    interval: int
    tolerance: int

    def __post_init__(self) -> None:
        self.spacing: int = self.interval
        self.longest_wait: int = self.interval
        # What the tolerance makes up for, and a little.
        self.late: int = self.tolerance + self.interval // 128
        self.signature: tuple[int, ...] = 1, self.period, self.interval, self.tolerance

    def new_state(self) -> list[int]:
        """Return a `tat` that is long over."""
        return [LONG_AGO]

    def take(self, state: Cells, now: int, units: int = 0) -> int:
        """Start a call if it conforms."""
        # Read once: in a mapped file each reading of a cell costs as much as a sum.
        tat = state[0]
        if tat <= now:
            state[0] = now + self.interval
            return 0
        ahead = tat - now
        if ahead > self.tolerance:
            return ahead - self.tolerance
        state[0] = tat + self.interval
        return 0

    def wait_for(self, state: Cells, now: int, units: int = 0) -> int:
        """Return the time until a call conforms."""
        return max(0, state[0] - now - self.tolerance)

    def stamp(self, state: Cells) -> int:
        """Return `tat`."""
        return state[0]

    def undo(self, state: Cells) -> None:
        """Go back by an increment. What was over before it is over still, whatever it was."""
        state[0] -= self.interval

    def is_idle(self, state: Cells, now: int) -> bool:
        """Return whether `tat` is over."""
        return state[0] <= now

    def repair(self, state: Cells, now: int) -> None:
        """Go back to the latest `tat` that a start can have left."""
        state[0] = min(state[0], now + self.tolerance + self.interval)

    def before_pause(self, state: Cells, until: int, length: int) -> int:
        """Let the first call conform at the end of the pause, and none of those missed catch up."""
        state[0] = max(state[0], until + self.tolerance)
        return 0

    def end_pause(self, state: Cells, now: int) -> None:
        """Go back to the latest `tat` that a start can have left."""
        self.repair(state, now)

    def __str__(self) -> str:
        return f"one call each {format_seconds(self.interval / SECOND)}"


def gcra_for(rate: Rate, burst: int) -> Gcra:
    """Return the rule that spaces the calls of a rate out.

    Args:
        rate: So many calls in so many seconds; the number need not be whole.
        burst: Calls by which the count of a window may be exceeded.

    Raises:
        OperoUsageError: The times are too long for a clock.

    Example:
        >>> gcra_for(Rate(100, 60), burst=1)
        Gcra(period=60000000000, interval=600000000, tolerance=600000000)
    """
    period = check_period(rate, burst)
    count: float = rate.count
    whole = math.floor(count)
    part = count - whole
    # What stands behind the point must not become one call more in some window. A large number loses it (less than
    # one per cent), a small one keeps its rate and pays with tolerance.
    if whole >= _WHOLE_FROM:
        count, part = float(whole), 0.0
    over, under = count.as_integer_ratio()
    interval = -(-period * under // over)
    return Gcra(period, interval, max(0, burst * interval - math.ceil(part * interval)))


def check_period(rate: Rate, burst: int) -> int:
    """Return the period of a rate in nanoseconds.

    Raises:
        OperoUsageError: The rate is too slow for a clock.
    """
    period = max(1, round(rate.period * SECOND))
    if max(period, math.ceil(period / rate.count) * (burst + 1)) > _LONGEST:
        raise OperoUsageError(
            f"A rate of {rate.count:g} in {rate.period:g} s is too slow for a clock: "
            "name a shorter period or a larger number."
        )
    return period


# --- pauses ---------------------------------------------------------------------------------------

PAUSE_CELLS: Final = 3
_NEXT, _UNTIL, _GAP = 0, 1, 2

_DRAINED: Final = 50_000_000
"""A slot that stood open for so long (and for a gap) has no caller waiting for it any more."""


class LimitPause:
    """A pause that a service asked for: until when no call starts, and how calls come out of it.

    After the pause calls start `gap` apart until no caller waits for a slot any more, so that those that have waited
    do not all arrive at once. A gap of 0 leaves that to the rule.

    The state is three cells, all 0 while there is no pause. Cell 0, the time before which nothing starts, is stored
    first and cleared last: a process that is killed in between leaves a pause, never a half one.
    """

    __slots__ = ("_cells",)

    def __init__(self, cells: Cells | None = None) -> None:
        self._cells: Cells = [0] * PAUSE_CELLS if cells is None else cells

    @property
    def on(self) -> bool:
        """Whether there is a pause, or one that calls are still coming out of."""
        return self._cells[_NEXT] != 0

    def left(self, now: int) -> int:
        """Return how much is left of the pause itself."""
        return max(0, self._cells[_UNTIL] - now) if self.on else 0

    def wait_for(self, now: int) -> int:
        """Return how long the next call has to wait for the pause or for the one before it."""
        return max(0, self._cells[_NEXT] - now)

    def begin(self, until: int, gap: int) -> bool:
        """Pause until a time; False, without effect, if the pause already lasts that long."""
        cells = self._cells
        if self.on and cells[_UNTIL] >= until:
            return False
        cells[_NEXT] = max(cells[_NEXT], until)
        cells[_UNTIL] = until
        cells[_GAP] = gap
        return True

    def started(self, now: int) -> None:
        """Note that a call has started after the pause."""
        cells = self._cells
        gap = cells[_GAP]
        if not gap or now - cells[_NEXT] > max(gap, _DRAINED):
            self.end()
        else:
            cells[_NEXT] = now + gap

    def take(self, rule: Rule, state: Any, now: int, units: int) -> int:
        """Start a call if the rule lets it and there is no pause; return 0 or the wait."""
        wait = self.wait_for(now) or rule.take(state, now, units)
        if not wait and self.on:
            self.started(now)
        return wait

    def end(self) -> None:
        """Forget the pause."""
        for place in (_GAP, _UNTIL, _NEXT):
            self._cells[place] = 0


def gap_after(length: int, even: int) -> int:
    """Return how far apart calls without spacing start after a pause.

    Ten come in the time that the service has asked for, or as many as would be spread evenly over the period if that
    is more.

    Args:
        length: The pause.
        even: The even spacing of the limit.

    Example:
        >>> gap_after(2_000_000_000, even=86_400_000_000)
        200000000
    """
    return max(1, min(even, length // 10))
