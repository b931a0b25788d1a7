# this_file: src/opero/concurrency/executors/in_process.py
"""Run items in threads of this process, or where the map was called.

Workers of this process, threads or tasks, share the items of a chunk: each takes one item at a time, and one that is
idle helps with the chunk of another, so that a slow item never keeps its neighbours from a free worker.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done
from opero.concurrency.item_runner import ItemRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opero.concurrency.executors.base import Chunk, ItemOutcome, MapJob, Parked, Report
    from opero.concurrency.item_runner import Result

__all__ = [
    "InlineExecutor",
    "LocalChunk",
    "LocalChunks",
    "LocalWorker",
    "ThreadExecutor",
]

_LOOK: Final = 0.03
"""Seconds after which finished items of a chunk that is under way are reported."""
_ONLY: Final = range(1)


# --- chunks that workers share --------------------------------------------------------------------


class LocalChunk:
    """A chunk whose items are taken one at a time, by one worker or by several.

    Args:
        chunk: The chunk.

    Attributes:
        chunk: As above.
        todo: Positions that no worker has taken. The steps of a deque are atomic: no item is run twice, and none pays
            for a lock.
        unreported: How many items are still to be reported.
    """

    __slots__ = ("chunk", "todo", "unreported")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk: Final = chunk
        self.unreported: int = len(chunk.items)
        self.todo: Final = deque(range(self.unreported))


class LocalChunks:
    """The chunks that workers of this process have under way.

    Args:
        report: Called with each report, from any worker.

    Attributes:
        flush_s: Seconds after which a worker reports what it has done.
        busy: Workers at a chunk of several items.
        report: As above.
    """

    def __init__(self, report: Callable[[Report], object]) -> None:
        self.flush_s: float = 0.0
        self.busy: Final[set[LocalWorker]] = set()
        self.report: Final = report
        self._lock = threading.Lock()
        self._open: dict[int, LocalChunk] = {}
        self._due = 0.0

    def add(self, chunk: Chunk) -> LocalChunk:
        """Return a chunk for workers to take."""
        local = LocalChunk(chunk)
        if local.unreported > 1:
            self._open[chunk.id] = local
        return local

    def flush(self, worker: LocalWorker) -> None:
        """Report what a worker has done so far."""
        with self._lock:
            if (done := worker.drain()) is not None:
                local = worker.local
                local.unreported -= len(done.values)
                if not local.unreported:
                    self._open.pop(done.chunk, None)
                self.report(done)

    def patience(self, timeout: float | None) -> float | None:
        """Report what workers have done while they are busy with slow items, if it is time for that.

        Args:
            timeout: Longest wait for reports in seconds, None for ever.

        Returns:
            How long to wait before the next call.
        """
        if not self._open:
            return timeout
        if (now := monotonic()) >= self._due:
            self._due = now + _LOOK
            # A copy, because workers come and go meanwhile.
            for worker in self.busy.copy():
                self.flush(worker)
        return _LOOK if timeout is None else min(timeout, _LOOK)

    def close(self) -> None:
        """Let no further item begin."""
        for local in list(self._open.values()):
            local.todo.clear()


class LocalWorker(ItemRunner):
    """A worker that shares chunks with others of this process.

    Args:
        job: The job.
        chunks: Reports what is done.
        name: Its name.
        context: Context of which each item of a synchronous function gets a copy, so that none sees what another one
            set; None where the worker's own will do.

    Attributes:
        local: The chunk that it is at.
    """

    local: LocalChunk

    def __init__(
        self, job: MapJob, chunks: LocalChunks, name: str, context: Context | None = None
    ) -> None:
        super().__init__(job)
        self._chunks = chunks
        self._name = name
        self._context = context
        self._copies = context is not None or job.enter is not None
        # What is done of the chunk and not reported yet.
        self._places: list[int] = []
        self._values: list[Any] = []
        self._odd: dict[int, ItemOutcome] = {}

    def run_chunk(self, local: LocalChunk) -> None:
        """Run the items of a chunk of a synchronous function that no other worker has taken."""
        chunk, add = local.chunk, self._begin_chunk(local)
        items, parked, take = chunk.items, chunk.parked or {}, local.todo.popleft
        try:
            # Asking first would not do: another worker may take the last one in between.
            while (position := _next(take)) is not None:
                item, known = items[position], parked.get(position)
                if self._copies:
                    context = self._copied(chunk.idx[position], item)
                    add(position, *context.run(self.run, item, known))
                else:
                    add(position, *self.run(item, known))
        finally:
            self._end_chunk()

    async def run_chunk_async(self, local: LocalChunk) -> None:
        """Run a chunk of a coroutine function, as `run_chunk` does."""
        chunk, add = local.chunk, self._begin_chunk(local)
        items, parked, take = chunk.items, chunk.parked or {}, local.todo.popleft
        try:
            while (position := _next(take)) is not None:
                item, known = items[position], parked.get(position)
                if self._copies:
                    context = self._copied(chunk.idx[position], item)
                    add(position, *await self._run_in_task(context, item, known))
                else:
                    add(position, *await self.run_async(item, known))
        finally:
            self._end_chunk()

    def _begin_chunk(self, local: LocalChunk) -> Callable[..., None]:
        """Begin a chunk; return what takes its finished items."""
        self.local = local
        self._since = perf_counter()
        if len(local.chunk.items) == 1:
            return self._add_only
        self._due = self._since + self._chunks.flush_s
        self._chunks.busy.add(self)
        return self._add

    def _end_chunk(self) -> None:
        if self in self._chunks.busy:
            self._chunks.flush(self)
            self._chunks.busy.discard(self)

    def _add_only(self, _: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Report the only item of a chunk."""
        odd = {} if outcome is None else {0: outcome}
        busy = perf_counter() - self._since
        self._chunks.report(Done(self.local.chunk.id, _ONLY, [value], odd, busy, self._name))

    def _add(self, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Add a finished item, and report what is done when it is time for that."""
        if outcome is not None:
            self._odd[position] = outcome
        self._places.append(position)
        # Last, because an item whose value is here counts as done for the thread that reports.
        self._values.append(value)
        if perf_counter() >= self._due:
            self._chunks.flush(self)

    def drain(self) -> Done | None:
        """Return what is not reported yet, None if that is nothing."""
        count = len(self._values)
        if not count:
            return None
        now = perf_counter()
        busy, self._since = now - self._since, now
        self._due = now + self._chunks.flush_s
        places: Sequence[int] = self._places[:count]
        values = self._values[:count]
        del self._places[:count], self._values[:count]
        odd: dict[int, ItemOutcome] = {}
        if self._odd:
            odd = {n: self._odd.pop(place) for n, place in enumerate(places) if place in self._odd}
        first, last = places[0], places[-1]
        if last - first + 1 == count:
            places = range(first, last + 1)
        return Done(self.local.chunk.id, places, values, odd, busy, self._name)

    def _copied(self, index: int, item: Any) -> Context:
        """Return the context of an attempt at an item, which the map's recorder may prepare."""
        context = copy_context() if self._context is None else self._context.copy()
        if self._job.enter is not None:
            context.run(self._job.enter, index, item)
        return context

    async def _run_in_task(self, context: Context, item: Any, parked: Parked | None) -> Result:
        """Run an item in a context; in an event loop only a task has one of its own."""
        from asyncio import create_task

        task = create_task(self.run_async(item, parked), context=context)
        try:
            return await task
        finally:
            # An item that is cut short takes its task along; for one that has ended this does nothing.
            task.cancel()


def _next(take: Callable[[], int]) -> int | None:
    """Return a position that no other worker has taken, None if there is none left."""
    try:
        return take()
    except IndexError:
        return None


# --- threads --------------------------------------------------------------------------------------


class ThreadExecutor:
    """The executor of `mode="thread"`, and of a synchronous function in `mode="async"`.

    A coroutine function gets an event loop in each thread. The threads are daemons: they never keep the interpreter
    alive.

    Args:
        workers: Most threads.
        context: Context of which each item gets a copy; None where each runs in that of its thread.
    """

    def __init__(self, workers: int, context: Context | None) -> None:
        self.workers = workers
        self._context = context
        self._waiting: SimpleQueue[LocalChunk | None] = SimpleQueue()
        self._reported: SimpleQueue[Report | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._chunks = LocalChunks(self._reported.put)
        self._items = 0
        self._stopped = False
        self._take: Callable[[], LocalChunk | None] = self._waiting.get

    def slots(self) -> int:
        """Return room for a chunk at work and one at hand for each thread."""
        return 2 * self.workers

    def open(self, job: MapJob) -> None:
        """Prepare; threads start with the first `poll`, so that each finds its chunk waiting."""
        self._job = job
        self._chunks.flush_s = job.target_s

    def submit(self, chunk: Chunk) -> None:
        """Put a chunk into the queue."""
        self._items += len(chunk.items)
        self._waiting.put(self._chunks.add(chunk))

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what the threads have reported."""
        self._start_workers()
        # No name for reports here: a traceback of an item may lead to this frame, and would be a reference cycle.
        return self._reports(self._chunks.patience(timeout))

    def _reports(self, wait: float | None) -> list[Report]:
        reports: list[Report] = []
        with contextlib.suppress(Empty):
            first = self._reported.get_nowait() if wait == 0 else self._reported.get(timeout=wait)
            while first is not None:
                reports.append(first)
                first = self._reported.get_nowait()
        return reports

    def _start_workers(self) -> None:
        """Start a thread for each item so far, up to the number of workers."""
        serve = self._serve_async if self._job.pipeline.awaits else self._serve
        while len(self._threads) < min(self.workers, self._items):
            name = f"thread-{len(self._threads)}"
            thread = threading.Thread(target=serve, args=(name,), name=f"opero-{name}", daemon=True)
            # Noted first: a start that is interrupted may have made it already.
            self._threads.append(thread)
            thread.start()

    def wake(self) -> None:
        """End a wait for reports."""
        self._reported.put(None)

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Let the threads return; one that is in the middle of an item is left behind when time is up."""
        threads, self._threads = self._threads, []
        self._stopped = True
        self._chunks.close()
        for _ in threads:
            self._waiting.put(None)
        end = monotonic() + (timeout if graceful else min(timeout, 0.01))
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - monotonic()))

    # --- in a thread ---------------------------------------------------------------------------------

    def _serve(self, name: str) -> None:
        worker = LocalWorker(self._job, self._chunks, name, self._context)
        while (local := self._next()) is not None:
            worker.run_chunk(local)

    def _serve_async(self, name: str) -> None:
        import asyncio

        worker, context = LocalWorker(self._job, self._chunks, name), self._context
        with asyncio.Runner() as loop:
            while (local := self._next()) is not None:
                loop.run(worker.run_chunk_async(local), context=context and context.copy())

    def _next(self) -> LocalChunk | None:
        """Wait for a chunk that has items left; return None at the end of the map."""
        while (local := self._take()) is not None and not self._stopped:
            if len(local.todo) > 1:
                # The next free thread helps with it.
                self._waiting.put(local)
            if local.todo:
                return local
        return None


class InlineExecutor(ThreadExecutor):
    """The executor of `sequential=True`: no workers, so that a debugger sees one stack."""

    def __init__(self) -> None:
        super().__init__(1, None)

    def slots(self) -> int:
        """Return 1: one item at a time."""
        return 1

    def open(self, job: MapJob) -> None:
        """Prepare."""
        super().open(job)
        self._worker = LocalWorker(job, self._chunks, "sequential")

    def _start_workers(self) -> None:
        """Run what was submitted."""
        while not self._waiting.empty() and (local := self._waiting.get()) is not None:
            self._worker.run_chunk(local)
