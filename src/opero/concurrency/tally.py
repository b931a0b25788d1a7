# this_file: src/opero/concurrency/tally.py
"""What of a chunk is reported, and what is still to come from its worker."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Tally"]


class Tally:
    """Keeps count of a chunk: how far it is reported without a gap, and what was reported early.

    Args:
        count: Its items.

    Attributes:
        kept: Position from which on its worker does nothing.

    Example:
        >>> tally = Tally(5)
        >>> tally.report([0, 2])
        >>> tally.cut(4)
        range(4, 5)
        >>> tally.left(), tally.over
        ([1, 3], False)
    """

    __slots__ = ("_early", "_next", "kept")

    def __init__(self, count: int) -> None:
        self.kept: int = count
        self._next = 0
        self._early: set[int] | None = None

    def report(self, places: Sequence[int]) -> None:
        """Note that items are done."""
        if isinstance(places, range) and places.start == self._next:
            self._next = places.stop
        else:
            self._early = {*places} if self._early is None else self._early | {*places}
        early = self._early
        while early and self._next in early:
            early.remove(self._next)
            self._next += 1

    def cut(self, kept: int) -> range:
        """Note that the worker does nothing from a position on; return the positions that are free now."""
        free = range(min(kept, self.kept), self.kept)
        self.kept = free.start
        return free

    def has(self, position: int) -> bool:
        """Tell whether an item is reported."""
        return position < self._next or (self._early is not None and position in self._early)

    @property
    def open(self) -> int:
        """How many items are still to be reported."""
        return self.kept - self._next - len(self._early or ())

    @property
    def over(self) -> bool:
        """Whether nothing is to come any more."""
        return self.open <= 0

    def left(self) -> Sequence[int]:
        """Return the positions that are still to be reported."""
        rest = range(self._next, self.kept)
        early = self._early
        return [n for n in rest if n not in early] if early else rest
