# this_file: src/opero/caching/stores/redis.py
"""Keep entries on a server that processes and machines share: `cache_backend="redis"`.

The server sees entries behind `opero:cache:` and leases behind `opero:lease:`, so that neither can
be mistaken for the other or for keys of other programs.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from types import NoneType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

from opero.caching.codec import read_raw
from opero.caching.stores.base import LONGEST_LEASE, Backoff, KeyOwner, Row, StoredItem, portions
from opero.caching.stores.redis_connections import (
    Command,
    LoopConnection,
    ThreadPool,
    connector,
    names_of,
)
from opero.errors import OperoUsageError, StoreError
from opero.utils.ambient import running_loop
from opero.utils.fork import reset_after_fork
from opero.utils.secrets import mask_url

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


ACROSS_HOSTS: Final = True

_Kind = type | tuple[type, ...]
_VALUE: Final = (bytes, NoneType)

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
        self._threads = ThreadPool(connector("redis", self._url))
        self._loops: WeakKeyDictionary[AbstractEventLoop, LoopConnection] = WeakKeyDictionary()

    def allow(self, max_bytes: int) -> None:
        """Allow entries of so many bytes; those beyond are not read."""
        self._largest = max(max_bytes, self._largest)

    # --- for threads ------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        return self._bounded(self._ask(_VALUE, self._get(key))[0])

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys."""
        return [self._bounded(answer) for answer in self._ask(_VALUE, *map(self._get, keys))]

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        self._ask(bytes, _put(key, blob, ttl))

    def set_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        for portion in portions(rows):
            self._ask(bytes, *(_put(*row) for row in portion))

    def delete(self, key: str) -> bool:
        """Remove one key and return whether it was there."""
        return bool(self._ask(int, ("UNLINK", _entry(key)))[0])

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return how many there were."""
        return sum(self._ask(int, ("UNLINK", *names))[0] for names in self._scan(prefix) if names)

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
        return [bool(answer) for answer in self._ask(int, *(_acquire(*o, seconds) for o in owners))]

    def release(self, owners: Sequence[KeyOwner]) -> None:
        """Give leases back, in one trip."""
        self._ask(int, *(_release(*owner) for owner in owners))

    # --- for event loops --------------------------------------------------------------------------

    async def aget(self, key: str) -> bytes | None:
        """As `get`."""
        return self._bounded((await self._aask(_VALUE, self._get(key)))[0])

    async def aset_many(self, rows: Sequence[Row]) -> None:
        """As `set_many`."""
        for portion in portions(rows):
            await self._aask(bytes, *(_put(*row) for row in portion))

    async def aacquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """As `acquire`."""
        return list(map(bool, await self._aask(int, *(_acquire(*o, seconds) for o in owners))))

    # --- upkeep -----------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked child: never touch the connections of the parent process."""
        _inherited.append((self._threads, self._loops))
        self._forget()

    def close(self) -> None:
        """Close the connections of threads; those of an event loop are closed with it."""
        pool, self._threads = self._threads, ThreadPool(self._threads.connect)
        pool.close()

    def __repr__(self) -> str:
        return f"<RedisStore {mask_url(self._url)}>"

    # --- asking -----------------------------------------------------------------------------------

    def _ask(self, kind: _Kind, *commands: Command) -> list[Any]:
        """Send commands in one trip and return their answers, which are of a kind; the first refusal is raised."""
        if not commands:
            return []
        self._backoff.check()
        try:
            answers = self._threads.ask(commands)
        except Exception as error:
            raise self._failure(error) from error
        return self._answered(kind, answers)

    async def _aask(self, kind: _Kind, *commands: Command) -> list[Any]:
        """Do the same for an event loop."""
        self._backoff.check()
        try:
            loop: Any = running_loop()
            connection = self._loops.get(loop)
            if connection is None:
                library = connector("redis.asyncio", self._url)()
                connection = self._loops[loop] = LoopConnection(library, self._backoff)
                await anext(connection.closer)
            answers = await connection.ask(loop, commands)
        except Exception as error:
            raise self._failure(error) from error
        return self._answered(kind, answers)

    def _answered(self, kind: _Kind, answers: list[Any]) -> list[Any]:
        self._backoff.over()
        for answer in answers:
            if not isinstance(answer, kind):
                if isinstance(answer, Exception):
                    raise self._failure(answer) from answer
                raise self._nonsense()
        return answers

    def _nonsense(self) -> StoreError:
        return StoreError(f"{mask_url(self._url)} does not answer as Redis does")

    def _failure(self, error: Exception) -> StoreError:
        """Return a failure in the words of the protocol, and begin a pause if the server is down."""
        if isinstance(error, StoreError):
            return error
        why = _reason(error)
        if not _DOWN.isdisjoint(names_of(error)):
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
        while cursor != b"0":
            (packed,) = self._ask(bytes, ("EVAL", _SCAN, 0, cursor, pattern, _BATCH))
            try:
                cursor, names = read_raw(packed)
                b"".join((cursor, *names))  # that is, they are bytes
            except (TypeError, ValueError) as error:
                raise self._nonsense() from error
            yield names

    def _items(self, names: list[bytes]) -> list[StoredItem]:
        sizes = self._ask(int, *(("STRLEN", name) for name in names))
        left = self._ask(int, *(("PTTL", name) for name in names))
        now = time.time()
        return [
            StoredItem(_key_of(name), size, None if milliseconds < 0 else now + milliseconds / 1000)
            for name, size, milliseconds in zip(names, sizes, left, strict=True)
            if milliseconds != _GONE
        ]


# --- commands ---------------------------------------------------------------------------------------------------------

_ENTRIES: Final = b"opero:cache:"
_LEASES: Final = b"opero:lease:"
_WILD: Final = re.compile(rb"[*?\[\]\\]")
_GONE: Final = -2
"""What Redis answers for the lifetime of a key that is not there."""

# As one value: whoever reads the answers need not know of answers within answers.
_SCAN: Final = (
    "return cmsgpack.pack(redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3]))"
)

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


def _key_of(name: bytes) -> str:
    """Do the reverse; other programs may have keys with what is no text at all."""
    try:
        return name[len(_ENTRIES) :].decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return name[len(_ENTRIES) :].decode("utf-8", "backslashreplace")


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


# --- errors -----------------------------------------------------------------------------------------------------------


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
    known = (name for one in (error.__cause__, error) for name in names_of(one) if name in _REASONS)
    found = next(known, None)
    return type(error).__name__ if found is None else _REASONS[found]
