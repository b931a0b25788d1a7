# this_file: src/opero/tasks/parallel.py
"""Jobs side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, Literal

from opero.errors import OperoUsageError
from opero.tasks.runnable import Runnable, as_runnable
from opero.utils.checks import whole

if TYPE_CHECKING:
    from opero.tasks.task_run import TaskRun

__all__ = ["OnError", "Parallel"]

OnError = Literal["raise", "collect"]
_Job = Runnable | Callable[..., Any]


class Parallel(Runnable):
    """Jobs that run at the same time; their results come in the order of the jobs.

    Jobs are pulled when there is room for them: with a limit of 100, fifty thousand jobs never take more than a hundred
    asyncio tasks. When a job fails, the others are cancelled and waited for, and its own error is raised, whatever else
    fails meanwhile; that is told in a note on it, and by `opero.failures`.

    Args:
        jobs: Tasks, sequences, parallels, circuit groups, or functions; or one iterable of such things, which is read
            as jobs begin. An iterator is read once, so that such a parallel runs once.
        limit: Most jobs at work at once; None for all of them.
        on_error: "raise", or "collect" for errors in the places of their jobs' results.
        name: Shown in events and errors.

    Raises:
        OperoUsageError: Something is no job, or the limit is less than 1.

    Example:
        >>> from opero.tasks import Parallel, Task, run_sync
        >>> run_sync(Parallel(Task(pow, 2, 3), Task(pow, 3, 2)))
        [8, 9]
        >>> run_sync(Parallel((Task(pow, 2, n) for n in range(5)), limit=2))
        [1, 2, 4, 8, 16]
    """

    def __init__(
        self,
        *jobs: _Job | Iterable[_Job],
        limit: int | None = None,
        on_error: OnError = "raise",
        name: str | None = None,
    ) -> None:
        super().__init__(name, "Parallel")
        if limit is not None:
            whole(1)("limit", limit)
        if on_error not in ("raise", "collect"):
            raise OperoUsageError(f'on_error={on_error!r} must be "raise" or "collect".')
        self.limit: int | None = limit
        self.on_error: OnError = on_error
        only: Any = jobs[0] if len(jobs) == 1 else None
        self.jobs: Iterable[Any]
        if _is_iterable_of_jobs(only):
            self.jobs = only
            # Nobody has seen the jobs yet: those that take an input get it.
            self.takes_input: bool = True
        else:
            made = tuple(as_runnable(job) for job in jobs)
            self.jobs = made
            self.takes_input = any(job.takes_input for job in made)
        self._used_up = False

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        from opero.tasks.crew import Crew

        given, jobs = run.given, self._begin()
        limit = self.limit
        if isinstance(self.jobs, Sized):
            # No worker comes for whom there is no job.
            limit = min(len(self.jobs), limit or len(self.jobs))
        # The run will hold the error that passes through this frame.
        del run
        crew = Crew(
            self.name,
            jobs,
            limit=limit,
            collect=self.on_error == "collect",
            given=given,
        )
        return await crew.work()

    def _begin(self) -> Generator[Runnable, None, None]:
        jobs = iter(self.jobs)
        if jobs is self.jobs:
            if self._used_up:
                raise OperoUsageError(
                    f"{self!r}: its jobs came from an iterator, which has been read by an earlier run. "
                    "Give a list, or make a Parallel for each run."
                )
            self._used_up = True
        return _runnables(jobs)


def _is_iterable_of_jobs(given: Any) -> bool:
    return (
        isinstance(given, Iterable)
        and not callable(given)
        and not isinstance(given, Runnable | str | bytes)
        and not inspect.iscoroutine(given)
    )


def _runnables(jobs: Iterator[Any]) -> Generator[Runnable, None, None]:
    """Take jobs as they come; a generator that is left early is closed."""
    try:
        for job in jobs:
            yield as_runnable(job)
    finally:
        close: Callable[[], object] | None = getattr(jobs, "close", None)
        if close is not None:
            close()
