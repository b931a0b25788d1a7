# this_file: src/opero/tasks/__init__.py
"""Functions composed to something larger: one after the other, side by side, behind a circuit breaker.

A definition (`Task`, `Sequence`, `Parallel`, `CircuitGroup`) says what to do and may be run any number of times; each
run is an object of its own, and its states are events on the default `event_bus`.

    state          PENDING, RUNNING, SUCCEEDED, FAILED, RETRYING, CANCELLED
    task_run       one execution
    runnable       what all definitions have in common
    task           one function with its arguments
    callee         how it is called, and whether it asks for an input
    policies       its options: core's pipeline, and retries as states
    threads        synchronous functions off the event loop
    sequence       one step after the other
    parallel       side by side
    crew           the workers that pull jobs
    circuit_group  a sequence behind a breaker
    running        `run` and `run_sync`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.events import EventBus, event_bus
    from opero.tasks.circuit_group import CircuitGroup
    from opero.tasks.parallel import Parallel
    from opero.tasks.running import run, run_sync
    from opero.tasks.sequence import Sequence
    from opero.tasks.state import TaskState
    from opero.tasks.task import Task
    from opero.tasks.task_run import TaskRun

__all__ = [
    "CircuitGroup",
    "EventBus",
    "Parallel",
    "Sequence",
    "Task",
    "TaskRun",
    "TaskState",
    "event_bus",
    "run",
    "run_sync",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CircuitGroup": "opero.tasks.circuit_group",
        "EventBus": "opero.events",
        "Parallel": "opero.tasks.parallel",
        "Sequence": "opero.tasks.sequence",
        "Task": "opero.tasks.task",
        "TaskRun": "opero.tasks.task_run",
        "TaskState": "opero.tasks.state",
        "event_bus": "opero.events",
        "run": "opero.tasks.running",
        "run_sync": "opero.tasks.running",
    },
)
