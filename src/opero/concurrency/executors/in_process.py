# this_file: src/opero/concurrency/executors/in_process.py
"""Run items in threads of this process, or where the map was called.

The threads share the items of a chunk: each takes one item at a time, and one that is idle helps with the chunk of
another, so that a slow item never keeps its neighbours from a free thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from operator import itemgetter
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero.concurrency.executors.base import Done, ItemOutcome, Lost
from opero.concurrency.item_runner import ItemRunner
from opero.utils.fork import reset_after_fork

if TYPE_CHECKING:
    from asyncio import Runner

    from opero.concurrency.executors.base import Chunk, MapJob, Parked, Report


_LOOK: Final = 0.03
"""Seconds after which finished items of a chunk that is under way are reported, once there are chunks of several."""
_TOGETHER: Final = 0.001
"""Seconds within which finished items are reported together, while the threads have others at hand."""
_SHARE: Final = 20
"""That is no more than this part of the time that an item takes."""

# --- finished items -------------------------------------------------------------------------------

Finished = tuple["Chunk", int, Any, ItemOutcome | None, float]
"""Chunk and position of an item, its value, what it is more than a plain value, and seconds of work."""


def reports_of(finished: list[Finished]) -> list[Report]:
    """Take out the items that are finished so far, and return their reports, one for each chunk."""
    count = len(finished)
    parts: dict[int, list[Finished]] = {}
    for one in finished[:count]:
        parts.setdefault(one[0].id, []).append(one)
    # What has come meanwhile stays; nothing is ever lost to a thread that adds to the list.
    del finished[:count]
    return [_report(number, part) for number, part in parts.items()]


def _report(chunk: int, part: list[Finished]) -> Done:
    part.sort(key=itemgetter(1))
    _, places, values, outcomes, busy = zip(*part, strict=True)
    first, last = places[0], places[-1]
    neighbours = last - first + 1 == len(places)
    odd = {n: outcome for n, outcome in enumerate(outcomes) if outcome is not None}
    ran = range(first, last + 1) if neighbours else places
    return Done(chunk, ran, list(values), odd, sum(busy))


def context_for(job: MapJob, context: Context | None, index: int, item: Any) -> Context:
    """Return the context of an attempt at an item, which the map's recorder may prepare."""
    own = copy_context() if context is None else context.copy()
    if job.enter is not None:
        own.run(job.enter, index, item)
    return own


# --- threads --------------------------------------------------------------------------------------


class SharedChunk(NamedTuple):
    """A chunk whose items are taken one at a time, by one thread or by several.

    Attributes:
        chunk: The chunk.
        todo: Positions that no thread has taken. The steps of a deque are atomic: no item is run twice, and none pays
            for a lock.
    """

    chunk: Chunk
    todo: deque[int]


class ThreadExecutor:
    """The executor of `mode="thread"`, and of a synchronous function in `mode="async"`.

    A coroutine function gets an event loop in each thread. The threads are daemons: they never keep the interpreter
    alive.

    Args:
        workers: Most threads.
        context: Context of which each item gets a copy, so that none sees what another one set; None where each runs
            in that of its thread.
    """

    def __init__(self, workers: int, context: Context | None) -> None:
        self.workers = workers
        self.slots: int = 2 * workers
        self._context = context
        self._waiting: SimpleQueue[SharedChunk | None] = SimpleQueue()
        self._take: Callable[[], SharedChunk | None] = self._waiting.get
        self._finished: list[Finished] = []
        self._returned: list[Report] = []
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._due = 0.0
        self._threads: list[threading.Thread] = []
        self._items = 0
        self._look: float | None = None
        self._stopped = False

    def open(self, job: MapJob) -> None:
        """Prepare; threads start with the first `poll`, so that each finds its chunk waiting."""
        self._job = job
        self._runner = ItemRunner(job)
        self._plain = self._context is None and job.enter is None
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Let the thread whose item has forked return in the child, which has no map."""
        if self._threads:
            self._stopped, self._take = True, lambda: None

    def submit(self, chunk: Chunk) -> None:
        """Put a chunk into the queue."""
        count = len(chunk.items)
        self._items += count
        if count > 1:
            self._look = _LOOK
        self._waiting.put(SharedChunk(chunk, deque(range(count))))

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what the threads have finished."""
        self._start_workers()
        if self._look is not None:
            timeout = self._look if timeout is None else min(timeout, self._look)
        with contextlib.suppress(Empty):
            if timeout != 0:
                self._woken.get(timeout=timeout)
                if self._finished and not self._waiting.empty():
                    # The threads have work at hand: what others of them finish now is taken in the same turn.
                    sleep(min(_TOGETHER, self._finished[0][4] / _SHARE))
            while True:
                self._woken.get_nowait()
        self._due = perf_counter() + self._job.target_s
        # Taken before the finished items: among those is the one after which they were given back.
        count = len(self._returned)
        returned = self._returned[:count]
        del self._returned[:count]
        # No name for reports here: a traceback of an item may lead to this frame, and would be a reference cycle.
        return reports_of(self._finished) + returned

    def _start_workers(self) -> None:
        """Start a thread for each item so far, up to the number of workers."""
        while len(self._threads) < min(self.workers, self._items):
            name = f"opero-thread-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            # Noted first: a start that is interrupted may have made it already.
            self._threads.append(thread)
            thread.start()

    def halt(self) -> None:
        """Begin no other item: each thread gives back what it takes."""
        self._stopped = True

    def wake(self) -> None:
        """End a wait for reports."""
        self._woken.put(None)

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Let the threads return; one that is in the middle of an item is left behind when time is up."""
        threads, self._threads = self._threads, []
        self._stopped = True
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
            while (shared := self._next()) is not None:
                self._run_chunk(shared, loop)

    def _next(self) -> SharedChunk | None:
        """Wait for a chunk that has items left; return None at the end of the map."""
        while (shared := self._take()) is not None:
            if len(shared.todo) > 1:
                # The next free thread helps with it.
                self._waiting.put(shared)
            if shared.todo:
                return shared
        return None

    def _run_chunk(self, shared: SharedChunk, loop: Runner | None) -> None:
        """Run the items of a chunk that no other thread has taken."""
        (chunk, todo), run, add = shared, self._runner.run, self._add
        known = chunk.parked or {}
        while not self._stopped:
            try:
                # Asking first would not do: another thread may take the last one in between.
                place = todo.popleft()
            except IndexError:
                return
            item, parked, began = chunk.items[place], known.get(place), perf_counter()
            # No names for results: a traceback leads to this frame, and would be a reference cycle.
            if loop is None and self._plain:
                add(shared, place, began, *run(item, parked))
                continue
            context = context_for(self._job, self._context, chunk.idx[place], item)
            if loop is None:
                add(shared, place, began, *context.run(run, item, parked))
            else:
                self._run_in_loop(loop, context, (shared, place, began), item, parked)
        places: list[int] = []
        with contextlib.suppress(IndexError):  # as above
            while True:
                places.append(todo.popleft())
        if places:
            self._returned.append(Lost(chunk.id, places, None, "stopped"))
            self.wake()

    def _run_in_loop(
        self,
        loop: Runner,
        context: Context,
        what: tuple[SharedChunk, int, float],
        item: Any,
        parked: Parked | None,
    ) -> None:
        from asyncio import CancelledError

        async def run() -> None:
            # Nothing is returned: the loop's frames would name the task with the result, and an error lead to them.
            self._add(*what, *await self._runner.run_async(item, parked))

        try:
            loop.run(run(), context=context)
        except CancelledError as error:  # the function has cancelled the task that runs it
            self._add(*what, None, ItemOutcome(error=error))

    def _add(
        self, shared: SharedChunk, place: int, began: float, value: Any, outcome: ItemOutcome | None
    ) -> None:
        """Add a finished item, and end the wait for reports when it is time for that."""
        now = perf_counter()
        self._finished.append((shared.chunk, place, value, outcome, now - began))
        if outcome is not None and self._job.ends(outcome):
            self.halt()
        if outcome is not None or not shared.todo or now >= self._due:
            self.wake()


class InlineExecutor(ThreadExecutor):
    """The executor of `sequential=True`: no workers, so that a debugger sees one stack."""

    def __init__(self) -> None:
        super().__init__(1, None)
        self.slots = 1

    def after_fork(self) -> None:
        """Go on in the child, too: the thread that runs the items is the program's."""

    def _start_workers(self) -> None:
        """Run what was submitted."""
        while not self._waiting.empty() and (shared := self._waiting.get()) is not None:
            self._run_chunk(shared, None)
