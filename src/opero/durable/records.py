# this_file: src/opero/durable/records.py
"""Define what a journal's store keeps (workflows, steps), what it writes, and the store's protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol


class WorkflowStatus(StrEnum):
    """Status of a workflow, as users see it."""

    PROCESSING = "processing"
    DONE = "done"
    FAILED = "failed"


class State(StrEnum):
    """State of a workflow, more exact than its status."""

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

    @property
    def status(self) -> WorkflowStatus:
        """The state in coarser words; "failed" includes what was cancelled or given up."""
        if self is State.DONE:
            return WorkflowStatus.DONE
        return WorkflowStatus.FAILED if self in ENDED else WorkflowStatus.PROCESSING


ENDED: Final = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.DEAD})


class StepState(StrEnum):
    """State of a step."""

    STARTED = "started"
    RETRYING = "retrying"
    PENDING = "pending"
    """A sleep that has not ended, a signal that has not come."""
    DONE = "done"
    FAILED = "failed"


RECORDED: Final = frozenset({StepState.DONE, StepState.FAILED})
"""States of steps whose outcome is in the journal."""


@dataclass(slots=True, kw_only=True)
class WorkflowRecord:
    """One run of a workflow.

    Attributes:
        id: Its identity, chosen by the caller or drawn at random.
        name: Name under which the function is registered.
        version: The function's `version=`, None without.
        args: Arguments, as `values.encode` writes them.
        hash: Digest of name and arguments.
        state: Its state.
        output: The result as JSON, None before the end.
        error: The error that ended it, as `values.pack_error` writes it, or why it cannot go on.
        failed_step: Path of the step whose error ended it.
        owner: The engine that runs it, None without.
        epoch: How often it was acquired; a write with an older one is refused.
        recoveries: Times it was acquired from a dead owner since the last progress.
        progress: Steps that were recorded when it was last acquired.
        wake: Wall-clock seconds at which a sleep or a wait ends, None without.
        cancel: Whether a cancellation was requested.
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
    def ownership(self) -> tuple[str, str, int]:
        """Id, owner and epoch, with which each write of its owner begins."""
        return self.id, self.owner or "", self.epoch


@dataclass(slots=True)
class StepRecord:
    """One step of a workflow.

    Attributes:
        path: Its place: the path of scopes and its number there ("3", "c2/1").
        name: Name of the activity, or of the operation ("sleep").
        hash: Digest of its arguments, "" without.
        state: Its state.
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


# --- writes -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Op:
    """One write. Each kind's docstring says what the store answers."""


@dataclass(slots=True)
class OwnedOp(Op):
    """A write that counts only while a workflow belongs to this owner and epoch."""

    workflow: str
    owner: str
    epoch: int


@dataclass(slots=True)
class Create(Op):
    """Add a workflow; answers with the record that is stored under its id: this one, or an older one."""

    record: WorkflowRecord


@dataclass(slots=True)
class Acquire(Op):
    """Take over workflows that have no owner, the oldest first; answers with their records.

    Frees the workflows of dead owners first. One that was running then, and had recorded no step since it
    was acquired, has one more recovery.

    Attributes:
        owner: The engine.
        names: Workflows that it can run.
        limit: Most workflows.
        blocked: Whether blocked ones are tried again.
        max_recoveries: A workflow with more recoveries is dead.
        recoveries: Only workflows with at least so many recoveries, and at most so many; those with the
            fewest come first where there is a choice.
    """

    owner: str
    names: tuple[str, ...]
    limit: int
    blocked: bool = False
    max_recoveries: int = 10
    recoveries: tuple[int, int] = (0, 1 << 30)


@dataclass(slots=True)
class PutStep(OwnedOp):
    """Write a step; answers whether the workflow still belongs to this owner and epoch."""

    step: StepRecord


@dataclass(slots=True)
class Move(OwnedOp):
    """Put a workflow into another state; answers whether it still belonged to this owner and epoch.

    Attributes:
        free: Whether it has no owner afterwards.
    """

    state: State
    output: str | None = None
    error: str | None = None
    failed_step: str | None = None
    wake: float | None = None
    free: bool = True


@dataclass(slots=True)
class Cancel(Op):
    """Request a workflow's cancellation; answers with its record, None if there is none."""

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
        version: Version of the code that will run the copy.
    """

    workflow: str
    new: str
    before: int
    version: str | None


@dataclass(slots=True)
class Send(Op):
    """Store a signal and wake a workflow that waits for it; answers whether there is such a workflow."""

    workflow: str
    name: str
    value: str


@dataclass(slots=True)
class Take(OwnedOp):
    """Record a waiting step with the oldest signal of a name.

    Answers with the signal's value, None if there is none, False if the workflow has another owner.

    Attributes:
        at: Wall-clock seconds at which the step ends if there is one.
    """

    name: str
    step: StepRecord
    at: float = 0.0


@dataclass(slots=True)
class Resolve(Op):
    """Decide about a step in doubt; answers whether there was one.

    Attributes:
        step: What it becomes; None to run it again.
    """

    workflow: str
    path: str
    step: StepRecord | None


@dataclass(slots=True)
class Drop(Op):
    """Free all workflows of an owner, so that others can take them over; answers with their number.

    Attributes:
        keep: Ids that it keeps: those that still run.
    """

    owner: str
    keep: tuple[str, ...] = field(default=())


@dataclass(slots=True)
class Wake(Op):
    """Let a workflow that sleeps or waits go on now, as if its time had come; answers whether there was one.

    Attributes:
        epoch: Only if it was not acquired since.
    """

    workflow: str
    epoch: int


@dataclass(slots=True)
class Annotate(Op):
    """Note why the workflows of a name are not run; answers with their number.

    Attributes:
        name: The name.
        before: Only those that could run since before this time, and have neither an owner nor a reason.
        error: The reason, until they are acquired.
    """

    name: str
    before: float
    error: str


# --- the store ----------------------------------------------------------------------------------------------------


class JournalStore(Protocol):
    """A journal: it takes writes in batches, each batch whole or not at all.

    Methods may be called from any thread, `apply` from one at a time. Every failure is a
    `JournalError` that says what to do.
    """

    def open(self) -> None:
        """Open files and connections; does nothing if they are open."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...

    def join(self) -> str:
        """Become an owner, which is alive until `leave` or until this process dies; return its id."""
        ...

    def leave(self, owner: str) -> None:
        """Stop being an owner."""
        ...

    def apply(self, ops: Sequence[Op]) -> list[Any]:
        """Write, durably when it returns, and answer each write as its class says."""
        ...

    def get(self, workflow: str) -> WorkflowRecord | None:
        """Return one workflow."""
        ...

    def find(
        self, name: str | None = None, states: Iterable[State] = (), limit: int | None = None
    ) -> list[WorkflowRecord]:
        """Return workflows, the youngest first."""
        ...

    def steps(self, workflow: str) -> list[StepRecord]:
        """Return a workflow's steps in the order of their first record."""
        ...

    def attention(self, owner: str) -> tuple[bool, float | None]:
        """Return, cheaply, whether an owner may find something, and when the next sleeper wakes.

        The time is in wall-clock seconds, None without sleepers.
        """
        ...

    def unowned(self, before: float) -> list[str]:
        """Return the names of workflows that could run since before a time, and have neither an owner nor a reason."""
        ...

    def cancelled(self, owner: str) -> list[str]:
        """Return the ids of an owner's workflows whose cancellation was requested."""
        ...

    def signalled(self, owner: str) -> list[tuple[str, str]]:
        """Return id and name of signals that are stored for an owner's workflows."""
        ...
