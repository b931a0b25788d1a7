# this_file: src/opero/durable/records.py
"""What a store keeps: workflows and their steps, and what it is asked to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

__all__ = [
    "ENDED",
    "Cancel",
    "Claim",
    "Create",
    "Drop",
    "Fork",
    "Move",
    "Op",
    "PutStep",
    "Resolve",
    "Resume",
    "Send",
    "State",
    "StepRecord",
    "StepState",
    "Take",
    "WorkflowRecord",
]


class State(StrEnum):
    """Where a workflow is.

    `status` in the tables that users see is coarser: see `WorkflowRecord.status`.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SLEEPING = "sleeping"
    WAITING = "waiting"
    BLOCKED = "blocked"
    IN_DOUBT = "in_doubt"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD = "dead"


ENDED: Final = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.DEAD})


class StepState(StrEnum):
    """Where a step is."""

    STARTED = "started"
    RETRYING = "retrying"
    PENDING = "pending"
    """A sleep that lasts, a signal that is waited for."""
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class WorkflowRecord:
    """One run of a workflow.

    Attributes:
        id: Its identity, chosen by the caller or drawn.
        name: Name under which the function is registered.
        version: The function's `version=`, None without.
        args: Arguments, as `values.encode` writes them.
        hash: Digest of name and arguments.
        state: Where it is.
        output: The result as JSON, None before the end.
        error: What it failed with, as `failures.pack_error` writes it, or why it waits.
        failed_step: Path of the step whose error ended it.
        owner: The engine that runs it, None for nobody.
        epoch: Number of claims; a write with an older one is refused.
        recoveries: Claims from dead owners since the last progress.
        progress: Steps that were recorded at the last claim.
        wake: Wall-clock seconds at which a sleep or a wait ends, None without.
        cancel: Whether somebody wants it cancelled.
        created, updated: Wall-clock seconds.
    """

    id: str
    name: str
    version: str | None
    args: str
    hash: str
    state: State = State.QUEUED
    output: str | None = None
    error: str | None = None
    failed_step: str | None = None
    owner: str | None = None
    epoch: int = 0
    recoveries: int = 0
    progress: int = 0
    wake: float | None = None
    cancel: bool = False
    created: float = 0.0
    updated: float = 0.0

    @property
    def status(self) -> str:
        """Tell it in the words of the status: "processing", "done" or "failed"."""
        if self.state is State.DONE:
            return "done"
        return "failed" if self.state in ENDED else "processing"


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One step of a workflow.

    Attributes:
        path: Its place: the path of scopes and its number there ("3", "c2/1").
        name: Name of the activity, or of the operation ("sleep").
        hash: Digest of its arguments, "" without.
        state: Where it is.
        value: Result or error as JSON.
        attempts: Attempts begun.
        wake: Wall-clock seconds at which a sleep ends or the next attempt begins.
        began, ended: Wall-clock seconds.
        order: Place among the workflow's steps by the time of their first record, from 1; 0 before.
    """

    path: str
    name: str
    hash: str
    state: StepState
    value: str | None = None
    attempts: int = 1
    wake: float | None = None
    began: float = 0.0
    ended: float | None = None
    order: int = 0


# --- what is written ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Op:
    """One write. The store answers with what stands in the docstring of each kind."""


@dataclass(slots=True)
class Create(Op):
    """Add a workflow; answers with the record that stands under its id: this one, or an older one."""

    record: WorkflowRecord


@dataclass(slots=True)
class Claim(Op):
    """Make workflows that nobody runs one's own; answers with their records.

    Attributes:
        owner: The engine.
        names: Workflows that it can run.
        limit: Most workflows.
        blocked: Whether blocked ones are tried again.
        only: A single id, None for the oldest.
        max_recoveries: One that is claimed from a dead owner more often without progress is dead.
    """

    owner: str
    names: tuple[str, ...]
    limit: int
    blocked: bool = False
    only: str | None = None
    max_recoveries: int = 10


@dataclass(slots=True)
class PutStep(Op):
    """Write a step; answers whether the workflow still belongs to this owner and epoch."""

    workflow: str
    owner: str
    epoch: int
    step: StepRecord


@dataclass(slots=True)
class Move(Op):
    """Put a workflow into another state; answers whether it still belonged to this owner and epoch.

    Attributes:
        free: Whether the owner lets go of it.
    """

    workflow: str
    owner: str
    epoch: int
    state: State
    output: str | None = None
    error: str | None = None
    failed_step: str | None = None
    wake: float | None = None
    free: bool = True


@dataclass(slots=True)
class Cancel(Op):
    """Ask for a workflow's end; answers with its record, None if there is none."""

    workflow: str


@dataclass(slots=True)
class Resume(Op):
    """Queue a workflow that has ended without a result, or is blocked; answers whether it was one."""

    workflow: str


@dataclass(slots=True)
class Fork(Op):
    """Copy a workflow with the steps before one; answers with the new record, None without the old one.

    Attributes:
        new: The new id.
        before: Steps whose `order` is smaller are copied.
        version: Version of the code that shall run the copy.
    """

    workflow: str
    new: str
    before: int
    version: str | None


@dataclass(slots=True)
class Send(Op):
    """Leave a signal; answers whether there is such a workflow, and wakes one that waits."""

    workflow: str
    name: str
    value: str


@dataclass(slots=True)
class Take(Op):
    """Record a waiting step with the oldest signal of a name.

    Answers with the signal's value, None if there is none, False if the workflow is somebody
    else's.

    Attributes:
        at: Wall-clock seconds at which the step ends if there is one.
    """

    workflow: str
    owner: str
    epoch: int
    name: str
    step: StepRecord
    at: float = 0.0


@dataclass(slots=True)
class Resolve(Op):
    """Decide about a step in doubt; answers whether there was one.

    Attributes:
        step: What it shall be; None to run it again.
    """

    workflow: str
    path: str
    step: StepRecord | None


@dataclass(slots=True)
class Drop(Op):
    """Let go of everything an owner has, so that others can go on with it; answers with the number.

    Attributes:
        keep: Ids that it does not let go of: those that still run.
    """

    owner: str
    keep: tuple[str, ...] = field(default=())
