# this_file: src/opero/concurrency/run.py
"""One map under way: what its two shells share, which is everything but the waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.chunks import ChunkSize
from opero.concurrency.driver import Driver, Failed, Recover
from opero.concurrency.engine import Chunk, Done, Job
from opero.concurrency.errand import InThread, Steps
from opero.concurrency.policy import Budget
from opero.concurrency.recall import Recall
from opero.concurrency.recorder import ItemRecorder, recall_items, record_items
from opero.concurrency.result import ItemResult, MapResult, Status
from opero.concurrency.watch import Bar, Watch
from opero.core.cache import CacheStage
from opero.utils import ambient

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opero.concurrency.engine import Report
    from opero.concurrency.order import Batch

__all__ = ["Plan", "Run"]

_GLANCE: Final = 0.05
"""Seconds after which a waiting map looks at its stop token."""

STOPPED: Final = "its stop_token was set"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a map is to do, made of its options.

    Attributes:
        job: What is done with each item.
        cache: The function's cache stage, None if it has none.
        size: The size of chunks.
        slots: Asks the engine how many chunks it wants to hold.
        submit: Hands a chunk to the engine.
        wake: Ends a wait for the engine's reports.
        context: Context in which the workers run.
        recover: What becomes of items that were lost with their worker.
        collects: Whether all results are kept, so that they need not wait for each other.
        ordered, raises, skips: The options `ordered` and `on_error`.
        max_errors: The option.
        stop_set: Tells whether the stop token is set; None without one.
        on_result: The option.
        bar: The progress bar, None for none.
        function: Name of the function, for messages.
        recorders: Who remembers what items gave.
        awaits: Whether the map runs in an event loop.
    """

    job: Job
    cache: CacheStage | None
    size: ChunkSize
    slots: Callable[[], int]
    submit: Callable[[Chunk], None]
    wake: Callable[[], None]
    context: Context
    recover: Recover
    collects: bool
    ordered: bool = True
    raises: bool = True
    skips: bool = False
    max_errors: float | None = None
    stop_set: Callable[[], bool] | None = None
    on_result: Callable[[ItemResult], object] | None = None
    bar: Bar | None = None
    function: str = ""
    recorders: tuple[ItemRecorder, ...] = ()
    awaits: bool = False


class Run:
    """The state of a map and every step of it that does not wait.

    Args:
        plan: What to do.

    Attributes:
        driver: Which items are where.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.driver = Driver(
            size=plan.size,
            ordered=plan.ordered and not plan.collects,
            raises=plan.raises,
            budget=Budget(plan.max_errors),
            recover=plan.recover,
            in_flight=plan.job.in_flight,
        )
        self._watch = Watch(on_result=plan.on_result, bar=plan.bar, keeps=plan.collects)
        self._recall: Recall | None = None
        if plan.cache is not None and not plan.cache.off and not ambient.disabled():
            self._recall = Recall(
                plan.cache,
                plan.job,
                shares=plan.collects,
                wake=plan.wake,
                context=plan.context,
                awaits=plan.awaits,
            )
        self._cancelled = False
        self._began = perf_counter()

    # --- one turn ------------------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many items to pull now."""
        recall = self._recall
        if recall is None:
            return self.driver.room(self.plan.slots())
        room = self.driver.room(self.plan.slots(), recall.waiting)
        return max(room, recall.ahead) if room else 0

    def admit(self, items: list[Any]) -> Steps[None]:
        """Take pulled items."""
        idx: Sequence[int] = self.driver.admit(len(items))
        for recorder in self.plan.recorders:
            known, idx, items = yield from recall_items(recorder, idx, items)
            if known is not None:
                yield from self._finish([known])
        if self._recall is None:
            if items:
                self.driver.enqueue(idx, items)
            return
        yield from self._finish((yield from self._recall.sort(idx, items, self.driver.enqueue)))

    def dispatch(self) -> None:
        """Submit as many chunks as the engine wants."""
        plan = self.plan
        if plan.stop_set is not None and plan.stop_set() and self.driver.stopped is None:
            self._cancelled = True
            self.driver.stop(STOPPED)
        slots, now = plan.slots(), ambient.clock().monotonic()
        while (chunk := self.driver.next_chunk(slots, now)) is not None:
            plan.submit(chunk)

    def absorb(self, reports: Iterable[Report]) -> Steps[None]:
        """Take the engine's reports."""
        recall, fresh = self._recall, self.driver.enqueue
        finished: list[Batch] = []
        if recall is not None:
            finished += yield from recall.arrivals(fresh)
        for report in reports:
            if isinstance(report, Done):
                self._count(report)
        computed = self.driver.take(reports, ambient.clock().monotonic())
        if recall is not None and computed:
            equal = yield from recall.settle(computed, fresh)
            finished += equal
        yield from self._finish(computed + finished)

    def _count(self, report: Done) -> None:
        self._watch.busy += report.busy_s
        if report.facts is not None:
            pipeline = self.plan.job.pipeline
            pipeline.stats.merge(report.facts.stats)
            if pipeline.emitter.active:
                for event in report.facts.events:
                    pipeline.emitter.emit(event)

    def _finish(self, batches: list[Batch]) -> Steps[None]:
        for recorder in self.plan.recorders:
            yield from record_items(recorder, batches)
        for batch in batches:
            self.driver.finish(batch)
            self._watch.saw(batch)

    # --- waiting -------------------------------------------------------------------------------------

    @property
    def pausing(self) -> bool:
        """Whether nothing can happen before an item's pause is over, so that the clock is what to wait for."""
        others = self._recall is not None and self._recall.following
        return not (self.driver.in_flight or others)

    def patience(self) -> float | None:
        """Return how long to wait for reports, in seconds; None for as long as it takes."""
        due = self.driver.next_due()
        if self._recall is not None and (other := self._recall.next_due()) is not None:
            due = other if due is None else min(due, other)
        wait = None if due is None else max(0.0, due - ambient.clock().monotonic())
        if self.plan.stop_set is None or (wait is not None and wait < _GLANCE):
            return wait
        return _GLANCE

    # --- the end -------------------------------------------------------------------------------------

    def each(self, batch: Batch) -> Iterator[Any]:
        """Yield what the caller gets of a batch: results, and errors as `on_error` says.

        Raises:
            BaseException: The error of an item that ends the map.
        """
        for position, value in enumerate(batch.values):
            outcome = batch.odd.get(position)
            error = None if outcome is None else outcome.error
            if error is None:
                yield value
            elif self.plan.raises or not isinstance(error, Exception):
                failed = Failed(batch.idx[position], batch.items[position], error)
                raise_failed(failed, self.plan.function)
            elif not self.plan.skips:
                yield error

    def result(self, batches: list[Batch]) -> MapResult[Any]:
        """Return what the map has done."""
        values: list[Any] = []
        indices: list[int] = []
        for batch in self._arranged(batches):
            failed = {n for n, o in batch.odd.items() if o.error is not None}
            for n, index in enumerate(batch.idx):
                if n not in failed:
                    indices.append(index)
                    values.append(batch.values[n])
        driver, origins = self.driver, self._watch.origins
        status: Status = "complete"
        if driver.stopped is not None:
            status = "cancelled" if self._cancelled else "stopped"
        return MapResult(
            values=values,
            indices=indices,
            failures=sorted(self._watch.failures, key=lambda failure: failure.index),
            status=status,
            reason=driver.stopped,
            total=driver.pulled if driver.ended else None,
            hits=origins["hit"],
            shared=origins["shared"],
            stale=origins["stale"],
            resumed=origins["resumed"],
            seconds=perf_counter() - self._began,
            busy=self._watch.busy,
        )

    def values(self, batches: list[Batch]) -> list[Any]:
        """Return the list that the caller gets.

        Raises:
            MapStopped: The map did not run to its end.
        """
        if self.driver.stopped is not None:
            from opero.errors import MapStopped

            raise MapStopped(self.driver.stopped, self.result(batches))
        found: list[Any] = []
        for batch in self._arranged(batches):
            found += self.each(batch) if batch.odd else batch.values
        return found

    def _arranged(self, batches: list[Batch]) -> list[Batch]:
        if not self.plan.ordered:
            return batches
        return sorted((run for batch in batches for run in batch.runs() if run), key=_start)

    def close(self) -> Steps[None]:
        """Give back what the map holds, but for the engine."""
        if self._recall is not None:
            self._recall.close()
        self._watch.close()
        for recorder in self.plan.recorders:
            if recorder.blocking:
                yield InThread(recorder.close)
            else:
                recorder.close()


def _start(batch: Batch) -> int:
    return batch.idx[0]


def raise_failed(failed: Failed, function: str) -> None:
    """Raise the error that ends a map, with a note of its item's index."""
    error = failed.error
    try:
        note = f"opero: {function}() failed for item {failed.index} of the map"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    except Exception:  # noqa: BLE001, S110 - the user's exception matters, the note does not
        pass
    try:
        raise error
    finally:
        # A frame that names an error which passes through it is a reference cycle.
        del error, failed
