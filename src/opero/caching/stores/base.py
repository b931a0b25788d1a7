# this_file: src/opero/caching/stores/base.py
"""What a store that outlives a process does: keep bytes by key, and grant leases.

A store knows nothing of values, of expiry in opero's sense, of functions or of listeners; all that is
done once, in front of it (`coded`). It keeps three outcomes apart: bytes, None for "not there", and a
`StoreError` for "the backend failed". Whether what it returns has expired, or belongs to this key at
all, is judged by the envelope around the value.

Keys are text, `namespace:function:digest`. What begins with `~` is kept beside the entries, and is
no entry. A text such as "disk:~/answers" becomes an open store here: one for each place and
process, whatever function uses it, closed when the last one is gone.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable
from weakref import WeakValueDictionary

from opero.errors import StoreError
from opero.utils import ambient
from opero.utils.checks import BACKENDS, backend_of
from opero.utils.fork import run_after_fork

__all__ = [
    "AsyncByteStore",
    "Backoff",
    "ByteStore",
    "KeyOwner",
    "Row",
    "StoreError",
    "StoredItem",
    "ThreadedStore",
    "across_hosts",
    "awaitable",
    "open_store",
    "open_stores",
    "pause_after",
    "portions",
    "settle",
]  # fmt: skip


class StoredItem(NamedTuple):
    """What a store knows of one entry without reading it.

    Attributes:
        key: Its whole key.
        size: Bytes of what is stored; 0 if that would be costly to know.
        expires: Seconds since the epoch at which the store itself drops it, None for never or
            unknown.
    """

    key: str
    size: int
    expires: float | None = None


KeyOwner = tuple[str, str]
"""The key of a lease, and its owner."""


Row = tuple[str, bytes, float | None]
"""The arguments of `ByteStore.set`."""


class ByteStore(Protocol):
    """Bytes by key, shared by threads and processes.

    Every verb may be called from any thread, and raises `StoreError` if the backend fails. It
    fails fast: a caller waits for a second at most, not for a minute of retries. One object serves
    a place in a process for as long as it runs, so that a backend which comes back is used again.
    """

    @property
    def name(self) -> str:
        """Its name in `info()` and `explain()`: "disk"."""
        ...

    @property
    def blocking(self) -> bool:
        """Whether an event loop must not call it: it is called in a thread then, or through its
        own asynchronous verbs.
        """
        ...

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        ...

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys, in as few trips as the backend can."""
        ...

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others, as a whole or not at all.

        Args:
            key: Where.
            blob: What, at least one byte, up to hundreds of megabytes.
            ttl: Seconds, more than 0, after which the store should drop it; None keeps it.
        """
        ...

    def set_many(self, rows: Sequence[Row]) -> None:
        """Do what `set` does for many keys, in as few trips as the backend can.

        Some may be stored, and others not, where it fails.
        """
        ...

    def delete(self, key: str) -> bool:
        """Remove one key and return whether it was there."""
        ...

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with exactly this text and return how many there were.

        No character of the prefix is a wildcard. The empty prefix removes everything of opero's,
        and nothing else.
        """
        ...

    def scan(self, prefix: str) -> Iterator[StoredItem]:
        """Iterate over the keys that begin with a text; what changes meanwhile may be missed."""
        ...

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys, None where it would be too costly to know."""
        ...

    def acquire(self, key: str, owner: str, seconds: float) -> bool:
        """Take or extend the lease of a key.

        Leases lie beside the entries: they are neither found by `get` nor removed by `clear`.

        Args:
            key: What is to be computed.
            owner: Text that is unique across machines.
            seconds: After so long the lease ends by itself.

        Returns:
            True if `owner` has the lease now, False if another one does. Of several that ask for it
            at the same time exactly one gets it. A lease that would last longer than `LONGEST_LEASE`
            counts as free: opero grants none like that.
        """
        ...

    def acquire_many(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Do what `acquire` does for many keys, each on its own, in as few trips as the backend can."""
        ...

    def release(self, key: str, owner: str) -> None:
        """Give a lease back; nothing happens if `owner` does not hold it (any more)."""
        ...

    def release_many(self, owners: Sequence[KeyOwner]) -> None:
        """Do what `release` does for many keys."""
        ...

    def close(self) -> None:
        """Close the connections; a later verb opens them again."""
        ...


@runtime_checkable
class AsyncByteStore(Protocol):
    """The verbs that a call needs, for event loops. A store that has them is an asynchronous one."""

    async def aget(self, key: str) -> bytes | None:
        """As `get`."""
        ...

    async def aset(self, key: str, blob: bytes, ttl: float | None) -> None:
        """As `set`."""
        ...

    async def adelete(self, key: str) -> bool:
        """As `delete`."""
        ...

    async def aclear(self, prefix: str) -> int:
        """As `clear`."""
        ...

    async def aacquire(self, key: str, owner: str, seconds: float) -> bool:
        """As `acquire`."""
        ...

    async def arelease(self, key: str, owner: str) -> None:
        """As `release`."""
        ...


class ThreadedStore:
    """The asynchronous verbs of a store that has none: each call runs in a thread.

    Args:
        store: The store.
    """

    __slots__ = ("_store",)

    def __init__(self, store: ByteStore) -> None:
        self._store = store

    async def aget(self, key: str) -> bytes | None:
        """As `get`."""
        from asyncio import to_thread

        return await to_thread(self._store.get, key)

    async def aset(self, key: str, blob: bytes, ttl: float | None) -> None:
        """As `set`."""
        from asyncio import to_thread

        await to_thread(self._store.set, key, blob, ttl)

    async def adelete(self, key: str) -> bool:
        """As `delete`."""
        from asyncio import to_thread

        return await to_thread(self._store.delete, key)

    async def aclear(self, prefix: str) -> int:
        """As `clear`."""
        from asyncio import to_thread

        return await to_thread(self._store.clear, prefix)

    async def aacquire(self, key: str, owner: str, seconds: float) -> bool:
        """As `acquire`."""
        from asyncio import to_thread

        return await to_thread(self._store.acquire, key, owner, seconds)

    async def arelease(self, key: str, owner: str) -> None:
        """As `release`."""
        from asyncio import to_thread

        await to_thread(self._store.release, key, owner)


def awaitable(store: ByteStore) -> AsyncByteStore:
    """Return a store's verbs for event loops: its own if it has any, otherwise threads."""
    return store if isinstance(store, AsyncByteStore) else ThreadedStore(store)


LONGEST_LEASE: Final = 10.0
"""Seconds beyond which no lease of opero's lasts unless it is extended."""

_TOGETHER: Final = 1 << 18


def portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut what is to be stored so that no other writer waits for the store for long.

    Example:
        >>> [len(portion) for portion in portions([("key", bytes(100_000), None)] * 7)]
        [2, 2, 2, 1]
    """
    start = size = 0
    for end, (_, blob, _) in enumerate(rows):
        size += len(blob)
        if size > _TOGETHER and end > start:
            yield rows[start:end]
            start, size = end, len(blob)
    if start < len(rows):
        yield rows[start:]


# --- servers that do not answer ---------------------------------------------------------------------------------------

_SHORTEST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 15.0


def pause_after(failures: int) -> float:
    """Return for how many seconds a server is not used after so many failures in a row.

    Example:
        >>> [pause_after(failures) for failures in (1, 2, 3, 50)]
        [1.0, 2.0, 4.0, 15.0]
    """
    return min(_SHORTEST_PAUSE * 2.0 ** min(failures - 1, 10), _LONGEST_PAUSE)


class Backoff:
    """Refuse callers for a while after a server did not answer, so that a dead one costs next to nothing.

    While a pause lasts, callers are refused at once. When it is over, one of them tries; the others
    are refused until that has an outcome, or as long as the pause would be. No lock: two that try
    at the same moment do no harm.

    Attributes:
        failures: Failures in a row, 0 for a server that answers.

    Example:
        >>> backoff = Backoff()
        >>> backoff.failed("it is down")
        >>> backoff.failures
        1
        >>> backoff.over()
        >>> backoff.check()
    """

    def __init__(self) -> None:
        self.failures: int = 0
        self._until = 0.0
        self._why = ""

    def check(self) -> None:
        """Raise while a pause lasts.

        Raises:
            StoreError: The pause lasts; the message says what the last failure was.
        """
        if not self.failures:
            return
        now = ambient.clock().monotonic()
        if now < self._until:
            raise StoreError(self._why)
        self._until = now + pause_after(self.failures)

    def failed(self, why: str) -> None:
        """Note a failure and begin a pause."""
        self.failures += 1
        self._why = why
        self._until = ambient.clock().monotonic() + pause_after(self.failures)

    def over(self) -> None:
        """End the pauses: the server has answered."""
        self.failures = 0


# --- open stores ------------------------------------------------------------------------------------------------------


class _OpenStores:
    """The stores that this process has open and that are in use."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stores: WeakValueDictionary[tuple[str, str], ByteStore] = WeakValueDictionary()


_opened: Final = _OpenStores()


def settle(text: str) -> str:
    """Return the text of a backend as it has to be remembered.

    Args:
        text: As given for `cache_backend`, but not "memory".

    Raises:
        OperoUsageError: It names no backend, or one that is not available.

    Example:
        >>> settle("disk:/var/cache/answers")
        'disk:/var/cache/answers'
    """
    settled: str = _module(text).settle(text)
    return settled


def across_hosts(text: str) -> bool:
    """Whether other hosts may read and write what a text names."""
    return bool(_module(text).ACROSS_HOSTS)


def open_store(text: str) -> ByteStore:
    """Return this process's store for a place.

    Nothing is created, connected or imported before the store's first verb.

    Args:
        text: As it came from `settle`. What it leaves open, like the folder of "disk", is looked up
            in the environment now.
    """
    module = _module(text)
    place = module.locate(text)
    with _opened.lock:
        key = module.__name__, place
        store = _opened.stores.get(key)
        if store is None:
            store = _opened.stores[key] = module.open_at(place)
        return store


def open_stores() -> list[ByteStore]:
    """Return the stores that this process has open and in use."""
    with _opened.lock:
        return list(_opened.stores.values())


def _module(text: str) -> Any:
    backend_of("cache_backend", text)
    return import_module(BACKENDS[text.partition(":")[0]])


@atexit.register
def _close_all() -> None:
    for store in open_stores():
        store.close()


@run_after_fork
def _after_fork() -> None:
    _opened.lock = threading.RLock()
