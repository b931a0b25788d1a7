# this_file: src/opero/concurrency/loop.py
"""Run a map: pull input, dispatch chunks, hand out results, and only then wait; in a thread or on an event loop."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from operator import attrgetter
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.batches import Batch
from opero.concurrency.executors.base import Done
from opero.concurrency.lookup import CacheLookup
from opero.concurrency.recorder import ItemRecorder, find_known_items, record_items
from opero.concurrency.result import MapResult, Status
from opero.concurrency.scheduler import FailedItem, Scheduler
from opero.errors import MapError, MapStopped
from opero.utils import ambient
from opero.utils.steps import in_thread, run_async, run_sync

if TYPE_CHECKING:
    from opero.concurrency.executors.base import AsyncMapExecutor, MapExecutor, MapJob, Report
    from opero.concurrency.progress import Progress
    from opero.core.cache import CacheStage
    from opero.core.options import MapOptions
    from opero.utils.steps import StepLogic

__all__ = ["MapRun", "run_map", "run_map_async"]

_GLANCE: Final = 0.05
"""Seconds after which a waiting map looks at its stop token."""
_PULL_S: Final = 0.002
"""Seconds after which input that comes slowly has to let the rest of the map go on."""
_MOST: Final = 4096
_ASKED: Final = 256
"""Most items that are looked up in a slow store at once."""
_GRACE: Final = 5.0
"""Seconds that workers get to end by themselves after the last item."""


class MapRun:
    """The state of a map and every step of it that does not wait.

    Args:
        job: What is done with each item.
        options: The map's options.
        executor: Runs the items.
        context: Context in which the workers run.
        scheduler: Decides what is next.
        progress: Takes every finished item.
        cache: The function's cache stage, None if it has none.
        recorders: Remember what became of items.
        collects: Whether all results are kept, so that they need not wait for each other.
        drains: Whether what was pulled before the input raised is finished first.

    Attributes:
        job, options, executor, scheduler, drains: As above.
        input_error: What the input has raised, None if nothing.
    """

    def __init__(
        self,
        job: MapJob,
        options: MapOptions,
        executor: Any,
        context: Context,
        scheduler: Scheduler,
        progress: Progress,
        *,
        cache: CacheStage | None,
        recorders: tuple[ItemRecorder, ...],
        collects: bool,
        drains: bool,
    ) -> None:
        self.job = job
        self.options = options
        self.executor = executor
        self.scheduler = scheduler
        self.drains = drains
        self.input_error: Exception | None = None
        self._progress = progress
        self._recorders = recorders
        self._token = options.stop_token
        self._cancelled = False
        self._kept: list[Batch] = []
        self._began = perf_counter()
        self._lookup: CacheLookup | None = None
        if cache is not None and not cache.off and not ambient.disabled():
            self._lookup = CacheLookup(
                cache, job, shares=collects, wake=executor.wake, context=context
            )

    # --- one turn ------------------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many items to pull now."""
        lookup = self._lookup
        if lookup is None:
            return self.scheduler.room(self.executor.slots())
        room = self.scheduler.room(self.executor.slots(), lookup.waiting)
        return max(room, lookup.ahead) if room else 0

    def admit(self, items: list[Any]) -> StepLogic[None]:
        """Take pulled items."""
        idx: Sequence[int] = self.scheduler.admit(len(items))
        for recorder in self._recorders:
            known, idx, items = yield from find_known_items(recorder, idx, items)
            if known is not None:
                yield from self._finish([known])
        if self._lookup is None:
            if items:
                self.scheduler.enqueue(idx, items)
            return
        yield from self._finish((yield from self._lookup.sort(idx, items, self.scheduler.enqueue)))

    def end_input(self, error: BaseException | None = None) -> None:
        """Note that no further item will come.

        Args:
            error: What the input has raised; raised here unless what was pulled is to be finished first.
        """
        if error is not None:
            if not (self.drains and isinstance(error, Exception)):
                raise error
            trace = error.__traceback__
            # Without the frame that caught it, which is none of the caller's.
            self.input_error = error.with_traceback(trace and trace.tb_next)
        self.scheduler.ended = True

    def dispatch(self) -> None:
        """Submit as many chunks as the executor wants."""
        scheduler, executor = self.scheduler, self.executor
        if self._token is not None and scheduler.stopped is None and self._token.is_set():
            self._cancelled = True
            scheduler.stop("its stop_token was set")
        slots, now = executor.slots(), ambient.clock().monotonic()
        while (chunk := scheduler.next_chunk(slots, now)) is not None:
            executor.submit(chunk)

    def absorb(self, reports: Iterable[Report]) -> StepLogic[None]:
        """Take the executor's reports."""
        lookup, fresh = self._lookup, self.scheduler.enqueue
        finished: list[Batch] = []
        if lookup is not None:
            finished += yield from lookup.arrivals(fresh)
        for report in reports:
            if isinstance(report, Done):
                self._progress.busy += report.busy_s
                if report.facts is not None:
                    self._add_facts(report)
        computed = self.scheduler.take(reports, ambient.clock().monotonic())
        if lookup is not None and computed:
            equal = yield from lookup.settle(computed, fresh)
            finished += equal
        yield from self._finish(computed + finished)
        if self._progress.interval is not None:
            self._progress.tick()

    def _add_facts(self, report: Done) -> None:
        """Add what happened in a worker to the map's own counters and events."""
        pipeline, facts = self.job.pipeline, report.facts
        if facts is None:
            return
        pipeline.stats.merge(facts.stats)
        if pipeline.emitter.active:
            for event in facts.events:
                pipeline.emitter.emit(event)

    def _finish(self, batches: list[Batch]) -> StepLogic[None]:
        for recorder in self._recorders:
            yield from record_items(recorder, batches)
        for batch in batches:
            self.scheduler.finish(batch)
            self._progress.add(batch)

    # --- waiting -------------------------------------------------------------------------------------

    def patience(self) -> tuple[float | None, bool]:
        """Return how long to wait for reports, None for as long as it takes, and whether only the clock can end that.

        The clock alone is waited for where every item pauses before its next attempt.
        """
        scheduler, lookup = self.scheduler, self._lookup
        due = scheduler.next_due()
        following = lookup is not None and lookup.following
        if lookup is not None and (other := lookup.next_due()) is not None:
            due = other if due is None else min(due, other)
        wait = self._progress.interval if self._token is None else _GLANCE
        if due is not None:
            left = max(0.0, due - ambient.clock().monotonic())
            wait = left if wait is None else min(wait, left)
        return wait, due is not None and not (scheduler.in_flight or following)

    # --- the end -------------------------------------------------------------------------------------

    def each(self, batch: Batch) -> Iterator[Any]:
        """Yield what the caller gets of a batch: results, and errors as `on_error` says.

        Raises:
            BaseException: The error of an item that ends the map.
        """
        if not batch.odd:
            yield from batch.values
            return
        errors, on_error = self.scheduler.errors, self.options.on_error
        for position, value in enumerate(batch.values):
            outcome = batch.odd.get(position)
            error = None if outcome is None else outcome.error
            if error is None:
                yield value
            elif errors.stops(error):
                if on_error == "return":
                    yield error
            elif errors.ends(error):
                self.raise_failed(FailedItem(batch.idx[position], batch.items[position], error))
            elif on_error == "return":
                yield error

    def keep(self, batch: Batch) -> None:
        """Keep a batch for `values` or `result`.

        Raises:
            BaseException: The error of the item that ends the map.
        """
        self._kept.append(batch)
        if self.scheduler.failed is not None:
            self.raise_failed(self.scheduler.failed)

    @contextmanager
    def results_in_errors(self) -> Iterator[None]:
        """Give an error of the map itself what is done."""
        try:
            yield
        except MapError as error:
            error.result = self.result()
            raise

    def raise_failed(self, failed: FailedItem) -> None:
        """Raise the error that ends a map, with a note of its item's index."""
        error = failed.error
        try:
            name = self.job.pipeline.info.name
            note = f"opero: {name}() failed for item {failed.index} of the map"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        except Exception:  # noqa: BLE001, S110 - the user's exception matters, the note does not
            pass
        try:
            raise error
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del error, failed

    def raise_ended(self) -> None:
        """Raise what a stream ends with, if that is not the end of its input."""
        if self.scheduler.stopped is not None:
            raise MapStopped(self.scheduler.stopped, self.result())
        error, self.input_error = self.input_error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # as above

    def result(self) -> MapResult[Any]:
        """Return what the map has done."""
        values: list[Any] = []
        indices: list[int] = []
        for batch in self._arranged():
            failed = {n for n, o in batch.odd.items() if o.error is not None}
            for n, index in enumerate(batch.idx):
                if n not in failed:
                    indices.append(index)
                    values.append(batch.values[n])
        scheduler, progress = self.scheduler, self._progress
        # Its traceback leads to frames that know this object: kept here it would be a reference cycle.
        broken, self.input_error = self.input_error, None
        status: Status = "complete"
        reason = scheduler.stopped
        if reason is not None:
            status = "cancelled" if self._cancelled else "stopped"
        elif broken is not None:
            status, reason = "stopped", f"its input raised {type(broken).__name__}: {broken}"
        return MapResult(
            values=values,
            indices=indices,
            failures=sorted(progress.failures, key=lambda failure: failure.index),
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

    def values(self) -> list[Any]:
        """Return the list that the caller gets.

        Raises:
            MapStopped: The map did not run to its end.
        """
        if self.scheduler.stopped is not None:
            raise MapStopped(self.scheduler.stopped, self.result())
        found: list[Any] = []
        for batch in self._arranged():
            found += self.each(batch) if batch.odd else batch.values
        return found

    def _arranged(self) -> list[Batch]:
        if not self.options.ordered:
            return self._kept
        runs = itertools.chain.from_iterable(map(Batch.runs, self._kept))
        return sorted(runs, key=attrgetter("idx.start"))

    def close(self) -> StepLogic[None]:
        """Release what the map holds, but for the executor."""
        if self._lookup is not None:
            self._lookup.close()
        self._progress.close()
        for recorder in self._recorders:
            if recorder.blocking:
                yield in_thread(recorder.close)
            else:
                recorder.close()


class _Source:
    """Items of an iterable, in portions that do not hold up the map.

    Args:
        items: The input.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._step = 1

    def pull(self, run: MapRun) -> StepLogic[None]:
        """Pull as much as there is room for, but not for long."""
        while (room := run.room()) > 0:
            wanted = min(self._step, room)
            began = perf_counter()
            found: list[Any] = []
            broken: BaseException | None = None
            try:
                # In place, so that what came before an error is not lost.
                found.extend(itertools.islice(self._items, wanted))
            except BaseException as error:  # noqa: BLE001 - raised by `end_input`
                broken = error
            slow = perf_counter() - began > _PULL_S
            if found:
                yield from run.admit(found)
            if len(found) < wanted:
                try:
                    run.end_input(broken)
                finally:
                    del (
                        broken
                    )  # a frame that names an error which passes through it is a reference cycle
                return
            if slow:
                self._step = max(1, self._step // 4)
                return
            if perf_counter() - began > _PULL_S:
                # Not the input but a store is slow: it is better asked about many at once.
                self._step = min(2 * self._step, _ASKED)
                return
            self._step = min(2 * self._step, _MOST)


# --- in a thread ----------------------------------------------------------------------------------


def run_map(run: MapRun, items: Iterable[Any]) -> Iterator[Batch]:
    """Run a map and yield what is finished; closing the iterator ends the map."""
    scheduler = run.scheduler
    executor: MapExecutor = run.executor
    graceful = False
    try:
        executor.open(run.job)
        source = _Source(items)
        while True:
            run_sync(source.pull(run))
            run.dispatch()
            handed = False
            while (batch := scheduler.hand_out()) is not None:
                handed = True
                yield batch
            if handed:
                continue
            if scheduler.done:
                graceful = True
                return
            run_sync(run.absorb(_wait(run, executor)))
    finally:
        try:
            executor.close(graceful=graceful, timeout=_GRACE)
        finally:
            run_sync(run.close())


def _wait(run: MapRun, executor: MapExecutor) -> list[Report]:
    if run.room() > 0:
        return executor.poll(0)
    patience, pauses = run.patience()
    if pauses and patience is not None:
        if patience > 0:
            ambient.clock().sleep(patience)
        return []
    return executor.poll(patience)


# --- on an event loop -----------------------------------------------------------------------------


class _AsyncSource:
    """Items of an asynchronous iterable: a task of its own waits for them.

    Args:
        items: The input.
        executor: Its wait ends when something has come.
    """

    def __init__(self, items: AsyncIterable[Any], executor: AsyncMapExecutor) -> None:
        import asyncio

        self._items = items
        self._executor = executor
        self._found: list[Any] = []
        self._wanted = 0
        self._more = asyncio.Event()
        self._task = asyncio.ensure_future(self._fetch())

    async def _fetch(self) -> None:
        try:
            await self._more.wait()
            async for item in self._items:
                self._found.append(item)
                self._executor.wake()
                while len(self._found) >= self._wanted:
                    self._more.clear()
                    await self._more.wait()
        finally:
            self._executor.wake()

    def pull(self, run: MapRun) -> StepLogic[None]:
        """Take what has come."""
        room = run.room()
        if self._found and room > 0:
            found, self._found = self._found[:room], self._found[room:]
            yield from run.admit(found)
            room -= len(found)
        self._wanted = max(room, 0)
        if self._wanted > len(self._found):
            self._more.set()
        if self._task.done() and not self._found:
            if self._task.cancelled():
                self._task.result()
            if not run.scheduler.ended:
                run.end_input(self._task.exception())

    async def close(self) -> None:
        """Wait for no more input."""
        import asyncio

        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # asked for, so that asyncio does not report it


async def run_map_async(
    run: MapRun, items: Iterable[Any] | AsyncIterable[Any]
) -> AsyncIterator[Batch]:
    """Run a map in an event loop, as `run_map` does in a thread."""
    scheduler = run.scheduler
    executor: AsyncMapExecutor = run.executor
    graceful = False
    source: _Source | _AsyncSource | None = None
    try:
        executor.open(run.job)
        later = isinstance(items, AsyncIterable)
        source = (
            _AsyncSource(items, executor) if isinstance(items, AsyncIterable) else _Source(items)
        )
        while True:
            await run_async(source.pull(run))
            run.dispatch()
            handed = False
            while (batch := scheduler.hand_out()) is not None:
                handed = True
                yield batch
            if handed:
                continue
            if scheduler.done:
                graceful = True
                return
            await run_async(run.absorb(await _wait_async(run, executor, later=later)))
    finally:
        try:
            if isinstance(source, _AsyncSource):
                await source.close()
        finally:
            try:
                await executor.close(graceful=graceful, grace=_GRACE)
            finally:
                await run_async(run.close())


async def _wait_async(run: MapRun, executor: AsyncMapExecutor, *, later: bool) -> list[Report]:
    """Wait for reports; `later` says that input may come meanwhile."""
    if later:
        return await executor.poll(run.patience()[0])
    if run.room() > 0:
        return await executor.poll(0)
    patience, pauses = run.patience()
    if pauses and patience is not None:
        if patience > 0:
            await ambient.clock().asleep(patience)
        return []
    return await executor.poll(patience)
