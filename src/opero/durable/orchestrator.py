# this_file: src/opero/durable/orchestrator.py
"""Start workflows, run, report and steer them: what users know as `opero.durable.Orchestrator`."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self

import opero.utils.checks as checks
from opero.durable.authoring import get_registry
from opero.durable.engine import Engine
from opero.durable.records import (
    ENDED,
    RECORDED,
    Cancel,
    Create,
    Fork,
    JournalStore,
    Op,
    Resolve,
    Resume,
    Send,
    State,
    StepRecord,
    StepState,
    WorkflowRecord,
    WorkflowStatus,
)
from opero.durable.sqlite_store import SqliteStore
from opero.durable.values import decode, encode, message_of, pack_error
from opero.durable.workflow_run import outcome_of
from opero.errors import (
    IdConflictError,
    OperoUsageError,
    OperoWarning,
    UnknownWorkflowError,
    UnserializableError,
    WorkflowEndedError,
    did_you_mean,
)
from opero.utils.async_utils import in_thread_of
from opero.utils.fork import reset_after_fork
from opero.utils.steps import BlockingStep, StepLogic, in_thread, run_async, run_sync
from opero.utils.units import Duration, parse_seconds

_GLANCE: Final = 0.25
"""Longest pause between two looks at a workflow that another process runs."""

_MISSING: Final[Any] = object()
"""Stands for a result that was not given; None may be one."""

_journal: Final = checks.must_be(
    "a place for the journal, such as SqliteStore(path)", checks.has("join", "apply"), instance=True
)


class DurableOrchestrator:
    """Run workflows, and go on with them after a crash.

    Activities run at least once; a recorded result is never computed again.

    Args:
        db_path: The journal, an SQLite file; several orchestrators and processes of one host may
            share it.
        max_workers: Most synchronous workflows at once; each takes a thread while it runs.
            Coroutines take none.
        store: Another place for the journal, instead of `db_path`.
        max_recoveries: A workflow under which its process has died this many times in a row, without
            another step, is dead.

    Raises:
        OperoUsageError: A value cannot work.

    Example:
        >>> import tempfile, os
        >>> from opero.durable import Orchestrator, activity, workflow
        >>> @activity
        ... def double(x): return 2 * x
        >>> @workflow
        ... def quadruple(x): return double(double(x))
        >>> with tempfile.TemporaryDirectory() as folder, Orchestrator(os.path.join(folder, "w.db")) as o:
        ...     o.result(o.invoke_workflow("quadruple", 3))
        12
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] = "opero.db",
        max_workers: int = 5,
        *,
        store: JournalStore | None = None,
        max_recoveries: int = 10,
    ) -> None:
        checks.whole(1)("max_workers", max_workers)
        checks.whole(1)("max_recoveries", max_recoveries)
        checks.none_or(_journal)("store", store)
        self.store: JournalStore = SqliteStore(db_path) if store is None else store
        self._max_workers = max_workers
        self._max_recoveries = max_recoveries
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Run nothing in a forked child: what is invoked there is run by the parent, or another process."""
        self._engine, self._lock = None, threading.Lock()

    # --- running ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to run workflows: those that were interrupted, those that are due, and new ones.

        Raises:
            JournalError: The journal cannot be used.
        """
        with self._lock:
            if self._engine is None:
                self.store.open()
                self._engine = Engine(self.store, self._max_workers, self._max_recoveries)

    def stop(self, timeout: Duration | None = None) -> bool:
        """Wait for the steps that are running, and free all workflows, so that other engines can take them over.

        Args:
            timeout: Longest wait for them, as a duration; None waits as long as they take.

        Returns:
            Whether all have ended. Steps that have not go on in their threads until this process ends.
        """
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is None:
            self.store.close()
            return True
        clean = engine.stop(None if timeout is None else parse_seconds(timeout, "timeout"))
        if clean:
            self.store.close()
        return clean

    astart: Final = in_thread_of(start)
    astop: Final = in_thread_of(stop)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.astop()

    def invoke_workflow(
        self, name: str | None = None, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Start a workflow and return its id, once it is recorded.

        Args:
            name: Its name, which may also be given as `name=` if no argument is given by position.
            args: Arguments of its function.
            workflow_id: Its identity; the same id with the same arguments is the same run, so that
                starting it again starts nothing. None draws one at random.
            kwargs: More arguments.

        Raises:
            UnknownWorkflowError: No such workflow is registered.
            TypeError: The arguments do not fit.
            UnserializableError: The journal cannot keep one of them.
            IdConflictError: The id belongs to a run with another name or other arguments.
            JournalError: It could not be written.
        """
        return run_sync(self._invoke(name, args, kwargs, workflow_id))

    async def ainvoke_workflow(
        self, name: str | None = None, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Do what `invoke_workflow` does, without blocking the event loop."""
        return await run_async(self._invoke(name, args, kwargs, workflow_id))

    def _invoke(
        self,
        name: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        workflow_id: str | None,
    ) -> StepLogic[str]:
        if name is None:
            name = kwargs.pop("name", None)
        if not isinstance(name, str):
            raise TypeError(f"invoke_workflow(): the name of a workflow is a str, not {name!r}.")
        spec = get_registry().latest(name)
        record = WorkflowRecord(
            id=workflow_id or str(uuid.uuid4()),
            name=name,
            version=spec.version,
            args=encode((args, kwargs), f"arguments of workflow {name}()"),
            hash=spec.parameters.digest(args, kwargs),
        )
        engine = self._engine
        if engine is None:
            found = yield in_thread(partial(self._apply, Create(record)))
        else:
            found = yield from engine.create(record, spec)
        if found.name != name or (
            found.hash != record.hash and not spec.parameters.matches(found.hash, args, kwargs)
        ):
            raise IdConflictError(
                f"workflow id {record.id!r} belongs to a run of {found.name!r}"
                f"{'' if found.name != name else ' with other arguments'}."
            )
        return record.id

    # --- waiting ----------------------------------------------------------------------------------------------------

    def wait(self, workflow_id: str, timeout: Duration | None = None) -> dict[str, Any]:
        """Wait until a workflow has ended, or can go on only with help from outside; return its status.

        Args:
            workflow_id: Its id.
            timeout: Longest wait, as a duration; None waits as long as it takes.

        Returns:
            As `get_workflow_status`. A workflow that is blocked or in doubt is still "processing",
            and its `error_message` says what it needs.

        Raises:
            TimeoutError: It has not ended in time.
            UnknownWorkflowError: There is no such workflow.
        """
        return self._status(run_sync(self._settle(workflow_id, timeout)))

    def result(self, workflow_id: str, timeout: Duration | None = None) -> Any:
        """Wait for a workflow's end and return its result, or raise the error that it has ended with.

        Raises:
            Exception: What its function raised.
            WorkflowEndedError: It was cancelled, or given up.
            DurableError: It can go on only with help from outside; the message says which.
            TimeoutError: It has not ended in time.
            UnknownWorkflowError: There is no such workflow.
        """
        return outcome_of(run_sync(self._settle(workflow_id, timeout)))

    async def await_workflow(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `wait`
    ) -> dict[str, Any]:
        """Do what `wait` does, without blocking the event loop."""
        return self._status(await run_async(self._settle(workflow_id, timeout)))

    async def aresult(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `result`
    ) -> Any:
        """Do what `result` does, without blocking the event loop."""
        return outcome_of(await run_async(self._settle(workflow_id, timeout)))

    def _settle(self, workflow_id: str, timeout: Duration | None) -> StepLogic[WorkflowRecord]:
        """Return a workflow's record once it is settled."""
        until = (
            math.inf if timeout is None else time.monotonic() + parse_seconds(timeout, "timeout")
        )
        pause, warned = 0.01, False
        while True:
            ended: Future[None] = Future()
            engine = self._engine
            here = engine is not None and engine.on_end(
                workflow_id, partial(ended.set_result, None)
            )
            record: WorkflowRecord = yield in_thread(partial(self._record, workflow_id))
            if record.state in SETTLED:
                return record
            if record.error and not warned:
                warned = True
                warnings.warn(
                    f"workflow {workflow_id!r} waits: {record.error}", OperoWarning, stacklevel=4
                )
            left = until - time.monotonic()
            if left <= 0:
                reason = f": {record.error}" if record.error else ""
                raise TimeoutError(f"workflow {workflow_id!r} has not ended in time{reason}")
            # Its end is notified where it runs here; else it has to be looked for.
            limit = left if here else min(left, pause)
            pause = min(2 * pause, _GLANCE)
            yield BlockingStep(_wait, _await, (ended, None if limit == math.inf else limit))

    # --- reporting --------------------------------------------------------------------------------------------------

    def get_workflow_status(self, workflow_id: str) -> dict[str, Any] | None:
        """Return a workflow's status, None if there is no such workflow.

        Returns:
            A dict with "id", "name", "status" ("processing", "done" or "failed", the values of
            `WorkflowStatus`), "current_activity", "error_message", "output", "created_at" and
            "updated_at" (ISO timestamps in UTC).
        """
        self.store.open()
        record = self.store.get(workflow_id)
        return None if record is None else self._status(record)

    def list_workflows(
        self, name: str | None = None, status: str | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the status of workflows, the youngest first.

        Args:
            name: Only those of this name.
            status: Only those with this status, or in this state ("sleeping", "in_doubt", …).
            limit: At most so many.

        Raises:
            OperoUsageError: There is no such status.
        """
        self.store.open()
        return [self._status(found) for found in self.store.find(name, _states_of(status), limit)]

    def steps(self, workflow_id: str) -> list[dict[str, Any]]:
        """Return a workflow's steps in order.

        Returns:
            Dicts with "step" (number), "path", "name", "status", "attempts", "output",
            "error_message", "began_at" and "ended_at".

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        self._record(workflow_id)
        found = self.store.steps(workflow_id)
        return [_step_of(number, step) for number, step in enumerate(found, start=1)]

    def state(self, workflow_id: str) -> str:
        """Return a workflow's state, which is more exact than its status.

        Returns:
            "queued", "running", "sleeping", "waiting", "blocked", "in_doubt", "done", "failed",
            "cancelled" or "dead".

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        return str(self._record(workflow_id).state)

    def _record(self, workflow_id: str) -> WorkflowRecord:
        self.store.open()
        record = self.store.get(workflow_id)
        if record is None:
            raise UnknownWorkflowError(f"there is no workflow with the id {workflow_id!r}.")
        return record

    def _status(self, record: WorkflowRecord) -> dict[str, Any]:
        engine = self._engine
        active = engine.active(record.id) if engine is not None else None
        steps = () if active or record.state in ENDED else self.store.steps(record.id)
        return _status_of(record, active, steps)

    # --- changing their course --------------------------------------------------------------------------------------

    def cancel(self, workflow_id: str) -> bool:
        """Cancel a workflow, wherever it runs; return whether it had not ended yet.

        A coroutine is cancelled at its current await, a synchronous function at its next step; what their
        `finally` blocks do still runs, and is not recorded.

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        before = self._record(workflow_id)
        self._apply(Cancel(workflow_id))
        if self._engine is not None:
            self._engine.cancel(workflow_id)
        return before.state not in ENDED

    def resume(self, workflow_id: str) -> bool:
        """Let a workflow that has failed, was cancelled, is dead or blocked go on; return whether it was one.

        Its recorded steps stay. The step whose error ended it runs again.

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        self._record(workflow_id)
        resumed = bool(self._apply(Resume(workflow_id)))
        self._poll()
        return resumed

    def fork(
        self, workflow_id: str, from_step: int | str, *, workflow_id_new: str | None = None
    ) -> str:
        """Start a copy of a workflow that keeps the steps before one, and return its id.

        Args:
            workflow_id: The workflow.
            from_step: The first step that runs anew: its number in `steps()`, or its path.
            workflow_id_new: Id of the copy; None draws one at random.

        Raises:
            UnknownWorkflowError: There is no such workflow.
            OperoUsageError: It has no such step.
            IdConflictError: The new id is taken.
        """
        record = self._record(workflow_id)
        steps = self.store.steps(workflow_id)
        before = _place_of(steps, from_step, workflow_id)
        new = workflow_id_new or str(uuid.uuid4())
        if self.store.get(new) is not None:
            raise IdConflictError(f"workflow id {new!r} is taken.")
        # The present code runs the copy: its youngest version comes last.
        version = [*get_registry().workflows.get(record.name, [record.version])][-1]
        self._apply(Fork(workflow_id, new, before, version))
        self._poll()
        return new

    def signal(self, workflow_id: str, name: str, value: Any = None) -> None:
        """Send a signal to a workflow: `wait_for(name)` in it returns the value.

        Raises:
            UnknownWorkflowError: There is no such workflow.
            WorkflowEndedError: It has ended.
            UnserializableError: The journal cannot keep the value.
        """
        self._record(workflow_id)
        if not self._apply(Send(workflow_id, name, encode(value, f"value of signal {name!r}"))):
            raise WorkflowEndedError(f"workflow {workflow_id!r} has ended and gets no signals.")
        if self._engine is not None:
            self._engine.signalled(workflow_id, name)
        self._poll()

    def resolve(
        self,
        workflow_id: str,
        path: str,
        *,
        result: Any = _MISSING,
        error: Exception | None = None,
        again: bool = False,
    ) -> None:
        """Decide the outcome of a step that is in doubt, and let its workflow go on.

        Args:
            workflow_id: The workflow.
            path: The step, as `steps()` and the message name it.
            result: It was done, and this is its result.
            error: It was done, and failed with this.
            again: It was not done: run it.

        Raises:
            OperoUsageError: Not exactly one of the three is given, or the step is not in doubt.
        """
        self._record(workflow_id)
        step = _resolution(path, result, error, again)
        if not self._apply(Resolve(workflow_id, path, step)):
            raise OperoUsageError(
                f"resolve(): step {path!r} of workflow {workflow_id!r} is not in doubt."
            )
        self._poll()

    def _apply(self, op: Op) -> Any:
        engine = self._engine
        if engine is not None:
            return engine.journal.write(op)
        self.store.open()
        with self._lock:
            return self.store.apply([op])[0]

    def _poll(self) -> None:
        if self._engine is not None:
            self._engine.poll_now()

    # --- the same on an event loop ------------------------------------------------------------------------------

    aget_workflow_status: Final = in_thread_of(get_workflow_status)
    alist_workflows: Final = in_thread_of(list_workflows)
    asteps: Final = in_thread_of(steps)
    astate: Final = in_thread_of(state)
    acancel: Final = in_thread_of(cancel)
    aresume: Final = in_thread_of(resume)
    afork: Final = in_thread_of(fork)
    asignal: Final = in_thread_of(signal)
    aresolve: Final = in_thread_of(resolve)

    def __repr__(self) -> str:
        return f"<Orchestrator on {self.store!r}, {'running' if self._engine else 'stopped'}>"


Orchestrator = DurableOrchestrator
"""Its public name, which the `Orchestrator` of resilient calls has too."""


def _wait(ended: Future[None], limit: float | None) -> None:
    with suppress(TimeoutError):
        ended.result(limit)


async def _await(ended: Future[None], limit: float | None) -> None:
    await asyncio.wait([asyncio.wrap_future(ended)], timeout=limit)


# --- checks ---


def _place_of(steps: list[StepRecord], wanted: int | str, workflow_id: str) -> int:
    """Return the place of a step given by number or path; one behind the last is allowed.

    Raises:
        OperoUsageError: There is no such step.
    """
    for number, step in enumerate(steps, start=1):
        if wanted in (number, step.path):
            return step.order
    if wanted == len(steps) + 1:
        return max((step.order for step in steps), default=0) + 1
    raise OperoUsageError(
        f"from_step={wanted!r}: workflow {workflow_id!r} has steps 1 to {len(steps)}; "
        "give a number, or a path as steps() shows it."
    )


def _resolution(path: str, result: Any, error: Exception | None, again: bool) -> StepRecord | None:
    """Return what a step in doubt becomes, None to run it again.

    Raises:
        OperoUsageError: Not exactly one of the three is given.
    """
    if (result is not _MISSING) + (error is not None) + bool(again) != 1:
        raise OperoUsageError("resolve(): give one of result=, error= and again=True.")
    if again:
        return None
    if error is not None:
        state, text = StepState.FAILED, pack_error(error)
    else:
        state, text = StepState.DONE, encode(result, "result")
    return StepRecord(path=path, name="", hash="", state=state, value=text)


# --- reports ---

SETTLED: Final = ENDED | {State.BLOCKED, State.IN_DOUBT}
"""States of workflows that have ended, or can go on only with help from outside."""


def _states_of(status: str | None) -> tuple[State, ...]:
    """Return the states that a status covers; a state is itself.

    Raises:
        OperoUsageError: There is no such status.
    """
    found = tuple(state for state in State if status in (state.status, state))
    if status is not None and not found:
        known = [*map(str, WorkflowStatus), *map(str, State)]
        raise OperoUsageError(
            f"status={status!r}: there is no such status.{did_you_mean(status, known)}"
        )
    return found


def _status_of(
    record: WorkflowRecord, active: str | None, steps: Iterable[StepRecord] = ()
) -> dict[str, Any]:
    """Return a workflow as a dict.

    Args:
        record: The workflow.
        active: The activity that it runs, if it runs in this process.
        steps: Its steps, which show that otherwise.
    """
    updated = record.updated
    for step in steps:
        updated = max(updated, step.ended or step.began)
        if step.state not in RECORDED:
            active = step.name
    error = message_of(record.error)
    if error is None and record.state in (State.CANCELLED, State.DEAD):
        error = str(record.state)
    return {
        "id": record.id,
        "name": record.name,
        "status": str(record.state.status),
        "current_activity": active,
        "error_message": error,
        "output": _shown(record.output),
        "created_at": _iso(record.created),
        "updated_at": _iso(updated),
    }


def _step_of(number: int, step: StepRecord) -> dict[str, Any]:
    """Return a step as a dict."""
    done = step.state is StepState.DONE
    return {
        "step": number,
        "path": step.path,
        "name": step.name,
        "status": str(step.state),
        "attempts": step.attempts,
        "output": _shown(step.value) if done else None,
        "error_message": None if done else message_of(step.value),
        "began_at": _iso(step.began),
        "ended_at": None if step.ended is None else _iso(step.ended),
    }


def _shown(text: str | None) -> Any:
    """Return a recorded value, or its JSON text where this program cannot rebuild it."""
    if text is None:
        return None
    try:
        return decode(text)
    except UnserializableError:
        return text


def _iso(seconds: float) -> str:
    try:
        return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat()
    except (OSError, OverflowError, ValueError) as error:
        raise UnserializableError(f"{seconds!r} in the journal is no time.") from error
