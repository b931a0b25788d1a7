# this_file: src/opero/concurrency/policy.py
"""What failed items mean for the map: go on, stop, or end at once."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["Budget", "OnError"]

OnError = Literal["raise", "return", "skip"]

_SAMPLE: Final = 20
"""Finished items from which on a share of failures says anything."""


class Budget:
    """How many items may fail.

    Args:
        most: A number of items, or a share of the finished ones between 0 and 1; None for no bound.

    Attributes:
        finished: Items that have ended, in whatever way.
        failed: Those that failed.

    Example:
        >>> budget = Budget(0.1)
        >>> budget.count(19, failed=19), budget.count(1, failed=0)
        (None, '19 of 20 items failed, more than max_errors=0.1 allows')
    """

    def __init__(self, most: float | None = None) -> None:
        self._most = most
        self.finished: int = 0
        self.failed: int = 0

    def count(self, items: int, *, failed: int) -> str | None:
        """Count items; return why the map must stop, or None."""
        self.finished += items
        self.failed += failed
        if self._most is None or not self.failed:
            return None
        if isinstance(self._most, int):
            if self.failed < self._most:
                return None
            return f"{self.failed} items failed, and max_errors={self._most} ends the map there"
        if self.finished < _SAMPLE or self.failed <= self._most * self.finished:
            return None
        return (
            f"{self.failed} of {self.finished} items failed, more than max_errors={self._most:g} "
            "allows"
        )
