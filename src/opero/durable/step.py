# this_file: src/opero/durable/step.py
"""Look a step up in the journal, or record its outcome: what sync and async steps share."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from opero.durable.failures import keepable, pack_error, rebuild_error
from opero.durable.journal import Course, judge
from opero.durable.records import StepRecord, StepState
from opero.durable.run import Ending, EndingKind, Unwind, WorkflowRun
from opero.durable.values import decode, encode
from opero.errors import NonDeterminismError, UnserializableError

if TYPE_CHECKING:
    from opero.durable.scope import Scope

__all__ = ["Step", "running_step", "step_at"]

running_step: Final[contextvars.ContextVar[Step | None]] = contextvars.ContextVar(
    "opero_durable_step", default=None
)
"""The step whose activity runs in this context, for what its pipeline reports."""


class Step:
    """A step at its place.

    Args:
        run: The workflow's run.
        path: The place.
        name: What is called.
        digest: Of its arguments, "" without.
        idempotent: Whether a call that may have happened may happen again.
        matches: Returns whether another digest is that of the same call, spelled differently.

    Attributes:
        record: What the journal has, or will have.
        recorded: Whether its outcome is in the journal.
        attempt: Number of the attempt to begin with.

    Raises:
        NonDeterminismError: The journal has something else at this place; the run is blocked.
        Unwind: It is unknown whether it has happened, and it must not happen twice.
    """

    __slots__ = (
        "_text", "_wake", "attempt", "course", "idempotent", "name", "record", "recorded", "run",
    )  # fmt: skip

    def __init__(
        self,
        run: WorkflowRun,
        path: str,
        name: str,
        digest: str,
        *,
        idempotent: bool = True,
        matches: Callable[[str], bool] | None = None,
    ) -> None:
        self.run: WorkflowRun = run
        self.name: str = name
        self.idempotent: bool = idempotent
        found = run.steps.get(path)
        try:
            verdict = judge(
                run.id, path, found, name, digest, idempotent=idempotent, matches=matches
            )
        except NonDeterminismError as error:
            run.block(str(error))
            raise
        self.course: Course = verdict.course
        self.attempt: int = verdict.attempts
        self._text = verdict.text
        self._wake = verdict.wake
        self.recorded: bool = verdict.course is Course.RETURN or verdict.course is Course.RAISE
        if found is not None:
            run.unread.discard(path)
        if verdict.course is Course.IN_DOUBT:
            text = (
                f"step {path}, {name}, was running when its process died, and must not run twice: "
                f"find out what happened and call resolve({run.id!r}, {path!r}, ...)"
            )
            run.end(Ending(EndingKind.IN_DOUBT, text))
            raise Unwind(text)
        if found is not None and self.recorded:
            self.record: StepRecord = found
        else:
            self.record = run.new_step(
                path, name, digest, state=StepState.STARTED, attempts=verdict.attempts
            )

    def outcome(self) -> Any:
        """Return or raise what is recorded.

        Raises:
            Exception: The recorded error.
            Unwind: The record cannot be rebuilt; the run is blocked.
        """
        text = self._text or "null"
        try:
            if self.course is Course.RETURN:
                value = decode(text)
                self.run.notify_step(self.record, replayed=True)
                return value
            error = rebuild_error(text)
        except UnserializableError as reason:
            raise self.run.block(f"step {self.record.path}, {self.name}: {reason}") from reason
        self.run.failed.append((error, self.record.path))
        self.run.notify_step(self.record, replayed=True, error=error)
        raise error

    def pause(self) -> float:
        """Return the seconds that are left, by the wall clock, of the pause in which its process died."""
        return 0.0 if self._wake is None else max(0.0, self._wake - time.time())

    def wait_until(self, wake: float | None) -> None:
        """Make it a step that waits, until a time; one that was waiting before a crash keeps its time."""
        self.record.wake = wake if self._wake is None else self._wake
        self.record.state = StepState.PENDING

    def received(self, text: str) -> None:
        """Take a signal's value, which is recorded already."""
        self.course, self._text = Course.RETURN, text

    def succeeded(self, value: object) -> None:
        """Take the result; it still has to be written.

        Raises:
            UnserializableError: The journal cannot keep it.
        """
        self._end(StepState.DONE, encode(value, f"result of {self.name}()"), None)

    def failed(self, error: Exception) -> Exception:
        """Take an error, which still has to be written, and return what the workflow gets."""
        error = keepable(error)
        self._end(StepState.FAILED, pack_error(error), error)
        self.run.failed.append((error, self.record.path))
        return error

    def retries(self, attempt: int, delay: float) -> None:
        """Record, before it begins, that another attempt follows: a crash must not give it back."""
        self.record.attempts = attempt
        if self.idempotent:
            self.record.state = StepState.RETRYING
            self.record.wake = time.time() + delay
        self.run.write(self.record)

    def _end(self, state: StepState, text: str, error: Exception | None) -> None:
        record = self.record
        record.state, record.value = state, text
        record.wake, record.ended = None, time.time()
        self.run.notify_step(record, error=error)


def step_at(
    scope: Scope,
    name: str,
    digest: str = "",
    *,
    idempotent: bool = True,
    matches: Callable[[str], bool] | None = None,
) -> Step:
    """Return the next step of a scope.

    Raises:
        NonDeterminismError: As for `Step`.
        Unwind: As for `Step`, or the run is over.
    """
    scope.run.check()
    return Step(scope.run, scope.next_path(), name, digest, idempotent=idempotent, matches=matches)
