# this_file: src/opero/caching/context.py
"""A cache without a function: get, set and delete by keys of one's own, in a namespace."""

from __future__ import annotations

import math
import os
from types import TracebackType
from typing import Any, Final, Self

from opero.caching import awaiting
from opero.caching.handle import CallKey
from opero.caching.isolate import Uncopyable, freeze
from opero.caching.keying import namespace_prefix
from opero.caching.keys import Unkeyable, digest, fast_part
from opero.caching.memory import Entry, EntryStore, MemoryStore, Store
from opero.caching.shelf import shared_store
from opero.caching.skips import Skips
from opero.caching.weight import weigh
from opero.core.options import Options
from opero.errors import OperoUsageError, StoreError, UnkeyableError
from opero.events.bus import Emitter
from opero.utils import ambient
from opero.utils.units import Duration, parse_seconds, parse_size

__all__ = ["CacheContext", "context_stores", "get_cache_context"]

_DEFAULT: Final[Any] = object()


class CacheContext:
    """Values by key, isolated like the results of functions.

    Use it as it is or in a `with` block, which does nothing more than name it. Keys are anything
    that can be part of a function's key: text, numbers, tuples, dataclasses and so on, by content and
    type. The key that `f.cache.key(...)` returns stands for the result of a call. What is set on disk
    is there for every process; `aget` and its like are for event loops.

    Args:
        store: Where the values are.
        namespace: For its repr.
        ttl: Lifetime of a value in seconds, None for ever.
        copy: Whether mutable values are isolated.
        prefix: What keys begin with in a store that wants text; None in memory.
    """

    def __init__(
        self,
        store: EntryStore,
        *,
        namespace: str,
        ttl: float | None,
        copy: bool,
        prefix: str | None = None,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._ttl = ttl
        self._copy = copy
        self._prefix = prefix

    def get(self, key: object, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        entry = self._entry(*self._place(key))
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
        store, made = self._place(key)
        store.put(made, self._made(made, key, value, ttl))

    def delete(self, key: object) -> bool:
        """Remove a value and tell whether there was one.

        Raises:
            StoreError: The store failed.
        """
        store, made = self._place(key)
        return store.delete(made)

    def clear(self) -> int:
        """Remove all values set through contexts of the namespace; return their number.

        Raises:
            StoreError: The store failed.
        """
        return self._store.clear()

    async def aget(self, key: object, default: Any = None) -> Any:
        """Do what `get` does without holding up the event loop."""
        if not self._store.blocking:
            return self.get(key, default)
        store, made = self._place(key)
        try:
            entry = self._alive(store, made, await awaiting.read(store, made))
        except StoreError as error:
            self._failed(error)
            return default
        return default if entry is None else entry.open()

    async def aset(self, key: object, value: Any, ttl: Duration | None = _DEFAULT) -> None:
        """Do what `set` does without holding up the event loop."""
        if not self._store.blocking:
            self.set(key, value, ttl)
            return
        store, made = self._place(key)
        await awaiting.keep(
            store,
            made,
            lambda: self._made(made, key, value, ttl),
            unless=lambda: False,
        )

    async def adelete(self, key: object) -> bool:
        """Do what `delete` does without holding up the event loop."""
        from asyncio import to_thread

        return await to_thread(self.delete, key)

    async def aclear(self) -> int:
        """Do what `clear` does without holding up the event loop."""
        from asyncio import to_thread

        return await to_thread(self.clear)

    def __contains__(self, key: object) -> bool:
        return self._entry(*self._place(key)) is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing: what was stored stays."""

    def __repr__(self) -> str:
        # Whoever only looks at it shall not wait for a disk or a server.
        size = "" if self._store.blocking else f": {self._store.measure()[0]} entries"
        return f"<CacheContext {self._store.name} {self._namespace!r}{size}>"

    def _place(self, key: object) -> tuple[EntryStore, Any]:
        """Return where the value of a key is, and under which key."""
        if isinstance(key, CallKey):
            cache = key.cache
            if (cache.store.name, cache.namespace) != (self._store.name, self._namespace):
                raise OperoUsageError(
                    f"{key!r} belongs to the namespace {cache.namespace!r} in {cache.store.name}, not to "
                    f"{self._namespace!r} in {self._store.name}."
                )
            return cache.store, key.key
        try:
            made = fast_part(key) if self._prefix is None else f"{self._prefix}{digest(key).hex()}"
        except Unkeyable as signal:
            raise UnkeyableError(f"A key of the cache must have content: {signal}.") from None
        return self._store, made

    def _made(self, made: Any, key: object, value: Any, ttl: Duration | None) -> Entry:
        """Return the entry of a value."""
        seconds = (
            self._ttl if ttl is _DEFAULT else None if ttl is None else parse_seconds(ttl, "ttl")
        )
        expires = math.inf if seconds is None else ambient.clock().monotonic() + seconds
        encode: Any = getattr(self._store, "entry", None)
        try:
            if isinstance(key, CallKey):
                lasts = key.cache.keeper.ttl if ttl is _DEFAULT else seconds
                return key.cache.plant(made, value, lasts)
            if encode is not None:
                entry: Entry = encode(made, value, expires)
                return entry
            stored, thaw = freeze(value, copy=self._copy)
        except Uncopyable as signal:
            raise OperoUsageError(f"A value cannot be cached: {signal}.") from None
        return Entry(stored, expires=expires, thaw=thaw, weight=weigh(value) + weigh(key))

    def _entry(self, store: EntryStore, key: Any) -> Entry | None:
        try:
            return self._alive(store, key, store.find(key))
        except StoreError as error:
            self._failed(error)
            return None

    @staticmethod
    def _alive(store: EntryStore, key: Any, entry: Entry | None) -> Entry | None:
        now = ambient.clock().monotonic()
        if entry is None or entry.expiry > now:
            return entry
        if entry.keep <= now:
            store.discard(key, entry)
        return None

    def _failed(self, error: StoreError) -> None:
        """A store that cannot be read holds nothing; whoever listens hears why."""
        emitter = Emitter(f"get_cache_context({self._namespace!r})")
        Skips(emitter).tell(f"the store could not be read: {error}")


_stores: dict[str, MemoryStore] = {}


def get_cache_context(
    cache_backend: str | Store = "memory", cache_namespace: str = "opero", **options: Any
) -> CacheContext:
    """Return a cache to be used by hand.

    Args:
        cache_backend: "memory", "disk", "disk:PATH", "redis", "redis://…", or a store object.
        cache_namespace: Contexts of one namespace see the same values; `clear_cache(namespace)`
            empties them, too.
        options: Further cache options: `cache_ttl`, `cache_maxsize`, `cache_max_bytes`,
            `cache_copy`, `cache_codec`. The first context of a namespace in memory decides its bounds.

    Raises:
        OperoUsageError: An option is unknown or wrong.

    Example:
        >>> with get_cache_context(cache_namespace="prices", cache_ttl="1h") as cache:
        ...     cache.set(("EUR", "USD"), 1.08)
        ...     cache.get(("EUR", "USD"))
        1.08
    """
    made = Options.of(
        "get_cache_context",
        cache_backend=cache_backend,
        cache_namespace=cache_namespace,
        **options,
    )
    wrong = [name for name in options if name not in _USED]
    if wrong:
        raise OperoUsageError(
            f"get_cache_context() has no use for {wrong[0]!r}; it takes cache_backend, "
            f"cache_namespace, {', '.join(_USED)}."
        )
    ttl = None if made.cache_ttl is None else parse_seconds(made.cache_ttl, "cache_ttl")
    size = parse_size(made.cache_max_bytes, "cache_max_bytes")
    if cache_backend == "memory":
        memory = _stores.setdefault(cache_namespace, MemoryStore(made.cache_maxsize, size))
        return CacheContext(memory, namespace=cache_namespace, ttl=ttl, copy=made.cache_copy)
    # Functions have a name between the colons.
    prefix = f"{namespace_prefix(cache_namespace)}:"
    return CacheContext(
        shared_store(cache_backend, lambda: prefix, size, made.cache_codec),
        namespace=cache_namespace,
        ttl=ttl,
        copy=made.cache_copy,
        prefix=prefix,
    )


_USED: Final = ("cache_ttl", "cache_maxsize", "cache_max_bytes", "cache_copy", "cache_codec")


def context_stores(namespace: str | None) -> list[MemoryStore]:
    """Return the stores of the contexts in memory of one namespace, or of all."""
    return [store for name, store in list(_stores.items()) if namespace in (None, name)]


def _after_fork() -> None:
    """Let go of locks that other threads of the parent held: they do not exist in the child."""
    for store in context_stores(None):
        store.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
