# this_file: src/opero/durable/scope.py
"""Locate a call in its workflow: the path that is its key in the journal.

A single counter would give concurrent branches numbers in the order of their timing. Here every
task, and every branch of a parallel group, counts its own steps: "3" is the third step of the
workflow, "c2/1" the first step of the second task that it created, "4/17/1" the first step of branch
17 of the group that is its fourth step. Groups find this through `opero.core.context`.
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
    from opero.durable.run import WorkflowRun

__all__ = [
    "EngineThread",
    "GroupBranches",
    "Scope",
    "active_runs",
    "begin_branches",
    "current",
    "current_scope",
    "is_unknown_thread",
    "task_factory",
]

current_scope: Final[contextvars.ContextVar[Scope | None]] = contextvars.ContextVar(
    "opero_durable_scope", default=None
)
"""The scope of this context; None outside workflows, and in activities: what they call is no step."""


class Scope:
    """A line of steps that follow each other.

    Args:
        run: The workflow's run.
        prefix: What the paths of its steps begin with.
        of_task: Whether it was made for one task, so that the running task need not be looked up.
    """

    __slots__ = ("_children", "_of_task", "_steps", "_tasks", "busy", "prefix", "run")

    def __init__(self, run: WorkflowRun, prefix: str = "", *, of_task: bool = False) -> None:
        self.run: WorkflowRun = run
        self.prefix: str = prefix
        self.busy: threading.Lock = threading.Lock()
        self._of_task = of_task
        self._steps = 0
        self._children = 0
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
        """Return the scope of one branch of the group that is the step `path`."""
        return Scope(self.run, f"{path}/{index}/", of_task=True)

    def attempt(self, number: int) -> Scope:
        """Return the scope of another attempt at what is done here."""
        return Scope(self.run, f"{self.prefix}r{number}/", of_task=True)

    def enter(self) -> None:
        """Begin a step; `leave` ends it.

        Raises:
            OperoUsageError: Another one is running on this line.
        """
        if not self.busy.acquire(blocking=False):
            raise OperoUsageError(
                "two steps of a workflow run at once in threads that it made itself, so their order could not be "
                "repeated: use opero.tasks.Parallel, operomap, or tasks of an asynchronous workflow."
            )

    def leave(self) -> None:
        """End a step."""
        self.busy.release()

    def of_running_task(self) -> Scope:
        """Return the scope of the running task, on a loop that is not an engine's."""
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


def current() -> Scope | None:
    """Return the scope of the caller, None outside workflows."""
    scope = current_scope.get()
    if scope is None or scope._of_task:  # noqa: SLF001 - a matter of this module
        return scope
    return scope.of_running_task()


def task_factory(
    loop: asyncio.AbstractEventLoop,
    coro: Any,
    *,
    context: contextvars.Context | None = None,
    **more: Any,
) -> asyncio.Task[Any]:
    """Make a task with a scope of its own, numbered when it is created, not when it first runs."""
    scope = current_scope.get() if context is None else context.get(current_scope)
    if scope is not None:
        # A context that was given belongs to the caller.
        context = contextvars.copy_context() if context is None else context.copy()
        context.run(current_scope.set, scope.child())
        task = asyncio.Task(coro, loop=loop, context=context, **more)
        scope.run.tasks.add(task)
        return task
    return asyncio.Task(coro, loop=loop, context=context, **more)


class GroupBranches:
    """The branches of one parallel group, known by their numbers.

    Args:
        scope: The line in which the group was begun; None for a group that is no part of a workflow.
        path: Its place there.
    """

    def __init__(self, scope: Scope | None, path: str = "") -> None:
        self._scope = scope
        self._path = path

    def enter(self, index: int) -> None:
        """Make this context the branch of that number."""
        if self._scope is not None:
            current_scope.set(self._scope.branch(self._path, index))

    def aside(self) -> None:
        """Take this context out of the workflow."""
        current_scope.set(None)


def begin_branches() -> GroupBranches:
    """Begin a group; it counts nothing within an activity, and where a cancelled workflow cleans up."""
    scope = current()
    if scope is None or scope.run.cancelling:
        return GroupBranches(None)
    scope.run.check()
    return GroupBranches(scope, scope.next_path())


# --- threads ------------------------------------------------------------------------------------------------------

active_runs: Final[set[WorkflowRun]] = set()
"""Runs whose workflow function is being executed in this process."""


class _MadeInWorkflow(int):
    """A true value of `Thread.daemon` that marks threads which a workflow function has made."""


class EngineThread(threading.Thread):
    """A daemon thread of an engine, which recognises the threads that workflow functions make in it.

    New threads take `daemon` from the thread that makes them, unless it is given. In a workflow
    function it has a value of its own, which is inherited by the threads of those threads too.
    """

    @property
    def daemon(self) -> bool:
        """Whether the program may end while the thread runs: always, but see the class."""
        return True if current_scope.get() is None else _MadeInWorkflow(True)  # type: ignore[return-value] # true

    @daemon.setter
    def daemon(self, value: bool) -> None:
        raise RuntimeError("threads of an engine are daemons")


def is_unknown_thread() -> bool:
    """Return whether this thread was made by a workflow function, and is not known to its run."""
    return bool(active_runs) and isinstance(threading.current_thread().daemon, _MadeInWorkflow)


# A child is no part of the workflow that it was forked in.
@run_after_fork
def _leave_workflow() -> None:
    current_scope.set(None)
    active_runs.clear()
