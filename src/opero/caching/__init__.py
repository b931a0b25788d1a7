# this_file: src/opero/caching/__init__.py
"""Keep results and compute each of them only once at a time; knows nothing of calls and stages.

    keys            from the arguments of a call to a key
    function_cache  answering the calls of one function: entries, other callers' outcomes, leading
    entries         finding, serving and storing the entries of one function
    memory          the entry, the store in memory, weights
    copying         copies of results, so that no caller sees another one's changes
    single_flight   computing a key once at a time: leaders, waiters, handing over
    lease           the same across processes
    refresh         serving expired entries after a failure, refreshing entries early
    codec, stores   results as bytes that execute nothing, on disk or on a server; users' stores
    handles         `f.cache`, `get_cache_context` and `clear_cache`

The stage that stands on it is `opero.core.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.caching.codec import Codec
    from opero.caching.function_cache import CacheInfo
    from opero.caching.handles import CacheContext, CacheHandle, clear_cache, get_cache_context
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
        "CacheContext": "opero.caching.handles",
        "CacheHandle": "opero.caching.handles",
        "CacheInfo": "opero.caching.function_cache",
        "Codec": "opero.caching.codec",
        "Store": "opero.caching.memory",
        "clear_cache": "opero.caching.handles",
        "get_cache_context": "opero.caching.handles",
    },
)
