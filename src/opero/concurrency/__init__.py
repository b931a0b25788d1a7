# this_file: src/opero/concurrency/__init__.py
"""Map functions over many items: one scheduler, and small executors under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.concurrency.pool import (
        ParallelExecutor,
        get_parallel_executor,
        get_parallel_map_decorator,
    )
    from opero.concurrency.result import ItemResult, MapFailure, MapResult

__all__ = [
    "ItemResult",
    "MapFailure",
    "MapResult",
    "ParallelExecutor",
    "get_parallel_executor",
    "get_parallel_map_decorator",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "opero.concurrency.pool": (
            "ParallelExecutor",
            "get_parallel_executor",
            "get_parallel_map_decorator",
        ),
        "opero.concurrency.result": ("ItemResult", "MapFailure", "MapResult"),
    },
)
