# this_file: src/opero/utils/__init__.py
"""Tools for synchronous and asynchronous functions, and for logging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.utils.async_utils import ensure_async as ensure_async
    from opero.utils.async_utils import is_async_function as is_async_function
    from opero.utils.async_utils import run_async as run_async
    from opero.utils.logging import configure_logging as configure_logging


export_lazily(
    __name__,
    {
        "opero.utils.async_utils": ("ensure_async", "is_async_function", "run_async"),
        "opero.utils.logging": ("configure_logging",),
    },
)
