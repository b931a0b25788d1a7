# this_file: src/opero/caching/handles.py
"""What users hold of caches: `f.cache`, contexts with keys of one's own, and `clear_cache` for all of the process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Final, Self
from weakref import WeakValueDictionary

from opero.caching.copying import Uncopyable
from opero.caching.entries import Entries
from opero.caching.function_cache import CacheInfo
from opero.caching.keys.canonical import digest, fast_part
from opero.caching.keys.content import Unkeyable
from opero.caching.keys.function_keys import namespace_prefix
from opero.errors import OperoUsageError, StoreError, UnkeyableError
from opero.events.bus import Emitter
from opero.utils.async_utils import in_thread_of
from opero.utils.checks import BACKENDS, text_or_none
from opero.utils.lazy import NamedTuple
from opero.utils.units import Duration, parse_seconds

if TYPE_CHECKING:
    from opero.caching.function_cache import FunctionCache
    from opero.caching.memory import Entry, EntryStore, MemoryStore


_DEFAULT: Final[Any] = object()


# --- one function's cache -------------------------------------------------------------------------


class CallKey(NamedTuple):
    """What the result of one call is stored under, for a `CacheContext`.

    Attributes:
        cache: The function's cache.
        key: The key in its store.
    """

    cache: FunctionCache
    key: Hashable

    def __repr__(self) -> str:
        return f"<key of a call of {self.cache.function}>"


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
        self, cache: FunctionCache | None, refresh: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        self._cache = cache
        self._refresh = refresh

    @property
    def _blocking(self) -> bool:
        return self._cache is not None and self._cache.store.blocking

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
        if self._cache is None:
            return False
        key = self._cache.key_of(args, kwargs)
        return key is not None and self._cache.invalidate(key)

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
            raise OperoUsageError("Such a call is not cached, so it has no key.")
        return CallKey(self._cache, key)

    def info(self) -> CacheInfo:
        """Return counters and bounds; those of a backend named "off" for a function that is not cached."""
        return CacheInfo() if self._cache is None else self._cache.info()

    aclear: Final = in_thread_of(clear)
    ainvalidate: Final = in_thread_of(invalidate)
    ainfo: Final = in_thread_of(info)

    def __repr__(self) -> str:
        if self._cache is None:
            return "<cache off>"
        return repr(self._cache.info()).replace("CacheInfo", f"cache of {self._cache.function}:", 1)


# --- keys of one's own ----------------------------------------------------------------------------


class CacheContext:
    """Values by key, isolated like the results of functions.

    Use it as it is or in a `with` block, which does nothing more than name it. Keys are anything
    that can be part of a function's key: text, numbers, tuples, dataclasses and so on, by content and
    type. The key that `f.cache.key(...)` returns stands for the result of a call. What is set on disk
    is there for every process; `aget` and its like are for event loops.

    Args:
        store: Where the values are.
        options: Their options (`core.options.Options`).
        prefix: What keys begin with in a store that wants text; None in memory.
    """

    def __init__(self, store: EntryStore, options: Any, prefix: str | None) -> None:
        self._store = store
        self._blocking = store.blocking
        self._namespace: str = options.cache_namespace
        self._ttl: Duration | None = options.cache_ttl
        self._prefix = prefix
        emitter = Emitter(f"get_cache_context({self._namespace!r})")
        self._entries = Entries(store, copy=options.cache_copy, emitter=emitter)

    def get(self, key: object, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        entry = self._entry(key)
        return default if entry is None else entry.open()

    def set(self, key: object, value: Any, ttl: Duration | None = _DEFAULT) -> None:
        """Store a value.

        Args:
            key: Its key.
            value: The value; later changes of the object do not reach the cache.
            ttl: Its lifetime, None for ever; by default the context's, for the result of a call the
                function's.

        Raises:
            OperoUsageError: The value cannot be copied, or not be encoded for a store on disk or on a
                server.
            StoreError: The store failed.
        """
        store, entries, made = self._place(key)
        if ttl is _DEFAULT:
            ttl = key.cache.ttl if isinstance(key, CallKey) else self._ttl
        lasts = None if ttl is None else parse_seconds(ttl, "ttl")
        try:
            make = key.cache.replacement if isinstance(key, CallKey) else entries.entry
            entry = make(made, value, lasts)
        except Uncopyable as signal:
            raise OperoUsageError(f"A value cannot be cached: {signal}.") from None
        store.put(made, entry)

    def delete(self, key: object) -> bool:
        """Remove a value and return whether there was one.

        Raises:
            StoreError: The store failed.
        """
        store, _, made = self._place(key)
        return store.delete(made)

    def clear(self) -> int:
        """Remove all values set through contexts of the namespace; return their number.

        Raises:
            StoreError: The store failed.
        """
        return self._store.clear()

    aget: Final = in_thread_of(get)
    aset: Final = in_thread_of(set)
    adelete: Final = in_thread_of(delete)
    aclear: Final = in_thread_of(clear)

    def __contains__(self, key: object) -> bool:
        return self._entry(key) is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: what was stored stays."""

    def __repr__(self) -> str:
        # A look at the object shall not wait for a disk or a server.
        size = "" if self._blocking else f": {self._store.measure()[0]} entries"
        return f"<CacheContext {self._store.name} {self._namespace!r}{size}>"

    def _place(self, key: object) -> tuple[EntryStore, Entries, Any]:
        """Return where the value of a key is, and under which key."""
        if isinstance(key, CallKey):
            cache = key.cache
            if (cache.store.name, cache.namespace) != (self._store.name, self._namespace):
                raise OperoUsageError(
                    f"{key!r} belongs to the namespace {cache.namespace!r} in {cache.store.name}, not to "
                    f"{self._namespace!r} in {self._store.name}."
                )
            return cache.store, cache.entries, key.key
        try:
            made = fast_part(key) if self._prefix is None else f"{self._prefix}{digest(key).hex()}"
        except Unkeyable as signal:
            raise UnkeyableError(f"A key of the cache must have content: {signal}.") from None
        return self._store, self._entries, made

    def _entry(self, key: object) -> Entry | None:
        _, entries, made = self._place(key)
        entry = entries.find(made)
        return entry if entry is not None and entries.is_fresh(made, entry) else None


context_stores: Final[dict[str, MemoryStore]] = {}
"""The values in memory of the contexts of each namespace."""


# --- all caches of the process --------------------------------------------------------------------

_registry: Final[WeakValueDictionary[int, FunctionCache]] = WeakValueDictionary()
"""By `id`. Put in and read by single steps of C, which need no lock."""


def register(cache: FunctionCache) -> None:
    """Let `clear_cache` reach a cache for as long as its function lives."""
    _registry[id(cache)] = cache


def clear_cache(namespace: str | None = None, backend: str | None = None) -> int:
    """Empty the caches of decorated functions and the contexts of `get_cache_context`.

    On disk and on a server that removes all entries of the namespace, also those of functions and
    programs that this process knows nothing of.

    Args:
        namespace: Only those with this `cache_namespace`; None for all.
        backend: Only those of this backend ("memory", "disk", "disk:PATH", "redis", "redis://…", or the
            class name of a store object); None for all that this process uses.

    Returns:
        The number of entries removed, as far as the stores know.

    Raises:
        StoreError: A store failed; all others have been emptied.

    Example:
        >>> from opero import clear_cache, opero
        >>> @opero(cache_namespace="geo")
        ... def locate(city):
        ...     return len(city)
        >>> locate("Rome"), clear_cache("geo")
        (4, 1)
    """
    text_or_none("namespace", namespace)
    text_or_none("backend", backend)
    removed = 0
    failed: StoreError | None = None
    for clear in _clears(namespace, backend):
        try:
            removed += clear()
        except StoreError as error:
            failed = error
    if failed is not None:
        raise failed
    return removed


def _clears(namespace: str | None, backend: str | None) -> Iterator[Callable[[], int]]:
    """Yield what empties each of the caches in question; memory first, because it never fails."""
    named = backend is not None and backend.partition(":")[0] in BACKENDS
    if named:
        from opero.caching.stores.base import settle

        backend = settle(str(backend))  # as stores name theirs
    found = [
        cache
        for reference in _registry.valuerefs()
        if (cache := reference()) is not None
        and namespace in (None, cache.namespace)
        and backend in (None, cache.store.name, getattr(cache.store, "text", None))
    ]
    yield from (cache.clear for cache in sorted(found, key=lambda cache: cache.store.blocking))
    if backend in (None, "memory"):
        stores = list(context_stores.items())
        yield from (store.clear for name, store in stores if namespace in (None, name))
    # No place has been opened without loading this.
    if named or "opero.caching.stores.base" in sys.modules:
        from opero.caching.stores.base import open_store, open_stores

        places = [store for store in open_stores() if backend in (None, store.name)]
        if named:
            here = open_store(str(backend))
            places = [here, *(store for store in places if store is not here)]
        prefix = "" if namespace is None else namespace_prefix(namespace)
        yield from (functools.partial(store.clear, prefix) for store in places)
