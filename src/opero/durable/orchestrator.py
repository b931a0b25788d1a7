# this_file: src/opero/durable/orchestrator.py
"""Start workflows, report their state, wait for them, and change their course.

`Operations` works on any journal, whether an engine runs here or not; `Orchestrator` runs an engine too.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Final, NoReturn, ParamSpec, Self, TypeVar

from opero.durable.engine import Engine
from opero.durable.failures import pack_error
from opero.durable.records import (
    ENDED,
    Cancel,
    Create,
    Fork,
    JournalStore,
    Op,
    Resolve,
    Resume,
    Send,
    StepRecord,
    StepState,
    WorkflowRecord,
)
from opero.durable.report import is_settled, outcome_of, states_of, status_of, step_of
from opero.durable.stores.sqlite import SqliteStore
from opero.durable.values import encode
from opero.durable.workflows import WorkflowSpec, workflows
from opero.errors import (
    IdConflictError,
    OperoUsageError,
    OperoWarning,
    UnknownWorkflowError,
    WorkflowEndedError,
)
from opero.utils.fork import reset_after_fork
from opero.utils.units import Duration, parse_seconds

__all__ = ["Operations", "Orchestrator"]

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_MISSING: Final[Any] = object()
"""Stands for a result that was not given; None may be one."""
_GLANCE: Final = 0.25
"""Longest pause between two looks at a workflow that another process runs."""


def _in_thread(
    method: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Return the asynchronous variant of a method: the same in a thread, so that the event loop is not blocked."""

    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(method, self, *args, **kwargs)

    name = f"a{method.__name__}"
    variant.__name__, variant.__qualname__ = (
        name,
        f"{method.__qualname__.rpartition('.')[0]}.{name}",
    )
    variant.__doc__ = f"Do what `{method.__name__}` does, without blocking the event loop."
    vars(variant)["__wrapped__"] = method  # its signature
    return variant


class Operations:
    """Report the workflows of a store and change their course; a running engine is notified at once.

    Args:
        store: The journal.
    """

    def __init__(self, store: JournalStore) -> None:
        self.store = store
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Run nothing in a forked child: what is invoked there is run by the parent, or another process."""
        self._engine, self._lock = None, threading.Lock()

    # --- reporting --------------------------------------------------------------------------------------------------

    def get_workflow_status(self, workflow_id: str) -> dict[str, Any]:
        """Return a workflow's status.

        Returns:
            A dict with "id", "name", "status" ("processing", "done" or "failed"),
            "current_activity", "error_message", "output", "created_at" and "updated_at" (ISO
            timestamps in UTC).

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        return self._status(self._record(workflow_id))

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
        return [self._status(found) for found in self.store.find(name, states_of(status), limit)]

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
        return [step_of(number, step) for number, step in enumerate(found, start=1)]

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
        return _unknown(workflow_id) if record is None else record

    def _status(self, record: WorkflowRecord) -> dict[str, Any]:
        engine = self._engine
        active = engine.active(record.id) if engine is not None else None
        steps = () if active or record.status != "processing" else self.store.steps(record.id)
        return status_of(record, active, steps)

    # --- changing their course --------------------------------------------------------------------------------------

    def cancel(self, workflow_id: str) -> bool:
        """Cancel a workflow, wherever it runs; return whether it had not ended yet.

        A coroutine is cancelled at its current await, a synchronous function at its next step; what their
        `finally` blocks do still runs, and is not recorded.

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        before = self._record(workflow_id)
        found = self._apply(Cancel(workflow_id))
        if found is None:
            _unknown(workflow_id)
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
        new = workflow_id_new or _draw_id()
        if self.store.get(new) is not None:
            raise IdConflictError(f"workflow id {new!r} is taken.")
        self._apply(Fork(workflow_id, new, before, _present_version(record)))
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

    aget_workflow_status = _in_thread(get_workflow_status)
    alist_workflows = _in_thread(list_workflows)
    asteps = _in_thread(steps)
    astate = _in_thread(state)
    acancel = _in_thread(cancel)
    aresume = _in_thread(resume)
    afork = _in_thread(fork)
    asignal = _in_thread(signal)
    aresolve = _in_thread(resolve)


class Orchestrator(Operations):
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
        for name, value in (("max_workers", max_workers), ("max_recoveries", max_recoveries)):
            if type(value) is not int or value < 1:
                raise OperoUsageError(f"{name}={value!r} must be a whole number from 1.")
        super().__init__(SqliteStore(db_path) if store is None else store)
        self._max_workers = max_workers
        self._max_recoveries = max_recoveries

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

    astart = _in_thread(start)
    astop = _in_thread(stop)

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
        spec, record = _new_run(name, args, kwargs, workflow_id)
        engine = self._engine
        found = self._apply(Create(record)) if engine is None else engine.create(record, spec)
        return _same_run(spec, record, found, args, kwargs)

    async def ainvoke_workflow(
        self, name: str | None = None, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Do what `invoke_workflow` does, without blocking the event loop."""
        spec, record = _new_run(name, args, kwargs, workflow_id)
        engine = self._engine
        if engine is None:
            found = await asyncio.to_thread(self._apply, Create(record))
        else:
            found = await engine.acreate(record, spec)
        return _same_run(spec, record, found, args, kwargs)

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
        return self._status(self._wait(workflow_id, timeout))

    def result(self, workflow_id: str, timeout: Duration | None = None) -> Any:
        """Wait for a workflow's end and return its result, or raise the error that it has ended with.

        Raises:
            Exception: What its function raised.
            WorkflowEndedError: It was cancelled, or given up.
            DurableError: It can go on only with help from outside; the message says which.
            TimeoutError: It has not ended in time.
            UnknownWorkflowError: There is no such workflow.
        """
        return outcome_of(self._wait(workflow_id, timeout))

    async def await_workflow(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `wait`
    ) -> dict[str, Any]:
        """Do what `wait` does, without blocking the event loop."""
        return self._status(await self._await(workflow_id, timeout))

    async def aresult(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `result`
    ) -> Any:
        """Do what `result` does, without blocking the event loop."""
        return outcome_of(await self._await(workflow_id, timeout))

    def _wait(self, workflow_id: str, timeout: Duration | None) -> WorkflowRecord:
        """Return a workflow's record once it is settled."""
        waiting = _EndWait(workflow_id, timeout)
        while True:
            ended = threading.Event()
            here = self._on_end(workflow_id, ended.set)
            record = self._record(workflow_id)
            if is_settled(record):
                return record
            ended.wait(waiting.pause(record, here=here))

    async def _await(self, workflow_id: str, timeout: Duration | None) -> WorkflowRecord:  # noqa: ASYNC109
        """Do what `_wait` does, without blocking the event loop."""
        waiting = _EndWait(workflow_id, timeout)
        loop = asyncio.get_running_loop()
        while True:
            ended = asyncio.Event()

            def notify(ended: asyncio.Event = ended) -> None:
                loop.call_soon_threadsafe(ended.set)

            here = self._on_end(workflow_id, notify)
            record = await asyncio.to_thread(self._record, workflow_id)
            if is_settled(record):
                return record
            pause = waiting.pause(record, here=here)
            try:
                async with asyncio.timeout(pause):
                    await ended.wait()
            except TimeoutError:
                pass

    def _on_end(self, workflow_id: str, callback: Callable[[], object]) -> bool:
        engine = self._engine
        return engine is not None and engine.on_end(workflow_id, callback)

    def __repr__(self) -> str:
        return f"<Orchestrator on {self.store!r}, {'running' if self._engine else 'stopped'}>"


class _EndWait:
    """The pauses of a wait for a workflow's end.

    Args:
        workflow_id: The workflow.
        timeout: Longest wait, None for as long as it takes.
    """

    def __init__(self, workflow_id: str, timeout: Duration | None) -> None:
        self._workflow_id = workflow_id
        self._until = (
            None if timeout is None else time.monotonic() + parse_seconds(timeout, "timeout")
        )
        self._next = 0.01
        self._warned = False

    def pause(self, record: WorkflowRecord, *, here: bool) -> float | None:
        """Return how long to wait before the next look, None for as long as it takes.

        Args:
            record: The workflow as it was seen last.
            here: Whether it runs in this process, so that its end is notified.

        Raises:
            TimeoutError: The time is up.
        """
        if record.error and not self._warned:
            self._warned = True
            warnings.warn(
                f"workflow {self._workflow_id!r} waits: {record.error}", OperoWarning, stacklevel=4
            )
        pause = None if here else self._next
        self._next = min(2 * self._next, _GLANCE)
        if self._until is None:
            return pause
        left = self._until - time.monotonic()
        if left <= 0:
            reason = f": {record.error}" if record.error else ""
            raise TimeoutError(f"workflow {self._workflow_id!r} has not ended in time{reason}")
        return left if pause is None else min(left, pause)


# --- records ------------------------------------------------------------------------------------------------------


def _new_run(
    name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], workflow_id: str | None
) -> tuple[WorkflowSpec, WorkflowRecord]:
    """Return the workflow of a name, and the record of a new run.

    Raises:
        UnknownWorkflowError: No such workflow is registered.
        TypeError: The arguments do not fit.
        UnserializableError: The journal cannot keep one of them.
    """
    if name is None:
        name = kwargs.pop("name", None)
    if not isinstance(name, str):
        raise TypeError(f"invoke_workflow(): the name of a workflow is a str, not {name!r}.")
    spec = workflows.latest(name)
    record = WorkflowRecord(
        id=workflow_id or _draw_id(),
        name=name,
        version=spec.version,
        args=encode((args, kwargs), f"arguments of workflow {name}()"),
        hash=spec.parameters.digest(args, kwargs),
    )
    return spec, record


def _same_run(
    spec: WorkflowSpec,
    record: WorkflowRecord,
    found: WorkflowRecord,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    """Return the id of a run if the record that is stored under it is of the same run.

    Raises:
        IdConflictError: It is of another one.
    """
    if found.name != record.name or (
        found.hash != record.hash and not spec.parameters.matches(found.hash, args, kwargs)
    ):
        raise IdConflictError(
            f"workflow id {record.id!r} belongs to a run of {found.name!r}"
            f"{'' if found.name != record.name else ' with other arguments'}."
        )
    return record.id


def _draw_id() -> str:
    """Return a new id."""
    return str(uuid.uuid4())


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


def _present_version(record: WorkflowRecord) -> str | None:
    """Return the version of the present code, which runs a copy."""
    try:
        return workflows.latest(record.name).version
    except UnknownWorkflowError:
        return record.version


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


def _unknown(workflow_id: str) -> NoReturn:
    raise UnknownWorkflowError(f"there is no workflow with the id {workflow_id!r}.")
