# this_file: src/opero/tasks/state.py
"""The states of a task."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["TaskState"]


class TaskState(StrEnum):
    """How far a run of a task has come.

    Attributes:
        PENDING: It has not begun.
        RUNNING: It is under way.
        SUCCEEDED: It has returned.
        FAILED: It has raised.
        RETRYING: It has failed and is tried again; a further failure, or the end, comes next.
        CANCELLED: It was cancelled.
    """

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRYING = "retrying"
    CANCELLED = "cancelled"
