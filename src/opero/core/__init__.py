# this_file: src/opero/core/__init__.py
"""The pipeline and its stages, each usable on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.caching.handles import clear_cache, get_cache_context
    from opero.core.cache import get_cache_decorator
    from opero.core.fallback import get_fallback_decorator
    from opero.core.rate_limit import get_rate_limit_decorator
    from opero.core.retry import get_retry_decorator

__all__ = [
    "clear_cache",
    "get_cache_context",
    "get_cache_decorator",
    "get_fallback_decorator",
    "get_rate_limit_decorator",
    "get_retry_decorator",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "opero.caching.handles": ("clear_cache", "get_cache_context"),
        "opero.core.cache": ("get_cache_decorator",),
        "opero.core.fallback": ("get_fallback_decorator",),
        "opero.core.rate_limit": ("get_rate_limit_decorator",),
        "opero.core.retry": ("get_retry_decorator",),
    },
)
