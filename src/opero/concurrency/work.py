# this_file: src/opero/concurrency/work.py
"""What a worker does with a chunk: one item after the other through the pipeline.

A success on the first attempt is a bare value; everything else is an `Outcome`. The function of a
plain pipeline is called directly, as decorated functions do it, and the stages see only what failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import Context, copy_context
from time import perf_counter
from typing import TYPE_CHECKING, Any

from opero.concurrency.engine import Outcome, Parked
from opero.core.call import Call, Failure, Pause
from opero.core.wrapper import is_unguarded
from opero.utils import ambient
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.concurrency.engine import Chunk, Job
    from opero.concurrency.sheet import Sheet
    from opero.core.pipeline import Pipeline

__all__ = ["Work"]


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
        self, chunk: Chunk, sheet: Sheet, *, stopped: Callable[[], bool] | None = None
    ) -> None:
        """Run a chunk of a synchronous function.

        Args:
            chunk: The chunk.
            sheet: Takes what becomes of it.
            stopped: Whether no further item shall begin; None if nobody will say so.
        """
        one = self.one if self._context is None else functools.partial(self._within, self._context)
        items, parked = chunk.items, chunk.parked or {}
        for position in sheet.positions(stopped):
            if self._job.enter is not None:
                one = functools.partial(self._entered, chunk.idx[position])
            sheet.add(position, *one(items[position], parked.get(position)))
        sheet.end()

    async def achunk(
        self, chunk: Chunk, sheet: Sheet, *, stopped: Callable[[], bool] | None = None
    ) -> None:
        """Run a chunk of a coroutine function; as `chunk`."""
        items, parked = chunk.items, chunk.parked or {}
        for position in sheet.positions(stopped):
            item, known = items[position], parked.get(position)
            if self._job.enter is None:
                told = await self.aone(item, known)
            else:
                told = await self._aentered(chunk.idx[position], item, known)
            sheet.add(position, *told)
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
