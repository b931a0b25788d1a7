# this_file: src/opero/caching/stores/redis.py
"""Keep entries on a server that processes and machines share: `cache_backend="redis"`.

The server sees entries behind `opero:cache:` and leases behind `opero:lease:`, so that neither can
be mistaken for the other or for keys of other programs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from threading import RLock
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

from opero.caching.stores.base import (
    LONGEST_LEASE,
    Backoff,
    KeyOwner,
    Row,
    StoredItem,
    StoreError,
    portions,
)
from opero.errors import OperoUsageError
from opero.utils.fork import reset_after_fork
from opero.utils.secrets import mask_url

if TYPE_CHECKING:
    from opero.caching.stores.redis_connections import Command, LoopConnections, ThreadConnections

__all__ = ["RedisStore", "locate", "open_at", "settle"]

ACROSS_HOSTS: Final = True

_VARIABLE: Final = "OPERO_REDIS_URL"
_DEFAULT: Final = "redis://localhost:6379/0"
_MAX_BYTES: Final = 256_000_000
_ENTRIES: Final = b"opero:cache:"
_LEASES: Final = b"opero:lease:"
_BATCH: Final = 1000
_WILD: Final = re.compile(rb"[*?\[\]\\]")
_ROUNDS: Final = 200
"""Rounds of a scan, of some thousand keys each, after which counting is too costly."""


def settle(text: str) -> str:
    """Return the text as it is, if it can be meant and the library is there.

    Raises:
        OperoUsageError: It is no address, or the extra is missing.
    """
    if text != "redis":
        _refuse(text)
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


def _refuse(text: str) -> None:
    """Raise an error that says what is wrong with an address, and shows no password."""
    fix = 'Write it like "redis://:PASSWORD@HOST:6379/0", "rediss://…" or "unix:///PATH?db=0".'
    if not _is_address(text):
        raise OperoUsageError(f"cache_backend={mask_url(text)!r} is no address of a server. {fix}")
    if "password" in parse_qs(urlsplit(text).query):
        raise OperoUsageError(f"cache_backend: a password does not belong behind the '?'. {fix}")


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
        self._get_tail = _get_tail(_MAX_BYTES)
        self._backoff = Backoff()
        self._lock = RLock()
        self._threads: ThreadConnections | None = None
        self._loops: LoopConnections | None = None
        reset_after_fork(self)

    def allow(self, max_bytes: int) -> None:
        """Allow entries of so many bytes; those beyond are not read."""
        self._largest = max(max_bytes, self._largest)
        self._get_tail = _get_tail(self._largest)

    # --- for threads ------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        return self._checked(self._ask(self._get(key)))

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys."""
        found = self._ask_many([self._get(key) for key in keys]) if keys else []
        return [self._checked(answer) for answer in found]

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        self._ask(_put(key, blob, ttl))

    def set_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        for portion in portions(rows):
            self._ask_many([_put(*row) for row in portion])

    def delete(self, key: str) -> bool:
        """Remove one key and return whether it was there."""
        return bool(self._ask(("UNLINK", _entry(key))))

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return how many there were."""
        return sum(self._ask(("UNLINK", *names)) for names in self._scan(prefix) if names)

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

    def acquire(self, key: str, owner: str, seconds: float) -> bool:
        """Take or extend the lease of a key."""
        return bool(self._ask(_acquire(key, owner, seconds)))

    def acquire_many(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Take or extend many leases, in one trip."""
        return [bool(answer) for answer in self._ask_many([_acquire(*c, seconds) for c in owners])]

    def release(self, key: str, owner: str) -> None:
        """Give a lease back."""
        self._ask(_release(key, owner))

    def release_many(self, owners: Sequence[KeyOwner]) -> None:
        """Give many leases back, in one trip."""
        self._ask_many([_release(*acquire) for acquire in owners])

    # --- for event loops --------------------------------------------------------------------------

    async def aget(self, key: str) -> bytes | None:
        """As `get`."""
        return self._checked(await self._aask(self._get(key)))

    async def aset(self, key: str, blob: bytes, ttl: float | None) -> None:
        """As `set`."""
        await self._aask(_put(key, blob, ttl))

    async def adelete(self, key: str) -> bool:
        """As `delete`."""
        return bool(await self._aask(("UNLINK", _entry(key))))

    async def aclear(self, prefix: str) -> int:
        """As `clear`."""
        cursor: Any = 0
        removed = 0
        while True:
            cursor, names = await self._aask(_scan_from(cursor, prefix))
            if names:
                removed += await self._aask(("UNLINK", *names))
            if not int(cursor):
                return removed

    async def aacquire(self, key: str, owner: str, seconds: float) -> bool:
        """As `acquire`."""
        return bool(await self._aask(_acquire(key, owner, seconds)))

    async def arelease(self, key: str, owner: str) -> None:
        """As `release`."""
        await self._aask(_release(key, owner))

    # --- upkeep -----------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked child: never touch the connections of the parent process."""
        # Kept, because what is collected closes its connections, or warns that it cannot.
        _inherited.append((self._threads, self._loops))
        self._lock = RLock()
        self._threads = self._loops = None

    def close(self) -> None:
        """Close the connections of threads; those of an event loop are closed with it."""
        with self._lock:
            connections, self._threads = self._threads, None
        if connections is not None:
            connections.close()

    def __repr__(self) -> str:
        return f"<RedisStore {mask_url(self._url)}>"

    # --- asking -----------------------------------------------------------------------------------

    def _ask(self, command: Command) -> Any:
        backoff = self._backoff
        if backoff.failures:
            backoff.check()
        try:
            answer = (self._threads or self._connect()).ask(command)
        except Exception as error:
            raise self._failure(error) from error
        if backoff.failures:
            backoff.over()
        return answer

    def _ask_many(self, commands: list[Command]) -> list[Any]:
        backoff = self._backoff
        if backoff.failures:
            backoff.check()
        try:
            answers = (self._threads or self._connect()).ask_many(commands)
        except Exception as error:
            raise self._failure(error) from error
        if backoff.failures:
            backoff.over()
        return answers

    async def _aask(self, command: Command) -> Any:
        backoff = self._backoff
        if backoff.failures:
            backoff.check()
        try:
            answer = await (self._loops or self._aconnect()).ask(command)
        except Exception as error:
            raise self._failure(error) from error
        if backoff.failures:
            backoff.over()
        return answer

    def _failure(self, error: Exception) -> StoreError:
        """Return a failure in the words of the protocol, and begin a pause if the server is down."""
        if isinstance(error, StoreError):
            return error
        from opero.caching.stores.redis_connections import is_down, reason

        why = reason(error)
        if is_down(error):
            self._backoff.failed(why)
        return StoreError(why)

    def _get(self, key: str) -> bytes:
        name = _ENTRIES + key.encode("utf-8", "surrogatepass")
        return b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b%b" % (len(name), name, self._get_tail)

    def _checked(self, answer: Any) -> bytes | None:
        if not answer:
            return None
        found: bytes = answer
        if len(found) > (self._largest or _MAX_BYTES):
            raise StoreError("an entry is larger than cache_max_bytes")
        return found

    def _scan(self, prefix: str) -> Iterator[list[bytes]]:
        cursor: Any = 0
        while True:
            cursor, names = self._ask(_scan_from(cursor, prefix))
            yield names
            if not int(cursor):
                return

    def _items(self, names: list[bytes]) -> list[StoredItem]:
        if not names:
            return []
        import time

        commands: list[Command] = []
        for name in names:
            commands += (("STRLEN", name), ("PTTL", name))
        answers = self._ask_many(commands)
        now = time.time()
        return [
            StoredItem(_key_of(name), size, None if left < 0 else now + left / 1000)
            for name, size, left in zip(names, answers[::2], answers[1::2], strict=True)
            if left != _GONE
        ]

    def _connect(self) -> ThreadConnections:
        with self._lock:
            if self._threads is None:
                from opero.caching.stores.redis_connections import ThreadConnections

                self._threads = ThreadConnections(self._url)
            return self._threads

    def _aconnect(self) -> LoopConnections:
        with self._lock:
            if self._loops is None:
                from opero.caching.stores.redis_connections import LoopConnections

                self._loops = LoopConnections(self._url, self._backoff)
            return self._loops


_GONE: Final = -2
"""What Redis answers for the lifetime of a key that is not there."""

_inherited: Final[list[object]] = []


# --- commands ---------------------------------------------------------------------------------------------------------

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


def _lease(key: str) -> bytes:
    return _LEASES + key.encode("utf-8", "surrogatepass")


def _key_of(name: bytes) -> str:
    return name[len(_ENTRIES) :].decode("utf-8", "surrogatepass")


def _get_tail(largest: int) -> bytes:
    """Return what stands behind the key when an entry is asked for: no more than it may hold, and a byte."""
    end = b"%d" % largest
    return b"\r\n$1\r\n0\r\n$%d\r\n%b\r\n" % (len(end), end)


def _put(key: str, blob: bytes, ttl: float | None) -> Command:
    """Store an entry, for at least a millisecond."""
    stored = ("SET", _entry(key), blob)
    return stored if ttl is None else (*stored, "PX", _milliseconds(ttl))


def _scan_from(cursor: Any, prefix: str) -> Command:
    """Ask for the next keys that begin with a text, none of whose characters is a wildcard."""
    pattern = _WILD.sub(rb"\\\g<0>", _entry(prefix)) + b"*"
    return "SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH


def _acquire(key: str, owner: str, seconds: float) -> Command:
    """Take or extend a lease; the answer is 1 if `owner` has it."""
    longest = _milliseconds(LONGEST_LEASE + seconds)
    return "EVAL", _ACQUIRE, 1, _lease(key), owner, _milliseconds(seconds), longest


def _release(key: str, owner: str) -> Command:
    """Give a lease back if `owner` has it."""
    return "EVAL", _RELEASE, 1, _lease(key), owner


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))
