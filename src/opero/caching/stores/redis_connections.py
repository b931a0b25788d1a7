# this_file: src/opero/caching/stores/redis_connections.py
"""Send commands to a Redis server, past the clients and pools of the library `redis`: those cost more than a command.

A command is tried once and does not wait long: what would be a stall of seconds is a miss. A server is not trusted:
whatever it sends takes no more time and memory than an entry may.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, BaseTransport, Future

    from opero.caching.plain_types import Buffer
    from opero.caching.stores.base import Backoff

Command = tuple[Any, ...] | bytes
"""A command and its arguments, or what is sent for it."""

_CONNECT: Final = 1.0
_ANSWER: Final = 1.0
_RATE: Final = 1 << 18
"""Seconds to connect, and for each `_RATE` bytes of an answer, so that large values may take longer."""

FRESH_SECONDS: Final = 60.0
"""How long a connection may have been idle: routers and firewalls forget old ones."""

_PIECE: Final = 1 << 20

_LARGEST: Final = 1 << 29
"""Bytes of a value: Redis holds no larger one."""
_LONGEST_LINE: Final = 1 << 16
_LONGEST_NUMBER: Final = 20


def connector(library: str, url: str) -> Callable[[], Any]:
    """Return what makes a connection to a server, which connects when something is sent, also after a disconnect.

    Args:
        library: "redis" for threads, "redis.asyncio" for event loops.
        url: Where the server is.
    """

    @functools.cache
    def settings() -> Any:
        no_backoff = import_module("redis.backoff").NoBackoff()
        return import_module(library).ConnectionPool.from_url(
            url,
            retry=import_module(f"{library}.retry").Retry(no_backoff, 0),
            socket_connect_timeout=_CONNECT,
            socket_timeout=_ANSWER,
            decode_responses=False,
            # The newer one sends messages that no command has asked for, and logs a line where it fails.
            protocol=2,
            parser_class=AnswerReader,
        )

    return lambda: settings().connection_class(**settings().connection_kwargs)


def _pieces(connection: Any, commands: Sequence[Command]) -> Iterable[Buffer]:
    """Yield what is sent for commands: what is short together, and what is long in parts, each with its own timeout."""
    if len(commands) == 1 and type(commands[0]) is bytes:
        yield commands[0]
        return
    short: list[bytes] = []
    for command in commands:
        for part in (command,) if type(command) is bytes else connection.pack_command(*command):
            if len(part) < _PIECE:
                short.append(part)
                continue
            yield b"".join(short)
            short.clear()
            view = memoryview(part)
            yield from (view[start : start + _PIECE] for start in range(0, len(part), _PIECE))
    yield b"".join(short)


# --- answers ----------------------------------------------------------------------------------------------------------


class AnswerParser:
    """Cuts what a server sends into answers: texts, numbers, values, None, and refusals as errors."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._expected = 0  # bytes without which there is no whole answer

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take what has come, and yield the answers that are complete now.

        Raises:
            ConnectionError: It is none that Redis gives to the commands of this package.
        """
        received = self._received
        received += data
        if len(received) < self._expected:
            return
        start = self._expected = 0
        while (end := received.find(b"\r\n", start) + 2) >= 2:
            line = bytes(received[start : end - 2])
            answer = _read_line(line)
            if line[:1] == b"$" and answer is not None:
                stop = end + answer + 2
                if len(received) < stop:
                    self._expected = stop - start
                    break
                answer, end = bytes(received[end : stop - 2]), stop
            start = end
            yield answer
        del received[:start]
        if len(received) > _LONGEST_LINE and not self._expected:
            raise ConnectionError("a line without an end")


def _read_line(line: bytes) -> Any:
    """Return what a line says: a text, an error, or a number; None for the length of what is not there."""
    kind, text = line[:1], line[1:]
    if kind == b"+":
        return text
    if kind == b"-":
        parser = import_module("redis.connection").DefaultParser
        return parser.parse_error(text.decode(errors="replace"))
    try:
        number = int(text[:_LONGEST_NUMBER])
    except ValueError as error:
        raise ConnectionError("it is no number") from error
    if kind == b"$" and number <= _LARGEST:
        return None if number < 0 else number
    if kind != b":":
        raise ConnectionError("it is no answer of Redis, or too large")
    return number


class AnswerReader:
    """Reads the answers for a connection of the library, in place of its own parsers: those trust the server.

    Args:
        socket_read_size: Most bytes to receive at once.
    """

    def __init__(self, socket_read_size: int) -> None:
        self._read_size = socket_read_size
        self._socket: Any = None
        self.on_disconnect()

    def on_connect(self, connection: Any) -> None:
        """Read from a connection that was opened."""
        self._socket = connection._sock  # noqa: SLF001 - a parser is handed the connection for that

    def on_disconnect(self) -> None:
        """Forget what was received."""
        self._parser, self._ready = AnswerParser(), deque[Any]()

    def read_response(self, **options: object) -> Any:
        """Return the next answer, also a refusal.

        Raises:
            OSError: There is none, or it takes too long.
        """
        began, count = time.monotonic(), 0
        while not self._ready:
            if count and time.monotonic() - began > _ANSWER * (1 + count / _RATE):
                raise TimeoutError
            data = self._socket.recv(self._read_size)
            if not data:
                raise ConnectionError("the server has closed the connection")
            count += len(data)
            self._ready.extend(self._parser.feed(data))
        answer = self._ready.popleft()
        if isinstance(answer, Exception) and "ConnectionError" in names_of(answer):
            raise answer  # as the library's own parsers do
        return answer


class ThreadPool:
    """The connections of threads: each is used by one at a time, and kept for the next.

    Args:
        connect: Makes one.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.connect: Callable[[], Any] = connect
        self._idle: deque[tuple[Any, float]] = deque()  # the last one used comes first
        self._closed = False

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one trip and return their answers, also refusals."""
        try:
            connection, since = self._idle.pop()
        except IndexError:
            connection, since = self.connect(), -math.inf
        trusted = time.monotonic() - since < FRESH_SECONDS
        if not trusted:
            connection.disconnect()
        while True:
            try:
                for piece in _pieces(connection, commands):
                    connection.send_packed_command((piece,))
                answers = [_read(connection) for _ in commands]
            except BaseException as error:
                # Whatever it is, an answer may be under way, which must reach no other caller.
                connection.disconnect()
                if not trusted or "ConnectionError" not in names_of(error):
                    raise
                trusted = False  # the server was restarted meanwhile
            else:
                self._idle.append((connection, time.monotonic()))
                if self._closed:
                    self.close()
                return answers

    def close(self) -> None:
        """Close all connections; those in use when they are idle again."""
        self._closed = True
        while self._idle:
            self._idle.pop()[0].disconnect()


class LoopConnection:
    """The connection of one event loop: tasks send as they come, and answers come in that order.

    It is the protocol (`asyncio.Protocol`) of its transport: the library's streams, locks and timers cost more than a
    command. The library reads the address, and writes commands.

    Args:
        library: A connection of the library, which is never opened.
        backoff: The pauses of the server.

    Attributes:
        closer: Closes the connection when it ends. There is no other hook: `asyncio.run` closes generators that are
            still open, then the loop. A connection that is not closed by then warns when it is collected.
    """

    def __init__(self, library: Any, backoff: Backoff) -> None:
        from asyncio import Lock

        self._library = library
        self._backoff = backoff
        self._opening = Lock()
        self._transport: Any = None
        self._waiting: deque[tuple[Future[list[Any]], int, list[Any]]] = deque()
        self._parser = AnswerParser()
        self._count = self._written = 0  # bytes so far
        self._used = -math.inf
        self._watched = self._closed = False
        self.closer: AsyncGenerator[None, None] = self._close_with_loop()

    async def ask(self, loop: AbstractEventLoop, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one trip and return their answers, also refusals."""
        again = True
        while True:
            if not self._usable:
                await self._open(loop)
            answers = self._send(self._transport, loop, commands)
            if not self._watched:
                self._watch(loop)
            try:
                return await answers
            except ConnectionError:
                if not again:
                    raise
                again = False  # the server was restarted meanwhile, perhaps
            finally:
                if self._closed:
                    self._end(ConnectionError)

    def _send(
        self, transport: Any, loop: AbstractEventLoop, commands: Sequence[Command]
    ) -> Future[list[Any]]:
        future: Future[list[Any]] = loop.create_future()
        self._waiting.append((future, len(commands), []))
        for piece in _pieces(self._library, commands):
            transport.write(piece)
            self._written += len(piece)
        return future

    @property
    def _usable(self) -> bool:
        """Whether the connection is open, and has not been idle for too long."""
        if self._transport is None or self._transport.is_closing():
            return False
        return bool(self._waiting) or time.monotonic() - self._used < FRESH_SECONDS

    def _watch(self, loop: AbstractEventLoop, before: object = None, since: float = 0.0) -> None:
        """Look from time to time whether anything moves; if it does not, no caller waits any longer."""
        self._watched = False
        transport = self._transport
        if transport is not None and self._waiting:
            sent = self._written - transport.get_write_buffer_size()
            now, moved = loop.time(), (self._count // _RATE, sent // _RATE)
            if moved != before:
                since = now
            elif now - since >= _ANSWER:
                self._end(TimeoutError)
                return
            self._watched = True
            loop.call_later(_ANSWER / 8, self._watch, loop, moved, since)

    # --- opening and closing ----------------------------------------------------------------------

    async def _open(self, loop: AbstractEventLoop) -> None:
        """Open the connection, unless another task has done it."""
        from asyncio import timeout

        waited = self._opening.locked()
        async with self._opening:
            if self._usable:
                return
            if waited:  # another task has tried in vain, perhaps
                self._backoff.check()
            self._end(ConnectionError)
            library, transport = self._library, None
            protocol: Any = self
            try:
                async with timeout(_CONNECT + _ANSWER):
                    if path := getattr(library, "path", None):
                        made = await loop.create_unix_connection(lambda: protocol, path)
                    else:
                        tls = getattr(library, "ssl_context", None)
                        made = await loop.create_connection(
                            lambda: protocol, library.host, library.port, ssl=tls and tls.get()
                        )
                    transport = made[0]
                    if commands := _introduction(library):
                        for answer in await self._send(transport, loop, commands):
                            if answer != b"OK":
                                refused = isinstance(answer, Exception)
                                raise answer if refused else ConnectionError  # noqa: TRY301 - closed below
            except BaseException:
                self._end(ConnectionError, transport)
                raise
            self._transport = transport
            self._used = time.monotonic()

    def _end(self, failure: type[Exception], transport: Any = None) -> None:
        """End the connection without sending anything more, and the waits of all callers."""
        from asyncio import Protocol

        transport, self._transport = self._transport or transport, None
        if transport is not None:
            # What comes of it is none of the next connection's business. A plain close would outlive the loop if the
            # server takes nothing.
            transport.set_protocol(Protocol())
            transport.abort()
        self._parser = AnswerParser()
        self._count += _RATE
        while self._waiting:
            future = self._waiting.popleft()[0]
            if not future.done():
                future.set_exception(failure())

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._closed = True
            self._end(ConnectionError)

    # --- as the protocol of the transport ---------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that are complete; end the connection if they are none of Redis."""
        self._count += len(data)
        self._used = time.monotonic()
        try:
            for answer in self._parser.feed(data):
                future, wanted, answers = self._waiting[0]
                answers.append(answer)
                if len(answers) == wanted:
                    del self._waiting[0]
                    self._count += _RATE  # that is progress, however small it is
                    if not future.done():  # else its task was cancelled
                        future.set_result(answers)
        except (ConnectionError, IndexError):
            self._end(ConnectionError)

    def connection_lost(self, error: Exception | None) -> None:
        """End the waits of all callers."""
        self._transport = None
        self._end(ConnectionError)

    def connection_made(self, transport: BaseTransport) -> None:
        """Do nothing: who opens the connection has it anyway."""

    def pause_writing(self) -> None:
        """Go on: what is to be sent is in memory anyway."""

    def resume_writing(self) -> None:
        """Go on."""

    def eof_received(self) -> None:
        """Let the transport close."""


def _introduction(library: Any) -> list[Command]:
    """Return the commands that a connection begins with."""
    names = filter(None, [library.username])
    return [
        *([("AUTH", *names, library.password)] if library.password else []),
        *([("CLIENT", "SETNAME", library.client_name)] if library.client_name else []),
        *([("SELECT", library.db)] if library.db else []),
    ]


def _read(connection: Any) -> Any:
    """Return an answer, which may be a refusal: the connection is good then, and there may be others behind it."""
    try:
        return connection.read_response()
    except Exception as error:
        if "ResponseError" not in names_of(error):
            raise
        return error


def names_of(error: BaseException | None) -> list[str]:
    """Return the names of an error's classes: the library's and Python's own mean the same by them."""
    return [kind.__name__ for kind in type(error).__mro__]
