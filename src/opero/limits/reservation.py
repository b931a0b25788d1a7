# this_file: src/opero/limits/reservation.py
"""A slot that was taken, and may be given back or settled; how a limit is told to people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opero.limits.cost import UNIT, as_units
from opero.limits.joint import Joint
from opero.limits.pace import Spacing
from opero.limits.slot import Mark, undo
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.limits.pace import Rule, Words
    from opero.utils.units import Rate, Window

__all__ = ["Reservation", "describe_rate", "describe_rule"]

_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day", 604800.0: "week"}


class Reservation:
    """A slot that was taken and may be given back.

    Args:
        limiter: The limiter that it is of.
        rule: Its rule.
        units: Cost in millionths.

    Attributes:
        limiter: As above.
        waited: Seconds that it took to get it.
    """

    __slots__ = ("_at", "_mark", "_rule", "_units", "limiter", "waited")

    def __init__(self, limiter: Any, rule: Rule, units: int = UNIT) -> None:
        self.limiter: Any = limiter
        self.waited: float = 0.0
        self._rule = rule
        self._units = units
        self._mark: Mark | None = None
        self._at = 0

    @property
    def cost(self) -> float:
        """What counts for it now: the reserved cost, or the settled one."""
        return self._units / UNIT

    def take(self) -> int:
        """Try to take the slot; return 0, or the nanoseconds to wait."""
        slot, rule = self.limiter.current_slot(), self._rule
        mark: Mark | None = None
        if isinstance(rule, Joint):

            def begin(words: Words, now: int) -> int:
                nonlocal mark
                before = rule.save(words)
                wait = rule.take(words, now, self._units)
                mark, self._at = Mark(before, rule.save(words)), now
                return wait

            wait: int = slot.decide(begin)
        else:
            wait, mark = slot.take_marked()
        if not wait:
            self._mark = mark
        return wait

    def refund(self) -> bool:
        """Give the slot back, because the call was not made after all.

        What it costs is given back in any case.

        Returns:
            True if the limiter is now as if the slot had never been taken. False if another call
            has started since: to count this one out might let one too many into some window.
        """
        mark, self._mark = self._mark, None
        if mark is None:
            return False
        rule, slot = self._rule, self.limiter.current_slot()
        if not isinstance(rule, Joint):
            given: bool = slot.give_back(mark)
            return given

        def undone(words: Words, now: int) -> bool:
            rule.settle(words, now, self._at, -self._units)
            return undo(rule, words, mark)

        whole: bool = slot.change(undone)
        return whole

    def settle(self, cost: float) -> None:
        """Put right what the call has cost: the difference is given back, or becomes a debt.

        That is final: a slot that was settled or given back stays so.

        Args:
            cost: The real cost.

        Raises:
            OperoUsageError: It is no number of 0 or more, or the limiter counts calls.

        Example:
            >>> from opero import RateLimiter
            >>> limiter = RateLimiter("1000 tokens/minute")
            >>> reservation = limiter.reserve(cost=900)
            >>> limiter.try_acquire(cost=900)
            False
            >>> reservation.settle(100)
            >>> limiter.try_acquire(cost=900)
            True
        """
        self.limiter.check_cost(cost)
        units = as_units(cost, "cost")
        mark, self._mark = self._mark, None
        rule = self._rule
        if mark is None or not isinstance(rule, Joint):
            return
        change, self._units = units - self._units, units
        if change:
            self.limiter.current_slot().change(
                lambda words, now: rule.settle(words, now, self._at, change)
            )

    def __repr__(self) -> str:
        return f"<Reservation after {self.waited:.3f} s>"


def describe_rate(rate: Rate, unit: str = "") -> str:
    """Write a rate for people.

    Example:
        >>> from opero.utils.units import Rate
        >>> describe_rate(Rate(100, 60)), describe_rate(Rate(5, 10), "tokens")
        ('100 per minute', '5 tokens per 10 s')
    """
    what = unit and f" {unit}"
    return f"{rate.count:g}{what} per {_PERIODS.get(rate.period) or format_seconds(rate.period)}"


def describe_spacing(rule: object, burst: int) -> str:
    """Write for people how a rule spaces calls out.

    Example:
        >>> from opero.limits.pace import rule_for
        >>> from opero.utils.units import Rate
        >>> describe_spacing(rule_for(Rate(100, 60), burst=1, smooth=None), burst=1)
        'one call each 0.6 s'
    """
    if not isinstance(rule, Spacing):
        return "no spacing"
    at_once = f", {burst + 1} at once after a pause" if burst > 1 else ""
    return f"{rule}{at_once}"


def describe_rule(windows: tuple[Window, ...], rule: Rule, burst: int) -> str:
    """Write a whole limit for people, window by window."""
    parts = rule.parts if isinstance(rule, Joint) else (rule,)
    # Where all windows count calls, nobody needs to be told.
    mixed = any(window.weighted for window in windows)
    told = [
        f"{describe_rate(window.rate, window.unit if mixed else '')}: {describe_spacing(part, burst)}"
        for window, part in zip(windows, parts, strict=False)
    ]
    told += [str(part) for part in parts[len(windows) :]]
    return " & ".join(told)
