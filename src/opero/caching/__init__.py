# this_file: src/opero/caching/__init__.py
"""Keep results and compute each of them only once at a time; knows nothing of calls and stages.

    keys            from the arguments of a call to a key
    function_cache  what the caches of one function share: store, keys, flights
    entries         finding and storing the entries of one function
    memory          the entry, the store in memory, weights
    copying         copies of results, so that no caller sees another one's changes
    single_flight   computing a key once at a time: leaders, waiters, handing over
    lease           the same across processes
    refresh         serving expired entries after a failure, refreshing entries early
    codec, stores   results as bytes that execute nothing, on disk or on a server; users' stores
    handle          `f.cache`
    context         `get_cache_context` and `clear_cache`

The stage that stands on it is `opero.core.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.caching.codec import Codec
    from opero.caching.context import CacheContext, clear_cache, get_cache_context
    from opero.caching.handle import CacheHandle, CacheInfo
    from opero.caching.memory import Store

__all__ = [
    "CacheContext",
    "CacheHandle",
    "CacheInfo",
    "Codec",
    "Store",
    "clear_cache",
    "get_cache_context",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CacheContext": "opero.caching.context",
        "CacheHandle": "opero.caching.handle",
        "CacheInfo": "opero.caching.handle",
        "Codec": "opero.caching.codec",
        "Store": "opero.caching.memory",
        "clear_cache": "opero.caching.context",
        "get_cache_context": "opero.caching.context",
    },
)
