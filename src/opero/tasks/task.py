# this_file: src/opero/tasks/task.py
"""The smallest thing that runs: one function with its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from opero.errors import OperoUsageError
from opero.tasks.callee import callee_of
from opero.tasks.runnable import Runnable
from opero.tasks.task_run import NOTHING, TaskRun
from opero.tasks.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable

__all__ = ["Task", "running_task"]

running_task: Final[ContextVar[TaskRun | None]] = ContextVar("opero_task", default=None)
"""The run of the task whose function this context belongs to."""


class Task(Runnable):
    """A function with its arguments, to be run any number of times.

    A coroutine function is awaited; any other one runs in a thread, with a copy of the context, so that the
    event loop goes on. Nothing is cached, retried or limited unless `options` or an `@opero` function say so.

    Args:
        fn: The function.
        args: Its positional arguments. In a sequence, a task without any gets the last result as the first
            one, if the function has a parameter for it that needs a value.
        name: Shown in events and errors; the function's by default.
        options: Options of `@opero` for this task, as a dict; for an `@opero` function those that differ.
        kwargs: Keyword arguments of the function; `functools.partial` takes those called `name` or `options`.

    Raises:
        OperoUsageError: The function cannot be called with these arguments, or an option is wrong.

    Example:
        >>> from opero.tasks import Task, run_sync
        >>> run_sync(Task(sorted, [3, 1, 2], reverse=True))
        [3, 2, 1]
        >>> from opero.testing import flaky
        >>> run_sync(Task(flaky("ok"), options=dict(retries=2, min_delay=0)))
        'ok'
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(fn, Runnable):
            raise OperoUsageError(
                f"Task({fn!r}): it is something that runs already; use it as it is."
            )
        callee = callee_of(fn)
        super().__init__(name, callee.name)
        callee.check(args, kwargs)
        self.takes_input: bool = callee.takes_input(args, kwargs)
        self._args = args
        self._kwargs = kwargs
        self._call: Callable[..., Awaitable[Any]]
        if options is not None or hasattr(fn, "__opero__"):
            from opero.tasks.policies import with_policies

            self._call = with_policies(fn, callee, options)
        else:
            self._call = fn if callee.is_async else off_loop(fn)

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        token = running_task.set(run)
        try:
            return await self._execute_with_policies()
        finally:
            try:
                running_task.reset(token)
            except ValueError:
                pass  # it was closed by the garbage collector, in another context than its own
            # The run will hold the error that passes through this frame.
            del run, token

    async def _execute_with_policies(self) -> Any:
        """Call the function, through what `options` put around it.

        It may be replaced on a task by something that calls it, once or more often; it takes its input from the
        run that it is called in.
        """
        run = running_task.get()
        try:
            args = self._args
            if run is not None and run.task is self and run.given is not NOTHING:
                args = (run.given,)
            return await self._call(*args, **self._kwargs)
        finally:
            del run  # as above


def off_loop(fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Return a coroutine function that calls `fn` in a thread, and awaits what it gives if that is awaitable."""

    async def called(*args: Any, **kwargs: Any) -> Any:
        result = await in_thread(functools.partial(fn, *args, **kwargs))
        return await result if hasattr(type(result), "__await__") else result

    return called
