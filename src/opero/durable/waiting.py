# this_file: src/opero/durable/waiting.py
"""Waiting for a workflow's end: told at once if it runs in this process, by looking now and then otherwise."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from opero.durable.failures import message_of, unpack_error
from opero.durable.records import State, WorkflowRecord
from opero.durable.report import settled
from opero.durable.values import decode
from opero.errors import DurableError, WorkflowEndedError
from opero.utils.units import Duration, parse_seconds

__all__ = ["asettle", "outcome", "settle"]

_GLANCE: Final = 0.25
"""Longest pause between two looks at a workflow that another process runs."""

Look = Callable[[str], WorkflowRecord]
Listen = Callable[[str, Callable[[], object]], bool]


def settle(
    workflow_id: str, timeout: Duration | None, look: Look, listen: Listen
) -> WorkflowRecord:
    """Wait until nothing more happens to a workflow by itself, and return it.

    Args:
        workflow_id: The workflow.
        timeout: Longest wait, None for as long as it takes.
        look: Finds its record.
        listen: Has something called at its end, and tells whether it runs here.

    Raises:
        TimeoutError: It takes longer.
    """
    until = _until(timeout)
    pause = 0.01
    while True:
        told = threading.Event()
        here = listen(workflow_id, told.set)
        record = look(workflow_id)
        if settled(record):
            return record
        told.wait(_left(until, workflow_id, None if here else pause))
        pause = min(2 * pause, _GLANCE)


async def asettle(
    workflow_id: str,
    timeout: Duration | None,  # noqa: ASYNC109 - as in the synchronous twin
    look: Look,
    listen: Listen,
) -> WorkflowRecord:
    """Do what `settle` does, without blocking the event loop."""
    until = _until(timeout)
    loop = asyncio.get_running_loop()
    pause = 0.01
    while True:
        told = asyncio.Event()

        def tell(told: asyncio.Event = told) -> None:
            loop.call_soon_threadsafe(told.set)

        here = listen(workflow_id, tell)
        record = await asyncio.to_thread(look, workflow_id)
        if settled(record):
            return record
        left = _left(until, workflow_id, None if here else pause)
        try:
            async with asyncio.timeout(left):
                await told.wait()
        except TimeoutError:
            pass
        pause = min(2 * pause, _GLANCE)


def outcome(record: WorkflowRecord) -> Any:
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


def _until(timeout: Duration | None) -> float | None:
    return None if timeout is None else time.monotonic() + parse_seconds(timeout, "timeout")


def _left(until: float | None, workflow_id: str, pause: float | None) -> float | None:
    """Return how long to wait now, None for as long as it takes."""
    if until is None:
        return pause
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"workflow {workflow_id!r} has not ended in time")
    return left if pause is None else min(left, pause)
