# this_file: src/opero/tasks/runnable.py
"""What tasks and everything composed of them have in common: they run, start, and are joined by `|`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from opero.errors import OperoUsageError
from opero.tasks.state import TaskState
from opero.tasks.task_run import NOTHING, TaskRun, carry_out
from opero.utils.checks import text_or_none

if TYPE_CHECKING:
    import asyncio

    from opero.tasks.sequence import Sequence

__all__ = ["Runnable", "as_runnable"]

_under_way: Final[set[asyncio.Task[Any]]] = set()
"""Runs that nobody may hold but the event loop, which holds them weakly."""


class Runnable:
    """A definition: it says what to do, may be run any number of times, also at once, and holds no run.

    Attributes:
        name: Shown in events and errors.
        takes_input: Whether it makes something of a value that it is given: in a sequence, the last result.
        state: The state that one of its runs went into last. A run's own state is on the `TaskRun`.
    """

    takes_input: bool = False

    def __init__(self, name: str | None, default: str) -> None:
        text_or_none("name", name)
        self.name: str = name or default
        self.state: TaskState = TaskState.PENDING

    async def run(self, value: Any = NOTHING, /) -> Any:
        """Run it and return its result.

        Args:
            value: What to begin with, for what takes an input.

        Raises:
            OperoUsageError: There is a value and nothing that takes it.
        """
        return await carry_out(self.new_run(value))

    def start(self, value: Any = NOTHING, /) -> TaskRun:
        """Begin a run on the event loop and return it at once; it may be awaited, looked at and cancelled.

        Args:
            value: As for `run`.

        Raises:
            OperoUsageError: As for `run`.
        """
        from asyncio import get_running_loop

        run = self.new_run(value)
        carrier = get_running_loop().create_task(carry_out(run), name=run.name)
        run.carrier = carrier
        _under_way.add(carrier)
        carrier.add_done_callback(_under_way.discard)
        return run

    def new_run(self, value: Any = NOTHING) -> TaskRun:
        """Return a run that has not begun."""
        if value is not NOTHING and not self.takes_input:
            raise OperoUsageError(
                f"{self!r} takes no input: its arguments are fixed, or it has no parameter for one. "
                "Call run() without a value."
            )
        return TaskRun(self, value)

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        raise NotImplementedError

    def __or__(self, then: Any) -> Sequence:
        """Join them: a sequence of this and the next."""
        from opero.tasks.sequence import joined

        return joined(self, as_runnable(then))

    def __ror__(self, first: Any) -> Sequence:
        from opero.tasks.sequence import joined

        return joined(as_runnable(first), self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def as_runnable(step: Any) -> Runnable:
    """Return what can run: the thing itself, or a task that calls it if it is a function.

    Raises:
        OperoUsageError: It is neither.

    Example:
        >>> as_runnable(len)
        <Task len>
    """
    if isinstance(step, Runnable):
        return step
    if inspect.iscoroutine(step):
        # Nobody will await it, and Python would say so once more.
        step.close()
        raise OperoUsageError(
            f"{step.__name__}() was called already, and what it gave can run only once: "
            f"write Task({step.__name__}, ...) with its arguments."
        )
    if not callable(step):
        raise OperoUsageError(
            f"{type(step).__name__} cannot be a step: give a Task, a Sequence, a Parallel, a CircuitGroup "
            "or a function."
        )
    from opero.tasks.task import Task

    return Task(step)
