# this_file: src/opero/caching/registry.py
"""All caches of decorated functions: emptied together, and set free after a fork."""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from opero.errors import StoreError
from opero.utils.backends import BACKENDS

if TYPE_CHECKING:
    from opero.caching.memory import EntryStore
    from opero.caching.stage import Cache

__all__ = ["clear_cache", "register"]

_registry: Final[weakref.WeakSet[Cache]] = weakref.WeakSet()
_lock = threading.RLock()


def register(cache: Cache) -> None:
    """Let `clear_cache` and forked children reach a cache for as long as somebody else holds it."""
    with _lock:
        _registry.add(cache)


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
    removed = 0
    failed: StoreError | None = None
    for clear in _clears(namespace, _settled(backend)):
        try:
            removed += clear()
        except StoreError as error:
            failed = error
    if failed is not None:
        raise failed
    return removed


def _settled(backend: str | None) -> str | None:
    """Return a backend as stores name theirs."""
    if backend is None or backend.partition(":")[0] not in BACKENDS:
        return backend
    from opero.caching.stores.base import settle

    return settle(backend)


def _clears(namespace: str | None, backend: str | None) -> Iterator[Callable[[], int]]:
    """Yield what empties each of the caches in question; memory first, because it never fails."""
    found = [
        cache
        for cache in _caches()
        if namespace in (None, cache.namespace) and backend in (None, *_names(cache.store))
    ]
    yield from (cache.clear for cache in sorted(found, key=lambda cache: cache.store.blocking))
    if backend in (None, "memory"):
        # Here, because few programs have contexts.
        from opero.caching.context import context_stores

        yield from (store.clear for store in context_stores(namespace))
    # Nobody has opened a place without having loaded this.
    if backend in BACKENDS or (backend and ":" in backend) or _STORES in sys.modules:
        yield from _clears_of_places(namespace, backend)


def _clears_of_places(namespace: str | None, backend: str | None) -> Iterator[Callable[[], int]]:
    from opero.caching.keying import namespace_prefix
    from opero.caching.stores.base import open_store, open_stores

    places = [store for store in open_stores() if backend in (None, store.name)]
    if backend is not None and backend.partition(":")[0] in BACKENDS:
        named = open_store(backend)
        places = [named, *(store for store in places if store is not named)]
    prefix = "" if namespace is None else namespace_prefix(namespace)
    yield from (functools.partial(store.clear, prefix) for store in places)


_STORES: Final = "opero.caching.stores.base"


def _names(store: EntryStore) -> tuple[str, ...]:
    return store.name, getattr(store, "text", store.name)


def _caches() -> Iterable[Cache]:
    with _lock:
        return list(_registry)


def _after_fork() -> None:
    """Let go of what other threads of the parent were doing: they do not exist in the child."""
    global _lock  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _lock = threading.RLock()
    for cache in _caches():
        cache.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
