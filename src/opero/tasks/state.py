# this_file: src/opero/tasks/state.py
"""Represent one execution of a task, and its state."""

from __future__ import annotations

from collections.abc import Generator
from contextvars import ContextVar
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero.errors import OperoUsageError
from opero.events import event_bus
from opero.events.runs import Run
from opero.utils import ambient

if TYPE_CHECKING:
    import asyncio

__all__ = ["NOTHING", "Definition", "TaskRun", "TaskState", "carry_out", "running_task"]


class TaskState(StrEnum):
    """State of a run of a task.

    Attributes:
        PENDING: Not started.
        RUNNING: Started and not ended.
        SUCCEEDED: Returned.
        FAILED: Raised.
        RETRYING: An attempt has failed and another one follows.
        CANCELLED: Cancelled.
    """

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRYING = "retrying"
    CANCELLED = "cancelled"


class Definition(Protocol):
    """What a run needs of the task that it executes."""

    name: str
    module: str | None
    state: TaskState

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        ...


class _Nothing:
    """Type of the marker for a missing value, as None is a value like any other."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NOTHING"


NOTHING: Final = _Nothing()


class TaskRun(Run):
    """One execution of a task, or of a composition of tasks. `start()` returns one; it may be awaited.

    Attributes:
        task: The definition.
        id: Its id, on its events too.
        parent_id: Id of the run that it is part of.
        state: Its state.
        attempt: Number of the attempt, from 1.
        started, ended: Readings of a monotonic clock in seconds; None before.
        result: Return value; None before the end.
        error: The exception that it, or its last attempt, raised; None if there is none.

    Example:
        >>> import asyncio
        >>> from opero.tasks import Task
        >>> async def main():
        ...     run = Task(str.upper, "tea").start()
        ...     print(run.state.name, await run, run.state.name)
        >>> asyncio.run(main())
        PENDING TEA SUCCEEDED
    """

    __slots__ = (
        "__weakref__", "attempt", "carrier", "ended", "error", "given", "passes", "result", "state", "task"
    )  # fmt: skip

    started: float | None

    def __init__(self, task: Definition, given: Any = NOTHING) -> None:
        super().__init__(task.name)
        self.task: Final = task
        self.given: Final = given
        self.state: TaskState = TaskState.PENDING
        self.attempt: int = 1
        self.ended: float | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.passes: Any = NOTHING
        self.carrier: asyncio.Task[Any] | None = None

    @property
    def seconds(self) -> float | None:
        """Duration, up to now while it runs; None before it starts."""
        if self.started is None:
            return None
        return (ambient.clock().monotonic() if self.ended is None else self.ended) - self.started

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.ended is not None

    def cancel(self) -> bool:
        """Cancel it, if `start()` started it; return whether that was still possible."""
        return self.carrier is not None and self.carrier.cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the end and return the result. A waiter that is cancelled cancels the run too."""
        if self.carrier is None:
            raise OperoUsageError(f"{self!r} was not started by start(), so it cannot be awaited.")
        return self.carrier.__await__()

    # --- changes of state --------------------------------------------------------------------------

    def begin(self) -> None:
        """Start: it is the current run from now on."""
        self.started = ambient.clock().monotonic()
        self.__enter__()
        self._set_state(TaskState.RUNNING)

    def retries(self, attempt: int, delay: float) -> None:
        """Note that an attempt has failed, with `error`, and another one follows.

        Args:
            attempt: Number of the next one.
            delay: Seconds of pause before it.
        """
        self.attempt = attempt
        self._set_state(TaskState.RETRYING, delay=delay)

    def succeed(self, result: Any) -> None:
        """End with a result."""
        self.result, self.error = result, None
        if self.passes is NOTHING:
            self.passes = result
        self._end(TaskState.SUCCEEDED)

    def fail(self, error: BaseException) -> None:
        """End with an error, a cancellation included."""
        from asyncio import CancelledError

        self.error = error
        cancelled = isinstance(error, CancelledError | GeneratorExit)
        self._end(TaskState.CANCELLED if cancelled else TaskState.FAILED)

    def _end(self, state: TaskState) -> None:
        self.ended = ambient.clock().monotonic()
        self._set_state(state)
        self.__exit__(None, None, None)

    def _set_state(self, state: TaskState, **details: Any) -> None:
        self.state = self.task.state = state
        if event_bus.subscriptions:
            from opero.events.types import TaskChanged

            event_bus.emit(
                TaskChanged(
                    function=self.name,
                    module=self.task.module,
                    # Not those of the context: a retry is reported from inside the call's own run.
                    run_id=self.id,
                    parent_id=self.parent_id,
                    task=self.task,
                    state=state,
                    result=self.result,
                    error=self.error,
                    attempt=self.attempt,
                    seconds=self.seconds,
                    details=details,
                )
            )

    def __repr__(self) -> str:
        seconds = self.seconds
        took = "" if seconds is None else f" {'after' if self.done else 'for'} {seconds:.3g} s"
        return f"<TaskRun {self.id} {self.name} {self.state}{took}>"


async def carry_out(run: TaskRun) -> Any:
    """Execute the definition, keep the run's state, and return or raise what the definition does."""
    run.begin()
    try:
        result = await run.task.execute(run)
    except BaseException as error:
        run.fail(error)
        raise
    else:
        run.succeed(result)
        return result
    finally:
        # The run holds its error: a frame that the error passes through must not hold the run.
        del run


running_task: Final[ContextVar[TaskRun | None]] = ContextVar("opero_task", default=None)
"""The run of the task whose function this context belongs to."""
