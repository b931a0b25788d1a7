# this_file: src/opero/concurrency/batches.py
"""Hold finished items in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opero.concurrency.executors.base import ItemOutcome

__all__ = ["Batch", "BatchesByOrigin", "Origin"]

Origin = Literal["fresh", "hit", "shared", "stale", "resumed"]
"""Where a result came from: computed by this map, found in the cache, computed by another caller or for an equal item,
found expired in the cache while computing it failed, or found in the checkpoint."""


@dataclass(slots=True)
class Batch:
    """Finished items.

    Attributes:
        idx: Their indices in the input; a `range` where they are neighbours.
        items: The items.
        values: Their results; None where there is none.
        odd: What is more than a plain result, by position.
        origin: Where the results came from.
    """

    idx: Sequence[int]
    items: list[Any]
    values: list[Any]
    odd: dict[int, ItemOutcome] = field(default_factory=dict)
    origin: Origin = "fresh"

    def __len__(self) -> int:
        return len(self.items)

    def without(self, positions: Collection[int]) -> Batch:
        """Return the items at all other positions."""
        kept = [n for n in range(len(self)) if n not in positions]
        return Batch(
            [self.idx[n] for n in kept],
            [self.items[n] for n in kept],
            [self.values[n] for n in kept],
            {place: self.odd[n] for place, n in enumerate(kept) if n in self.odd},
            self.origin,
        )

    def runs(self) -> Iterator[Batch]:
        """Split into runs of neighbours."""
        if isinstance(self.idx, range):
            yield self
            return
        start = 0
        for end in range(1, len(self.idx) + 1):
            if end < len(self.idx) and self.idx[end] == self.idx[end - 1] + 1:
                continue
            yield Batch(
                range(self.idx[start], self.idx[start] + end - start),
                self.items[start:end],
                self.values[start:end],
                {n - start: self.odd[n] for n in range(start, end) if n in self.odd},
                self.origin,
            )
            start = end


class BatchesByOrigin:
    """Finished items that the map did not compute for themselves, in a batch for each origin.

    Example:
        >>> found = BatchesByOrigin()
        >>> found.add("hit", 3, "item", "result")
        >>> found.batches
        [Batch(idx=[3], items=['item'], values=['result'], odd={}, origin='hit')]
    """

    def __init__(self) -> None:
        self._batches: dict[Origin, Batch] = {}

    @property
    def batches(self) -> list[Batch]:
        """The batches so far."""
        return list(self._batches.values())

    def add(self, origin: Origin, index: int, item: Any, result: Any) -> None:
        """Add a finished item.

        Args:
            origin: Where its result came from.
            index: Its place in the input.
            item: The item.
            result: Its result, or an `ItemOutcome`.
        """
        batch = self._batches.get(origin)
        if batch is None:
            batch = self._batches[origin] = Batch([], [], [], {}, origin)
        idx: Any = batch.idx
        if isinstance(result, ItemOutcome):
            batch.odd[len(batch.items)] = result
        idx.append(index)
        batch.items.append(item)
        batch.values.append(result.value if isinstance(result, ItemOutcome) else result)
