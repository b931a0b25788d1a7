# this_file: src/opero/durable/conclusion.py
"""How a run has ended, and what is written about it: a pure decision."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from opero.durable.failures import keepable, pack_error
from opero.durable.records import Move, State
from opero.durable.run import Run, Why, WorkflowCancelled
from opero.durable.values import encode
from opero.errors import ActivityError, UnserializableError

__all__ = ["conclude"]

_STATES: Final = {
    Why.SLEEP: State.SLEEPING,
    Why.WAIT: State.WAITING,
    Why.STOP: State.QUEUED,
    Why.BLOCKED: State.BLOCKED,
    Why.DOUBT: State.IN_DOUBT,
}


def conclude(run: Run, value: Any, error: BaseException | None) -> Move | None:
    """Return what becomes of a workflow whose function has ended.

    Args:
        run: Its run.
        value: What the function returned.
        error: What it raised, None if it returned.

    Returns:
        What is to be written; None if it is somebody else's, or nothing can be written.
    """
    record, ending = run.record, run.ending
    assert record.owner is not None  # noqa: S101 - it ran here
    move = Move(record.id, record.owner, record.epoch, State.DONE)
    over = error is None or isinstance(error, Exception)
    # A function that has come to its end needs no further step, so a stop in the meantime changes nothing.
    if ending is not None and not (over and ending.why is Why.STOP):
        if ending.why not in _STATES:
            return None
        move.state, move.error, move.wake = _STATES[ending.why], ending.text, ending.wake
        return move
    if run.cancelling and isinstance(error, WorkflowCancelled | asyncio.CancelledError):
        move.state = State.CANCELLED
        return move
    if error is None:
        try:
            move.output = encode(value, f"result of {record.name}()")
        except UnserializableError as refusal:
            error = refusal
        else:
            return move
    failure = _kept(error)
    move.state, move.error = State.FAILED, pack_error(failure)
    for raised, path in run.failed:
        if raised is error or raised is failure:
            move.failed_step = path
    return move


def _kept(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return keepable(error)
    return ActivityError(type(error).__name__, str(error))
