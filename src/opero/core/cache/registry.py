# this_file: src/opero/core/cache/registry.py
"""All caches of decorated functions: emptied together, and set free after a fork."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opero.core.cache.stage import Cache

__all__ = ["clear_cache", "register"]

_registry: Final[weakref.WeakSet[Cache]] = weakref.WeakSet()
_lock = threading.RLock()


def register(cache: Cache) -> None:
    """Let `clear_cache` and forked children reach a cache for as long as somebody else holds it."""
    with _lock:
        _registry.add(cache)


def clear_cache(namespace: str | None = None, backend: str | None = None) -> int:
    """Empty the caches of decorated functions and the contexts of `get_cache_context`.

    Args:
        namespace: Only those with this `cache_namespace`; None for all.
        backend: Only those of this backend ("memory", or the class name of a store object); None
            for all.

    Returns:
        The number of entries removed, as far as the stores know.

    Example:
        >>> from opero import clear_cache, opero
        >>> @opero(cache_namespace="geo")
        ... def locate(city):
        ...     return len(city)
        >>> locate("Rome"), clear_cache("geo")
        (4, 1)
    """
    removed = sum(
        cache.clear()
        for cache in _caches()
        if namespace in (None, cache.namespace) and backend in (None, cache.store.name)
    )
    if backend in (None, "memory"):
        # Here, because few programs have contexts.
        from opero.core.cache.context import context_stores

        removed += sum(store.clear() for store in context_stores(namespace))
    return removed


def _caches() -> Iterable[Cache]:
    with _lock:
        return list(_registry)


def _after_fork() -> None:
    """Let go of what other threads of the parent were doing: they do not exist in the child."""
    global _lock  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _lock = threading.RLock()
    for cache in _caches():
        cache.shelf.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
