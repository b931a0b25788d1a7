# this_file: src/opero/concurrency/executors/loop.py
"""The event loop: a few tasks that pull chunks from one queue, so that none waits for the driver."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING

from opero.concurrency.engine import Caps
from opero.concurrency.rounds import Rounds
from opero.concurrency.sheet import sheet_of
from opero.concurrency.work import Work

if TYPE_CHECKING:
    from opero.concurrency.engine import Chunk, Job, Report

__all__ = ["Loop"]


class Loop:
    """The engine of `mode="async"`, for coroutine functions; lives in the running loop.

    Args:
        workers: Tasks, so many items are in flight at once.
        context: Context of which each task gets a copy.
    """

    name = "async"
    caps = Caps()

    def __init__(self, workers: int, context: Context) -> None:
        self._workers = workers
        self._context = context
        self._inbox: deque[Chunk] = deque()
        self._reports: list[Report] = []
        self._rounds = Rounds()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._idle: deque[asyncio.Future[None]] = deque()

    def slots(self) -> int:
        """Each task has a chunk at work and one at hand."""
        return 2 * self._workers

    def open(self, job: Job) -> None:
        """Get ready; tasks are made when there is something for them to do."""
        self._job = job
        self._work = Work(job)
        self._loop = asyncio.get_running_loop()

    def submit(self, chunk: Chunk) -> None:
        """Queue a chunk, and let a task take it up."""
        self._rounds.expect(chunk)
        self._inbox.append(chunk)
        while self._idle:
            sleeper = self._idle.popleft()
            if not sleeper.done():
                sleeper.set_result(None)
                return
        if len(self._tasks) < self._workers:
            name = f"task-{len(self._tasks)}"
            running = self._loop.create_task(self._serve(name), context=self._context.copy())
            self._tasks.append(running)

    async def poll(self, wait: float | None) -> list[Report]:
        """Return what the tasks have reported; wait for the first report."""
        self._rounds.make()
        if not (self._reports or self._news.is_set()) and wait != 0:
            try:
                async with asyncio.timeout(self._rounds.wait(wait)):
                    await self._news.wait()
            except TimeoutError:
                return []
        elif wait == 0:
            # Whoever does not wait must still let the tasks run.
            await asyncio.sleep(0)
        self._news.clear()
        reports, self._reports = self._reports, []
        return reports

    def wake(self) -> None:
        """End a wait for reports, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop is closed, so nobody waits
            return

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Cancel all tasks and wait until they have ended."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- in a task -----------------------------------------------------------------------------------

    async def _serve(self, name: str) -> None:
        while True:
            while not self._inbox:
                sleeper = self._loop.create_future()
                self._idle.append(sleeper)
                await sleeper
            chunk = self._inbox.popleft()
            sheet = sheet_of(chunk, self._job, name, self._tell)
            with self._rounds.over(sheet):
                await self._work.achunk(chunk, sheet)

    def _tell(self, report: Report) -> None:
        self._reports.append(report)
        self._news.set()
