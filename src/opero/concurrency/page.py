# this_file: src/opero/concurrency/page.py
"""A chunk in a worker process: what came, and what is to become of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from opero.concurrency.executors.base import Parked
    from opero.concurrency.parcel import Parcel
    from opero.concurrency.sheet import Sheet

__all__ = ["Page"]


class Page:
    """A chunk under way.

    Args:
        parcel: Its items.
        parked: What some of them bring from earlier attempts.
        sheet: Takes what becomes of them.
        turn: How many chunks this worker has had, with this one.
        stopped: Whether no further item shall begin.

    Attributes:
        positions: Takes one position after the other.
        soon: When what is done is reported, in a loop.
    """

    def __init__(
        self,
        parcel: Parcel,
        parked: dict[int, Parked],
        sheet: Sheet,
        turn: int,
        stopped: Callable[[], object],
    ) -> None:
        self.parcel = parcel
        self.parked = parked
        self.sheet = sheet
        self.turn = turn
        self.positions = sheet.positions(stopped)
        self.soon: TimerHandle | None = None
