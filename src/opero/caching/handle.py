# this_file: src/opero/caching/handle.py
"""Give users the cache of one decorated function, as `f.cache`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from opero.errors import OperoUsageError
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.caching.memory import Entry, EntryStore

__all__ = ["CacheHandle", "CacheInfo", "CallKey", "ManagedCache", "format_bytes"]


T = TypeVar("T")


class ManagedCache(Protocol):
    """The cache of one decorated function, as its handle, contexts and `clear_cache` see it.

    Attributes:
        function: The function's name.
        namespace: The `cache_namespace`.
        store: Where the entries are.
        ttl: Lifetime of an entry in seconds, None for ever.
    """

    function: str
    namespace: str
    store: EntryStore
    ttl: float | None

    def clear(self) -> int:
        """Remove all entries and return how many there were."""
        ...

    def invalidate(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> bool:
        """Remove the entry of a call and return whether there was one."""
        ...

    def key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Hashable | None:
        """Return the key of a call; None if it has none because its cache is off."""
        ...

    def replacement(self, key: Hashable, value: Any, ttl: float | None, /) -> Entry:
        """Return the entry of a result that a user sets; a computation under way will not replace it."""
        ...

    def info(self) -> CacheInfo:
        """Return counters and bounds."""
        ...

    def after_fork(self) -> None:
        """Forget what other threads of the parent process were doing."""
        ...


class CallKey:
    """What the result of one call is stored under, for a `CacheContext`.

    Attributes:
        cache: The function's cache.
        key: The key in its store.
    """

    __slots__ = ("cache", "key")

    def __init__(self, cache: ManagedCache, key: Hashable) -> None:
        self.cache: ManagedCache = cache
        self.key: Hashable = key

    def __repr__(self) -> str:
        return f"<key of a call of {self.cache.function}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """What a function's cache holds and has done.

    Attributes:
        hits: Results served from the cache.
        misses: Calls that found nothing fresh.
        stale: Calls that got an expired result, because the function failed; neither hits nor misses.
        size: Entries; None if the store does not know.
        bytes: Their estimated bytes; None if the store does not know.
        maxsize: Most entries.
        max_bytes: Most bytes.
        ttl: Lifetime of an entry in seconds, None for ever.
        backend: Where they are.
        namespace: The `cache_namespace`.
    """

    hits: int
    misses: int
    stale: int
    size: int | None
    bytes: int | None
    maxsize: int
    max_bytes: int
    ttl: float | None
    backend: str
    namespace: str

    def __repr__(self) -> str:
        size = "?" if self.size is None else f"{self.size:,}"
        weight = "" if self.bytes is None else f", {format_bytes(self.bytes)}"
        looked = self.hits + self.misses + self.stale
        stale = f", {self.stale:,} stale" if self.stale else ""
        share = f" ({self.hits / looked:.0%})" if looked else ""
        lasts = "no expiry" if self.ttl is None else f"ttl {format_seconds(self.ttl)}"
        return (
            f"<CacheInfo {self.backend} {self.namespace!r}: {size} entries{weight}, "
            f"{self.hits:,} hits{share}, {self.misses:,} misses{stale}, {lasts}>"
        )


class CacheHandle:
    """Look into a function's cache, empty it, renew an entry.

    Arguments are those of the function; for a method, the instance comes first
    (`Client.fetch.cache.invalidate(client, 1)`), or ask the bound method
    (`client.fetch.cache.invalidate(1)`).

    Args:
        cache: The stage; None for a function that is not cached, which has nothing to remove or to look up.
        refresh: Computes the result of a call anew and stores it; returns a coroutine if the function
            is asynchronous.

    Example:
        >>> from opero import opero
        >>> @opero
        ... def double(x):
        ...     return 2 * x
        >>> double(1), double(2), double.cache.info().size
        (2, 4, 2)
        >>> double.cache.invalidate(x=1), double.cache.invalidate(x=1)
        (True, False)
        >>> double.cache.clear()
        1
    """

    __slots__ = ("_cache", "_refresh")

    def __init__(
        self,
        cache: ManagedCache | None,
        refresh: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        self._cache = cache
        self._refresh = refresh

    def clear(self) -> int:
        """Remove all results of the function and return how many there were."""
        return 0 if self._cache is None else self._cache.clear()

    def invalidate(self, /, *args: Any, **kwargs: Any) -> bool:
        """Remove the result of one call and return whether there was one.

        A computation of it that is under way will not be stored, since it may have begun with what
        is outdated now.

        Raises:
            TypeError: The arguments do not fit the function.
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
        return self._cache is not None and self._cache.invalidate(args, kwargs)

    def refresh(self, /, *args: Any, **kwargs: Any) -> Any:
        """Compute one result anew, store and return it; awaitable if the function is asynchronous.

        Until it is there, other callers get the old one; it also stays if the computation fails.
        """
        return self._refresh(args, kwargs)

    def key(self, /, *args: Any, **kwargs: Any) -> CallKey:
        """Return the key of one call, with which a context gets, sets or deletes its result.

        Raises:
            TypeError: The arguments do not fit the function.
            OperoUsageError: The function is not cached, or an argument has no content.

        Example:
            >>> from opero import opero
            >>> from opero.core import get_cache_context
            >>> @opero(cache_namespace="places")
            ... def locate(city):
            ...     raise ConnectionError
            >>> with get_cache_context(cache_namespace="places") as cache:
            ...     cache.set(locate.cache.key("Rome"), (41.9, 12.5))
            >>> locate("Rome")
            (41.9, 12.5)
        """
        key = None if self._cache is None else self._cache.key_of(args, kwargs)
        if self._cache is None or key is None:
            raise OperoUsageError("The function is not cached, so its calls have no keys.")
        return CallKey(self._cache, key)

    async def aclear(self) -> int:
        """Do what `clear` does without holding up the event loop."""
        return await self._aside(self.clear)

    async def ainvalidate(self, /, *args: Any, **kwargs: Any) -> bool:
        """Do what `invalidate` does without holding up the event loop."""
        return await self._aside(self.invalidate, *args, **kwargs)

    async def ainfo(self) -> CacheInfo:
        """Do what `info` does without holding up the event loop."""
        return await self._aside(self.info)

    async def _aside(self, verb: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        if self._cache is None or not self._cache.store.blocking:
            return verb(*args, **kwargs)
        from asyncio import to_thread

        return await to_thread(verb, *args, **kwargs)

    def info(self) -> CacheInfo:
        """Return counters and bounds; those of a backend named "off" for a function that is not cached."""
        return _OFF if self._cache is None else self._cache.info()

    def __repr__(self) -> str:
        if self._cache is None:
            return "<cache off>"
        return repr(self._cache.info()).replace("CacheInfo", f"cache of {self._cache.function}:", 1)


_OFF = CacheInfo(
    hits=0,
    misses=0,
    stale=0,
    size=0,
    bytes=0,
    maxsize=0,
    max_bytes=0,
    ttl=None,
    backend="off",
    namespace="",
)


def format_bytes(size: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> format_bytes(256_000_000), format_bytes(1_500), format_bytes(12)
        ('256 MB', '1.5 kB', '12 B')
    """
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size} B"
