# this_file: src/opero/durable/engine.py
"""Acquire workflows, run them in threads or on the event loop, and write down how they end.

acquire → replay and run → end, or put aside (asleep, waiting, blocked, in doubt)
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, cast

from opero.concurrency.executors.base import recording
from opero.durable.authoring import WorkflowSpec, get_registry
from opero.durable.journal import Journal
from opero.durable.records import (
    Acquire,
    Annotate,
    Create,
    Drop,
    JournalStore,
    Move,
    State,
    Wake,
    WorkflowRecord,
)
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
from opero.durable.workflow_run import Ending, Unwind, WorkflowRun, finalize
from opero.errors import JournalError, NonDeterminismError, OperoWarning, UnserializableError
from opero.utils.ambient import Run, fork
from opero.utils.async_utils import LoopThread
from opero.utils.steps import BlockingStep, StepLogic

_GLANCE: Final = 0.5
"""Seconds between two polls for what other processes have done; a dead one's work is found by the next one."""
_GRACE: Final = 1.0
"""Seconds that running steps get to end when the program ends without a stop."""
_CLEANUP: Final = 1.0
"""Seconds that tasks which a workflow has left running get to end."""
_MANY: Final = 200
"""Coroutines that are acquired at once; more follow at once."""
_SUSPECT: Final = 2
"""Recoveries without progress from which a workflow may be what kills its processes."""
_UNOWNED: Final = 1.5
"""Seconds for which a workflow may be without a program that knows it before that is noted."""
_ANY: Final = 1 << 30


class Engine:
    """Runs the workflows of one journal in this process.

    Args:
        store: The journal.
        max_workers: Most synchronous workflows at once; each takes a thread while it runs.
        max_recoveries: Times in a row that a process may die under a workflow without progress.
    """

    def __init__(self, store: JournalStore, max_workers: int, max_recoveries: int) -> None:
        self.store: Final = store
        self.journal: Final = Journal(store)
        self.owner: Final = store.join()
        self._threads = WorkerThreads(max_workers)
        self._loop = _workflow_loop()
        self._max_recoveries = max_recoveries
        self._lock = threading.Lock()
        self._runs: dict[str, WorkflowRun] = {}
        self._idle = threading.Condition(self._lock)
        self._on_end: dict[str, list[Callable[[], object]]] = {}
        self._stranded: dict[str, Move] = {}
        self._suspect: WorkflowRun | None = None
        self._unknown: set[str] = set()
        self._asleep: dict[str, tuple[float, int]] = {}
        self._stopping = False
        self._wanted = threading.Event()
        self._retry_blocked = True
        try:
            # What can go on does so before `start` returns.
            self._poll()
        except BaseException:
            store.leave(self.owner)
            raise
        self._watcher = threading.Thread(target=self._watch, name="opero-watch", daemon=True)
        self._watcher.start()
        self._pid = os.getpid()
        atexit.register(self._at_exit)

    # --- starting workflows ---------------------------------------------------------------------------------------

    def create(self, record: WorkflowRecord, spec: WorkflowSpec) -> StepLogic[WorkflowRecord]:
        """Record a new workflow and run it, at once if a thread is free; return the record under its id."""
        mine = self._reserve(spec)
        if mine:
            record.owner, record.epoch, record.state = self.owner, 1, State.RUNNING
        try:
            found = yield BlockingStep(self.journal.write, self.journal.submit, (Create(record),))
        except BaseException:
            if mine:
                self._release(spec)
                # A caller that is cancelled does not take its write back.
                self.journal.post(Move(record.id, self.owner, 1, State.QUEUED))
            raise
        if mine and found is record:
            self._launch(record, spec, new=True)
        elif mine:
            self._release(spec)
        elif found is record:
            self._wanted.set()
        return cast("WorkflowRecord", found)

    def _reserve(self, spec: WorkflowSpec) -> bool:
        if self._stopping or self._is_isolated():
            return False
        return spec.is_async or self._threads.reserve()

    def _release(self, spec: WorkflowSpec) -> None:
        if not spec.is_async:
            self._threads.release()

    def _launch(self, record: WorkflowRecord, spec: WorkflowSpec, *, new: bool) -> None:
        """Run a workflow that this engine owns and has reserved a thread for."""
        try:
            steps = () if new else self.store.steps(record.id)
        except UnserializableError as error:
            self._release(spec)
            self.journal.write(Move(*record.ownership, State.BLOCKED, error=str(error)))
            return
        except JournalError as error:
            self._release(spec)
            self._strand(record, str(error))
            return
        run = WorkflowRun(record, steps, self.journal, on_loop=spec.is_async)
        with self._lock:
            self._runs[record.id] = run
            self._asleep.pop(record.id, None)
            if record.recoveries >= min(_SUSPECT, self._max_recoveries):
                self._suspect = run
            if self._stopping:
                run.ending = Ending(State.QUEUED)
        if spec.is_async:
            asyncio.run_coroutine_threadsafe(self._run_async(run, spec), self._loop.get())
        else:
            self._threads.run(partial(self._run_sync, run, spec))

    # --- running them -----------------------------------------------------------------------------------------------

    def _run_sync(self, run: WorkflowRun, spec: WorkflowSpec) -> None:
        """Run a synchronous workflow in this thread."""
        value, error = None, None
        try:
            value = _invoke(run, spec)
        except BaseException as caught:  # noqa: BLE001 - any error ends the workflow
            error = caught
        move = finalize(run, value, error)
        if move is not None:
            try:
                self.journal.write(move)
            except JournalError as failure:
                self._strand(run.record, str(failure), move)
        self._release(spec)
        self._leave(run, move, value, error)

    async def _run_async(self, run: WorkflowRun, spec: WorkflowSpec) -> None:
        """Run an asynchronous workflow on the event loop."""
        loop = asyncio.get_running_loop()
        # In a task of its own: what is to be written about its end cannot be cancelled along with it.
        task = loop.create_task(_ainvoke(run, spec))
        run.unwind = lambda: loop.call_soon_threadsafe(task.cancel)
        if run.ending is not None:
            task.cancel()
        value, error = None, None
        try:
            value = await task
        except BaseException as caught:  # noqa: BLE001 - any error ends the workflow
            error = caught
        run.unwind = None
        move = finalize(run, value, error)
        await _end_tasks(run)
        run.over = True
        if move is not None:
            try:
                await self.journal.submit(move)
            except JournalError as failure:
                self._strand(run.record, str(failure), move)
        self._leave(run, move, value, error)

    def _leave(
        self, run: WorkflowRun, move: Move | None, value: Any, error: BaseException | None
    ) -> None:
        """Forget a run, and notify listeners and what waits for its end."""
        if move is not None:
            failure = error if isinstance(error, Exception) else None
            run.notify_state(move.state, result=value, error=failure)
            if move.state in (State.DONE, State.FAILED):
                _report_unread(run)
        with self._idle:
            if self._runs.get(run.id) is run:
                del self._runs[run.id]
            if self._suspect is run:
                self._suspect = None
            callbacks = self._on_end.pop(run.id, [])
            self._idle.notify_all()
        for callback in callbacks:
            callback()
        ending = run.ending
        if ending is not None and ending.stranded:
            self._strand(run.record, ending.text or "")
        if ending is not None and ending.latest is not None:
            with self._lock:
                self._asleep[run.id] = ending.latest, run.record.epoch
        # What was put aside may be due by now, and a thread is free.
        self._wanted.set()

    def _strand(self, record: WorkflowRecord, text: str, move: Move | None = None) -> None:
        """Remember what could not be written; it is tried at each poll."""
        with self._lock:
            new = record.id not in self._stranded
            self._stranded[record.id] = move or Move(*record.ownership, State.QUEUED)
        if new:
            _warn(f"workflow {record.id!r} goes on when its journal can be written again: {text}")

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = 0.0
        while True:
            self._wanted.wait(pause)
            # First this, so that a `stop` from here on ends the next wait.
            self._wanted.clear()
            if self._stopping:
                return
            try:
                pause = self._poll()
            except JournalError as error:
                _warn(str(error))
                pause = _GLANCE

    def _poll(self) -> float:
        """Do what there is to do, and return the seconds until the next poll."""
        self._free_stranded()
        self._wake_overdue()
        for workflow in self.store.cancelled(self.owner):
            self.cancel(workflow)
        with self._lock:
            runs = list(self._runs.values())
        if any(run.listening for run in runs):
            for workflow, name in self.store.signalled(self.owner):
                self.signalled(workflow, name)
        for run in runs:
            run.note_long(time.time() - _GLANCE)
        found, wake = self.store.attention(self.owner)
        if (found or self._retry_blocked) and self._acquire():
            return 0.0
        if found:
            self._note_unknown()
        return _GLANCE if wake is None else min(_GLANCE, max(0.0, wake - time.time()))

    def _acquire(self) -> bool:
        """Acquire as many workflows as there are threads free; return whether there may be more.

        A workflow under which processes have died is acquired apart: one such at a time, and at its last
        chance nothing else begins beside it. So it is given up for what it does itself.
        """
        coroutines = get_registry().names(is_async=True)
        functions = get_registry().names(is_async=False)
        if self._stopping or self._is_isolated():
            self._acquire_some((), 0)  # frees what dead owners had
            return False
        known = coroutines + functions if self._threads.free > 0 else coroutines
        suspect_from = min(_SUSPECT, self._max_recoveries)
        if self._suspect is None or self._suspect.progressed:
            last_chance = (self._max_recoveries, _ANY)
            if self._is_idle() and self._acquire_some(known, 1, last_chance):
                return False
            self._acquire_some(known, 1, (suspect_from, self._max_recoveries - 1))
        trusted = (0, suspect_from - 1)
        found = self._acquire_some(coroutines, _MANY, trusted)
        if self._threads.free > 0:
            self._acquire_some(functions, self._threads.free, trusted)
        self._retry_blocked = False
        return found == _MANY

    def _acquire_some(
        self, names: tuple[str, ...], limit: int, recoveries: tuple[int, int] = (0, _ANY)
    ) -> int:
        blocked, most = self._retry_blocked, self._max_recoveries
        op = Acquire(self.owner, names, limit, blocked, most, recoveries)
        acquired: list[WorkflowRecord] = self.journal.write(op)
        for record in acquired:
            self._adopt(record)
        return len(acquired)

    def _is_idle(self) -> bool:
        """Return whether nothing runs here but coroutines that wait."""
        with self._lock:
            return all(run.on_loop and not run.active for run in self._runs.values())

    def _is_isolated(self) -> bool:
        """Return whether a workflow has its last chance here, so that nothing else may begin."""
        run = self._suspect
        return (
            run is not None and not run.progressed and run.record.recoveries >= self._max_recoveries
        )

    def _note_unknown(self) -> None:
        """Note on workflows that no program acquires, because this one does not know them, what they wait for."""
        before = time.time() - _UNOWNED
        for name in self.store.unowned(before):
            if name in get_registry().workflows:
                continue
            reason = f"no running program has registered the workflow {name!r}: import the module that defines it"
            # First, so that who reads the reason in the journal was warned.
            if name not in self._unknown:
                self._unknown.add(name)
                _warn(f"{self.store!r} has workflows to run, but {reason}.")
            self.journal.write(Annotate(name, before, reason))

    def _adopt(self, record: WorkflowRecord) -> None:
        """Run a workflow that was acquired, if the version that started it is known here."""
        spec = get_registry().find(record.name, record.version)
        if spec is None:
            known = ", ".join(map(repr, get_registry().workflows.get(record.name, ())))
            text = (
                f"it was started by version {record.version!r} of {record.name!r}, and this program has {known}: "
                "bring that version back, or fork the workflow"
            )
            self.journal.write(Move(*record.ownership, State.BLOCKED, error=text))
            return
        if not spec.is_async:
            self._threads.reserve(always=True)
        self._launch(record, spec, new=False)

    def _wake_overdue(self) -> None:
        """Wake what this engine put aside for a time that has passed, though not by the wall clock."""
        now = time.monotonic() - _GLANCE
        with self._lock:
            overdue = {one: epoch for one, (end, epoch) in self._asleep.items() if end < now}
            for workflow in overdue:
                del self._asleep[workflow]
        for workflow, epoch in overdue.items():
            self.journal.write(Wake(workflow, epoch))

    def _free_stranded(self) -> None:
        with self._lock:
            stranded = dict(self._stranded)
        for workflow, move in stranded.items():
            self.journal.write(move)
            with self._lock:
                self._stranded.pop(workflow, None)
                callbacks = self._on_end.pop(workflow, [])
            for callback in callbacks:
                callback()

    # --- from outside -----------------------------------------------------------------------------------------------

    def poll_now(self) -> None:
        """Poll at once."""
        self._wanted.set()

    def cancel(self, workflow: str) -> None:
        """Cancel a workflow that runs here."""
        run = self._runs.get(workflow)
        if run is not None and run.cancel() and run.unwind is not None:
            run.cancelling = True
            run.unwind()

    def signalled(self, workflow: str, name: str) -> None:
        """Wake a workflow that runs here and waits for a signal."""
        run = self._runs.get(workflow)
        if run is not None:
            run.signalled(name)

    def active(self, workflow: str) -> str | None:
        """Return the name of the activity that a workflow is running, None if it does not run here."""
        run = self._runs.get(workflow)
        steps = [] if run is None else run.active
        return steps[-1].name if steps else None

    def on_end(self, workflow: str, callback: Callable[[], object]) -> bool:
        """Call something once a run that this engine is running has ended; return whether there is one."""
        with self._lock:
            if workflow not in self._runs and workflow not in self._stranded:
                return False
            self._on_end.setdefault(workflow, []).append(callback)
            return True

    def stop(self, timeout: float | None) -> bool:
        """End all runs after their current step; return whether all have ended in time."""
        atexit.unregister(self._at_exit)
        with self._lock:
            self._stopping = True
            runs = list(self._runs.values())
        self._wanted.set()
        for run in runs:
            run.end(Ending(State.QUEUED))
        with self._idle:
            clean = self._idle.wait_for(lambda: not self._runs, timeout)
            left = tuple(self._runs)
        self._watcher.join()
        try:
            self.journal.write(Drop(self.owner, left))
        except JournalError as error:
            _warn(str(error))
        if clean:
            self.journal.close()
            self._threads.close()
            self._loop.stop()
            self.store.leave(self.owner)
        return clean

    def _at_exit(self) -> None:
        """Free all workflows when the program ends without a stop; running steps get a second to end."""
        if os.getpid() == self._pid and self.stop(_GRACE):
            self.store.close()


def _warn(text: str) -> None:
    """Warn; where warnings are errors, the thread that runs everything must not end with one."""
    with suppress(OperoWarning):
        warnings.warn(text, OperoWarning, stacklevel=3)


def _report_unread(run: WorkflowRun) -> None:
    """Warn of recorded steps that an ended workflow has not asked for: its program has changed."""
    unread = sorted(run.unread_steps(), key=lambda step: step.order)
    if unread:
        steps = ", ".join(f"{step.path} ({step.name})" for step in unread[:5])
        more = ", ..." if len(unread) > 5 else ""
        _warn(
            f"workflow {run.id!r} ({run.record.name}) has ended without asking for {len(unread)} recorded "
            f"step{'s' * (len(unread) > 1)}: {steps}{more}. The program that recorded them did more than this one."
        )


# --- the workflow function ----------------------------------------------------------------------------------------


def _invoke(run: WorkflowRun, spec: WorkflowSpec) -> Any:
    """Call a synchronous workflow."""
    with _within(run, spec) as (args, kwargs):
        return spec.fn(*args, **kwargs)


async def _ainvoke(run: WorkflowRun, spec: WorkflowSpec) -> Any:
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
        # The tasks of a coroutine have not ended yet.
        run.over = not run.on_loop


async def _end_tasks(run: WorkflowRun) -> None:
    """Cancel the tasks that a workflow has left running: nothing outlives it."""
    left = [task for task in run.tasks if not task.done()]
    if left:
        # What they still do to clean up is no part of the workflow, unless that goes on later.
        run.cancelling = run.cancelling or run.ending is None
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_CLEANUP)


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


def _workflow_loop() -> LoopThread:
    """Return a thread with an event loop whose tasks have scopes."""

    def prepare(loop: asyncio.AbstractEventLoop) -> None:
        loop.set_task_factory(task_factory)
        loop.set_exception_handler(_report_unhandled)

    return LoopThread("opero-workflows", thread=EngineThread, prepare=prepare)


def _report_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report unhandled errors, but not of tasks whose workflow is put aside: its state says why, or a warning."""
    if not isinstance(context.get("exception"), Unwind | NonDeterminismError | JournalError):
        loop.default_exception_handler(context)
