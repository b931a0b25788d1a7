# this_file: src/opero/durable/report.py
"""Report records as plain dicts, and the outcome of a workflow as a value or an error."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any, Final

from opero.durable.failures import message_of, unpack_error
from opero.durable.records import ENDED, State, StepRecord, StepState, WorkflowRecord
from opero.durable.values import decode
from opero.errors import (
    DurableError,
    OperoUsageError,
    UnserializableError,
    WorkflowEndedError,
    did_you_mean,
)

__all__ = ["is_settled", "outcome_of", "states_of", "status_of", "step_of"]

_SETTLED: Final = ENDED | {State.BLOCKED, State.IN_DOUBT}
_OF_STATUS: Final = {
    "processing": tuple(state for state in State if state not in ENDED),
    "done": (State.DONE,),
    "failed": (State.FAILED, State.CANCELLED, State.DEAD),
}


def is_settled(record: WorkflowRecord) -> bool:
    """Return whether a workflow has ended, or can go on only with help from outside."""
    return record.state in _SETTLED


def states_of(status: str | None) -> tuple[State, ...]:
    """Return the states that a status covers; a state is itself.

    "failed" includes what was cancelled or given up.

    Raises:
        OperoUsageError: There is no such status.
    """
    if status is None:
        return ()
    if status in _OF_STATUS:
        return _OF_STATUS[status]
    if status in set(State):
        return (State(status),)
    known = [*_OF_STATUS, *(str(state) for state in State)]
    raise OperoUsageError(
        f"status={status!r}: there is no such status.{did_you_mean(status, known)}"
    )


def status_of(
    record: WorkflowRecord, active: str | None, steps: Iterable[StepRecord] = ()
) -> dict[str, Any]:
    """Return a workflow as a dict.

    Args:
        record: The workflow.
        active: The activity that it runs, if it runs in this process.
        steps: Its steps, which show that otherwise.
    """
    updated = record.updated
    for step in steps:
        updated = max(updated, step.ended or step.began)
        if step.state not in (StepState.DONE, StepState.FAILED):
            active = step.name
    error = message_of(record.error)
    if error is None and record.state in (State.CANCELLED, State.DEAD):
        error = str(record.state)
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "current_activity": active,
        "error_message": error,
        "output": _shown(record.output),
        "created_at": _iso(record.created),
        "updated_at": _iso(updated),
    }


def step_of(number: int, step: StepRecord) -> dict[str, Any]:
    """Return a step as a dict."""
    done = step.state is StepState.DONE
    return {
        "step": number,
        "path": step.path,
        "name": step.name,
        "status": str(step.state),
        "attempts": step.attempts,
        "output": _shown(step.value) if done else None,
        "error_message": None if done else message_of(step.value),
        "began_at": _iso(step.began),
        "ended_at": None if step.ended is None else _iso(step.ended),
    }


def outcome_of(record: WorkflowRecord) -> Any:
    """Return the result of a workflow, or raise what it has ended with."""
    match record.state:
        case State.DONE:
            return decode(record.output or "null")
        case State.FAILED:
            raise unpack_error(record.error or "{}")
        case State.CANCELLED | State.DEAD:
            why = f": {record.error}" if record.error else ""
            raise WorkflowEndedError(f"workflow {record.id!r} is {record.state}{why}")
        case _:
            raise DurableError(
                f"workflow {record.id!r} is {record.state}: {message_of(record.error)}"
            )


def _shown(text: str | None) -> Any:
    """Return a recorded value, or its JSON text where this program cannot rebuild it."""
    if text is None:
        return None
    try:
        return decode(text)
    except UnserializableError:
        return text


def _iso(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat()
