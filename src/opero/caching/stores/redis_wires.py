# this_file: src/opero/caching/stores/redis_wires.py
"""Connections of threads: each is used by one of them at a time, and kept for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opero.caching.codec import Buffer
    from opero.caching.stores import redis_commands as say

__all__ = ["FRESH_SECONDS", "Wires", "pieces"]

FRESH_SECONDS: Final = 60.0
"""How long a connection may have been idle: what stands between us and a server forgets old ones."""

_PIECE: Final = 1 << 20


def pieces(packed: Iterable[bytes]) -> Iterator[Buffer]:
    """Cut what is long, because a timeout counts for what is sent at once.

    Example:
        >>> [len(piece) for piece in pieces([b"$2500000", bytes(2_500_000)])]
        [8, 1048576, 1048576, 402848]
    """
    for part in packed:
        if len(part) <= _PIECE:
            yield part
        else:
            view = memoryview(part)
            yield from (view[start : start + _PIECE] for start in range(0, len(part), _PIECE))


class Wires:
    """The connections to one server.

    Args:
        connect: Makes one. It connects when something is sent, also after it was disconnected.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._idle: deque[tuple[Any, float]] = deque()  # the last one used comes first
        self._closed = False

    def ask(self, *command: Any) -> Any:
        """Send a command and return its answer."""
        wire, used = self._take()
        while True:
            try:
                packed = wire.pack_command(*command)
                for piece in packed if len(packed) == 1 else pieces(packed):
                    wire.send_packed_command((piece,))
                answer = wire.read_response()
            except BaseException as error:
                from opero.caching.stores.redis_client import is_gone, is_refusal

                if is_refusal(error):
                    self._put(wire)
                    raise
                # Whatever else it is, an answer may be under way, which must reach nobody else.
                wire.disconnect()
                if not (used and is_gone(error)):
                    raise
                used = False  # the server was restarted meanwhile
            else:
                self._put(wire)
                return answer

    def ask_many(self, commands: list[say.Command]) -> list[Any]:
        """Send commands in one round trip and return their answers.

        Raises:
            Exception: The first refusal, if the server refuses any of them.
        """
        wire, used = self._take()
        while True:
            try:
                for piece in pieces(wire.pack_commands(commands)):
                    wire.send_packed_command((piece,))
                answers = [_answer(wire) for _ in commands]
            except BaseException as error:
                from opero.caching.stores.redis_client import is_gone

                wire.disconnect()
                if not (used and is_gone(error)):
                    raise
                used = False
            else:
                self._put(wire)
                for answer in answers:
                    if isinstance(answer, Exception):
                        raise answer
                return answers

    def _take(self) -> tuple[Any, bool]:
        try:
            wire, since = self._idle.pop()
        except IndexError:
            return self._connect(), False
        if monotonic() - since < FRESH_SECONDS:
            return wire, True
        wire.disconnect()
        return wire, False

    def _put(self, wire: Any) -> None:
        self._idle.append((wire, monotonic()))
        if self._closed:
            self.close()

    def close(self) -> None:
        """Close all connections; those in use when they are idle again."""
        self._closed = True
        while self._idle:
            try:
                wire, _ = self._idle.pop()
            except IndexError:  # another thread has taken the last one
                return
            wire.disconnect()


def _answer(wire: Any) -> Any:
    """Read one answer; return a refusal, because there are others behind it."""
    try:
        return wire.read_response()
    except Exception as error:
        from opero.caching.stores.redis_client import is_refusal

        if is_refusal(error):
            return error
        raise
