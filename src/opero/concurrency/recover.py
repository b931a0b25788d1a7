# this_file: src/opero/concurrency/recover.py
"""What becomes of an item whose worker died: a failed call like any other, decided where the map runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.concurrency.engine import Outcome, Parked
from opero.core.call import Call, FailedCall
from opero.errors import CallTimeoutError, OperoError, WorkerLostError
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.concurrency.engine import Job, Lost

__all__ = ["Recovery"]


class Recovery:
    """Judges lost items by the retry options of their map.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pipeline = job.pipeline

    def __call__(self, item: Any, parked: Parked | None, lost: Lost, now: float, /) -> Outcome:
        """Return a pause before the item's next attempt, or the error it ends with."""
        job, pipeline = self._job, self._pipeline
        before = parked or Parked()
        error = self._error(lost)
        pipeline.stats.merge({"calls": 1, "failures": 1})
        if pipeline.emitter.active:
            name = pipeline.emitter.function
            attempt = before.attempts
            pipeline.emitter.emit(
                events.AttemptFailed(function=name, attempt=attempt, value=None, error=error)
            )
        failures = (*before.failures, (None, error))
        call = Call((*job.before, item, *job.after), job.kwargs)
        call.attempts, call.calls, call.slept = before.attempts, before.calls + 1, before.slept
        call.started = now - before.elapsed
        call.deadline = self._deadline(call.started)
        final: Exception = error
        retry = pipeline.retry
        if retry is not None:
            try:
                delay = retry.before_next(call, error)
            except Exception as refused:  # noqa: BLE001 - that is how it says that all is spent
                final = refused
            else:
                retry.slept(call, delay)
                after = Parked(
                    attempts=call.attempts,
                    calls=call.calls,
                    slept=call.slept,
                    elapsed=before.elapsed + delay,
                    failures=failures,
                )
                return Outcome(
                    attempts=call.attempts, calls=call.calls, retry_in=delay, parked=after
                )
        call.failures = [FailedCall(label, known) for label, known in failures]
        instead = pipeline.report.failed(call, final)
        return Outcome(error=instead or final, attempts=call.attempts, calls=call.calls)

    def _deadline(self, started: float) -> float | None:
        """Return the clock reading at which the item must be done, None for never."""
        own = self._job.options.deadline
        ends = [] if own is None else [started + parse_seconds(own, "deadline")]
        if self._job.deadline is not None:
            ends.append(self._job.deadline)
        return min(ends, default=None)

    def _error(self, lost: Lost) -> OperoError:
        name = self._pipeline.info.name
        if lost.why == "timeout":
            return CallTimeoutError(name, self._job.item_timeout or 0.0)
        return WorkerLostError(name, lost.why, lost.pid, lost.exitcode, lost.said)
