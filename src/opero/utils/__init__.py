# this_file: src/opero/utils/__init__.py
"""Small tools around sync and async functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.instrumentation.logs import configure_logging
    from opero.utils.async_utils import ensure_async, is_async_function, run_async

__all__ = ["configure_logging", "ensure_async", "is_async_function", "run_async"]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        # Its room is further up; this package only passes the name on.
        "configure_logging": "opero.instrumentation.logs",
        "ensure_async": "opero.utils.async_utils",
        "is_async_function": "opero.utils.async_utils",
        "run_async": "opero.utils.async_utils",
    },
)
