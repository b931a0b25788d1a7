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
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done, ItemOutcome
from opero.concurrency.item_runner import ItemRunner

if TYPE_CHECKING:
    from asyncio import Runner
    from collections.abc import Sequence

    from opero.concurrency.executors.base import Chunk, MapJob, Parked, Report

__all__ = [
    "InlineExecutor",
    "LocalChunk",
    "LocalWorker",
    "ThreadExecutor",
    "as_range",
    "context_for",
    "only_done",
]

_LOOK: Final = 0.03
"""Seconds after which finished items of a chunk that is under way are reported."""
_TOGETHER: Final = 0.001
"""Seconds within which finished items are reported together, while the threads have others at hand."""
_ONLY: Final = range(1)
_Add = Callable[[int, Any, ItemOutcome | None], None]


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


class LocalWorker(ItemRunner):
    """A worker that shares chunks with others of this process.

    Args:
        job: The job.
        executor: Takes what is done.
        context: Context of which each item gets a copy, so that none sees what another one set; None where the
            worker's own will do.
        loop: Runs the items of a coroutine function, None for a synchronous one.

    Attributes:
        local: The chunk that it is at.
    """

    local: LocalChunk

    def __init__(
        self,
        job: MapJob,
        executor: ThreadExecutor,
        context: Context | None = None,
        loop: Runner | None = None,
    ) -> None:
        super().__init__(job)
        self._executor = executor
        self._context = context
        self._loop = loop
        self._plain = context is None and job.enter is None and loop is None
        # What is done of the chunk and not reported yet.
        self._places: list[int] = []
        self._values: list[Any] = []
        self._odd: dict[int, ItemOutcome] = {}

    def run_chunk(self, local: LocalChunk) -> None:
        """Run the items of a chunk that no other worker has taken."""
        self.local = local
        chunk, busy = local.chunk, self._executor.busy
        items, parked, take = chunk.items, chunk.parked or {}, local.todo.popleft
        self._since = perf_counter()
        add: _Add = self._add_only
        if len(items) > 1:
            self._due = self._since + self._job.target_s
            busy.add(self)
            add = self._add
        try:
            # Asking first would not do: another worker may take the last one in between.
            while (position := _next(take)) is not None:
                item, known = items[position], parked.get(position)
                if self._plain:
                    add(position, *self.run(item, known))
                    continue
                context = context_for(self._job, self._context, chunk.idx[position], item)
                if self._loop is None:
                    add(position, *context.run(self.run, item, known))
                else:
                    self._run_in_loop(self._loop, context, add, (position, item, known))
        finally:
            if self in busy:
                self._executor.flush(self)
                busy.discard(self)

    def _run_in_loop(
        self, loop: Runner, context: Context, add: _Add, what: tuple[int, Any, Parked | None]
    ) -> None:
        from asyncio import CancelledError

        position, item, known = what

        async def run() -> None:
            # Nothing is returned: the loop's frames would name the task with the result, and an error lead to them.
            add(position, *await self.run_async(item, known))

        try:
            loop.run(run(), context=context)
        except CancelledError as error:  # the function has cancelled the task that runs it
            add(position, None, ItemOutcome(error=error))

    def _add_only(self, _: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Report the only item of a chunk."""
        busy_s = perf_counter() - self._since
        self._executor.report(only_done(self.local.chunk, value, outcome, busy_s))

    def _add(self, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Add a finished item, and report what is done when it is time for that."""
        if outcome is not None:
            self._odd[position] = outcome
        self._places.append(position)
        # Last, because an item whose value is here counts as done for the thread that reports.
        self._values.append(value)
        if perf_counter() >= self._due:
            self._executor.flush(self)

    def drain(self) -> Done | None:
        """Return what is not reported yet, None if that is nothing."""
        count = len(self._values)
        if not count:
            return None
        now = perf_counter()
        busy, self._since = now - self._since, now
        self._due = now + self._job.target_s
        places, values = self._places[:count], self._values[:count]
        del self._places[:count], self._values[:count]
        odd: dict[int, ItemOutcome] = {}
        if self._odd:
            odd = {n: self._odd.pop(place) for n, place in enumerate(places) if place in self._odd}
        return Done(self.local.chunk.id, as_range(places), values, odd, busy)


def _next(take: Callable[[], int]) -> int | None:
    """Return a position that no other worker has taken, None if there is none left."""
    try:
        return take()
    except IndexError:
        return None


def context_for(job: MapJob, context: Context | None, index: int, item: Any) -> Context:
    """Return the context of an attempt at an item, which the map's recorder may prepare."""
    own = copy_context() if context is None else context.copy()
    if job.enter is not None:
        own.run(job.enter, index, item)
    return own


def only_done(chunk: Chunk, value: Any, outcome: ItemOutcome | None, busy_s: float) -> Done:
    """Return the report of a chunk of one item."""
    return Done(chunk.id, _ONLY, [value], {} if outcome is None else {0: outcome}, busy_s)


def as_range(places: Sequence[int]) -> Sequence[int]:
    """Return ascending positions, as a range where they are neighbours."""
    first, last = places[0], places[-1]
    return range(first, last + 1) if last - first + 1 == len(places) else places


# --- threads --------------------------------------------------------------------------------------


class ThreadExecutor:
    """The executor of `mode="thread"`, and of a synchronous function in `mode="async"`.

    A coroutine function gets an event loop in each thread. The threads are daemons: they never keep the interpreter
    alive.

    Args:
        workers: Most threads.
        context: Context of which each item gets a copy; None where each runs in that of its thread.

    Attributes:
        report: Takes a report, from any worker.
        busy: Workers at a chunk of several items.
    """

    def __init__(self, workers: int, context: Context | None) -> None:
        self.workers = workers
        self._context = context
        self._waiting: SimpleQueue[LocalChunk | None] = SimpleQueue()
        self._reported: SimpleQueue[Report | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._open: dict[int, LocalChunk] = {}
        self._due = 0.0
        self._items = 0
        self._stopped = False
        self._take: Callable[[], LocalChunk | None] = self._waiting.get
        self.report: Final[Callable[[Report], object]] = self._reported.put
        self.busy: Final[set[LocalWorker]] = set()

    def slots(self) -> int:
        """Return room for a chunk at work and one at hand for each thread."""
        return 2 * self.workers

    def open(self, job: MapJob) -> None:
        """Prepare; threads start with the first `poll`, so that each finds its chunk waiting."""
        self._job = job

    def submit(self, chunk: Chunk) -> None:
        """Put a chunk into the queue."""
        self._items += len(chunk.items)
        local = LocalChunk(chunk)
        if local.unreported > 1:
            self._open[chunk.id] = local
        self._waiting.put(local)

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what the threads have reported."""
        self._start_workers()
        # No name for reports here: a traceback of an item may lead to this frame, and would be a reference cycle.
        return self._reports(self._patience(timeout))

    def _patience(self, timeout: float | None) -> float | None:
        """Let busy workers report, if it is time for that; return how long to wait before the next look."""
        if not self._open:
            return timeout
        if (now := monotonic()) >= self._due:
            self._due = now + _LOOK
            # A copy, because workers come and go meanwhile.
            for worker in self.busy.copy():
                self.flush(worker)
        return _LOOK if timeout is None else min(timeout, _LOOK)

    def flush(self, worker: LocalWorker) -> None:
        """Report what a worker has done so far."""
        with self._lock:
            if (done := worker.drain()) is not None:
                local = worker.local
                local.unreported -= len(done.values)
                if not local.unreported:
                    self._open.pop(done.chunk, None)
                self.report(done)

    def _reports(self, wait: float | None) -> list[Report]:
        reports: list[Report] = []
        with contextlib.suppress(Empty):
            first = self._reported.get_nowait() if wait == 0 else self._reported.get(timeout=wait)
            if wait != 0 and first is not None and not self._waiting.empty():
                # The threads have work at hand: what others of them finish now is taken in the same turn.
                sleep(_TOGETHER)
            while first is not None:
                reports.append(first)
                first = self._reported.get_nowait()
        return reports

    def _start_workers(self) -> None:
        """Start a thread for each item so far, up to the number of workers."""
        while len(self._threads) < min(self.workers, self._items):
            name = f"opero-thread-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
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
        for local in list(self._open.values()):
            local.todo.clear()
        for _ in threads:
            self._waiting.put(None)
        end = monotonic() + (timeout if graceful else min(timeout, 0.01))
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - monotonic()))

    # --- in a thread ---------------------------------------------------------------------------------

    def _serve(self) -> None:
        with contextlib.ExitStack() as stack:
            loop: Runner | None = None
            if self._job.pipeline.awaits:
                import asyncio

                loop = stack.enter_context(asyncio.Runner())
            worker = LocalWorker(self._job, self, self._context, loop)
            while (local := self._next()) is not None:
                worker.run_chunk(local)

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
        self._worker = LocalWorker(job, self)

    def _start_workers(self) -> None:
        """Run what was submitted."""
        while not self._waiting.empty() and (local := self._waiting.get()) is not None:
            self._worker.run_chunk(local)
