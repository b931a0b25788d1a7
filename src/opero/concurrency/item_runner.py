# this_file: src/opero/concurrency/item_runner.py
"""Run single items through their pipeline, and judge those that were lost with their worker.

A success on the first attempt is a bare value; everything else is an `ItemOutcome`. The function of a
plain pipeline is called directly, as decorated functions do it, and the stages see only what failed.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from opero import events
from opero.concurrency.executors.base import ItemOutcome, Parked
from opero.core.call import Call, FailedCall, RetryParked
from opero.errors import CallTimeoutError, DeadlineError, OperoError, WorkerLostError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.steps import BlockingStep, run_async, run_sync
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.executors.base import Lost, MapJob
    from opero.core.pipeline import FastPath
    from opero.utils.steps import StepLogic


Result = tuple[Any, ItemOutcome | None]
"""A plain result, or what became of the item instead."""


class ItemRunner:
    """Runs the items of one job, in one worker or in several that share its pipeline.

    Args:
        job: The job.
    """

    def __init__(self, job: MapJob) -> None:
        self._job = job
        self._pipeline = pipeline = job.pipeline
        fn = job.function
        self._call = fn if not (job.before or job.after or job.kwargs) else self._bound
        self._direct = pipeline.is_unguarded and not job.details
        self._fast_path = pipeline.fast_path
        self._count = pipeline.stats.call_counter.count

    def _bound(self, item: Any) -> Any:
        job = self._job
        return job.function(*job.before, item, *job.after, **job.kwargs)

    # --- an item -------------------------------------------------------------------------------------

    @property
    def direct(self) -> tuple[Callable[[Any], Any], FastPath] | None:
        """What a loop needs that calls the function itself and counts the calls: the call, and the fast path.

        The loop may do that while the switch is off and the fast path open; the error of a call goes to `run`. None
        where each item needs the stages.
        """
        return (self._call, self._fast_path) if self._direct else None

    def run(self, item: Any, parked: Parked | None, first_error: Exception | None = None) -> Result:
        """Run one item of a synchronous function: its plain result, or what became of it.

        Args:
            item: The item.
            parked: What it brings from earlier attempts.
            first_error: The error of its first real call, if that was made already.
        """
        if (
            first_error is None
            and parked is None
            and self._direct
            and not (switch.on or self._fast_path.closed)
        ):
            self._count()
            try:
                return self._call(item), None
            except Exception as error:  # noqa: BLE001 - the stages decide what comes next
                first_error = error
            except BaseException as error:  # noqa: BLE001 - it belongs to the item; the scheduler decides
                return None, ItemOutcome(error=error)
        logic = self._run_stages(item, parked, first_error)
        del first_error  # a frame that names an error which passes through it is a reference cycle
        return run_sync(logic)

    async def run_async(self, item: Any, parked: Parked | None) -> Result:
        """Run one item of a coroutine function."""
        first_error: Exception | None = None
        if parked is None and self._direct and not (switch.on or self._fast_path.closed):
            self._count()
            try:
                return await self._call(item), None
            except Exception as error:  # noqa: BLE001 - the stages decide what comes next
                first_error = error
            except BaseException as error:
                if _ends_the_worker(error):
                    raise
                return None, ItemOutcome(error=error)
        logic = self._run_stages(item, parked, first_error)
        del first_error  # as above
        return await run_async(logic)

    def _run_stages(
        self, item: Any, parked: Parked | None, first_error: Exception | None
    ) -> StepLogic[Result]:
        """Run one item through the stages."""
        job, run = self._job, self._pipeline.run
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        call.park_after = job.parks
        if job.stopped is not None:
            call.stop_wait = self._park_if_stopped
        call.keep_failures = True
        if first_error is not None:
            call.calls, call.prior_outcome = 1, first_error
            del first_error  # as above
        if parked is not None:
            now = ambient.clock().monotonic()
            call.attempts, call.calls, call.slept = parked.attempts, parked.calls, parked.slept
            call.started = call.first_failed = now - parked.elapsed
            call.failures = [FailedCall(label, error) for label, error in parked.failures]
        began = perf_counter()
        try:
            value = yield BlockingStep(run, run, (call,))
        except RetryParked as pause:
            since = call.first_failed if call.started is None else call.started
            elapsed = 0.0 if since is None else ambient.clock().monotonic() - since
            failures = tuple(call.failures or ())
            after = Parked(call.attempts, call.calls, call.slept, elapsed + pause.seconds, failures)
            return None, self._outcome(call, began, retry_in=pause.seconds, parked=after)
        except BaseException as error:
            if self._pipeline.awaits and _ends_the_worker(error):
                raise
            return None, self._outcome(call, began, error=error)
        finally:
            call.keep_failures = False
            call.drop_failures()
        plain = call.attempts == 1 and call.calls <= 1 and not (call.rejected or job.details)
        return value, None if plain else self._outcome(call, began, value=value)

    def _park_if_stopped(self) -> None:
        """Take a call out of the queue of its rate limit, because the map begins no further item."""
        if self._job.stopped is not None and self._job.stopped():
            raise RetryParked(0.0)

    def _outcome(self, call: Call, began: float, **made: Any) -> ItemOutcome:
        fallback = self._pipeline.fallback
        return ItemOutcome(
            attempts=call.attempts,
            calls=call.calls,
            seconds=perf_counter() - began,
            slept=call.slept,
            waited=call.waited,
            label=None if fallback is None else fallback.label(call),
            fallback=call.value,
            rejected=call.rejected,
            **made,
        )


def _ends_the_worker(error: BaseException) -> bool:
    """Return whether the worker itself is to end, and not only the work of its item."""
    if isinstance(error, GeneratorExit):
        return True
    from asyncio import CancelledError, current_task

    task = current_task()
    return isinstance(error, CancelledError) and task is not None and task.cancelling() > 0


# --- items whose worker died ----------------------------------------------------------------------


def judge_lost(
    job: MapJob, item: Any, parked: Parked | None, lost: Lost, now: float, /
) -> ItemOutcome:
    """Judge a lost item by the retry options of its map: it counts as one failed call.

    Returns:
        A pause before the item's next attempt, or the error it ends with.
    """
    pipeline, before = job.pipeline, parked or Parked()
    error = _lost_error(job, lost)
    pipeline.stats.add(calls=1, failures=1)
    if pipeline.emitter.active:
        name, attempt = pipeline.emitter.function, before.attempts
        pipeline.emitter.emit(
            events.AttemptFailed(function=name, attempt=attempt, value=None, error=error)
        )
    failures = (*before.failures, (None, error))
    call = Call((*job.before, item, *job.after), job.kwargs)
    call.attempts, call.calls, call.slept = before.attempts, before.calls + 1, before.slept
    call.started = now - before.elapsed
    own = pipeline.options.deadline
    ends = [job.deadline, None if own is None else call.started + parse_seconds(own, "deadline")]
    call.deadline = min((end for end in ends if end is not None), default=None)
    delay = pipeline.retry.before_next(call, error)
    if delay is not None:
        pipeline.retry.slept(call, delay)
        elapsed = before.elapsed + delay
        after = Parked(call.attempts, call.calls, call.slept, elapsed, failures)
        return ItemOutcome(attempts=call.attempts, calls=call.calls, retry_in=delay, parked=after)
    call.failures = [FailedCall(label, known) for label, known in failures]
    instead = pipeline.report.failed(call, error)
    return ItemOutcome(error=instead or error, attempts=call.attempts, calls=call.calls)


def _lost_error(job: MapJob, lost: Lost) -> OperoError:
    name = job.pipeline.info.name
    if lost.why == "deadline":
        return DeadlineError(f"{name}() ran out of time before its worker was done")
    if lost.why == "timeout":
        return CallTimeoutError(name, job.item_timeout or 0.0)
    return WorkerLostError(name, lost.why, lost.pid, lost.exitcode, lost.said)
