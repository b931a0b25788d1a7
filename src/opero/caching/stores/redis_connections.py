# this_file: src/opero/caching/stores/redis_connections.py
"""Talk to a Redis server through the connections of the library `redis`, past its clients and pools.

Those cost more than a command. A command is tried once and does not wait long: what would be a stall
of seconds is a miss. `ThreadConnections` is for threads, `LoopConnections` for event loops.
"""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop, Semaphore, get_running_loop
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from redis import ConnectionPool
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from opero.caching.codec import Buffer
    from opero.caching.stores.base import Backoff

__all__ = ["Command", "LoopConnections", "ThreadConnections", "is_down", "pieces", "reason"]

Command = tuple[Any, ...] | bytes
"""A command and its arguments, or what is sent for it."""

_CONNECT: Final = 1.0
_ANSWER: Final = 1.0
"""Seconds. The latter is between two pieces of an answer, so that large values may take longer."""


def _settings() -> dict[str, Any]:
    return {
        "socket_connect_timeout": _CONNECT,
        "socket_timeout": _ANSWER,
        "decode_responses": False,
        # The newer one sends messages that no command has asked for, and logs a line where it fails.
        "protocol": 2,
    }


# --- threads ---------------------------------------------------------------------------------------------------------

FRESH_SECONDS: Final = 60.0
"""How long a connection may have been idle: routers and firewalls forget old ones."""

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


class ThreadConnections:
    """The connections of threads to one server: each is used by one thread at a time, and kept for the next.

    Args:
        url: Where it is.
    """

    def __init__(self, url: str) -> None:
        pool = ConnectionPool.from_url(url, retry=Retry(NoBackoff(), 0), **_settings())
        # It connects when something is sent, also after it was disconnected.
        self._connect: Callable[[], Any] = lambda: pool.connection_class(**pool.connection_kwargs)
        self._idle: deque[tuple[Any, float]] = deque()  # the last one used comes first
        self._closed = False

    def ask(self, command: Command) -> Any:
        """Send a command and return its answer."""
        connection, used = self._take()
        while True:
            try:
                for piece in _packed(connection, command):
                    connection.send_packed_command((piece,))
                answer = connection.read_response()
            except BaseException as error:
                if _is_refusal(error):
                    self._put(connection)
                    raise
                # Whatever else it is, an answer may be under way, which must reach no other caller.
                connection.disconnect()
                if not (used and _is_gone(error)):
                    raise
                used = False  # the server was restarted meanwhile
            else:
                self._put(connection)
                return answer

    def ask_many(self, commands: list[Command]) -> list[Any]:
        """Send commands in one round trip and return their answers.

        Raises:
            Exception: The first refusal, if the server refuses any of them.
        """
        connection, used = self._take()
        while True:
            try:
                packed = [part for command in commands for part in _packed(connection, command)]
                for piece in pieces([b"".join(packed)]):
                    connection.send_packed_command((piece,))
                answers = [_answer(connection) for _ in commands]
            except BaseException as error:
                connection.disconnect()
                if not (used and _is_gone(error)):
                    raise
                used = False
            else:
                self._put(connection)
                for answer in answers:
                    if isinstance(answer, Exception):
                        raise answer
                return answers

    def _take(self) -> tuple[Any, bool]:
        try:
            connection, since = self._idle.pop()
        except IndexError:
            return self._connect(), False
        if monotonic() - since < FRESH_SECONDS:
            return connection, True
        connection.disconnect()
        return connection, False

    def _put(self, connection: Any) -> None:
        self._idle.append((connection, monotonic()))
        if self._closed:
            self.close()

    def close(self) -> None:
        """Close all connections; those in use when they are idle again."""
        self._closed = True
        while self._idle:
            try:
                connection, _ = self._idle.pop()
            except IndexError:  # another thread has taken the last one
                return
            connection.disconnect()


def _packed(connection: Any, command: Command) -> Iterable[Buffer]:
    """Return what is sent for a command."""
    if type(command) is bytes:
        return (command,)
    packed: list[bytes] = connection.pack_command(*command)
    return packed if len(packed) == 1 else pieces(packed)


def _answer(connection: Any) -> Any:
    """Read one answer; return a refusal, because there are others behind it."""
    try:
        return connection.read_response()
    except Exception as error:
        if _is_refusal(error):
            return error
        raise


# --- event loops -----------------------------------------------------------------------------------------------------

_MOST_PER_LOOP: Final = 16
"""Connections of one event loop; tasks beyond wait for their turn."""


class _LoopPool:
    """The connections of one event loop.

    Args:
        connect: Makes one, which connects when something is sent.

    Attributes:
        turn: Limits how many tasks use one.
    """

    __slots__ = ("_closer", "_connect", "_idle", "turn")

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._idle: deque[tuple[Any, float]] = deque()
        self.turn = Semaphore(_MOST_PER_LOOP)
        self._closer = self._close_with_loop()

    async def ask(self, command: Command) -> Any:
        """Send a command and return its answer."""
        connection, used = await self._take()
        while True:
            try:
                for piece in _packed(connection, command):
                    await connection.send_packed_command((piece,))
                answer = await connection.read_response()
            except BaseException as error:
                if _is_refusal(error):
                    self._idle.append((connection, monotonic()))
                    raise
                # As for threads: an answer that is under way must reach no other caller.
                await connection.disconnect(nowait=True)
                if not (used and _is_gone(error)):
                    raise
                used = False
            else:
                self._idle.append((connection, monotonic()))
                return answer

    async def _take(self) -> tuple[Any, bool]:
        try:
            connection, since = self._idle.pop()
        except IndexError:
            return self._connect(), False
        if monotonic() - since < FRESH_SECONDS:
            return connection, True
        await connection.disconnect(nowait=True)
        return connection, False

    async def close_with_loop(self) -> None:
        """Have the loop close the connections when it ends."""
        await anext(self._closer)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        # There is no other hook: `asyncio.run` closes generators that are still open, then the
        # loop. A connection that is not closed by then warns when it is collected.
        try:
            yield
        finally:
            while self._idle:
                await self._idle.pop()[0].disconnect()


class LoopConnections:
    """The connections of event loops to one server: some for each loop, closed with it.

    Args:
        url: Where it is.
        backoff: Its pauses.
    """

    def __init__(self, url: str, backoff: Backoff) -> None:
        from redis.asyncio import ConnectionPool as AsyncPool
        from redis.asyncio.retry import Retry as AsyncRetry

        pool = AsyncPool.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **_settings())
        self._connect: Callable[[], Any] = lambda: pool.connection_class(**pool.connection_kwargs)
        self._backoff = backoff
        self._by_loop: WeakKeyDictionary[AbstractEventLoop, _LoopPool] = WeakKeyDictionary()
        self._lock = threading.Lock()

    async def ask(self, command: Command) -> Any:
        """Send a command from the running loop and return its answer."""
        pool = self._by_loop.get(get_running_loop())
        if pool is None:
            pool = await self._pool()
        crowded = pool.turn.locked()
        async with pool.turn:
            if crowded:  # the server may have died while this task waited
                self._backoff.check()
            return await pool.ask(command)

    async def _pool(self) -> _LoopPool:
        made = _LoopPool(self._connect)
        with self._lock:
            pool = self._by_loop.setdefault(get_running_loop(), made)
        if pool is made:
            await pool.close_with_loop()
        return pool


# --- errors ----------------------------------------------------------------------------------------------------------


def _is_refusal(error: BaseException) -> bool:
    """Whether an error is the server's answer to a command, so that the connection is good."""
    return isinstance(error, errors.ResponseError)


def _is_gone(error: BaseException) -> bool:
    """Whether an error says that the connection has ended, perhaps long ago."""
    return isinstance(error, errors.ConnectionError | ConnectionError)


def is_down(error: Exception) -> bool:
    """Whether the server could not be asked at all, as against refusing one command."""
    return isinstance(error, errors.ConnectionError | errors.TimeoutError | OSError | TimeoutError)


def reason(error: Exception) -> str:
    """Say what happened. The library's own words may hold addresses and keys, so they are not used."""
    # The asynchronous client wraps what goes wrong while it connects.
    for kinds, text in _REASONS:
        if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
            return text
    return type(error).__name__


_REASONS: Final[tuple[tuple[Any, str], ...]] = (
    (
        (errors.AuthenticationError, errors.AuthenticationWrongNumberOfArgsError),
        "the server refuses the password",
    ),
    ((errors.NoPermissionError, errors.AuthorizationError), "the server does not permit it"),
    (errors.ReadOnlyError, "the server is a replica that takes no writes"),
    (errors.OutOfMemoryError, "the server is out of memory"),
    (errors.BusyLoadingError, "the server is still loading its data"),
    ((errors.TimeoutError, TimeoutError), "the server does not answer"),
    ((errors.ConnectionError, OSError), "the server cannot be reached"),
)
