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

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.durable.authoring import activity as activity
    from opero.durable.authoring import get_registry as get_registry
    from opero.durable.authoring import now as now
    from opero.durable.authoring import random as random
    from opero.durable.authoring import sleep as sleep
    from opero.durable.authoring import uuid as uuid
    from opero.durable.authoring import wait_for as wait_for
    from opero.durable.authoring import workflow as workflow
    from opero.durable.orchestrator import Orchestrator as Orchestrator
    from opero.durable.records import WorkflowStatus as WorkflowStatus
    from opero.durable.sqlite_store import SqliteStore as SqliteStore
    from opero.durable.values import register_type as register_type


export_lazily(
    __name__,
    {
        "opero.durable.authoring": (
            "activity", "get_registry", "now", "random", "sleep", "uuid", "wait_for", "workflow",
        ),
        "opero.durable.orchestrator": ("Orchestrator",),
        "opero.durable.records": ("WorkflowStatus",),
        "opero.durable.sqlite_store": ("SqliteStore",),
        "opero.durable.values": ("register_type",),
    },
)  # fmt: skip
