# this_file: src/opero/core/cache.py
"""The cache as a decorator of its own, and what manages caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.caching.context import get_cache_context
from opero.caching.registry import clear_cache
from opero.core.options import standalone

if TYPE_CHECKING:
    from opero.caching import Store
    from opero.utils.units import Duration

__all__ = ["clear_cache", "get_cache_context", "get_cache_decorator"]


def get_cache_decorator(
    cache: bool = True,
    cache_ttl: Duration | None = 3600,
    cache_backend: str | Store = "memory",
    cache_key: Callable[..., object] | None = None,
    cache_namespace: str = "opero",
    **options: Any,
) -> Callable[[Any], Any]:
    """Return a decorator that only caches.

    Args:
        cache: False for a decorator that gives the function itself back.
        cache_ttl: Lifetime of an entry; None never expires.
        cache_backend: "memory", "disk", "disk:PATH", "redis", "redis://…", or a store object.
        cache_key: Callable that gets the call's arguments and returns the key.
        cache_namespace: Prefix shared by functions, cleared together.
        options: Any other of the `cache…` options.

    Example:
        >>> @get_cache_decorator(cache_ttl="15m")
        ... def double(x):
        ...     return 2 * x
        >>> double(2), double(2), double.stats.calls
        (4, 4, 1)
    """
    decorator = standalone(
        "get_cache_decorator",
        "cache",
        cache=cache,
        cache_ttl=cache_ttl,
        cache_backend=cache_backend,
        cache_key=cache_key,
        cache_namespace=cache_namespace,
        **options,
    )
    return decorator if cache else lambda function: function
