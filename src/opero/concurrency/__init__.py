# this_file: src/opero/concurrency/__init__.py
"""Map functions over many items: one scheduler, and small executors under it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.concurrency.pool import ParallelExecutor as ParallelExecutor
    from opero.concurrency.pool import get_parallel_executor as get_parallel_executor
    from opero.concurrency.pool import get_parallel_map_decorator as get_parallel_map_decorator
    from opero.concurrency.report import ItemResult as ItemResult
    from opero.concurrency.report import MapFailure as MapFailure
    from opero.concurrency.report import MapResult as MapResult


export_lazily(
    __name__,
    {
        "opero.concurrency.pool": ("ParallelExecutor", "get_parallel_executor", "get_parallel_map_decorator"),
        "opero.concurrency.report": ("ItemResult", "MapFailure", "MapResult"),
    },
)  # fmt: skip
