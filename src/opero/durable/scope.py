# this_file: src/opero/durable/scope.py
"""Where in a workflow a call stands: the path that is its key in the journal.

A single counter would give concurrent branches numbers in the order of their timing. Here every
task, and every job of a parallel group, counts its own steps: "3" is the third step of the
workflow, "c2/1" the first step of the second task that it created, "4/17/1" the first step of job
17 of the group that is its fourth step.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from opero.errors import OperoUsageError
from opero.utils.fork import run_after_fork

if TYPE_CHECKING:
    from opero.durable.run import Run

__all__ = ["Scope", "current", "enter", "outside", "reset", "task_factory"]

_scope: Final[contextvars.ContextVar[Scope | None]] = contextvars.ContextVar(
    "opero_durable_scope", default=None
)


class Scope:
    """One line of steps, which follow each other.

    Args:
        run: The workflow's run.
        prefix: What the paths of its steps begin with.
        of_task: Whether an engine's event loop made it for one task, so that no task must be asked
            for.
    """

    __slots__ = ("_busy", "_children", "_of_task", "_steps", "_tasks", "prefix", "run")

    def __init__(self, run: Run, prefix: str = "", *, of_task: bool = False) -> None:
        self.run: Run = run
        self.prefix: str = prefix
        self._of_task = of_task
        self._steps = 0
        self._children = 0
        self._busy = threading.Lock()
        self._tasks: WeakKeyDictionary[asyncio.Task[Any], Scope] | None = None

    @property
    def root(self) -> bool:
        """Whether it is the line of the workflow function itself."""
        return not self.prefix

    def next_path(self) -> str:
        """Number the next step."""
        self._steps += 1
        return f"{self.prefix}{self._steps}"

    def child(self) -> Scope:
        """Return the scope of the next task."""
        self._children += 1
        return Scope(self.run, f"{self.prefix}c{self._children}/", of_task=True)

    def branch(self, path: str, index: int) -> Scope:
        """Return the scope of one job of the group that is the step `path`."""
        return Scope(self.run, f"{path}/{index}/", of_task=True)

    def attempt(self, number: int) -> Scope:
        """Return the scope of another attempt at what is done here."""
        return Scope(self.run, f"{self.prefix}r{number}/", of_task=True)

    def enter(self) -> None:
        """Begin a step.

        Raises:
            OperoUsageError: Another one is under way on this line.
        """
        if not self._busy.acquire(blocking=False):
            raise OperoUsageError(
                "two steps of a workflow run at once in threads of its own making, so their order could not be "
                "repeated: use opero.tasks.Parallel, operomap, or tasks of an asynchronous workflow."
            )

    def leave(self) -> None:
        """End a step."""
        self._busy.release()

    def here(self) -> Scope:
        """Return the scope of the running task, where a loop that is not an engine's runs it."""
        if self._of_task:
            return self
        try:
            task = asyncio.current_task()
        except RuntimeError:
            return self
        if task is None:
            return self
        if self._tasks is None:
            self._tasks = WeakKeyDictionary()
        found = self._tasks.get(task)
        if found is None:
            found = self._tasks[task] = self.child()
        return found


def enter(scope: Scope) -> None:
    """Make a scope that of this context."""
    _scope.set(scope)


def current() -> Scope | None:
    """Return the scope of the caller, None outside workflows."""
    scope = _scope.get()
    return None if scope is None else scope.here()


def outside() -> contextvars.Token[Scope | None]:
    """Leave the workflow, for the time that an activity runs: what it calls is no step."""
    return _scope.set(None)


def reset(token: contextvars.Token[Scope | None]) -> None:
    """Undo `outside`."""
    _scope.reset(token)


def task_factory(
    loop: asyncio.AbstractEventLoop,
    coro: Any,
    *,
    context: contextvars.Context | None = None,
    **more: Any,
) -> asyncio.Task[Any]:
    """Make a task with a scope of its own, numbered when it is created, not when it first runs."""
    scope = _scope.get() if context is None else context.get(_scope)
    if scope is not None:
        # A context that was given belongs to its giver.
        context = contextvars.copy_context() if context is None else context.copy()
        context.run(enter, scope.child())
        task = asyncio.Task(coro, loop=loop, context=context, **more)
        scope.run.tasks.add(task)
        return task
    return asyncio.Task(coro, loop=loop, context=context, **more)


# A child is no part of the workflow that it was forked in.
run_after_fork(lambda: _scope.set(None))
