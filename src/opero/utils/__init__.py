# this_file: src/opero/utils/__init__.py
"""Tools for synchronous and asynchronous functions, and for logging."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.utils.async_utils import ensure_async, is_async_function, run_async
    from opero.utils.logging import configure_logging

__all__ = ["configure_logging", "ensure_async", "is_async_function", "run_async"]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "opero.utils.async_utils": ("ensure_async", "is_async_function", "run_async"),
        "opero.utils.logging": ("configure_logging",),
    },
)
