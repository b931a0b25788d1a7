# this_file: src/opero/concurrency/work.py
"""What a worker does with a chunk: one item after the other through the pipeline, and what it reports of them.

A success on the first attempt is a bare value; everything else is an `Outcome`. The function of a
plain pipeline is called directly, as decorated functions do it, and the stages see only what failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import Context, copy_context
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.engine import Done, GaveBack, Outcome, Parked
from opero.core import ambient
from opero.core.call import Call, Failure, Pause
from opero.core.express import is_unguarded
from opero.utils.switch import switch

if TYPE_CHECKING:
    from opero.concurrency.engine import Chunk, Job, Report
    from opero.core.pipeline import Pipeline

__all__ = ["PATIENCE", "Sheet", "Work"]

PATIENCE: Final = 5
"""A chunk that takes so many times its target is given back."""


class Sheet:
    """What a worker has to report of one chunk.

    Args:
        chunk: The chunk.
        job: Whose target and patience count.
        worker: Name of the worker.
        tell: Takes each report.
        flush_s: Seconds after which what is done is reported; None for the job's target.
    """

    __slots__ = (
        "_began", "_chunk", "_flush_s", "_flushed", "_gives_back", "_odd", "_start", "_target",
        "_tell", "_values", "_worker",
    )  # fmt: skip

    def __init__(
        self,
        chunk: Chunk,
        job: Job,
        worker: str,
        tell: Callable[[Report], object],
        *,
        flush_s: float | None = None,
    ) -> None:
        self._chunk = chunk
        self._target = job.target_s
        self._flush_s = job.target_s if flush_s is None else flush_s
        # Of several items at once none is behind another, and nobody could take the rest.
        self._gives_back = job.gives_back and job.in_flight == 1
        self._worker = worker
        self._tell = tell
        self._values: list[Any] = []
        self._odd: dict[int, Outcome] = {}
        self._start = 0
        self._began = self._flushed = perf_counter()

    def add(self, value: Any, outcome: Outcome | None) -> bool:
        """Write down one item; tell whether the worker shall go on with the next.

        Args:
            value: The plain result; not looked at where there is an outcome.
            outcome: What became of the item if that is more than a plain result.
        """
        if outcome is not None:
            self._odd[self._start + len(self._values)] = outcome
            value = None
        self._values.append(value)
        n_done = self._start + len(self._values)
        now = perf_counter()
        if now - self._flushed < self._flush_s or n_done == len(self._chunk):
            return True
        self._flush(now, final=False)
        if self._gives_back and now - self._began >= PATIENCE * self._target:
            self._tell(GaveBack(self._chunk.id, n_done))
            return False
        return True

    def report(self) -> None:
        """Report what is done so far."""
        if self._values:
            self._flush(perf_counter(), final=False)

    def stop(self) -> None:
        """Report what is done and give the rest back."""
        self.report()
        self._tell(GaveBack(self._chunk.id, self._start))

    def end(self) -> None:
        """Report the rest; the chunk is done with."""
        self._flush(perf_counter(), final=True)

    def _flush(self, now: float, *, final: bool) -> None:
        done = Done(
            chunk=self._chunk.id,
            start=self._start,
            values=self._values,
            odd=self._odd,
            busy_s=now - self._flushed,
            worker=self._worker,
            final=final,
        )
        self._start += len(self._values)
        self._values, self._odd, self._flushed = [], {}, now
        self._tell(done)


class Work:
    """Runs the items of one job, in one worker or in several that share its pipeline.

    Args:
        job: The job.
        pipeline: The pipeline of this worker; None for the job's own.
        context: Context of which each item of a synchronous function gets a copy, so that none sees
            what another one set; None where the worker's own will do.
    """

    def __init__(
        self, job: Job, pipeline: Pipeline | None = None, *, context: Context | None = None
    ) -> None:
        self._job = job
        self._pipeline = pipeline = job.pipeline if pipeline is None else pipeline
        self._context = context
        fn = job.function
        self._call = fn if not (job.before or job.after or job.kwargs) else self._bound
        self._direct = is_unguarded(pipeline) and not job.details
        self._lane = pipeline.lane
        self._count = pipeline.stats.call_tally.count

    def _bound(self, item: Any) -> Any:
        job = self._job
        return job.function(*job.before, item, *job.after, **job.kwargs)

    # --- a chunk -------------------------------------------------------------------------------------

    def chunk(
        self, chunk: Chunk, sheet: Sheet, *, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Run a chunk of a synchronous function.

        Args:
            chunk: The chunk.
            sheet: Takes what becomes of it.
            stopped: Whether no further item shall begin.
        """
        one = self.one if self._context is None else functools.partial(self._within, self._context)
        parked = chunk.parked or {}
        for position, item in enumerate(chunk.items):
            if stopped():
                return sheet.stop()
            if self._job.enter is not None:
                one = functools.partial(self._entered, chunk.idx[position])
            if not sheet.add(*one(item, parked.get(position))):
                return None
        return sheet.end()

    async def achunk(self, chunk: Chunk, sheet: Sheet) -> None:
        """Run a chunk of a coroutine function."""
        parked = chunk.parked or {}
        for position, item in enumerate(chunk.items):
            known = parked.get(position)
            if self._job.enter is None:
                told = await self.aone(item, known)
            else:
                told = await self._aentered(chunk.idx[position], item, known)
            if not sheet.add(*told):
                return
        sheet.end()

    # --- an item -------------------------------------------------------------------------------------

    def _within(
        self, context: Context, item: Any, parked: Parked | None
    ) -> tuple[Any, Outcome | None]:
        return context.copy().run(self.one, item, parked)

    def _entered(self, index: int, item: Any, parked: Parked | None) -> tuple[Any, Outcome | None]:
        """Run one item in a context that somebody has prepared."""
        context = self._copied()
        if self._job.enter is not None:
            context.run(self._job.enter, index, item)
        return context.run(self.one, item, parked)

    async def _aentered(
        self, index: int, item: Any, parked: Parked | None
    ) -> tuple[Any, Outcome | None]:
        """Do the same in an event loop, where only a task has a context of its own."""
        from asyncio import create_task

        context = self._copied()
        if self._job.enter is not None:
            context.run(self._job.enter, index, item)
        task = create_task(self.aone(item, parked), context=context)
        try:
            return await task
        finally:
            # An item that is cut short takes its task along; for one that has ended this does nothing.
            task.cancel()

    def _copied(self) -> Context:
        return copy_context() if self._context is None else self._context.copy()

    def one(self, item: Any, parked: Parked | None) -> tuple[Any, Outcome | None]:
        """Run one item of a synchronous function: its plain result, or what became of it."""
        begun: Exception | None = None
        # `_may_go_directly` written out.
        if parked is None and self._direct and not (switch.on or self._lane.closed):
            self._count()
            try:
                return self._call(item), None
            except Exception as error:  # noqa: BLE001 - the stages decide what comes next
                begun = error
            except BaseException as error:  # noqa: BLE001 - it belongs to the item; the driver decides
                return None, Outcome(error=error)
        call = self._begin(item, parked, begun)
        del begun  # a frame that names an error which passes through it is a reference cycle
        began = perf_counter()
        try:
            value = self._pipeline.run(call)
            if self._pipeline.awaits:
                from opero.utils import run_async

                value = run_async(value)
        except Pause as pause:
            return None, self._parked(call, pause.seconds, began)
        except BaseException as error:  # noqa: BLE001 - as above
            return None, self._failed(call, error, began)
        finally:
            _let_go(call)
        return value, self._succeeded(call, value, began)

    async def aone(self, item: Any, parked: Parked | None) -> tuple[Any, Outcome | None]:
        """Run one item of a coroutine function."""
        begun: Exception | None = None
        if self._may_go_directly(parked):
            self._count()
            try:
                return await self._call(item), None
            except Exception as error:  # noqa: BLE001 - the stages decide what comes next
                begun = error
            except BaseException as error:
                if _is_ours(error):
                    raise
                return None, Outcome(error=error)
        call = self._begin(item, parked, begun)
        del begun  # as above
        began = perf_counter()
        try:
            value = await self._pipeline.run(call)
        except Pause as pause:
            return None, self._parked(call, pause.seconds, began)
        except BaseException as error:
            if _is_ours(error):
                raise
            return None, self._failed(call, error, began)
        finally:
            _let_go(call)
        return value, self._succeeded(call, value, began)

    def _may_go_directly(self, parked: Parked | None) -> bool:
        return self._direct and parked is None and not (switch.on or self._lane.closed)

    def _begin(self, item: Any, parked: Parked | None, begun: Exception | None) -> Call:
        job = self._job
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        call.patience = job.parks
        call.kept = True
        if begun is not None:
            call.calls, call.begun = 1, begun
        if parked is not None:
            now = ambient.clock().monotonic()
            call.attempts, call.calls, call.slept = parked.attempts, parked.calls, parked.slept
            call.started = call.first_failed = now - parked.elapsed
            call.failures = [Failure(label, error) for label, error in parked.failures]
        return call

    def _parked(self, call: Call, seconds: float, began: float) -> Outcome:
        since = call.started if call.started is not None else call.first_failed
        elapsed = 0.0 if since is None else ambient.clock().monotonic() - since
        parked = Parked(
            attempts=call.attempts,
            calls=call.calls,
            slept=call.slept,
            elapsed=elapsed + seconds,
            failures=tuple(call.failures or ()),
        )
        outcome = self._outcome(call, began)
        outcome.retry_in, outcome.parked = seconds, parked
        return outcome

    def _failed(self, call: Call, error: BaseException, began: float) -> Outcome:
        outcome = self._outcome(call, began)
        outcome.error = error
        return outcome

    def _succeeded(self, call: Call, value: Any, began: float) -> Outcome | None:
        plain = call.attempts == 1 and call.calls <= 1 and not call.rejected
        if plain and not self._job.details:
            return None
        outcome = self._outcome(call, began)
        outcome.value = value
        return outcome

    def _outcome(self, call: Call, began: float) -> Outcome:
        fallback = self._pipeline.fallback
        return Outcome(
            attempts=call.attempts,
            calls=call.calls,
            seconds=perf_counter() - began,
            slept=call.slept,
            waited=call.waited,
            label=None if fallback is None else fallback.label(call),
            fallback=call.value,
            rejected=call.rejected,
        )


def _is_ours(error: BaseException) -> bool:
    """Whether the worker itself is to end, and not only what its item has done inside."""
    if isinstance(error, GeneratorExit):
        return True
    from asyncio import CancelledError, current_task

    task = current_task()
    return isinstance(error, CancelledError) and task is not None and task.cancelling() > 0


def _let_go(call: Call) -> None:
    call.kept = False
    call.let_go()
