# this_file: src/opero/concurrency/executors/event_loop.py
"""Run coroutine functions in tasks of the running event loop, and let blocking executors serve an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

from opero.concurrency.executors.in_process import LocalChunk, LocalChunks, LocalWorker

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapExecutor, MapJob, Report

__all__ = ["AsyncInlineExecutor", "EventLoopExecutor", "ExecutorBridge"]


class EventLoopExecutor:
    """The executor of `mode="async"`, for coroutine functions: tasks that take chunks from one queue.

    Args:
        workers: Tasks, so many items are in flight at once.
        context: Context of which each task gets a copy.
    """

    def __init__(self, workers: int, context: Context) -> None:
        self._workers = workers
        self._context = context
        self._inbox: deque[LocalChunk] = deque()
        self._reports: list[Report] = []
        self._chunks = LocalChunks(self._take_report)
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._idle: deque[asyncio.Future[None]] = deque()

    def slots(self) -> int:
        """Return room for a chunk at work and one at hand for each task."""
        return 2 * self._workers

    def open(self, job: MapJob) -> None:
        """Prepare; tasks are made when there is something for them to do."""
        self._job = job
        self._chunks.flush_s = job.target_s
        self._loop = asyncio.get_running_loop()

    def submit(self, chunk: Chunk) -> None:
        """Queue a chunk, and let a task take it up."""
        self._offer(self._chunks.add(chunk))

    def _offer(self, local: LocalChunk) -> None:
        self._inbox.append(local)
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
        patience = self._chunks.patience(wait)
        if not (self._reports or self._woken.is_set()) and wait != 0:
            try:
                async with asyncio.timeout(patience):
                    await self._woken.wait()
            except TimeoutError:
                return []
        elif wait == 0:
            # The tasks must run even if the map does not wait for them.
            await asyncio.sleep(0)
        self._woken.clear()
        reports, self._reports = self._reports, []
        return reports

    def wake(self) -> None:
        """End a wait for reports, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:  # the loop is closed, so no wait is left
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
        worker = LocalWorker(self._job, self._chunks, name)
        while True:
            while not self._inbox:
                sleeper = self._loop.create_future()
                self._idle.append(sleeper)
                await sleeper
            local = self._inbox.popleft()
            if len(local.todo) > 1:
                # The next free task helps with it.
                self._offer(local)
            if local.todo:
                await worker.run_chunk_async(local)

    def _take_report(self, report: Report) -> None:
        self._reports.append(report)
        self._woken.set()


class AsyncInlineExecutor(EventLoopExecutor):
    """The executor of `sequential=True` for coroutine functions: each item runs in the caller's task."""

    def __init__(self) -> None:
        super().__init__(1, copy_context())

    def slots(self) -> int:
        """Return 1: one item at a time."""
        return 1

    def submit(self, chunk: Chunk) -> None:
        """Keep a chunk for the next `poll`."""
        self._inbox.append(self._chunks.add(chunk))

    async def poll(self, wait: float | None) -> list[Report]:
        """Run what was submitted."""
        worker = LocalWorker(self._job, self._chunks, "sequential")
        while self._inbox:
            await worker.run_chunk_async(self._inbox.popleft())
        return await super().poll(wait)


class ExecutorBridge:
    """An executor that blocks, for an event loop: its waits go to a thread.

    Args:
        engine: The executor.
    """

    def __init__(self, engine: MapExecutor) -> None:
        self._engine = engine
        self._waiter: ThreadPoolExecutor | None = None

    def slots(self) -> int:
        """Return what the executor says."""
        return self._engine.slots()

    def open(self, job: MapJob) -> None:
        """Open the executor."""
        self._engine.open(job)
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="opero-map")

    def submit(self, chunk: Chunk) -> None:
        """Submit a chunk; that never blocks."""
        self._engine.submit(chunk)

    async def poll(self, wait: float | None) -> list[Report]:
        """Wait for reports in a thread; a cancelled wait ends the thread's wait too."""
        if wait == 0:
            await asyncio.sleep(0)
            return self._engine.poll(0)
        loop = asyncio.get_running_loop()
        polling = loop.run_in_executor(self._waiter, self._engine.poll, wait)
        try:
            return await asyncio.shield(polling)
        except asyncio.CancelledError:
            self._engine.wake()
            await asyncio.wait({polling})
            raise

    def wake(self) -> None:
        """End a wait for reports."""
        self._engine.wake()

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Close the executor in the thread, so that the loop goes on meanwhile."""
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(
            waiter, lambda: self._engine.close(graceful=graceful, timeout=grace)
        )
        try:
            await asyncio.shield(closing)
        finally:
            waiter.shutdown(wait=False)
