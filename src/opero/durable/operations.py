# this_file: src/opero/durable/operations.py
"""What an operator does with a journal: looking at workflows and stepping in, whether an engine runs here or not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NoReturn

from opero.durable.invocation import MISSING, draw_id, place_of, resolution, version_now
from opero.durable.records import ENDED, Cancel, Fork, Op, Resolve, Resume, Send, WorkflowRecord
from opero.durable.report import states_of, status_of, step_of
from opero.durable.values import encode
from opero.errors import (
    IdConflictError,
    OperoUsageError,
    UnknownWorkflowError,
    WorkflowEndedError,
)
from opero.utils.fork import reset_after_fork

if TYPE_CHECKING:
    from opero.durable.engine import Engine
    from opero.durable.store import Store

__all__ = ["Operations"]


class Operations:
    """Looks at the workflows of a store and steps in; a running engine hears of it at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child nothing runs; what is invoked there is run by the parent, or another process."""
        self._engine, self._lock = None, threading.Lock()

    # --- looking ----------------------------------------------------------------------------------------------------

    def get_workflow_status(self, workflow_id: str) -> dict[str, Any]:
        """Return how a workflow is.

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
        """Return how workflows are, the youngest first.

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
        """Return where a workflow is, more exactly than its status tells.

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

    # --- stepping in ------------------------------------------------------------------------------------------------

    def cancel(self, workflow_id: str) -> bool:
        """Cancel a workflow, wherever it runs; tell whether it had not ended yet.

        A coroutine is cancelled where it stands, a synchronous function at its next step; what their
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
        """Let a workflow that has failed, was cancelled, is dead or blocked go on; tell whether it was one.

        Its recorded steps stay. The step whose error ended it runs again.

        Raises:
            UnknownWorkflowError: There is no such workflow.
        """
        self._record(workflow_id)
        resumed = bool(self._apply(Resume(workflow_id)))
        self._look()
        return resumed

    def fork(
        self, workflow_id: str, from_step: int | str, *, workflow_id_new: str | None = None
    ) -> str:
        """Start a copy of a workflow that keeps the steps before one, and return its id.

        Args:
            workflow_id: The workflow.
            from_step: The first step that runs anew: its number in `steps()`, or its path.
            workflow_id_new: Id of the copy; None draws one.

        Raises:
            UnknownWorkflowError: There is no such workflow.
            OperoUsageError: It has no such step.
            IdConflictError: The new id is taken.
        """
        record = self._record(workflow_id)
        steps = self.store.steps(workflow_id)
        before = place_of(steps, from_step, workflow_id)
        new = workflow_id_new or draw_id()
        if self.store.get(new) is not None:
            raise IdConflictError(f"workflow id {new!r} is taken.")
        self._apply(Fork(workflow_id, new, before, version_now(record)))
        self._look()
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
        self._look()

    def resolve(
        self,
        workflow_id: str,
        path: str,
        *,
        result: Any = MISSING,
        error: Exception | None = None,
        again: bool = False,
    ) -> None:
        """Tell what became of a step that is in doubt, and let its workflow go on.

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
        step = resolution(path, result, error, again)
        if not self._apply(Resolve(workflow_id, path, step)):
            raise OperoUsageError(
                f"resolve(): step {path!r} of workflow {workflow_id!r} is not in doubt."
            )
        self._look()

    def _apply(self, op: Op) -> Any:
        engine = self._engine
        if engine is not None:
            return engine.journal.write(op)
        self.store.open()
        with self._lock:
            return self.store.apply([op])[0]

    def _look(self) -> None:
        if self._engine is not None:
            self._engine.look()


def _unknown(workflow_id: str) -> NoReturn:
    raise UnknownWorkflowError(f"there is no workflow with the id {workflow_id!r}.")
