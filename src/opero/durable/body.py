# this_file: src/opero/durable/body.py
"""The workflow function itself: called in a context that is its own, and followed by nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.recorder import recording
from opero.core.context import fork
from opero.durable.branches import begin_branches
from opero.durable.items import record_map
from opero.durable.news import tell_workflow
from opero.durable.records import State
from opero.durable.scope import enter
from opero.durable.values import decode
from opero.events.run import Run as EventRun

if TYPE_CHECKING:
    from opero.durable.registry import WorkflowSpec
    from opero.durable.run import Run

__all__ = ["acall", "call", "end_tasks"]

_GRACE: Final = 1.0
"""Seconds that tasks which a workflow has left behind get to end."""


def call(run: Run, spec: WorkflowSpec) -> Any:
    """Call a synchronous workflow."""
    with _within(run, spec):
        args, kwargs = decode(run.record.args)
        return spec.fn(*args, **kwargs)


async def acall(run: Run, spec: WorkflowSpec) -> Any:
    """Call a workflow that is a coroutine function."""
    with _within(run, spec):
        args, kwargs = decode(run.record.args)
        return await spec.fn(*args, **kwargs)


@contextmanager
def _within(run: Run, spec: WorkflowSpec) -> Iterator[None]:
    """Make this context the workflow's: steps, maps and parallel branches find its journal through it."""
    enter(run.root)
    recording.set(record_map)
    fork.set(begin_branches)
    with EventRun(spec.name, id=run.id):
        tell_workflow(run.record, State.RUNNING)
        yield


async def end_tasks(run: Run) -> None:
    """Cancel the tasks that a workflow has left behind: nothing outlives it."""
    left = [task for task in run.tasks if not task.done()]
    if left:
        # What they still do to clean up is no part of the workflow, unless that goes on later.
        run.cancelling = run.cancelling or run.ending is None
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_GRACE)
