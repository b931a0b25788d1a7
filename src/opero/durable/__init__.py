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

from opero.durable.authoring import activity, get_registry, now, sleep, uuid, wait_for, workflow
from opero.durable.authoring import random as random
from opero.durable.orchestrator import Orchestrator
from opero.durable.records import WorkflowStatus
from opero.durable.sqlite_store import SqliteStore
from opero.durable.values import register_type

__all__ = [
    "Orchestrator", "SqliteStore", "WorkflowStatus", "activity", "get_registry", "now", "random", "register_type",
    "sleep", "uuid", "wait_for", "workflow",
]  # fmt: skip
