# this_file: src/opero/durable/turns.py
"""In which order outcomes reach the tasks of a workflow: one after another, as they were recorded.

"The first that is done wins" is decided by this order, so a replay has to repeat it. The next outcome
is given when everything that the one before has set going has been done, in the first run as well as
in a replay; else two of them might look as if they had come at once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

__all__ = ["Turns", "turns_of"]

_PATIENCE: Final = 64
"""Rounds of the event loop after which it is no longer waited for: something there never rests."""

Give = Callable[[], object]


class Turns:
    """The outcomes that wait for their turn in one event loop.

    Args:
        loop: The loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # What is to be run in this or the next round; a loop that hides it gets a few rounds for each outcome.
        self._busy: Any = getattr(loop, "_ready", None)
        self._lines: dict[object, list[tuple[float, int, Give]]] = {}
        self._numbers = itertools.count()
        self._rounds = 0
        self._armed = False

    def queue(self, line: object, order: float, give: Give) -> None:
        """Give an outcome when its turn has come; call it in the loop's thread.

        Args:
            line: Outcomes of the same line wait for each other.
            order: The smallest is the next.
            give: Gives it.
        """
        heapq.heappush(self._lines.setdefault(line, []), (order, next(self._numbers), give))
        if not self._armed:
            self._armed = True
            self._rounds = 0
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        restless = self._rounds < 8 if self._busy is None else bool(self._busy)
        if restless and self._rounds < _PATIENCE:
            self._rounds += 1
            asyncio.get_running_loop().call_soon(self._turn)
            return
        self._rounds = 0
        for line, waiting in list(self._lines.items()):
            heapq.heappop(waiting)[2]()
            if not waiting:
                del self._lines[line]
        if self._lines:
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._armed = False


_of_loops: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Turns]] = WeakKeyDictionary()


def turns_of(loop: asyncio.AbstractEventLoop) -> Turns:
    """Return the turns of a loop; call it in the loop's thread."""
    found = _of_loops.get(loop)
    if found is None:
        found = _of_loops[loop] = Turns(loop)
    return found
