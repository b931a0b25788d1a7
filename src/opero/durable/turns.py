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

_AT_A_TIME: Final = 64
"""Outcomes given before the loop looks after sockets and timers again."""

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
        try:
            self._give()
            if not restless:
                self._go_on()
        finally:
            self._armed = bool(self._lines)
            if self._armed:
                asyncio.get_running_loop().call_soon(self._turn)

    def _give(self) -> None:
        """Give the next outcome of each line."""
        for line, waiting in list(self._lines.items()):
            heapq.heappop(waiting)[2]()
            if not waiting:
                del self._lines[line]

    def _go_on(self) -> None:
        """Give further outcomes, and run what each sets going, as the loop would in its next rounds.

        A replay of thousands of outcomes would else pay for several rounds of the loop with each. Nothing is done
        out of its order: this callback is the last of its round, so what is ready now has come after it.
        """
        loop, ready = asyncio.get_running_loop(), self._busy
        if ready is None:
            return
        for _ in range(_AT_A_TIME):
            for _ in range(_PATIENCE):
                for _ in range(len(ready)):
                    handle = ready.popleft()
                    if not handle.cancelled():
                        handle._run()  # noqa: SLF001 - as the loop itself does
                if not ready:
                    break
            if ready or not self._lines or getattr(loop, "_stopping", False):
                return
            self._give()


_of_loops: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Turns]] = WeakKeyDictionary()


def turns_of(loop: asyncio.AbstractEventLoop) -> Turns:
    """Return the turns of a loop; call it in the loop's thread."""
    found = _of_loops.get(loop)
    if found is None:
        found = _of_loops[loop] = Turns(loop)
    return found
