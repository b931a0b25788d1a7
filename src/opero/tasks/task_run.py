# this_file: src/opero/tasks/task_run.py
"""One execution of a task: what the definition does not hold."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from opero.errors import OperoUsageError
from opero.events import event_bus
from opero.events.run import Run
from opero.tasks.state import TaskState
from opero.utils import ambient

if TYPE_CHECKING:
    import asyncio

    from opero.tasks.runnable import Runnable

__all__ = ["NOTHING", "TaskRun", "carry_out"]


class _Nothing:
    """Stands for a value that is not there, as None is a value like any other."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NOTHING"


NOTHING: Final = _Nothing()


class TaskRun(Run):
    """One execution of a task, or of what is composed of tasks. `start()` returns one; it may be awaited.

    Attributes:
        task: The definition.
        id: Its id, on its events too.
        parent_id: Id of the run that it is part of.
        state: How far it is.
        attempt: Number of the attempt, from 1.
        started, ended: Readings of a monotonic clock in seconds; None before.
        result: What it returned, None before.
        error: What it raised, or its last attempt has; None if nothing.

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

    def __init__(self, task: Runnable, given: Any = NOTHING) -> None:
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
        """How long it took, or has taken so far; None before it began."""
        if self.started is None:
            return None
        return (ambient.clock().monotonic() if self.ended is None else self.ended) - self.started

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self.ended is not None

    def cancel(self) -> bool:
        """Cancel it, if `start()` began it; tell whether that was still possible."""
        return self.carrier is not None and self.carrier.cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the end: the result, or the error. Who is cancelled meanwhile cancels it too."""
        if self.carrier is None:
            raise OperoUsageError(f"{self!r} was not begun by start(), so it cannot be awaited.")
        return self.carrier.__await__()

    # --- what happens to it -----------------------------------------------------------------------

    def begin(self) -> None:
        """It is under way, and the current run from now on."""
        self.started = ambient.clock().monotonic()
        self.__enter__()
        self._goes(TaskState.RUNNING)

    def retries(self, attempt: int, delay: float) -> None:
        """An attempt has failed, with `error`, and another one follows.

        Args:
            attempt: Number of the one to come.
            delay: Seconds of pause before it.
        """
        self.attempt = attempt
        self._goes(TaskState.RETRYING, delay=delay)

    def succeed(self, result: Any) -> None:
        """It has returned."""
        self.result, self.error = result, None
        if self.passes is NOTHING:
            self.passes = result
        self._end(TaskState.SUCCEEDED)

    def fail(self, error: BaseException) -> None:
        """It has raised, or was cancelled or closed."""
        from asyncio import CancelledError

        self.error = error
        cancelled = isinstance(error, CancelledError | GeneratorExit)
        self._end(TaskState.CANCELLED if cancelled else TaskState.FAILED)

    def _end(self, state: TaskState) -> None:
        self.ended = ambient.clock().monotonic()
        self._goes(state)
        self.__exit__(None, None, None)

    def _goes(self, state: TaskState, **details: Any) -> None:
        self.state = self.task.state = state
        if event_bus.subscriptions:
            from opero.events import TaskChanged

            event_bus.emit(
                TaskChanged(
                    function=self.name,
                    # Not those of the context: a retry is told from inside the call's own run.
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
    """Execute the definition, keep the run's books, and return or raise what it does."""
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
