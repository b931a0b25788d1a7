# this_file: src/opero/concurrency/outbox.py
"""Large results of a worker on their way: each is copied into a segment as soon as it is there.

An array that waited for the next report would be memory that the next array cannot have, and new memory is dear.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.parcel import PLAIN, seal
from opero.concurrency.segment import CAN_PASS, FULL, Load, Segment, Supply

if TYPE_CHECKING:
    from opero.concurrency.executors.base import ItemOutcome
    from opero.concurrency.slate import Slate

__all__ = ["Outbox"]

_KEPT: Final = 2
"""Segments of a worker: one that it fills, while the map empties the other."""


class Outbox:
    """Where a worker puts its results.

    Args:
        slate: Tells how many segments the map has emptied.
    """

    def __init__(self, slate: Slate) -> None:
        self._slate = slate
        self._supply = Supply(_KEPT)
        self._segment: Segment | None = None
        self._sent: deque[tuple[int, Segment]] = deque()
        self._count = 0
        self._shown: dict[int, int] = {}

    def seal(self, value: Any, outcome: ItemOutcome | None) -> Any:
        """Return what stands for a result, that of the outcome if there is one."""
        if outcome is not None:
            if type(outcome.value) not in PLAIN:
                outcome.value = self._sealed(outcome.value)
        elif type(value) not in PLAIN:
            value = self._sealed(value)
        return value

    def _sealed(self, value: Any) -> tuple[Any, ...]:
        if CAN_PASS and self._segment is None:
            self._segment = self._take()
        return seal(value, "result", self._segment)

    def _take(self) -> Segment:
        taken = self._slate.taken
        while self._sent and self._sent[0][0] <= taken:
            self._supply.give_back(self._sent.popleft()[1])
        return self._supply.take()

    @property
    def full(self) -> bool:
        """Whether what is there had better be sent."""
        return self._segment is not None and self._segment.used >= FULL

    def ship(self) -> tuple[Load | tuple[()], int | None]:
        """Return what is said of the segment in the frame, and the descriptor that goes with it."""
        segment = self._segment
        if segment is None or not segment.used:
            return (), None
        self._segment = None
        load, fd = segment.load, segment.descriptor(self._shown)
        if segment.kept:
            self._count += 1
            self._sent.append((self._count, segment))
        else:
            self._supply.drop(segment)
        return load, fd
