# this_file: src/opero/core/cache/stores/redis_lines.py
"""Connections of event loops: one client for each loop, closed with it."""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop, Semaphore, get_running_loop
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from opero.core.cache.stores.redis_client import CONNECTIONS, async_client

if TYPE_CHECKING:
    from opero.core.cache.stores.rest import Rest

__all__ = ["Lines"]


class _Line:
    """What one event loop uses.

    Attributes:
        ask: Sends a command and returns its answer.
        turn: Who may use a connection; tasks that wait for one are not told that there is none.
    """

    __slots__ = ("_held", "ask", "turn")

    def __init__(self, url: str) -> None:
        client: Any = async_client(url)
        self.ask = client.execute_command
        self.turn = Semaphore(CONNECTIONS)
        self._held = _until_the_loop_ends(client)

    async def hold(self) -> None:
        """Have the loop close the client when it ends."""
        await anext(self._held)


async def _until_the_loop_ends(client: Any) -> AsyncGenerator[None, None]:
    # There is no other hook: `asyncio.run` closes generators that are still open, then the loop. A
    # client that is not closed by then warns when it is collected.
    try:
        yield
    finally:
        await client.aclose()


class Lines:
    """The lines of one server.

    Args:
        url: Where it is.
        rest: Its pauses.
    """

    def __init__(self, url: str, rest: Rest) -> None:
        self._url = url
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
            return await line.ask(*command)

    async def _draw(self) -> _Line:
        made = _Line(self._url)
        with self._lock:
            line = self._by_loop.setdefault(get_running_loop(), made)
        if line is made:
            await line.hold()
        return line
