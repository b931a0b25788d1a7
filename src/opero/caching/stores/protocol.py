# this_file: src/opero/caching/stores/protocol.py
"""What a store that outlives a process has to be able to do: keep bytes by key, and lend leases.

A store knows nothing of values, of expiry in opero's sense, of functions or of listeners; all that
is done once, in front of it. It keeps three outcomes apart: bytes, None for "not there", and a
`StoreError` for "the backend failed". Whether what it returns has expired, or was meant for this
key at all, is told by the envelope around the value.

Keys are text, `namespace:function:digest`. What begins with `~` is kept beside the entries, and is
no entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

from opero.errors import StoreError

__all__ = [
    "AsyncByteStore", "ByteStore", "Claim", "Item", "Row", "StoreError", "Threaded", "awaitable", "portions",
]  # fmt: skip


class Item(NamedTuple):
    """What a store tells of one entry without reading it.

    Attributes:
        key: Its whole key.
        size: Bytes of what is stored; 0 if the store cannot tell cheaply.
        expires: Seconds since the epoch at which the store itself drops it, None for never or
            unknown.
    """

    key: str
    size: int
    expires: float | None = None


Claim = tuple[str, str]
"""The key of a lease, and who claims it."""


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
            blob: What, up to hundreds of megabytes.
            ttl: Seconds, more than 0, after which the store should drop it; None keeps it.
        """
        ...

    def set_many(self, rows: Sequence[Row]) -> None:
        """Do what `set` does for many keys, in as few trips as the backend can.

        Some may be stored, and others not, where it fails.
        """
        ...

    def delete(self, key: str) -> bool:
        """Remove one key and tell whether it was there."""
        ...

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with exactly this text and return how many there were.

        No character of the prefix is a wildcard. The empty prefix removes everything of opero's,
        and nothing of anybody else's.
        """
        ...

    def scan(self, prefix: str) -> Iterator[Item]:
        """Iterate over the keys that begin with a text; what changes meanwhile may be missed."""
        ...

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys, None where it would be too costly to tell."""
        ...

    def claim(self, key: str, owner: str, seconds: float) -> bool:
        """Take or extend the lease of a key.

        Leases lie beside the entries: they are neither found by `get` nor removed by `clear`.

        Args:
            key: What is to be computed.
            owner: Who claims; text that is unique across machines.
            seconds: After so long the lease ends by itself.

        Returns:
            True if `owner` has the lease now, False if somebody else does. Of several that claim
            at the same time exactly one gets it.
        """
        ...

    def claim_many(self, claims: Sequence[Claim], seconds: float) -> list[bool]:
        """Do what `claim` does for many keys, each on its own, in as few trips as the backend can."""
        ...

    def release(self, key: str, owner: str) -> None:
        """Give a lease back; nothing happens if `owner` does not hold it (any more)."""
        ...

    def release_many(self, claims: Sequence[Claim]) -> None:
        """Do what `release` does for many keys."""
        ...

    def renew(self) -> None:
        """After a fork: let go of locks and connections that belong to the parent."""
        ...

    def close(self) -> None:
        """Let go of connections; a later verb opens them again."""
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

    async def aclaim(self, key: str, owner: str, seconds: float) -> bool:
        """As `claim`."""
        ...

    async def arelease(self, key: str, owner: str) -> None:
        """As `release`."""
        ...


class Threaded:
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

    async def aclaim(self, key: str, owner: str, seconds: float) -> bool:
        """As `claim`."""
        from asyncio import to_thread

        return await to_thread(self._store.claim, key, owner, seconds)

    async def arelease(self, key: str, owner: str) -> None:
        """As `release`."""
        from asyncio import to_thread

        await to_thread(self._store.release, key, owner)


def awaitable(store: ByteStore) -> AsyncByteStore:
    """Return a store's verbs for event loops: its own if it has any, otherwise threads."""
    return store if isinstance(store, AsyncByteStore) else Threaded(store)


_TOGETHER: Final = 1 << 18


def portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut what is to be stored so that nobody else has to wait for the store for long.

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
