# this_file: src/opero/durable/store.py
"""What an engine asks of the place where the journal is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from opero.durable.records import Op, State, StepRecord, WorkflowRecord

__all__ = ["Store"]


class Store(Protocol):
    """A journal: it takes writes in batches, each batch whole or not at all.

    Methods may be called from any thread, `apply` from one at a time. Every failure is a
    `JournalError` that says what to do.
    """

    def open(self) -> None:
        """Get ready; once is enough, twice does no harm."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...

    def join(self) -> str:
        """Become an owner, which stays alive until `leave` or until this process dies; return its id."""
        ...

    def leave(self, owner: str) -> None:
        """Be an owner no longer."""
        ...

    def apply(self, ops: Sequence[Op]) -> list[Any]:
        """Write, durably when it returns, and answer each write as its class says.

        A claim also frees what dead owners have left.
        """
        ...

    def get(self, workflow: str) -> WorkflowRecord | None:
        """Return one workflow."""
        ...

    def find(
        self,
        name: str | None = None,
        states: Iterable[State] = (),
        limit: int | None = None,
    ) -> list[WorkflowRecord]:
        """Return workflows, the youngest first."""
        ...

    def steps(self, workflow: str) -> list[StepRecord]:
        """Return a workflow's steps in the order of their first record."""
        ...

    def attention(self, owner: str) -> tuple[bool, float | None]:
        """Tell cheaply whether a claim may find something, and when the next sleeper wakes.

        The time is in wall-clock seconds, None without sleepers.
        """
        ...

    def cancelled(self, owner: str) -> list[str]:
        """Return the ids of an owner's workflows that somebody wants cancelled."""
        ...

    def signalled(self, owner: str) -> list[tuple[str, str]]:
        """Return id and name of signals that are there for an owner's workflows."""
        ...
