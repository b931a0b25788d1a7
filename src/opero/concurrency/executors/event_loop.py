# this_file: src/opero/concurrency/executors/event_loop.py
"""Run coroutine functions in tasks of the running event loop, and let blocking executors serve an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from itertools import repeat
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import ItemOutcome, Lost
from opero.concurrency.executors.in_process import Finished, context_for, reports_of
from opero.concurrency.item_runner import ItemRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.executors.base import Chunk, MapExecutor, MapJob, Parked, Report
    from opero.concurrency.item_runner import Result


_NONE: Final[dict[int, Any]] = {}


class EventLoopExecutor:
    """The executor of `mode="async"`, for coroutine functions: tasks that take items from one queue.

    Args:
        workers: Tasks, so many items are in flight at once.
        context: Context of which each task gets a copy.
    """

    def __init__(self, workers: int, context: Context) -> None:
        self._workers = workers
        # As many items at work as there are tasks, and as many at hand.
        self.slots: int = 2
        self._context = context
        self._waiting: deque[tuple[Chunk, int]] = deque()
        self._finished: list[Finished] = []
        self._returned: list[Report] = []
        self._halted = False
        self._timed = False
        self._woken = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = 0
        self._closed = False

    def open(self, job: MapJob) -> None:
        """Prepare; tasks are made when there is something for them to do."""
        self._job = job
        self._runner = ItemRunner(job)
        self._loop = asyncio.get_running_loop()

    def submit(self, chunk: Chunk) -> None:
        """Queue the items of a chunk, for tasks that end when the queue is empty."""
        count = len(chunk.items)
        self._waiting.extend(zip(repeat(chunk), range(count)))
        if self._halted:
            self.halt()
            return
        for _ in range(min(count, self._workers - self._serving)):
            self._serving += 1
            task = self._loop.create_task(self._serve(), context=self._context.copy())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def poll(self, wait: float | None) -> list[Report]:
        """Return what the tasks have reported; wait for the first report."""
        if wait == 0:
            # The tasks must run even if the map does not wait for them.
            await asyncio.sleep(0)
        elif not self._woken.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._woken.wait()
        self._woken.clear()
        self._timed = False
        returned, self._returned = self._returned, []
        return reports_of(self._finished) + returned

    def halt(self) -> None:
        """Give back all that waits for a task."""
        self._halted = True
        while self._waiting:
            chunk, place = self._waiting.popleft()
            self._returned.append(Lost(chunk.id, (place,), None, "stopped"))
            self._woken.set()

    def wake(self) -> None:
        """End a wait for reports, from any thread."""
        # Once the loop is closed there is no wait left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._woken.set)

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Cancel all tasks and wait until they have ended."""
        self._closed = True
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- in a task -----------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Run items until none is left."""
        waiting, run, apart = self._waiting, self._runner.run_async, self._job.enter is not None
        try:
            while waiting:
                chunk, place = waiting.popleft()
                item, parked = chunk.items[place], (chunk.parked or _NONE).get(place)
                began = perf_counter()
                try:
                    # No names for results: a traceback leads to this frame, and would be a reference cycle.
                    if apart:
                        result = self._run_apart(chunk.idx[place], item, parked)
                        self._add(chunk, place, began, *await result)
                    else:
                        self._add(chunk, place, began, *await run(item, parked))
                except asyncio.CancelledError as error:
                    if not self._closed:  # the function has cancelled the task that runs it
                        self._add(chunk, place, began, None, ItemOutcome(error=error))
                    raise
        finally:
            self._serving -= 1

    def _add(
        self, chunk: Chunk, place: int, began: float, value: Any, outcome: ItemOutcome | None
    ) -> None:
        """Add a finished item; while others wait for a task, what is done is reported many at once."""
        self._finished.append((chunk, place, value, outcome, perf_counter() - began))
        if outcome is not None and self._job.ends(outcome):
            self.halt()
        if outcome is not None or not self._waiting:
            self._woken.set()
        elif not self._timed:
            self._timed = True
            self._loop.call_later(self._job.target_s, self._woken.set)

    async def _run_apart(self, index: int, item: Any, parked: Parked | None) -> Result:
        """Run an item in a context of its own; in an event loop only a task has one."""
        context = context_for(self._job, None, index, item)
        task = self._loop.create_task(self._runner.run_async(item, parked), context=context)
        try:
            return await task
        finally:
            # An item that is cut short takes its task along; for one that has ended this does nothing.
            task.cancel()


class AsyncInlineExecutor(EventLoopExecutor):
    """The executor of `sequential=True` for coroutine functions: each item runs in the caller's task."""

    def __init__(self) -> None:
        super().__init__(0, copy_context())
        self.slots = 1

    async def poll(self, wait: float | None) -> list[Report]:
        """Run what was submitted."""
        self._serving += 1
        await self._serve()
        return await super().poll(wait)


class ExecutorBridge:
    """An executor that blocks, for an event loop: its waits go to a thread.

    Args:
        engine: The executor.

    Attributes:
        slots, open, submit, halt, wake: The executor's own, which never block for long.
    """

    def __init__(self, engine: MapExecutor) -> None:
        self._engine = engine
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="opero-map")
        self.slots: int = engine.slots
        self.open: Callable[[MapJob], None] = engine.open
        self.submit: Callable[[Chunk], None] = engine.submit
        self.halt: Callable[[], None] = engine.halt
        self.wake: Callable[[], None] = engine.wake

    async def poll(self, wait: float | None) -> list[Report]:
        """Wait for reports in a thread; a cancelled wait ends the thread's wait too."""
        loop = asyncio.get_running_loop()
        polling = loop.run_in_executor(self._waiter, self._engine.poll, wait)
        try:
            return await asyncio.shield(polling)
        except asyncio.CancelledError:
            self.wake()
            await asyncio.wait({polling})
            raise

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Close the executor in the thread, so that the loop goes on meanwhile."""
        close = functools.partial(self._engine.close, graceful=graceful, timeout=grace)
        closing = asyncio.get_running_loop().run_in_executor(self._waiter, close)
        try:
            await asyncio.shield(closing)
        finally:
            self._waiter.shutdown(wait=False)
