# this_file: src/opero/concurrency/backlog.py
"""Chunks that wait for a lane, and which lane is to have which."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opero.concurrency.lane import Held, Lane

__all__ = ["deal"]


def deal(waiting: deque[Held], lanes: Iterable[Lane], in_flight: int) -> Iterator[Lane]:
    """Give waiting chunks to lanes that have room, the emptiest first, and return these lanes one by one.

    A chunk that must be alone waits for a lane that has nothing else; the emptiest is given nothing more meanwhile.

    Args:
        waiting: The chunks, the next one first; what is given away is taken out.
        lanes: The lanes.
        in_flight: Items that a lane can have under way at once.
    """
    if not waiting:
        return
    ready = [lane for lane in lanes if lane.ready]
    for held in list(waiting):
        able = [lane for lane in ready if lane.has_room(held, in_flight)]
        if able:
            lane = min(able, key=_load)
            waiting.remove(held)
            lane.take(held)
            yield lane
        elif not held.alone:
            return
        elif ready:
            ready.remove(min(ready, key=_load))


def _load(lane: Lane) -> int:
    return lane.open
