# this_file: src/opero/caching/stores/redis.py
"""`cache_backend="redis"`: a server that processes and machines share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from threading import RLock
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

from opero.caching.stores import redis_commands as say
from opero.caching.stores.protocol import Claim, Item, Row, StoreError, portions
from opero.caching.stores.rest import Rest
from opero.errors import OperoUsageError
from opero.utils.secrets import mask_url

if TYPE_CHECKING:
    from opero.caching.stores.redis_engine import RedisEngine
    from opero.caching.stores.redis_lines import Lines

__all__ = ["RedisStore", "locate", "open_at", "settle"]

ACROSS_HOSTS: Final = True

_VARIABLE: Final = "OPERO_REDIS_URL"
_DEFAULT: Final = "redis://localhost:6379/0"
_MANY: Final = 200
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

    A command is tried once. A server that does not answer is left alone for a second, and longer if
    it goes on, so that calls cost next to nothing until it is back.

    Args:
        url: Where it is. Nothing is connected before the first verb.
    """

    name = "redis"
    blocking = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._rest = Rest()
        self._lock = RLock()
        self._engine: RedisEngine | None = None
        self._lines: Lines | None = None

    # --- for threads ------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        found: bytes | None = self._ask(say.get(key))
        return found

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys."""
        found: list[bytes | None] = self._ask(say.get_many(keys)) if keys else []
        return found

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        self._ask(say.put(key, blob, ttl))

    def set_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        for portion in portions(rows):
            self._ask_many([say.put(*row) for row in portion])

    def delete(self, key: str) -> bool:
        """Remove one key and tell whether it was there."""
        return bool(self._ask(say.delete(key)))

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return how many there were."""
        return sum(self._ask(say.remove(names)) for names in self._scan(prefix) if names)

    def scan(self, prefix: str) -> Iterator[Item]:
        """Iterate over the keys that begin with a text."""
        for names in self._scan(prefix):
            yield from self._items(names)

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys, None if the server holds millions."""
        count = size = 0
        for rounds, names in enumerate(self._scan(prefix)):
            if rounds == _MANY:
                return None, None
            items = self._items(names)
            count += len(items)
            size += sum(item.size for item in items)
        return count, size

    def claim(self, key: str, owner: str, seconds: float) -> bool:
        """Take or extend the lease of a key."""
        return bool(self._ask(say.claim(key, owner, seconds)))

    def claim_many(self, claims: Sequence[Claim], seconds: float) -> list[bool]:
        """Take or extend many leases, in one trip."""
        answers = self._ask_many([say.claim(*claim, seconds) for claim in claims])
        return [bool(answer) for answer in answers]

    def release(self, key: str, owner: str) -> None:
        """Give a lease back."""
        self._ask(say.release(key, owner))

    def release_many(self, claims: Sequence[Claim]) -> None:
        """Give many leases back, in one trip."""
        self._ask_many([say.release(*claim) for claim in claims])

    # --- for event loops --------------------------------------------------------------------------

    async def aget(self, key: str) -> bytes | None:
        """As `get`."""
        found: bytes | None = await self._aask(say.get(key))
        return found

    async def aset(self, key: str, blob: bytes, ttl: float | None) -> None:
        """As `set`."""
        await self._aask(say.put(key, blob, ttl))

    async def adelete(self, key: str) -> bool:
        """As `delete`."""
        return bool(await self._aask(say.delete(key)))

    async def aclear(self, prefix: str) -> int:
        """As `clear`."""
        cursor = removed = 0
        while True:
            cursor, names = say.scanned(await self._aask(say.scan(cursor, prefix)))
            if names:
                removed += await self._aask(say.remove(names))
            if not cursor:
                return removed

    async def aclaim(self, key: str, owner: str, seconds: float) -> bool:
        """As `claim`."""
        return bool(await self._aask(say.claim(key, owner, seconds)))

    async def arelease(self, key: str, owner: str) -> None:
        """As `release`."""
        await self._aask(say.release(key, owner))

    # --- upkeep -----------------------------------------------------------------------------------

    def renew(self) -> None:
        """After a fork: let go of locks and connections that belong to the parent."""
        # Kept, because what is collected closes its connections, or warns that it cannot.
        _inherited.append((self._engine, self._lines))
        self._lock = RLock()
        self._engine = self._lines = None

    def close(self) -> None:
        """Close the connections of threads; those of an event loop are closed with it."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.cleanup()

    def __repr__(self) -> str:
        return f"<RedisStore {mask_url(self._url)}>"

    # --- asking -----------------------------------------------------------------------------------

    def _ask(self, command: say.Command) -> Any:
        rest = self._rest
        if rest.failures:
            rest.check()
        try:
            answer = (self._engine or self._open()).ask(*command)
        except Exception as error:
            raise self._told(error) from error
        if rest.failures:
            rest.over()
        return answer

    def _ask_many(self, commands: list[say.Command]) -> list[Any]:
        rest = self._rest
        if rest.failures:
            rest.check()
        try:
            answers = (self._engine or self._open()).ask_many(commands)
        except Exception as error:
            raise self._told(error) from error
        if rest.failures:
            rest.over()
        return answers

    async def _aask(self, command: say.Command) -> Any:
        rest = self._rest
        if rest.failures:
            rest.check()
        try:
            answer = await (self._lines or self._draw()).ask(command)
        except Exception as error:
            raise self._told(error) from error
        if rest.failures:
            rest.over()
        return answer

    def _told(self, error: Exception) -> StoreError:
        """Return a failure in the words of the protocol, and leave a server alone that is down."""
        if isinstance(error, StoreError):
            return error
        from opero.caching.stores.redis_client import is_down, reason

        why = reason(error)
        if is_down(error):
            self._rest.failed(why)
        return StoreError(why)

    def _scan(self, prefix: str) -> Iterator[list[bytes]]:
        cursor = 0
        while True:
            cursor, names = say.scanned(self._ask(say.scan(cursor, prefix)))
            yield names
            if not cursor:
                return

    def _items(self, names: list[bytes]) -> list[Item]:
        if not names:
            return []
        import time

        commands = [command for name in names for command in say.inspect(name)]
        answers = self._ask_many(commands)
        now = time.time()
        return [
            Item(say.key_of(name), size, None if left < 0 else now + left / 1000)
            for name, size, left in zip(names, answers[::2], answers[1::2], strict=True)
            if left != _GONE
        ]

    def _open(self) -> RedisEngine:
        with self._lock:
            if self._engine is None:
                from opero.caching.stores.redis_client import client
                from opero.caching.stores.redis_engine import RedisEngine

                self._engine = RedisEngine(client(self._url))
            return self._engine

    def _draw(self) -> Lines:
        with self._lock:
            if self._lines is None:
                from opero.caching.stores.redis_lines import Lines

                self._lines = Lines(self._url, self._rest)
            return self._lines


_GONE: Final = -2
"""What Redis answers for the lifetime of a key that is not there."""

_inherited: Final[list[object]] = []
