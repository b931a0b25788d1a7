# this_file: src/opero/caching/stores/redis_lines.py
"""Connections of event loops: some for each loop, closed with it."""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop, Semaphore, get_running_loop
from collections import deque
from collections.abc import AsyncGenerator, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from opero.caching.stores.redis_client import async_connector, is_gone, is_refusal
from opero.caching.stores.redis_wires import FRESH_SECONDS, pieces

if TYPE_CHECKING:
    from opero.caching.stores.rest import Rest

__all__ = ["Lines"]

_MOST: Final = 16
"""Connections of one event loop; tasks beyond wait for their turn."""


class _Line:
    """The connections of one event loop.

    Args:
        connect: Makes one, which connects when something is sent.

    Attributes:
        turn: Who may use one; tasks that wait are not told that there is none.
    """

    __slots__ = ("_connect", "_held", "_idle", "turn")

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._idle: deque[tuple[Any, float]] = deque()
        self.turn = Semaphore(_MOST)
        self._held = self._until_the_loop_ends()

    async def ask(self, command: tuple[Any, ...]) -> Any:
        """Send a command and return its answer."""
        wire, used = await self._take()
        while True:
            try:
                packed = wire.pack_command(*command)
                for piece in packed if len(packed) == 1 else pieces(packed):
                    await wire.send_packed_command((piece,))
                answer = await wire.read_response()
            except BaseException as error:
                if is_refusal(error):
                    self._idle.append((wire, monotonic()))
                    raise
                # As for threads: an answer that is under way must reach nobody else.
                await wire.disconnect(nowait=True)
                if not (used and is_gone(error)):
                    raise
                used = False
            else:
                self._idle.append((wire, monotonic()))
                return answer

    async def _take(self) -> tuple[Any, bool]:
        try:
            wire, since = self._idle.pop()
        except IndexError:
            return self._connect(), False
        if monotonic() - since < FRESH_SECONDS:
            return wire, True
        await wire.disconnect(nowait=True)
        return wire, False

    async def hold(self) -> None:
        """Have the loop close the connections when it ends."""
        await anext(self._held)

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        # There is no other hook: `asyncio.run` closes generators that are still open, then the
        # loop. A connection that is not closed by then warns when it is collected.
        try:
            yield
        finally:
            while self._idle:
                await self._idle.pop()[0].disconnect()


class Lines:
    """The lines of one server.

    Args:
        url: Where it is.
        rest: Its pauses.
    """

    def __init__(self, url: str, rest: Rest) -> None:
        self._connect = async_connector(url)
        self._rest = rest
        self._by_loop: WeakKeyDictionary[AbstractEventLoop, _Line] = WeakKeyDictionary()
        self._lock = threading.Lock()

    async def ask(self, command: tuple[Any, ...]) -> Any:
        """Send a command from the running loop and return its answer."""
        line = self._by_loop.get(get_running_loop())
        if line is None:
            line = await self._draw()
        crowded = line.turn.locked()
        async with line.turn:
            if crowded:  # the server may have died while this task waited
                self._rest.check()
            return await line.ask(command)

    async def _draw(self) -> _Line:
        made = _Line(self._connect)
        with self._lock:
            line = self._by_loop.setdefault(get_running_loop(), made)
        if line is made:
            await line.hold()
        return line
