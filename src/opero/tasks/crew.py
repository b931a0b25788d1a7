# this_file: src/opero/tasks/crew.py
"""The workers of a `Parallel`: a few asyncio tasks that pull jobs, instead of one for each.

A worker more comes only while all there are have a job at work, so that there are never more than jobs in flight. Each
job runs in a context of its own, as it would in a task of its own.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero.core.context import fork
from opero.core.failures import attach, raise_again
from opero.tasks.task_run import NOTHING, TaskRun, carry_out

if TYPE_CHECKING:
    from opero.core.context import Branches
    from opero.tasks.runnable import Runnable

__all__ = ["Crew"]

_BREATH: Final = 16
"""Jobs after which a worker lets the loop's other tasks have a turn, should none of the jobs have done so."""


class _Failure(NamedTuple):
    """What went wrong, and where: "job 3 (fetch)"."""

    where: str
    error: BaseException


class Crew:
    """One run of a parallel.

    Args:
        name: Its name, for notes.
        jobs: The jobs, pulled when a worker is free.
        limit: Most jobs in flight; None for all that there are.
        collect: Whether errors take their jobs' places, instead of ending it.
        given: The input, for the jobs that take one.
    """

    def __init__(
        self,
        name: str,
        jobs: Generator[Runnable, None, None],
        *,
        limit: int | None,
        collect: bool,
        given: Any,
    ) -> None:
        self._name = name
        self._jobs = jobs
        self._limit = limit
        self._collect = collect
        self._given = given
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()  # of each job a copy
        self._aside = copy_context()  # of each worker a copy
        begin = fork.get()
        self._branches: Branches | None = None if begin is None else begin()
        if self._branches is not None:
            self._aside.run(self._branches.aside)
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: list[Any] = []
        self._failures: list[_Failure] = []
        self._over = False
        self._gone = self._loop.create_future()

    async def work(self) -> list[Any]:
        """Run all jobs; return their results in order, or raise the first error when all workers have ended."""
        self._hire()
        try:
            try:
                if self._tasks:
                    await self._gone
            except asyncio.CancelledError:
                self._stop()
                await self._all_gone()
                raise
        finally:
            self._close()
            failures, self._failures = self._failures, []
            # The contexts hold this very run, it will hold the error, and that the frames of this.
            self._context = self._aside = Context()
        if failures:
            try:
                raise_again(self._explained(failures))
            finally:
                # Frames that name an error which passes through them are reference cycles.
                failures.clear()
        return self._results

    async def _all_gone(self) -> None:
        """Wait for the workers, however often that is cancelled."""
        while self._tasks:
            self._gone = self._loop.create_future()
            try:
                await self._gone
            except asyncio.CancelledError:
                continue

    # --- workers --------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Let one more worker come, if there may be one more."""
        if self._over or (self._limit is not None and len(self._tasks) >= self._limit):
            return
        task = self._aside.copy().run(self._loop.create_task, self._serve())
        self._tasks.add(task)
        task.add_done_callback(self._leaves)

    def _leaves(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not (self._tasks or self._gone.done()):
            self._gone.set_result(None)

    async def _serve(self) -> None:
        if asyncio.current_task() not in self._tasks:
            # An eager task factory begins it before `_hire` has counted it.
            await asyncio.sleep(0)
        done = 0
        while (job := self._pull()) is not None:
            if not done:
                # Two for one, so that many are there after a few turns of the loop.
                self._hire()
                self._hire()
            await self._one(len(self._results) - 1, job)
            if not self._over:
                _forget_cancellation()
            done += 1
            if not done % _BREATH:
                await asyncio.sleep(0)

    def _pull(self) -> Runnable | None:
        """Return the next job, and make room for its result; None if there is none."""
        if self._over:
            return None
        try:
            job = next(self._jobs, None)
        except Exception as error:  # noqa: BLE001 - it ends the parallel as a job's would
            self._fail("its iterable", error)
            return None
        if job is None:
            self._over = True
        else:
            self._results.append(None)
        return job

    async def _one(self, index: int, job: Runnable) -> None:
        """Run one job and keep what comes of it."""
        context = self._context.copy()
        try:
            if self._branches is not None:
                context.run(self._branches.enter, index)
            given = self._given if job.takes_input else NOTHING
            running = carry_out(context.run(TaskRun, job, given))
            self._results[index] = await _within(context, running)
        except GeneratorExit:
            raise  # nobody waits any more
        except BaseException as error:
            collected = isinstance(error, Exception)
            if isinstance(error, asyncio.CancelledError):
                if _cancelled_from_outside():
                    # By the crew, or by somebody who cancels all tasks there are.
                    if not self._over:
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
        self._failures.append(_Failure(where, error))
        self._stop()

    def _stop(self) -> None:
        """Let no further job begin, and cancel those at work."""
        self._over = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    def _close(self) -> None:
        """Close a generator of jobs that was left before its end."""
        try:
            self._jobs.close()
        except Exception as error:  # noqa: BLE001 - what was raised before goes first
            self._failures.append(_Failure("its iterable", error))

    def _explained(self, failures: list[_Failure]) -> BaseException:
        """Return the first error, with the others behind it and in its note."""
        first, *others = failures
        lines = [f"ended with {first.where}"]
        lines += [f"  then {where}: {type(error).__name__}" for where, error in others]
        attach(
            first.error,
            self._name,
            "\n".join(lines),
            [error for _, error in others],
            owner=f"opero.tasks.{self._name}",
        )
        return first.error


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _forget_cancellation() -> None:
    """Take back what a job has asked of its task, and then not heeded: the next one has no part in it."""
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
