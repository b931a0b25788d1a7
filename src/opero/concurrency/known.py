# this_file: src/opero/concurrency/known.py
"""Results that a map did not compute for the item itself, gathered by where they came from."""

from __future__ import annotations

from typing import Any

from opero.concurrency.engine import Outcome
from opero.concurrency.order import Batch, Origin

__all__ = ["Known"]


class Known:
    """Items that are finished, in a batch for each origin.

    Example:
        >>> known = Known()
        >>> known.add("hit", 3, "item", "result")
        >>> known.batches
        [Batch(idx=[3], items=['item'], values=['result'], odd={}, origin='hit')]
    """

    def __init__(self) -> None:
        self._batches: dict[Origin, Batch] = {}

    @property
    def batches(self) -> list[Batch]:
        """What was gathered."""
        return list(self._batches.values())

    def add(self, origin: Origin, index: int, item: Any, told: Any) -> None:
        """Take a finished item.

        Args:
            origin: Where its result came from.
            index: Its place in the input.
            item: The item.
            told: Its result, or an `Outcome`.
        """
        batch = self._batches.get(origin)
        if batch is None:
            batch = self._batches[origin] = Batch([], [], [], {}, origin)
        idx: Any = batch.idx
        if isinstance(told, Outcome):
            batch.odd[len(batch.items)] = told
        idx.append(index)
        batch.items.append(item)
        batch.values.append(told.value if isinstance(told, Outcome) else told)
