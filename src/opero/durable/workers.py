# this_file: src/opero/durable/workers.py
"""Run workflow functions: synchronous ones in worker threads, coroutines in one thread with an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.recorder import recording
from opero.durable.records import State
from opero.durable.step import (
    EngineThread,
    Scope,
    active_runs,
    begin_branches,
    current_scope,
    record_map,
    task_factory,
)
from opero.durable.values import decode
from opero.durable.workflow_run import Unwind, WorkflowRun
from opero.errors import JournalError, NonDeterminismError, UnserializableError
from opero.events.runs import Run
from opero.utils.ambient import fork
from opero.utils.async_utils import LoopThread

if TYPE_CHECKING:
    from opero.durable.decorators import WorkflowSpec

__all__ = ["WorkerThreads", "ainvoke", "end_tasks", "invoke", "workflow_loop"]

_GRACE: Final = 1.0
"""Seconds that tasks which a workflow has left running get to end."""


# --- the workflow function ----------------------------------------------------------------------------------------


def invoke(run: WorkflowRun, spec: WorkflowSpec) -> Any:
    """Call a synchronous workflow."""
    with _within(run, spec) as (args, kwargs):
        return spec.fn(*args, **kwargs)


async def ainvoke(run: WorkflowRun, spec: WorkflowSpec) -> Any:
    """Call a workflow that is a coroutine function."""
    with _within(run, spec) as (args, kwargs):
        return await spec.fn(*args, **kwargs)


@contextmanager
def _within(run: WorkflowRun, spec: WorkflowSpec) -> Iterator[Any]:
    """Make this context the workflow's, and return its arguments.

    Steps, maps and parallel branches find its journal through the context.
    """
    current_scope.set(Scope(run, of_task=run.on_loop))
    recording.set(record_map)
    fork.set(begin_branches)
    active_runs.add(run)
    try:
        with Run(spec.name, id=run.id):
            run.notify_state(State.RUNNING)
            try:
                arguments = decode(run.record.args)
            except UnserializableError as reason:
                raise run.block(f"arguments of {run.record.name}(): {reason}") from reason
            yield arguments
    finally:
        active_runs.discard(run)


async def end_tasks(run: WorkflowRun) -> None:
    """Cancel the tasks that a workflow has left running: nothing outlives it."""
    left = [task for task in run.tasks if not task.done()]
    if left:
        # What they still do to clean up is no part of the workflow, unless that goes on later.
        run.cancelling = run.cancelling or run.ending is None
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_GRACE)


# --- threads ------------------------------------------------------------------------------------------------------


class WorkerThreads:
    """Threads for synchronous workflows: as many as run at once, at most `size`.

    Args:
        size: Most jobs at once.
    """

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self._lock = threading.Lock()
        self._reserved = 0
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    @property
    def free(self) -> int:
        """How many more jobs can be run."""
        return self.size - self._reserved

    def reserve(self, *, always: bool = False) -> bool:
        """Reserve a thread for one job if there is one.

        With `always`, for a job that was acquired when there was one. Should another have taken it since, the job
        waits in `run`.
        """
        with self._lock:
            if self._reserved >= self.size and not always:
                return False
            self._reserved += 1
            return True

    def release(self) -> None:
        """Give a reservation back."""
        with self._lock:
            self._reserved -= 1

    def run(self, job: Callable[[], object]) -> None:
        """Run a job that has a reservation, in a thread that is idle or a new one."""
        self._jobs.put(job)
        with self._lock:
            if len(self._threads) >= min(self._reserved, self.size):
                return
            thread = EngineThread(target=self._serve, name="opero-workflow", daemon=True)
            self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            # Context variables that one workflow sets must not reach the next one.
            contextvars.Context().run(job)

    def close(self) -> None:
        """End the threads; none of them has a job any more."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


def workflow_loop() -> LoopThread:
    """Return a thread with an event loop whose tasks have scopes."""

    def prepare(loop: asyncio.AbstractEventLoop) -> None:
        loop.set_task_factory(task_factory)
        loop.set_exception_handler(_report_unhandled)

    return LoopThread("opero-workflows", thread=EngineThread, prepare=prepare)


def _report_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report unhandled errors, but not of tasks whose workflow is put aside: its state says why, or a warning."""
    if not isinstance(context.get("exception"), Unwind | NonDeterminismError | JournalError):
        loop.default_exception_handler(context)
