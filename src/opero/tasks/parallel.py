# this_file: src/opero/tasks/parallel.py
"""Run jobs side by side: `Parallel`, and the worker tasks that pull its jobs."""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import suppress
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Final, Literal

from opero.core.failures import attach, raise_again
from opero.errors import OperoUsageError
from opero.tasks.task import NOTHING, Runnable, TaskRun, as_runnable, carry_out
from opero.utils.ambient import fork, require_loop
from opero.utils.checks import none_or, one_of, whole

if TYPE_CHECKING:
    from opero.utils.ambient import Branches


OnError = Literal["raise", "collect"]
_limit = none_or(whole(1))
_on_error = one_of("raise", "collect")
_Jobs = Runnable | Callable[..., Any]


class Parallel(Runnable):
    """Jobs that run at the same time; their results come in the order of the jobs.

    Jobs are pulled when there is room for them: with a limit of 100, fifty thousand jobs never take more than a hundred
    asyncio tasks. When a job fails, the others are cancelled and waited for, and its own error is raised. Errors of
    other jobs are listed in a note on it, and returned by `opero.failures`.

    Args:
        jobs: Tasks, sequences, parallels, circuit groups, or functions; or one iterable of such things, which is read
            as jobs begin. An iterator is read once, so that such a parallel runs once.
        limit: Most jobs that run at once; None for all of them. `max_workers=` is another name for it.
        on_error: "raise", or "collect" to return errors in the places of their jobs' results.
        name: Shown in events and errors.

    Raises:
        OperoUsageError: Something is no job, the limit is less than 1, or given twice.

    Example:
        >>> from opero.tasks import Parallel, Task, run_sync
        >>> run_sync(Parallel(Task(pow, 2, 3), Task(pow, 3, 2)))
        [8, 9]
        >>> run_sync(Parallel((Task(pow, 2, n) for n in range(5)), limit=2))
        [1, 2, 4, 8, 16]
    """

    def __init__(
        self,
        *jobs: _Jobs | Iterable[_Jobs],
        limit: int | None = None,
        on_error: OnError = "raise",
        name: str | None = None,
        max_workers: int | None = None,
    ) -> None:
        super().__init__(name, "Parallel")
        if max_workers is not None:
            if limit is not None:
                raise OperoUsageError("limit= and max_workers= are the same: give one of them.")
            limit = max_workers
        _limit("limit", limit)
        _on_error("on_error", on_error)
        self.limit: int | None = limit
        self.on_error: OnError = on_error
        only: Any = jobs[0] if len(jobs) == 1 else None
        self.jobs: Iterable[Any]
        if _is_iterable_of_jobs(only):
            self.jobs = only
            # The jobs are not known yet: those that take an input get it.
            self.takes_input: bool = True
        else:
            made = tuple(as_runnable(job) for job in jobs)
            self.jobs = made
            self.takes_input = any(job.takes_input for job in made)
        self._used_up = False

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        workers = WorkerTasks(self, run.given, self._begin())
        # The run will hold the error that passes through this frame.
        del run
        return await workers.run()

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
    """Yield jobs as definitions; a generator that is left early is closed."""
    try:
        for job in jobs:
            yield as_runnable(job)
    finally:
        close: Callable[[], object] | None = getattr(jobs, "close", None)
        if close is not None:
            close()


# --- workers ----------------------------------------------------------------------------------------

_JOBS_PER_TURN: Final = 16
"""Jobs after which a worker yields to the loop's other tasks, in case none of the jobs has done so."""


class WorkerTasks:
    """One run of a parallel: a few asyncio tasks that pull jobs, instead of one task for each job.

    Another worker is added only while all of them are running a job, so that there are never more than jobs in flight.
    Each job runs in a context of its own, as it would in a task of its own.

    Args:
        parallel: Its definition.
        given: The input of jobs that take one.
        jobs: The jobs, pulled when there is room for them.
    """

    def __init__(
        self, parallel: Parallel, given: Any, jobs: Generator[Runnable, None, None]
    ) -> None:
        self._name = parallel.name
        self._limit = parallel.limit
        self._collect = parallel.on_error == "collect"
        self._given = given
        self._jobs = jobs
        require_loop("run branches at once")
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()  # copied for each job
        self._worker_context = copy_context()  # copied for each worker
        begin = fork.get()
        self._branches: Branches | None = None if begin is None else begin()
        if self._branches is not None:
            self._worker_context.run(self._branches.aside)
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: list[Any] = []
        self._failures: list[tuple[str, BaseException]] = []  # "job 3 (fetch)", and its error
        self._closed = False

    async def run(self) -> list[Any]:
        """Run all jobs; return their results in order, or raise the first error when all workers have ended."""
        self._add_worker()
        try:
            await self._join()
        except asyncio.CancelledError:
            self._stop()
            while self._tasks:  # however often that is cancelled
                with suppress(asyncio.CancelledError):
                    await self._join()
            raise
        finally:
            self._close()
            failures, self._failures = self._failures, []
            # The contexts hold this run, it will hold the error, and that holds the frames of this method.
            self._context = self._worker_context = Context()
        if failures:
            try:
                raise_again(self._explained(failures))
            finally:
                # Frames that name an error which passes through them are reference cycles.
                failures.clear()
        return self._results

    async def _join(self) -> None:
        """Wait for the workers, also for those that are added meanwhile."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- workers --------------------------------------------------------------------------------------

    def _add_worker(self) -> None:
        """Add a worker, if the limit permits and there is a job for it."""
        if self._limit is not None and len(self._tasks) >= self._limit:
            return
        if (job := self._pull()) is None:
            return
        task = self._worker_context.copy().run(self._loop.create_task, self._serve(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, job: tuple[int, Runnable] | None) -> None:
        if asyncio.current_task() not in self._tasks:
            # An eager task factory starts it before `_add_worker` has counted it.
            await asyncio.sleep(0)
        # Two for one, so that there are many after a few turns of the loop.
        self._add_worker()
        self._add_worker()
        done = 0
        # A job that another worker's failure finds pulled and not begun is not begun any more.
        while job is not None and not self._failures:
            await self._one(*job)
            if not self._closed:
                _forget_cancellation()
            done += 1
            if not done % _JOBS_PER_TURN:
                await asyncio.sleep(0)
            job = self._pull()

    def _pull(self) -> tuple[int, Runnable] | None:
        """Return the next job and the place of its result; None if there is none."""
        if self._closed:
            return None
        try:
            job = next(self._jobs, None)
        except Exception as error:  # noqa: BLE001 - it ends the parallel as a job's would
            self._fail("its iterable", error)
            return None
        if job is None:
            self._closed = True
            return None
        self._results.append(None)
        return len(self._results) - 1, job

    async def _one(self, index: int, job: Runnable) -> None:
        """Run one job and store its result or error."""
        context = self._context.copy()
        try:
            if self._branches is not None:
                context.run(self._branches.enter, index)
            given = self._given if job.takes_input else NOTHING
            running = carry_out(context.run(TaskRun, job, given))
            self._results[index] = await _within(context, running)
        except GeneratorExit:
            raise  # the task is being destroyed
        except BaseException as error:
            collected = isinstance(error, Exception)
            if isinstance(error, asyncio.CancelledError):
                if _cancelled_from_outside():
                    # By `_stop`, or by code that cancels all tasks of the loop.
                    if not self._closed:
                        self._fail("a worker", error)
                    raise
                collected = True
            if collected and self._collect:
                self._results[index] = error
            else:
                self._fail(f"job {index} ({job.name})", error)
        finally:
            del context

    # --- failures -------------------------------------------------------------------------------------

    def _fail(self, where: str, error: BaseException) -> None:
        self._failures.append((where, error))
        self._stop()

    def _stop(self) -> None:
        """Start no further job and cancel those that run."""
        self._closed = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    def _close(self) -> None:
        """Close a generator of jobs that was not read to its end."""
        try:
            self._jobs.close()
        except Exception as error:  # noqa: BLE001 - earlier errors go first
            self._failures.append(("its iterable", error))

    def _explained(self, failures: list[tuple[str, BaseException]]) -> BaseException:
        """Return the first error, with the others behind it and in its note."""
        (first, error), *others = failures
        lines = [f"ended with {first}", *(f"  then {w}: {type(e).__name__}" for w, e in others)]
        behind = [other for _, other in others]
        attach(error, self._name, "\n".join(lines), behind, owner=f"opero.tasks.{self._name}")
        return error


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _forget_cancellation() -> None:
    """Withdraw a cancellation that a job has requested of its own task and then swallowed."""
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


@types.coroutine
def _within(context: Context, running: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Await a coroutine that runs in another context than the task."""
    step: Callable[..., Any] = running.send
    what: Any = None
    try:
        while True:
            try:
                future = context.run(step, what)
            except StopIteration as end:
                return end.value
            try:
                what, step = (yield future), running.send
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's to handle
                what, step = error, running.throw
    finally:
        # Frames that the error passes through must not hold what holds it.
        del what, context, running, step
