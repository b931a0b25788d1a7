# this_file: src/opero/durable/step.py
"""One step: looked up in the journal, else done and recorded. The decisions, and what both colours share."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opero.durable.failures import keepable, pack_error, unpack_error
from opero.durable.news import tell_step
from opero.durable.records import StepRecord, StepState
from opero.durable.replay import Course, judge
from opero.durable.run import Ending, Run, Unwind, Why
from opero.durable.scope import outside, reset
from opero.durable.values import decode, encode
from opero.errors import NonDeterminismError

if TYPE_CHECKING:
    from opero.durable.scope import Scope

__all__ = ["Step", "running_step", "step_at"]

running_step: Final[contextvars.ContextVar[Step | None]] = contextvars.ContextVar(
    "opero_durable_step", default=None
)
"""The step whose activity runs in this context, for what its pipeline has to tell."""


class Step:
    """A step at its place.

    Args:
        run: The workflow's run.
        path: The place.
        name: What is called.
        digest: Of its arguments, "" without.
        idempotent: Whether a call that may have happened may happen again.

    Attributes:
        record: What stands in the journal, or will.
        recorded: Whether its outcome stands there already.
        attempt: Number of the attempt to begin with.
        wake: Wall-clock seconds before which it must not begin, None for at once.

    Raises:
        NonDeterminismError: The journal has something else at this place; the run is blocked.
        Unwind: It is unknown whether it has happened, and it must not happen twice.
    """

    __slots__ = ("_text", "attempt", "course", "idempotent", "name", "record", "run", "wake")

    def __init__(
        self, run: Run, path: str, name: str, digest: str, *, idempotent: bool = True
    ) -> None:
        self.run: Run = run
        self.name: str = name
        self.idempotent: bool = idempotent
        try:
            verdict = judge(run.id, path, run.steps.get(path), name, digest, idempotent=idempotent)
        except NonDeterminismError as error:
            run.end(Ending(Why.BLOCKED, str(error)))
            raise
        self.course: Course = verdict.course
        self._text = verdict.text
        self.attempt: int = verdict.attempts
        self.wake: float | None = verdict.wake
        if verdict.course is Course.DOUBT:
            text = (
                f"step {path}, {name}, was running when its process died, and must not run twice: "
                f"find out what happened and tell resolve({run.id!r}, {path!r}, ...)"
            )
            run.end(Ending(Why.DOUBT, text))
            raise Unwind(text)
        if self.recorded:
            self.record: StepRecord = run.steps[path]
        else:
            self.record = run.new_step(
                path, name, digest, state=StepState.STARTED, attempts=verdict.attempts
            )

    @property
    def recorded(self) -> bool:
        """Whether its outcome stands in the journal."""
        return self.course in (Course.RETURN, Course.RAISE)

    def outcome(self) -> Any:
        """Return or raise what is recorded."""
        assert self._text is not None  # noqa: S101 - an outcome has one
        if self.course is Course.RETURN:
            tell_step(self.run.record, self.record, replayed=True)
            return decode(self._text)
        error = self._raised(unpack_error(self._text))
        tell_step(self.run.record, self.record, replayed=True, error=error)
        raise error

    def pause(self) -> float:
        """Return the seconds that are left of the pause in which its process died."""
        return 0.0 if self.wake is None else max(0.0, self.wake - time.time())

    def received(self, text: str) -> None:
        """Take note of a signal's value, which is recorded already."""
        self.course, self._text = Course.RETURN, text

    def succeeded(self, value: object) -> None:
        """Take note of the result; it still has to be written.

        Raises:
            UnserializableError: The journal cannot keep it.
        """
        text = encode(value, f"result of {self.name}()")
        self._end(StepState.DONE, text)

    def failed(self, error: Exception) -> Exception:
        """Take note of an error, which still has to be written, and return what the workflow gets."""
        error = keepable(error)
        self._end(StepState.FAILED, pack_error(error), error)
        return self._raised(error)

    def retries(self, attempt: int, delay: float) -> None:
        """Record, before it begins, that another attempt follows: a crash shall not give it back."""
        self.record.attempts = attempt
        if self.idempotent:
            self.record.state = StepState.RETRYING
            self.record.wake = time.time() + delay
        self.run.write(self.record)

    def _end(self, state: StepState, text: str, error: Exception | None = None) -> None:
        self.record.state, self.record.value = state, text
        self.record.wake, self.record.ended = None, time.time()
        tell_step(self.run.record, self.record, error=error)

    def _raised(self, error: Exception) -> Exception:
        self.run.failed.append((error, self.record.path))
        return error

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While its activity runs: outside the workflow, counted as running."""
        self.run.begin(self.record)
        tell_step(self.run.record, self.record)
        scope, step = outside(), running_step.set(self)
        try:
            yield
        finally:
            running_step.reset(step)
            reset(scope)

    def over(self) -> None:
        """It is written, or never will be."""
        self.run.finish(self.record)


def step_at(scope: Scope, name: str, digest: str = "", *, idempotent: bool = True) -> Step:
    """Return the next step of a scope.

    Raises:
        NonDeterminismError: As for `Step`.
        Unwind: As for `Step`, or the run is over.
    """
    scope.run.check()
    return Step(scope.run, scope.next_path(), name, digest, idempotent=idempotent)
