# this_file: src/opero/caching/stores/redis.py
"""Keep entries on a server that processes and machines share: `cache_backend="redis"`.

The server sees entries behind `opero:cache:` and leases behind `opero:lease:`, so that neither can
be mistaken for the other or for keys of other programs.

Commands go through the connections of the library `redis`, past its clients and pools: those cost more than a
command. A command is tried once and does not wait long: what would be a stall of seconds is a miss.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from threading import RLock
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

from opero.caching.stores.base import LONGEST_LEASE, Backoff, KeyOwner, Row, StoredItem, portions
from opero.errors import OperoUsageError, StoreError
from opero.utils.fork import reset_after_fork
from opero.utils.secrets import mask_url

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

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
        self._lock = RLock()
        self._threads: _ThreadPool | None = None
        self._loops: WeakKeyDictionary[AbstractEventLoop, _LoopPool] = WeakKeyDictionary()
        self._aconnect: Callable[[], Any] | None = None

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

    async def aset(self, key: str, blob: bytes, ttl: float | None) -> None:
        """As `set`."""
        await self._aask(_put(key, blob, ttl))

    async def aacquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """As `acquire`."""
        return [
            bool(answer) for answer in await self._aask(*(_acquire(*o, seconds) for o in owners))
        ]

    # --- upkeep -----------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked child: never touch the connections of the parent process."""
        _inherited.append((self._threads, self._loops))
        self._forget()

    def close(self) -> None:
        """Close the connections of threads; those of an event loop are closed with it."""
        with self._lock:
            pool, self._threads = self._threads, None
        if pool is not None:
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
            answers = (self._threads or self._thread_pool()).ask(commands)
        except Exception as error:
            raise self._failure(error) from error
        return self._answered(answers)

    async def _aask(self, *commands: Command) -> list[Any]:
        """Do the same for an event loop."""
        from asyncio import get_running_loop

        self._backoff.check()
        try:
            loop = get_running_loop()
            pool = self._loops.get(loop) or await self._loop_pool(loop)
            answers = await pool.ask(commands)
        except Exception as error:
            raise self._failure(error) from error
        return self._answered(answers)

    def _answered(self, answers: list[Any]) -> list[Any]:
        self._backoff.over()
        for answer in answers:
            if isinstance(answer, Exception):
                raise StoreError(_reason(answer)) from answer
        return answers

    def _failure(self, error: Exception) -> StoreError:
        """Return a failure in the words of the protocol, and begin a pause if the server is down."""
        if isinstance(error, StoreError):
            return error
        why = _reason(error)
        if not _DOWN.isdisjoint(_names(error)):
            self._backoff.failed(why)
        return StoreError(why)

    def _thread_pool(self) -> _ThreadPool:
        with self._lock:
            if self._threads is None:
                self._threads = _ThreadPool(_connector("redis", self._url, _ANSWER))
            return self._threads

    async def _loop_pool(self, loop: AbstractEventLoop) -> _LoopPool:
        """Return the connections of the running loop, which closes them when it ends."""
        with self._lock:
            if self._aconnect is None:
                # Waiting is bounded here: the library would set a timer for each step of a command.
                self._aconnect = _connector("redis.asyncio", self._url, None)
            made = _LoopPool(self._aconnect, self._backoff)
            pool = self._loops.setdefault(loop, made)
        if pool is made:
            await anext(pool.closer)
        return pool

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

_MOST_PER_LOOP: Final = 16
"""Connections of one event loop; tasks beyond wait for their turn."""

_PIECE: Final = 1 << 20


def _connector(library: str, url: str, timeout: float | None) -> Callable[[], Any]:
    """Return what makes a connection to a server, which connects when something is sent, also after a disconnect.

    Args:
        library: "redis" for threads, "redis.asyncio" for event loops.
        url: Where the server is.
        timeout: Seconds in which something must be sent or come; None for the caller to watch over it.
    """
    no_backoff = import_module("redis.backoff").NoBackoff()
    pool = import_module(library).ConnectionPool.from_url(
        url,
        retry=import_module(f"{library}.retry").Retry(no_backoff, 0),
        socket_connect_timeout=_CONNECT,
        socket_timeout=timeout,
        decode_responses=False,
        # The newer one sends messages that no command has asked for, and logs a line where it fails.
        protocol=2,
    )
    made = pool.connection_class if library == "redis" else _aborting(pool.connection_class)
    return lambda: made(**pool.connection_kwargs)


def _aborting(connection_class: Any) -> Any:
    """Return a class of connections that send nothing more once they disconnect without waiting.

    A plain close goes on sending, and outlives the event loop if the server takes nothing.
    """

    class AbortingConnection(connection_class):  # type: ignore[misc]  # a class of the library
        async def disconnect(self, nowait: bool = False, **given: Any) -> None:
            if nowait and self._writer is not None:
                self._writer.transport.abort()
            await super().disconnect(nowait, **given)

    return AbortingConnection


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


class _IdleConnections:
    """Connections to one server: each is used by one caller at a time, and kept for the next.

    Args:
        connect: Makes one.
    """

    _closed = False

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._idle: deque[tuple[Any, float]] = deque()  # the last one used comes first

    def take(self) -> tuple[Any, bool]:
        """Return a connection, and whether it should be open; if not, it is to be disconnected."""
        try:
            connection, since = self._idle.pop()
        except IndexError:
            return self._connect(), False
        return connection, time.monotonic() - since < FRESH_SECONDS

    def keep(self, connection: Any) -> None:
        """Keep a connection for the next caller."""
        self._idle.append((connection, time.monotonic()))


class _ThreadPool(_IdleConnections):
    """The connections of threads."""

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one trip and return their answers, also refusals."""
        connection, trusted = self.take()
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
                self.keep(connection)
                if self._closed:
                    self.close()
                return answers

    def close(self) -> None:
        """Close all connections; those in use when they are idle again."""
        self._closed = True
        while self._idle:
            self.take()[0].disconnect()


class _LoopPool(_IdleConnections):
    """The connections of one event loop.

    Args:
        connect: Makes one.
        backoff: The pauses of the server.

    Attributes:
        closer: Closes the connections when it ends. There is no other hook: `asyncio.run` closes generators
            that are still open, then the loop. A connection that is not closed by then warns when it is
            collected.
    """

    def __init__(self, connect: Callable[[], Any], backoff: Backoff) -> None:
        from asyncio import Semaphore, timeout

        super().__init__(connect)
        self._backoff = backoff
        self._limit = timeout
        self._turn = Semaphore(_MOST_PER_LOOP)
        self.closer: AsyncGenerator[None, None] = self._close_with_loop()

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one trip and return their answers, also refusals."""
        crowded = self._turn.locked()
        async with self._turn:
            if crowded:  # the server may have died while this task waited
                self._backoff.check()
            connection, trusted = self.take()
            if not trusted:
                await connection.disconnect(nowait=True)
            while True:
                try:
                    answers = await self._exchange(connection, commands)
                except BaseException as error:
                    # As for threads: an answer that is under way must reach no other caller.
                    await connection.disconnect(nowait=True)
                    if not trusted or "ConnectionError" not in _names(error):
                        raise
                    trusted = False
                else:
                    self.keep(connection)
                    if self._closed:
                        await self._close()
                    return answers

    async def _exchange(self, connection: Any, commands: Sequence[Command]) -> list[Any]:
        """Send commands and return their answers within the time that each step may take."""
        async with self._limit(_ANSWER if connection.is_connected else _CONNECT + _ANSWER) as limit:
            for number, piece in enumerate(_pieces(connection, commands)):
                if number:
                    from asyncio import get_running_loop

                    # A loop that were kept would never be collected.
                    limit.reschedule(get_running_loop().time() + _ANSWER)
                await connection.send_packed_command((piece,))
            answers: list[Any] = []
            for _ in commands:
                try:
                    answers.append(await connection.read_response())
                except Exception as error:  # noqa: BLE001 - raised again unless it is an answer
                    answers.append(_refusal(error))
        return answers

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self._close()

    async def _close(self) -> None:
        """Close all connections without waiting: this may run in a task that is cancelled with its loop."""
        self._closed = True
        while self._idle:
            await self.take()[0].disconnect(nowait=True)


def _read(connection: Any) -> Any:
    try:
        return connection.read_response()
    except Exception as error:  # noqa: BLE001 - as above
        return _refusal(error)


def _refusal(error: Exception) -> Exception:
    """Return an error if it is an answer: the connection is good then, and there may be others behind it."""
    if "ResponseError" not in _names(error):
        raise error
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
