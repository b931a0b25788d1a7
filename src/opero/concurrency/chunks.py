# this_file: src/opero/concurrency/chunks.py
"""Size the chunks of a map, and keep count of what is reported of each."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final

__all__ = ["HEAVIEST", "LARGEST", "ChunkProgress", "ChunkSize"]

LARGEST: Final = 5_000
"""Most items of a chunk."""

HEAVIEST: Final = 1 << 21
"""Most bytes of a chunk's large buffers, if it is not a single item: few enough to stay in the processor's cache."""
_GROWTH: Final = 4
"""A chunk is at most so many times as large as the last one that was measured."""
_LEAP: Final = 16
"""The same, while even that many items would take less than a quarter of the target."""
_SMALLEST: Final = 32
"""Towards the end of the input chunks get smaller, down to this part of their size."""


class ChunkSize:
    """The size of the next chunk, from the time that items took so far.

    It starts with single items and grows towards chunks that take `target_s`.

    Args:
        target_s: Seconds of work that a chunk should hold.
        fixed: Size that the user wants; None to measure.
        least: Smallest size, for workers that run several items at once.

    Attributes:
        size: Items of the next chunk.

    Example:
        >>> chunks = ChunkSize(target_s=0.03)
        >>> for _ in range(3):
        ...     chunks.measured(chunks.size, 0.001 * chunks.size)  # each item takes 1 ms
        >>> chunks.size
        30
    """

    def __init__(self, *, target_s: float, fixed: int | None = None, least: int = 1) -> None:
        self._target = target_s
        self._fixed = fixed
        self._least = least
        self._most = LARGEST
        self._wanted = 0
        self.size: int = fixed or least

    def measured(self, items: int, busy_s: float) -> None:
        """Learn how long some items took; a small sample may shrink the size, not raise it."""
        if self._fixed or not items:
            return
        # Compared before it is divided: a time may be so short that the quotient is infinite.
        short = busy_s * _SMALLEST * LARGEST <= self._target * items
        fitting = _SMALLEST * LARGEST if short else int(self._target * items / busy_s)
        self._wanted = fitting
        wanted = max(self._least, min(self._most, fitting))
        if wanted < self.size:
            self.size = wanted
        elif items >= self.size:
            leap = _LEAP if 4 * _LEAP * self.size <= wanted else _GROWTH
            self.size = min(wanted, leap * self.size)

    def weighed(self, items: int, size: int) -> None:
        """Learn how many bytes some items took that travel beside their frame."""
        self._most = min(LARGEST, max(self._least, HEAVIEST * items // size))
        if not self._fixed:
            self.size = min(self.size, self._most)

    def gave_back(self) -> None:
        """Learn that a chunk took far longer than it should: start again with single items."""
        self.size = self._fixed or self._least

    def part(self, left: int, slots: int) -> int:
        """Return the size of a part of what was given back: it is shared out, whatever size the user wants."""
        return max(1, min(self.size, ceil(left / max(1, slots))))

    def share(self, left: int, slots: int) -> int:
        """Return the size that spreads the last `left` items evenly.

        As in guided self-scheduling (C. Polychronopoulos and D. Kuck, 1987), chunks become smaller
        towards the end.
        """
        # Of the quickest items a chunk holds less than it might, and a part of it would be nothing.
        whole = self._wanted if self.size == LARGEST else self.size
        least = max(1, min(self.size, whole // _SMALLEST))
        return self._fixed or max(least, min(self.size, ceil(left / max(1, slots))))


class ChunkProgress:
    """What is reported of a chunk: everything up to some position, and what came early.

    Args:
        count: Its items.

    Attributes:
        kept: Position from which on its worker does nothing.
        open: How many items are still to be reported.

    Example:
        >>> progress = ChunkProgress(5)
        >>> progress.report([0, 2])
        >>> progress.cut(4)
        range(4, 5)
        >>> progress.left(), progress.open
        ([1, 3], 2)
    """

    __slots__ = ("_early", "_next", "kept", "open")

    def __init__(self, count: int) -> None:
        self.kept: int = count
        self.open: int = count
        self._next = 0
        self._early: set[int] | None = None

    def report(self, places: Sequence[int]) -> None:
        """Note that items are done."""
        self.open -= len(places)
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
        self.open = max(0, self.kept - self._next) - sum(n < self.kept for n in self._early or ())
        return free

    def has(self, position: int) -> bool:
        """Tell whether an item is reported."""
        return position < self._next or (self._early is not None and position in self._early)

    @property
    def over(self) -> bool:
        """Whether everything is reported."""
        return self.open <= 0

    def left(self) -> Sequence[int]:
        """Return the positions that are still to be reported."""
        open_places = range(self._next, self.kept)
        early = self._early
        return [n for n in open_places if n not in early] if early else open_places
