# this_file: src/opero/tasks/__init__.py
"""Compose functions: one after the other, side by side, behind a circuit breaker.

A definition (`Task`, `Sequence`, `Parallel`, `CircuitGroup`) says what to do and may be run any number of times; each
run is a `TaskRun`, and changes of its state are events on the default `event_bus`.

    callee         how a task calls its function: arguments, threads, options
    task           Task, Sequence, CircuitGroup, their runs (TaskRun, TaskState), `run` and `run_sync`
    parallel       Parallel and its worker tasks
"""

from __future__ import annotations

from opero.events import EventBus, event_bus
from opero.tasks.parallel import Parallel
from opero.tasks.task import CircuitGroup, Sequence, Task, TaskRun, TaskState, run, run_sync

__all__ = [
    "CircuitGroup", "EventBus", "Parallel", "Sequence", "Task", "TaskRun", "TaskState", "event_bus", "run",
    "run_sync",
]  # fmt: skip
