# this_file: src/opero/durable/report.py
"""Records as users see them: plain dicts."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any, Final

from opero.durable.failures import message_of
from opero.durable.records import ENDED, State, StepRecord, StepState, WorkflowRecord
from opero.durable.values import decode
from opero.errors import OperoUsageError, UnserializableError, did_you_mean

__all__ = ["settled", "states_of", "status_of", "step_of"]

_SETTLED: Final = ENDED | {State.BLOCKED, State.IN_DOUBT}
_OF_STATUS: Final = {
    "processing": tuple(state for state in State if state not in ENDED),
    "done": (State.DONE,),
    "failed": (State.FAILED, State.CANCELLED, State.DEAD),
}


def settled(record: WorkflowRecord) -> bool:
    """Tell whether nothing more happens to a workflow by itself."""
    return record.state in _SETTLED


def states_of(status: str | None) -> tuple[State, ...]:
    """Return the states that a status covers; a state is itself.

    "failed" covers what was cancelled or given up too.

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
        steps: Its steps, which tell that otherwise.
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


def _shown(text: str | None) -> Any:
    """Return a recorded value; its JSON where the program that looks does not know its type."""
    if text is None:
        return None
    try:
        return decode(text)
    except UnserializableError:
        return text


def _iso(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat()
