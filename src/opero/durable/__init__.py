# this_file: src/opero/durable/__init__.py
"""Run workflows that survive a crash: completed steps are recorded, and never run again.

Activities run at least once; their results are recorded exactly once.

    activity, workflow   decorate functions
    Orchestrator         starts and runs workflows, and reports their state
    sleep, wait_for      pauses that survive restarts
    now, uuid, random    time, ids and random numbers that replay alike
    register_type        lets the journal keep values of your classes
    get_registry         what is decorated in this process, for tests that clear it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.durable.decorators import activity, get_registry, workflow
    from opero.durable.orchestrator import Orchestrator
    from opero.durable.records import WorkflowStatus
    from opero.durable.sqlite_store import SqliteStore
    from opero.durable.timers import now, random, sleep, uuid, wait_for
    from opero.durable.values import register_type

__all__ = [
    "Orchestrator", "SqliteStore", "WorkflowStatus", "activity", "get_registry", "now", "random", "register_type",
    "sleep", "uuid", "wait_for", "workflow",
]  # fmt: skip

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "opero.durable.decorators": ("activity", "get_registry", "workflow"),
        "opero.durable.orchestrator": ("Orchestrator",),
        "opero.durable.records": ("WorkflowStatus",),
        "opero.durable.sqlite_store": ("SqliteStore",),
        "opero.durable.timers": ("now", "random", "sleep", "uuid", "wait_for"),
        "opero.durable.values": ("register_type",),
    },
)
