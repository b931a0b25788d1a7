# this_file: src/opero/core/__init__.py
"""The pipeline and its stages, each usable on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.caching.handles import clear_cache as clear_cache
    from opero.core.cache import get_cache_context as get_cache_context
    from opero.core.cache import get_cache_decorator as get_cache_decorator
    from opero.core.fallback import get_fallback_decorator as get_fallback_decorator
    from opero.core.rate_limit import get_rate_limit_decorator as get_rate_limit_decorator
    from opero.core.retry import get_retry_decorator as get_retry_decorator


export_lazily(
    __name__,
    {
        "opero.caching.handles": ("clear_cache",),
        "opero.core.cache": ("get_cache_context", "get_cache_decorator"),
        "opero.core.fallback": ("get_fallback_decorator",),
        "opero.core.rate_limit": ("get_rate_limit_decorator",),
        "opero.core.retry": ("get_retry_decorator",),
    },
)
