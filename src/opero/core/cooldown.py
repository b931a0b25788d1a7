# this_file: src/opero/core/cooldown.py
"""Cooling down: a fallback value whose service asked to wait is left alone for so long."""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock
from typing import Final

from opero.caching.keys import Unkeyable, fast_part

__all__ = ["Cooldowns", "part_key"]

_MOST: Final = 1000
"""Values that are remembered; beyond it the one that is ready soonest is forgotten."""


def part_key(value: object, index: int) -> Hashable:
    """Return what tells one fallback value from the others: its content.

    A value without content (a client, a lambda) goes by its place in the list.

    Example:
        >>> part_key("gpt-4", 0) == part_key("gpt-4", 3), part_key(lambda: 0, 2)
        (True, 2)
    """
    try:
        return fast_part(value)
    except Unkeyable:
        return index


class Cooldowns:
    """Until when each of the values of one function is left alone.

    Example:
        >>> resting = Cooldowns()
        >>> resting.begin("gpt-4", 0, until=15.0)
        >>> resting.left("gpt-4", 0, now=10.0), resting.left("gpt-3.5", 1, now=10.0)
        (5.0, 0.0)
    """

    __slots__ = ("_lock", "_until")

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}
        self._lock = Lock()

    def __bool__(self) -> bool:
        """Whether any value may be cooling; the success path asks nothing else."""
        return bool(self._until)

    def begin(self, value: object, index: int, until: float) -> None:
        """Leave a value alone until a clock reading, or longer if it is so already."""
        key = part_key(value, index)
        with self._lock:
            if len(self._until) >= _MOST and key not in self._until:
                del self._until[min(self._until, key=self._until.__getitem__)]
            self._until[key] = max(until, self._until.get(key, until))

    def left(self, value: object, index: int, now: float) -> float:
        """Return the seconds for which a value is still left alone."""
        key = part_key(value, index)
        until = self._until.get(key)
        if until is None:
            return 0.0
        if until > now:
            return until - now
        with self._lock:
            if self._until.get(key) == until:
                del self._until[key]
        return 0.0

    def __len__(self) -> int:
        return len(self._until)
