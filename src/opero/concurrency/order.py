# this_file: src/opero/concurrency/order.py
"""In what order finished items are handed out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opero.concurrency.engine import Outcome

__all__ = ["AsTheyCome", "Batch", "InOrder", "Origin"]

Origin = Literal["fresh", "hit", "shared", "stale", "resumed"]
"""Where a result came from: computed by this map, found in the cache, computed just now by somebody else or for an
equal item, found in the cache expired while computing it failed, or found in the checkpoint."""


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
    odd: dict[int, Outcome] = field(default_factory=dict)
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


class AsTheyCome:
    """Finished items leave at once.

    Attributes:
        held: Items that nobody has taken yet.
    """

    def __init__(self) -> None:
        self.held: int = 0
        self._ready: deque[Batch] = deque()

    def put(self, batch: Batch) -> None:
        """Take finished items."""
        self._ready.append(batch)
        self.held += len(batch)

    def take(self) -> Batch | None:
        """Return the next ones to hand out."""
        if not self._ready:
            return None
        batch = self._ready.popleft()
        self.held -= len(batch)
        return batch

    def open_up(self) -> None:
        """Nobody waits, so nothing changes."""


class InOrder:
    """Finished items wait for those before them.

    Attributes:
        held: Items that wait here.
    """

    def __init__(self) -> None:
        self.held: int = 0
        self._next = 0
        self._runs: dict[int, Batch] = {}
        self._gaps = False

    def put(self, batch: Batch) -> None:
        """Take finished items."""
        for run in batch.runs():
            if run:
                self._runs[run.idx[0]] = run
                self.held += len(run)

    def take(self) -> Batch | None:
        """Return the next ones to hand out; None while one before them is missing."""
        if self._gaps and self._runs and self._next not in self._runs:
            self._next = min(self._runs)
        run = self._runs.pop(self._next, None)
        if run is not None:
            self._next += len(run)
            self.held -= len(run)
        return run

    def open_up(self) -> None:
        """Hand out the rest with gaps: what is missing will not come any more."""
        self._gaps = True
