# this_file: src/opero/concurrency/recover.py
"""What becomes of an item whose worker died: a failed call like any other, decided where the map runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero import events
from opero.concurrency.engine import Outcome, Parked
from opero.core.call import Call, Failure
from opero.core.retry import RetryPolicy, RetryState
from opero.errors import CallTimeoutError, OperoError, WorkerLostError

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
        self._policy = RetryPolicy.of(job.options)
        self._retries = self._pipeline.retry is not None

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
        calls = before.calls + 1
        failures = (*before.failures, (None, error))
        state = RetryState(
            self._policy,
            attempt=before.attempts,
            started=now - before.elapsed,
            slept=before.slept,
        )
        final: Exception = error
        if self._retries:
            try:
                delay = state.next_delay(error, now=now)
            except Exception as refused:  # noqa: BLE001 - that is how it says that all is spent
                final = refused
            else:
                pipeline.stats.add(retries=1, slept=delay)
                if pipeline.emitter.active:
                    pipeline.emitter.emit(
                        events.RetryScheduled(
                            function=pipeline.emitter.function, attempt=state.attempt, delay=delay
                        )
                    )
                after = Parked(
                    attempts=state.attempt,
                    calls=calls,
                    slept=before.slept + delay,
                    elapsed=before.elapsed + delay,
                    failures=failures,
                )
                return Outcome(attempts=state.attempt, calls=calls, retry_in=delay, parked=after)
        call = Call((*job.before, item, *job.after), job.kwargs)
        call.attempts, call.calls, call.started = before.attempts, calls, now - before.elapsed
        call.failures = [Failure(label, known) for label, known in failures]
        instead = pipeline.report.failed(call, final)
        return Outcome(error=instead or final, attempts=before.attempts, calls=calls)

    def _error(self, lost: Lost) -> OperoError:
        name = self._pipeline.info.name
        if lost.why == "timeout":
            return CallTimeoutError(name, self._job.item_timeout or 0.0)
        return WorkerLostError(name, lost.why, lost.pid, lost.exitcode, lost.said)
