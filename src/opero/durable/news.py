# this_file: src/opero/durable/news.py
"""What listeners hear of workflows and their steps; nothing is built while nobody listens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from opero.events import event_bus

if TYPE_CHECKING:
    from opero.durable.records import State, StepRecord, WorkflowRecord

__all__ = ["tell_step", "tell_workflow"]


def tell_workflow(
    record: WorkflowRecord,
    state: State,
    *,
    result: Any = None,
    error: BaseException | None = None,
) -> None:
    """Tell that a workflow went into another state."""
    if event_bus.active:
        from opero.events import WorkflowChanged

        event_bus.emit(
            WorkflowChanged(
                function=record.name,
                workflow_id=record.id,
                state=state,
                result=result,
                error=error,
                seconds=time.time() - record.updated,
            )
        )


def tell_step(
    record: WorkflowRecord,
    step: StepRecord,
    *,
    replayed: bool = False,
    error: BaseException | None = None,
) -> None:
    """Tell that a step has begun or ended, or that its outcome was found in the journal."""
    if event_bus.active:
        from opero.events import StepChanged

        event_bus.emit(
            StepChanged(
                function=step.name,
                workflow_id=record.id,
                step=step.path,
                state=step.state,
                replayed=replayed,
                error=error,
                seconds=None if step.ended is None else step.ended - step.began,
            )
        )
