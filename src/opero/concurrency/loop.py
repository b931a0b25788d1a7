# this_file: src/opero/concurrency/loop.py
"""Run a map: pull input, dispatch chunks, hand out results, and only then wait; in a thread or on an event loop."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from operator import attrgetter
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from opero.concurrency.executors.base import (
    Batch,
    Done,
    ItemRecorder,
    MapJob,
    find_known_items,
    record_items,
)
from opero.concurrency.report import MapResult, Progress, Status
from opero.concurrency.scheduler import Scheduler
from opero.core.options import MapOptions
from opero.errors import MapError, MapStopped, OperoUsageError
from opero.utils import ambient
from opero.utils.steps import BlockingStep, in_thread, run_async, run_sync

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Report
    from opero.concurrency.lookup import CacheLookup  # noqa: TC004 - loaded with the first cache
    from opero.utils.steps import StepLogic


Returns = Literal["list", "report", "stream"]
"""What the caller gets: all results, a `MapResult`, or an iterator."""

_GLANCE: Final = 0.05
"""Seconds after which a waiting map looks at its stop token."""
_PULL_S: Final = 0.002
"""Seconds after which input that comes slowly has to let the map go on otherwise."""
_MOST: Final = 4096
_ASKED: Final = 256
"""Most items that are looked up in a slow store at once."""
_GRACE: Final = 5.0
"""Seconds that workers get to end by themselves after the last item."""


@dataclass(eq=False)
class MapRun(AbstractContextManager["MapRun"], AbstractAsyncContextManager["MapRun"]):
    """One run of a map; as a context manager, blocking or asynchronous, it ends everything that it has started.

    Args:
        items: The input.
        job: What is done with each item.
        options: The map's options.
        executor: Runs the items; its `poll` and `close` are coroutine functions for a map on an event loop.
        scheduler: Decides what is next.
        progress: Takes every finished item.
        recorders: Remember what became of items.
        returns: What the caller gets.
        lookup: Looks items up in the cache; None without one.
    """

    items: Any
    job: MapJob
    options: MapOptions
    executor: Any
    scheduler: Scheduler
    progress: Progress
    recorders: tuple[ItemRecorder, ...]
    returns: Returns
    lookup: CacheLookup | None
    _source: Iterator[Any] | _AsyncSource | None = None
    _step: int = 1
    _input_error: Exception | None = None
    _graceful: bool = False
    _cancelled: bool = False
    _kept: list[Batch] = field(default_factory=list)
    _began: float = field(default_factory=perf_counter)
    _process: int = field(default_factory=os.getpid)

    # --- turns ---------------------------------------------------------------------------------------

    def complete(self) -> StepLogic[None]:
        """Run the map to its end and keep what is finished.

        Raises:
            BaseException: The error of the item that ends the map.
        """
        while (batch := (yield from self.next_batch())) is not None:
            self._kept.append(batch)
            del batch  # it may hold the error that is raised now
            if self.scheduler.failed is not None:
                raise self._noted(*self.scheduler.failed)

    def next_batch(self) -> StepLogic[Batch | None]:
        """Run the map until something is finished, and return that; None at its end."""
        scheduler, source = self.scheduler, self._source
        if os.getpid() != self._process:
            raise OperoUsageError(
                "this map was begun in another process, of which this one is a fork: begin one here"
            )
        if (batch := scheduler.hand_out()) is not None:
            return batch
        if source is None:
            self.executor.open(self.job)
            self.progress.watch()
            later = isinstance(self.items, AsyncIterable)
            source = _AsyncSource(self, self.items) if later else iter(self.items)
            self._source = source
        while True:
            yield from source.pull() if isinstance(source, _AsyncSource) else self._pull(source)
            token = self.options.stop_token
            if token is not None and scheduler.stopped is None and token.is_set():
                self._cancelled = True
                scheduler.stop("its stop_token was set")
            if scheduler.stopped is not None:
                self.executor.halt()
            slots, now = self.executor.slots, ambient.clock().monotonic()
            while (chunk := scheduler.next_chunk(slots, now)) is not None:
                self.executor.submit(chunk)
            if (batch := scheduler.hand_out()) is not None:
                return batch
            if scheduler.done:
                self._graceful = True
                return None
            yield from self._absorb((yield self._wait()) or ())

    def _pull(self, source: Iterator[Any]) -> StepLogic[None]:
        """Pull as much of the input as there is room for, but not for long."""
        while (room := self.room()) > 0:
            wanted = min(self._step, room)
            began = perf_counter()
            found: list[Any] = []
            # Not a name for the error: one that the frame keeps would be a reference cycle.
            broken: list[BaseException] = []
            self.progress.pulls = True
            try:
                # In place, so that what came before an error is not lost.
                found.extend(itertools.islice(source, wanted))
            except BaseException as error:  # noqa: BLE001 - raised by `end_input`
                broken.append(error)
            self.progress.pulls = False
            slow = perf_counter() - began > _PULL_S
            if found:
                yield from self.admit(found)
            if len(found) < wanted:
                self.scheduler.ended = True
                if broken:
                    self.note_broken_input(broken)
                return
            if slow:
                self._step = max(1, self._step // 4)
                return
            if perf_counter() - began > _PULL_S:
                # Not the input but a store is slow: it is better asked about many at once.
                self._step = min(2 * self._step, _ASKED)
                return
            self._step = min(2 * self._step, _MOST)

    def room(self) -> int:
        """Return how many items to pull now."""
        lookup, slots = self.lookup, self.executor.slots
        streamed_s = perf_counter() - self._began if self.returns == "stream" else None
        waiting, ahead = (0, 0) if lookup is None else (lookup.waiting, lookup.ahead)
        room = self.scheduler.room(slots, waiting, streamed_s)
        return max(room, ahead) if room else 0

    def admit(self, items: list[Any]) -> StepLogic[None]:
        """Take pulled items."""
        idx: Sequence[int] = self.scheduler.admit(len(items))
        for recorder in self.recorders:
            known, idx, items = yield from find_known_items(recorder, idx, items)
            if known is not None:
                yield from self._finish([known])
        if self.lookup is None:
            self.scheduler.enqueue(idx, items)
            return
        found = yield from self.lookup.sort(idx, items)
        yield from self._finish(found)

    def note_broken_input(self, broken: list[BaseException]) -> None:
        """Note what the input has raised.

        Args:
            broken: The error alone, which is taken out. For a list, which is not finished then, it is raised at once;
                else after the last result.
        """
        if self.returns == "list" or not isinstance(broken[0], Exception):
            raise broken.pop()
        if isinstance(error := broken.pop(), Exception):
            trace = error.__traceback__
            # Without the frame that caught it, which is none of the caller's.
            self._input_error = error.with_traceback(trace and trace.tb_next)

    def _wait(self) -> BlockingStep:
        """Return the step that waits for reports; there are none where it waits for the clock alone."""
        scheduler, lookup, poll = self.scheduler, self.lookup, self.executor.poll
        later = isinstance(self._source, _AsyncSource)
        if not later and self.room() > 0:
            return BlockingStep(poll, poll, (0,))
        wait = self.progress.interval if self.options.stop_token is None else _GLANCE
        dues = [scheduler.next_due(), None if lookup is None else lookup.next_due()]
        if known := [due for due in dues if due is not None]:
            clock = ambient.clock()
            left = max(0.0, min(known) - clock.monotonic())
            wait = left if wait is None else min(wait, left)
            awaited = later or scheduler.in_flight or (lookup is not None and lookup.following)
            if wait and not awaited:
                return BlockingStep(clock.sleep, clock.asleep, (wait,))
        return BlockingStep(poll, poll, (wait,))

    def _absorb(self, reports: Sequence[Report]) -> StepLogic[None]:
        """Take the executor's reports."""
        scheduler, progress, lookup = self.scheduler, self.progress, self.lookup
        pipeline = self.job.pipeline
        finished: list[Batch] = []
        if lookup is not None:
            finished = yield from lookup.arrivals()
        for report in reports:
            if not isinstance(report, Done):
                continue
            progress.busy += report.busy_s
            if (facts := report.facts) is not None:
                # What happened in a worker belongs to the map's own counters and events.
                pipeline.stats.add(**facts.stats)
                if pipeline.emitter.active:
                    for event in facts.events:
                        pipeline.emitter.emit(event)
        computed = scheduler.take(reports, ambient.clock().monotonic())
        if lookup is not None and computed:
            finished += yield from lookup.settle(computed)
        yield from self._finish(computed + finished)
        if progress.interval is not None:
            progress.tick()

    def _finish(self, batches: list[Batch]) -> StepLogic[None]:
        for recorder in self.recorders:
            yield from record_items(recorder, batches)
        for batch in batches:
            self.scheduler.finish(batch)
            self.progress.add(batch)

    # --- the end -------------------------------------------------------------------------------------

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if os.getpid() != self._process:
            return  # workers and what is held are those of the parent
        try:
            self.executor.close(graceful=self._graceful, timeout=_GRACE)
        finally:
            run_sync(self._release(error))

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(self._source, _AsyncSource):
                await self._source.close()
        finally:
            try:
                await self.executor.close(graceful=self._graceful, grace=_GRACE)
            finally:
                await run_async(self._release(error))

    def _release(self, error: BaseException | None) -> StepLogic[None]:
        """Release what the map holds, but for the executor; an error of the map itself gets what is done."""
        self._source = None
        if self.lookup is not None:
            self.lookup.close()
        if self.progress.interval is not None:
            self.progress.close()
        for recorder in self.recorders:
            yield in_thread(recorder.close)
        if isinstance(error, MapError) and error.result is None:
            error.result = self.result(error.reason)
        if error is not None:
            # The frames that an error has passed know this object: what that holds would be a reference cycle.
            vars(self).clear()

    def each(self, batch: Batch) -> Iterator[Any]:
        """Yield what the caller gets of a batch: results, and errors as `on_error` says.

        Raises:
            BaseException: The error of an item that ends the map.
        """
        errors, returned = self.scheduler.errors, self.options.on_error == "return"
        for position, value in enumerate(batch.values):
            outcome = batch.odd.get(position)
            error = None if outcome is None else outcome.error
            if error is None:
                yield value
            elif errors.ends(error) and not errors.stops(error):
                del outcome, error  # as in `_pull`
                raise self._noted(batch.idx[position], batch.odd.pop(position).error)
            elif returned:
                yield error

    def _noted(self, index: int, error: Any) -> BaseException:
        """Return the error that ends a map, with a note of its item's index."""
        try:
            name = self.job.pipeline.info.name
            note = f"opero: {name}() failed for item {index} of the map"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        except Exception:  # noqa: BLE001, S110 - the user's exception matters, the note does not
            pass
        noted: BaseException = error
        return noted

    def raise_ended(self) -> None:
        """End a map; raise what it ends with instead of its results, if it did not run to its end."""
        stopped = self.scheduler.stopped
        error = self._input_error if stopped is None else MapStopped(stopped, self.result())
        ended = [] if error is None else [error]
        del error  # as in `_pull`
        vars(self).clear()  # as in `_release`
        if ended:
            raise ended.pop()

    def result(self, ended_by: str | None = None) -> MapResult[Any]:
        """Return what the map has done.

        Args:
            ended_by: What has ended it, if its items have not.
        """
        values: list[Any] = []
        indices: list[int] = []
        for batch in self._arranged():
            failed = {n for n, o in batch.odd.items() if o.error is not None}
            kept = batch.without(failed) if failed else batch
            indices += kept.idx
            values += kept.values
        scheduler, progress = self.scheduler, self.progress
        # Its traceback leads to frames that know this object: kept here it would be a reference cycle.
        broken, self._input_error = self._input_error, None
        status: Status = "complete"
        reason = scheduler.stopped or ended_by
        if reason is not None:
            status = "cancelled" if self._cancelled else "stopped"
        elif broken is not None:
            status, reason = "stopped", f"its input raised {type(broken).__name__}: {broken}"
        return MapResult(
            values=values,
            indices=indices,
            failures=sorted(progress.failures, key=attrgetter("index")),
            status=status,
            reason=reason,
            total=scheduler.pulled if scheduler.ended and broken is None else None,
            hits=progress.origins["hit"],
            shared=progress.origins["shared"],
            stale=progress.origins["stale"],
            resumed=progress.origins["resumed"],
            seconds=perf_counter() - self._began,
            busy=progress.busy,
            input_error=broken,
        )

    def outcome(self) -> Any:
        """Return what the caller gets of a map that was run to its end.

        Raises:
            MapStopped: It was to be a list, and the map was stopped before.
        """
        if self.returns == "report":
            found: Any = self.result()
        else:
            if self.scheduler.stopped is not None:
                self.raise_ended()
            found = []
            for batch in self._arranged():
                found += self.each(batch) if batch.odd else batch.values
        vars(self).clear()  # as in `_release`
        return found

    def _arranged(self) -> list[Batch]:
        if not self.options.ordered:
            return self._kept
        runs: list[Batch] = []
        for batch in self._kept:
            runs += (batch,) if isinstance(batch.idx, range) else batch.runs()
        return sorted(runs, key=attrgetter("idx.start"))


# --- input ----------------------------------------------------------------------------------------


class _AsyncSource:
    """Items of an asynchronous iterable: a task of its own waits for them.

    Args:
        run: The map.
        items: The input.
    """

    def __init__(self, run: MapRun, items: AsyncIterable[Any]) -> None:
        import asyncio

        self._run = run
        self._items = items
        self._found: list[Any] = []
        self._wanted = 0
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = asyncio.ensure_future(self._fetch())

    async def _fetch(self) -> None:
        try:
            await self._more.wait()
            async for item in self._items:
                self._found.append(item)
                self._run.executor.wake()
                while len(self._found) >= self._wanted:
                    self._more.clear()
                    await self._more.wait()
        finally:
            self._run.executor.wake()

    def pull(self) -> StepLogic[None]:
        """Take what has come."""
        run = self._run
        room = run.room()
        if self._found and room > 0:
            found, self._found = self._found[:room], self._found[room:]
            yield from run.admit(found)
            room -= len(found)
        self._wanted = max(room, 0)
        run.progress.pulls = self._wanted > len(self._found)
        if run.progress.pulls:
            self._more.set()
        if self._task is not None and self._task.done() and not self._found:
            run.progress.pulls = False
            run.scheduler.ended = True
            if broken := self._end():
                run.note_broken_input(broken)

    def _end(self) -> list[BaseException]:
        """Return what the input has raised; a task that is still known then would be a reference cycle."""
        task, self._task = self._task, None
        error = None if task is None else task.exception()  # raises what has cancelled it
        return [] if error is None else [error]

    async def close(self) -> None:
        """Wait for no more input."""
        import asyncio

        # As in `_end`: what has cancelled the task leads to the frame that waits here for input.
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # asked for, so that asyncio does not report it


# --- what callers get -----------------------------------------------------------------------------


def run_map(run: MapRun) -> Any:
    """Run a map to its end; return its list or `MapResult`."""
    with run:
        run_sync(run.complete())
    return run.outcome()


async def run_map_async(begin: Callable[[], MapRun]) -> Any:
    """Begin a map and run it to its end, as `run_map` does in a thread."""
    ambient.require_loop("run a map")
    async with begin() as run:
        await run_async(run.complete())
    return run.outcome()


class ResultStream(itertools.chain[Any]):
    """Results one by one, as fast as from a list; the map runs as they are consumed."""

    parts: Any

    def close(self) -> None:
        """End the map, and have no more results."""
        self.parts.close()
        deque(self, maxlen=0)


def stream_map(run: MapRun) -> Iterator[Any]:
    """Return the results of a map, which runs as they are consumed; closing or dropping the iterator ends it."""
    parts = _run_in_parts(run)
    stream = cast("ResultStream", ResultStream.from_iterable(parts))
    stream.parts = parts
    return stream


def _run_in_parts(run: MapRun) -> Iterator[Sequence[Any]]:
    with run:
        while (batch := run_sync(run.next_batch())) is not None:
            if batch.odd:
                # One by one: an error that ends the map is raised here, in its block.
                yield from zip(run.each(batch), strict=True)
            else:
                yield batch.values
    run.raise_ended()


async def stream_map_async(begin: Callable[[], MapRun]) -> AsyncIterator[Any]:
    """Begin a map and yield results, as `stream_map` does in a thread."""
    ambient.require_loop("run a map")
    async with begin() as run:
        while (batch := await run_async(run.next_batch())) is not None:
            for value in run.each(batch) if batch.odd else batch.values:
                yield value
    run.raise_ended()
