# this_file: src/opero/durable/operations.py
"""Report the workflows of a journal as plain dicts, and change their course, whether an engine runs here or not."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from opero.durable.decorators import get_registry
from opero.durable.records import (
    ENDED,
    RECORDED,
    Cancel,
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
from opero.durable.values import decode, encode, message_of, pack_error, unpack_error
from opero.errors import (
    DurableError,
    IdConflictError,
    OperoUsageError,
    UnknownWorkflowError,
    UnserializableError,
    WorkflowEndedError,
    did_you_mean,
)
from opero.utils.ambient import require_loop
from opero.utils.fork import reset_after_fork

if TYPE_CHECKING:
    from opero.durable.engine import Engine


P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_MISSING: Final[Any] = object()
"""Stands for a result that was not given; None may be one."""


def in_thread_of(
    method: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Return the asynchronous variant of a method: the same in a thread, so that the event loop is not blocked."""

    @functools.wraps(method)
    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        require_loop("read or write the journal")
        return await asyncio.to_thread(method, self, *args, **kwargs)

    owner, _, name = method.__qualname__.rpartition(".")
    variant.__name__, variant.__qualname__ = f"a{name}", f"{owner}.a{name}"
    variant.__doc__ = f"Do what `{name}` does, without blocking the event loop."
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


def outcome_of(record: WorkflowRecord) -> Any:
    """Return the result of a workflow, or raise what it has ended with."""
    match record.state:
        case State.DONE:
            return decode(record.output or "null")
        case State.FAILED:
            raise unpack_error(record.error or "{}")
        case State.CANCELLED | State.DEAD:
            why = f": {record.error}" if record.error else ""
            raise WorkflowEndedError(f"workflow {record.id!r} is {record.state}{why}")
        case _:
            raise DurableError(
                f"workflow {record.id!r} is {record.state}: {message_of(record.error)}"
            )


def _shown(text: str | None) -> Any:
    """Return a recorded value, or its JSON text where this program cannot rebuild it."""
    if text is None:
        return None
    try:
        return decode(text)
    except UnserializableError:
        return text


def _iso(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat()
