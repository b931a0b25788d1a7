# this_file: src/opero/caching/stores/redis.py
"""Keep entries on a server that processes and machines share: `cache_backend="redis"`.

The server sees entries behind `opero:cache:` and leases behind `opero:lease:`, so that neither can
be mistaken for the other or for keys of other programs.

Commands go through the connections of the library `redis`, past its clients and pools: those cost more than a
command. A command is tried once and does not wait long: what would be a stall of seconds is a miss.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

from opero.caching.stores.base import LONGEST_LEASE, Backoff, KeyOwner, Row, StoredItem, portions
from opero.errors import OperoUsageError, StoreError
from opero.utils.ambient import running_loop
from opero.utils.fork import reset_after_fork
from opero.utils.secrets import mask_url

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

    from opero.caching.plain_types import Buffer


ACROSS_HOSTS: Final = True

_VARIABLE: Final = "OPERO_REDIS_URL"
_DEFAULT: Final = "redis://localhost:6379/0"
_MAX_BYTES: Final = 256_000_000
_BATCH: Final = 1000
_ROUNDS: Final = 200
"""Rounds of a scan, of some thousand keys each, after which counting is too costly."""

_inherited: Final[list[object]] = []
"""Connections of a parent process: what is collected closes them, or warns that it cannot."""


def settle(text: str) -> str:
    """Return the text as it is, if it can be meant and the library is there.

    Raises:
        OperoUsageError: It is no address, or the extra is missing.
    """
    fix = 'Write it like "redis://:PASSWORD@HOST:6379/0", "rediss://…" or "unix:///PATH?db=0".'
    if text != "redis" and not _is_address(text):
        raise OperoUsageError(f"cache_backend={mask_url(text)!r} is no address of a server. {fix}")
    if "password" in parse_qs(urlsplit(text).query):
        raise OperoUsageError(f"cache_backend: a password does not belong behind the '?'. {fix}")
    if find_spec("redis") is None:
        raise OperoUsageError(
            f'cache_backend={mask_url(text)!r} needs the library redis: pip install "opero[redis]"'
        )
    return text


def locate(text: str) -> str:
    """Return the address of the server: that in the text, in `OPERO_REDIS_URL`, or the usual one."""
    return text if text != "redis" else os.environ.get(_VARIABLE) or _DEFAULT


def open_at(place: str) -> RedisStore:
    """Return the store of a server."""
    return RedisStore(place)


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        if text.startswith("unix://"):
            return bool(parts.path)
        database = parts.path.strip("/") or "0"
        return (
            text.startswith(("redis://", "rediss://"))
            and bool(parts.hostname)
            and parts.port != 0
            and database.isdecimal()
        )
    except ValueError:  # of the port
        return False


class RedisStore:
    """Bytes on a Redis server, or one that speaks its language.

    A command is tried once. A server that does not answer is not used for a second, and longer if it
    goes on, so that calls cost next to nothing until it is back.

    Args:
        url: Where it is. Nothing is connected before the first verb.
    """

    name = "redis"
    blocking = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._largest = 0
        self._backoff = Backoff()
        reset_after_fork(self)
        self._forget()

    def _forget(self) -> None:
        self._threads = _ThreadPool(_connector("redis", self._url, _ANSWER))
        self._loops: WeakKeyDictionary[AbstractEventLoop, _LoopConnection] = WeakKeyDictionary()

    def allow(self, max_bytes: int) -> None:
        """Allow entries of so many bytes; those beyond are not read."""
        self._largest = max(max_bytes, self._largest)

    # --- for threads ------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        return self._bounded(self._ask(self._get(key))[0])

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys."""
        return [self._bounded(answer) for answer in self._ask(*map(self._get, keys))]

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        self._ask(_put(key, blob, ttl))

    def set_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        for portion in portions(rows):
            self._ask(*(_put(*row) for row in portion))

    def delete(self, key: str) -> bool:
        """Remove one key and return whether it was there."""
        return bool(self._ask(("UNLINK", _entry(key)))[0])

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return how many there were."""
        return sum(self._ask(("UNLINK", *names))[0] for names in self._scan(prefix) if names)

    def scan(self, prefix: str) -> Iterator[StoredItem]:
        """Iterate over the keys that begin with a text."""
        for names in self._scan(prefix):
            yield from self._items(names)

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys, None if the server holds millions."""
        count = size = 0
        for rounds, names in enumerate(self._scan(prefix)):
            if rounds == _ROUNDS:
                return None, None
            items = self._items(names)
            count += len(items)
            size += sum(item.size for item in items)
        return count, size

    def acquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Take or extend leases, in one trip."""
        return [bool(answer) for answer in self._ask(*(_acquire(*o, seconds) for o in owners))]

    def release(self, owners: Sequence[KeyOwner]) -> None:
        """Give leases back, in one trip."""
        self._ask(*(_release(*owner) for owner in owners))

    # --- for event loops --------------------------------------------------------------------------

    async def aget(self, key: str) -> bytes | None:
        """As `get`."""
        return self._bounded((await self._aask(self._get(key)))[0])

    async def aset_many(self, rows: Sequence[Row]) -> None:
        """As `set_many`."""
        for portion in portions(rows):
            await self._aask(*(_put(*row) for row in portion))

    async def aacquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """As `acquire`."""
        return list(map(bool, await self._aask(*(_acquire(*o, seconds) for o in owners))))

    # --- upkeep -----------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked child: never touch the connections of the parent process."""
        _inherited.append((self._threads, self._loops))
        self._forget()

    def close(self) -> None:
        """Close the connections of threads; those of an event loop are closed with it."""
        pool, self._threads = self._threads, _ThreadPool(self._threads.connect)
        pool.close()

    def __repr__(self) -> str:
        return f"<RedisStore {mask_url(self._url)}>"

    # --- asking -----------------------------------------------------------------------------------

    def _ask(self, *commands: Command) -> list[Any]:
        """Send commands in one trip and return their answers; the first refusal is raised."""
        if not commands:
            return []
        self._backoff.check()
        try:
            answers = self._threads.ask(commands)
        except Exception as error:
            raise self._failure(error) from error
        return self._answered(answers)

    async def _aask(self, *commands: Command) -> list[Any]:
        """Do the same for an event loop."""
        self._backoff.check()
        try:
            loop: Any = running_loop()
            connection = self._loops.get(loop)
            if connection is None:
                # Waiting is bounded there: the library would set a timer for each step of a command.
                connect = _connector("redis.asyncio", self._url, None)
                connection = self._loops[loop] = _LoopConnection(connect, self._backoff)
                await anext(connection.closer)
            answers = await connection.ask(loop, commands)
        except Exception as error:
            raise self._failure(error) from error
        return self._answered(answers)

    def _answered(self, answers: list[Any]) -> list[Any]:
        self._backoff.over()
        for answer in answers:
            if isinstance(answer, Exception):
                raise self._failure(answer) from answer
        return answers

    def _failure(self, error: Exception) -> StoreError:
        """Return a failure in the words of the protocol, and begin a pause if the server is down."""
        if isinstance(error, StoreError):
            return error
        why = _reason(error)
        if not _DOWN.isdisjoint(_names(error)):
            self._backoff.failed(why)
        return StoreError(why)

    def _get(self, key: str) -> bytes:
        """Ask for an entry: for no more than it may hold, and a byte."""
        name, end = _entry(key), b"%d" % (self._largest or _MAX_BYTES)
        parts = (len(name), name, len(end), end)
        return b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b\r\n$1\r\n0\r\n$%d\r\n%b\r\n" % parts

    def _bounded(self, answer: Any) -> bytes | None:
        if not answer:
            return None
        found: bytes = answer
        if len(found) > (self._largest or _MAX_BYTES):
            raise StoreError("an entry is larger than cache_max_bytes")
        return found

    def _scan(self, prefix: str) -> Iterator[list[bytes]]:
        """Yield the server's keys that begin with a text, none of whose characters is a wildcard."""
        pattern = _WILD.sub(rb"\\\g<0>", _entry(prefix)) + b"*"
        cursor: Any = 0
        while True:
            ((cursor, names),) = self._ask(("SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH))
            yield names
            if not int(cursor):
                return

    def _items(self, names: list[bytes]) -> list[StoredItem]:
        sizes = self._ask(*(("STRLEN", name) for name in names))
        left = self._ask(*(("PTTL", name) for name in names))
        now = time.time()
        return [
            StoredItem(
                name[len(_ENTRIES) :].decode("utf-8", "surrogatepass"),
                size,
                None if milliseconds < 0 else now + milliseconds / 1000,
            )
            for name, size, milliseconds in zip(names, sizes, left, strict=True)
            if milliseconds != _GONE
        ]


# --- commands ---------------------------------------------------------------------------------------------------------

Command = tuple[Any, ...] | bytes
"""A command and its arguments, or what is sent for it."""

_ENTRIES: Final = b"opero:cache:"
_LEASES: Final = b"opero:lease:"
_WILD: Final = re.compile(rb"[*?\[\]\\]")
_GONE: Final = -2
"""What Redis answers for the lifetime of a key that is not there."""

# A key without an end, or with one that is too far away, is no lease of opero's.
_ACQUIRE: Final = """\
local holder = redis.pcall('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  local left = redis.call('PTTL', KEYS[1])
  if left >= 0 and left <= tonumber(ARGV[3]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1"""
_RELEASE: Final = """\
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0"""


def _entry(key: str) -> bytes:
    """Return the server's key of an entry. File names in a key may hold what is no Unicode."""
    return _ENTRIES + key.encode("utf-8", "surrogatepass")


def _put(key: str, blob: bytes, ttl: float | None) -> Command:
    """Store an entry, for at least a millisecond."""
    stored = ("SET", _entry(key), blob)
    return stored if ttl is None else (*stored, "PX", _milliseconds(ttl))


def _acquire(key: str, owner: str, seconds: float) -> Command:
    """Take or extend a lease; the answer is 1 if `owner` has it."""
    longest = _milliseconds(LONGEST_LEASE + seconds)
    name = _LEASES + key.encode("utf-8", "surrogatepass")
    return "EVAL", _ACQUIRE, 1, name, owner, _milliseconds(seconds), longest


def _release(key: str, owner: str) -> Command:
    """Give a lease back if `owner` has it."""
    return "EVAL", _RELEASE, 1, _LEASES + key.encode("utf-8", "surrogatepass"), owner


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))


# --- connections ------------------------------------------------------------------------------------------------------

_CONNECT: Final = 1.0
_ANSWER: Final = 1.0
"""Seconds. For threads the latter is between two pieces of an answer, so that large values may take longer."""

FRESH_SECONDS: Final = 60.0
"""How long a connection may have been idle: routers and firewalls forget old ones."""

_PIECE: Final = 1 << 20


def _connector(library: str, url: str, timeout: float | None) -> Callable[[], Any]:
    """Return what makes a connection to a server, which connects when something is sent, also after a disconnect.

    Args:
        library: "redis" for threads, "redis.asyncio" for event loops.
        url: Where the server is.
        timeout: Seconds in which something must be sent or come; None for the caller to watch over it.
    """

    @functools.cache
    def settings() -> Any:
        no_backoff = import_module("redis.backoff").NoBackoff()
        return import_module(library).ConnectionPool.from_url(
            url,
            retry=import_module(f"{library}.retry").Retry(no_backoff, 0),
            socket_connect_timeout=_CONNECT,
            socket_timeout=timeout,
            decode_responses=False,
            # The newer one sends messages that no command has asked for, and logs a line where it fails.
            protocol=2,
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


class _ThreadPool:
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
                if not trusted or "ConnectionError" not in _names(error):
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


class _LoopConnection:
    """The connection of one event loop: tasks send as they come, and answers come in that order.

    The library opens it and introduces itself to the server. Then this object takes the place of the library's
    streams as the protocol (`asyncio.Protocol`) of the transport: they cost more than a command.

    Args:
        connect: Makes a connection of the library.
        backoff: The pauses of the server.

    Attributes:
        closer: Closes the connection when it ends. There is no other hook: `asyncio.run` closes generators that are
            still open, then the loop. A connection that is not closed by then warns when it is collected.
    """

    def __init__(self, connect: Callable[[], Any], backoff: Backoff) -> None:
        from asyncio import Lock

        self._connect = connect
        self._backoff = backoff
        self._opening = Lock()
        self._library: Any = None  # its connection
        self._transport: Any = None
        self._streams: Any = None  # the protocol of the library
        self._waiting: deque[tuple[Future[list[Any]], int, list[Any]]] = deque()
        self._received = bytearray()
        self._expected = self._count = (
            0  # bytes without which there is no whole answer; bytes so far
        )
        self._used = -math.inf
        self._watched = self._closed = False
        self.closer: AsyncGenerator[None, None] = self._close_with_loop()

    async def ask(self, loop: AbstractEventLoop, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one trip and return their answers, also refusals."""
        again = True
        while True:
            if not self._usable:
                await self._open()
            future: Future[list[Any]] = loop.create_future()
            self._waiting.append((future, len(commands), []))
            for piece in _pieces(self._library, commands):
                self._transport.write(piece)
            if not self._watched:
                self._watch(loop)
            try:
                return await future
            except ConnectionError:
                if not again:
                    raise
                again = False  # the server was restarted meanwhile, perhaps
            finally:
                if self._closed:
                    await self._close()

    @property
    def _usable(self) -> bool:
        """Whether the connection is open, and has not been idle for too long."""
        if self._transport is None or self._transport.is_closing():
            return False
        return bool(self._waiting) or time.monotonic() - self._used < FRESH_SECONDS

    def _watch(self, loop: AbstractEventLoop, before: object = None, since: float = 0.0) -> None:
        """Look from time to time whether anything moves; if it does not, no caller waits any longer."""
        self._watched = bool(self._waiting)
        if self._watched:
            now, moved = loop.time(), (self._count, self._transport.get_write_buffer_size())
            if moved != before:
                since = now
            elif now - since >= _ANSWER:
                self._watched = False
                self._end(TimeoutError)
                return
            loop.call_later(_ANSWER / 8, self._watch, loop, moved, since)

    # --- opening and closing ----------------------------------------------------------------------

    async def _open(self) -> None:
        """Open the connection, unless another task has done it."""
        from asyncio import timeout

        waited = self._opening.locked()
        async with self._opening:
            if self._usable:
                return
            if waited:  # another task has tried in vain, perhaps
                self._backoff.check()
            await self._close()
            self._library = library = self._connect()
            try:
                async with timeout(_CONNECT + _ANSWER):
                    await library.connect()
            except BaseException:
                await library.disconnect(nowait=True)
                raise
            self._transport = library._writer.transport  # noqa: SLF001 - it is to be had nowhere else
            self._streams = self._transport.get_protocol()
            self._transport.set_protocol(self)
            self._used = time.monotonic()

    def _end(self, failure: type[Exception]) -> None:
        """End the connection without sending anything more, and the waits of all callers."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.set_protocol(self._streams)
            transport.abort()  # a plain close would outlive the loop if the server takes nothing
        self._received.clear()
        self._expected = 0
        self._count += 1
        while self._waiting:
            future = self._waiting.popleft()[0]
            if not future.done():
                future.set_exception(failure())

    async def _close(self) -> None:
        """Close the connection without waiting: this may run in a task that is cancelled with its loop."""
        self._end(ConnectionError)
        if self._library is not None:
            await self._library.disconnect(nowait=True)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._closed = True
            await self._close()

    # --- as the protocol of the transport ---------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that are complete; what a task that was cancelled has asked for is dropped."""
        received = self._received
        received += data
        self._count += len(data)
        if len(received) < self._expected:
            return
        start = self._expected = 0
        while (end := received.find(b"\r\n", start) + 2) >= 2:
            kind, head = received[start : start + 1], bytes(received[start + 1 : end - 2])
            answer: Any = int(head) if kind == b":" else head
            if kind == b"$" and (size := int(head)) >= 0:
                stop = end + size + 2
                if len(received) < stop:
                    self._expected = stop - start
                    break
                answer, end = bytes(received[end : end + size]), stop
            elif kind == b"-":
                text = head.decode(errors="replace")
                answer = self._library._parser.parse_error(text)  # noqa: SLF001 - as above
            start = end
            future, wanted, answers = self._waiting[0]
            answers.append(answer)
            if len(answers) == wanted:
                del self._waiting[0]
                if not future.done():
                    future.set_result(answers)
        del received[:start]
        self._used = time.monotonic()

    def connection_lost(self, error: Exception | None) -> None:
        """End the waits of all callers."""
        self._transport = None
        self._end(ConnectionError)

    def pause_writing(self) -> None:
        """Go on: what is to be sent is in memory anyway, and a transport that is at its end closes itself."""

    resume_writing = eof_received = pause_writing


def _read(connection: Any) -> Any:
    """Return an answer, which may be a refusal: the connection is good then, and there may be others behind it."""
    try:
        return connection.read_response()
    except Exception as error:
        if "ResponseError" not in _names(error):
            raise
        return error


# --- errors -----------------------------------------------------------------------------------------------------------


def _names(error: BaseException | None) -> list[str]:
    """Return the names of an error's classes: the library's and Python's own mean the same by them."""
    return [kind.__name__ for kind in type(error).__mro__]


_DOWN: Final = {"ConnectionError", "TimeoutError", "OSError"}
"""The server could not be asked at all, as against refusing one command."""

_REASONS: Final = {
    "AuthenticationError": "the server refuses the password",
    "AuthenticationWrongNumberOfArgsError": "the server refuses the password",
    "NoPermissionError": "the server does not permit it",
    "AuthorizationError": "the server does not permit it",
    "ReadOnlyError": "the server is a replica that takes no writes",
    "OutOfMemoryError": "the server is out of memory",
    "BusyLoadingError": "the server is still loading its data",
    "TimeoutError": "the server does not answer",
    "ConnectionError": "the server cannot be reached",
    "OSError": "the server cannot be reached",
}


def _reason(error: Exception) -> str:
    """Say what happened. The library's own words may hold addresses and keys, so they are not used."""
    # What goes wrong while it connects is the cause of another error.
    known = (name for one in (error.__cause__, error) for name in _names(one) if name in _REASONS)
    found = next(known, None)
    return type(error).__name__ if found is None else _REASONS[found]
