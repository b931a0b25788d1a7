# this_file: src/opero/caching/__init__.py
"""The cache: what was computed once is not computed again, and never by two callers at once.

    stage       `Cache`: the stage around one function
    adapters    how a call passes it: hit, lead or follow
    lookup      finding and serving entries
    keeper      storing results: whether, for how long, in what form
    sharing     the outcome for those who waited
    aging       renewed before its expiry, or served after it; lulls after failures
    lease       single-flight across processes; `lease_keeper` renews leases and gives them back
    renewal     computing anew behind the scenes, in the background
    skips       who hears of what is not cached
    registry    all caches: `clear_cache`, forks

They stand on what knows nothing of calls and listeners.

    shelf       what the caches of one function share: the next four
    edits       a function that was edited since its results were stored
    awaiting    stores and event loops
    keying      from a call to a key, with the parts that `opero.caching.keys` makes
    instances   numbers of instances, for methods
    flight      single-flight: who computes, who takes over
    waiter      who waits, and what they are told
    memory, user_store, stores      the kinds of store
    codec       results as bytes that execute nothing
    isolate, copy_error     copies of results and of failures
    weight      how heavy a result is

In users' hands are `handle` (`f.cache`) and `context` (`get_cache_context`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.caching.codec import Codec
    from opero.caching.context import CacheContext, get_cache_context
    from opero.caching.handle import CacheHandle, CacheInfo
    from opero.caching.memory import Store
    from opero.caching.registry import clear_cache
    from opero.caching.stage import Cache

__all__ = [
    "Cache",
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
        "Cache": "opero.caching.stage",
        "CacheContext": "opero.caching.context",
        "CacheHandle": "opero.caching.handle",
        "CacheInfo": "opero.caching.handle",
        "Codec": "opero.caching.codec",
        "Store": "opero.caching.memory",
        "clear_cache": "opero.caching.registry",
        "get_cache_context": "opero.caching.context",
    },
)
