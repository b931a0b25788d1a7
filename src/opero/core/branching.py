# this_file: src/opero/core/branching.py
"""Parallel branches by number: for those who must know them apart whatever the timing.

What runs jobs side by side (`opero.tasks.Parallel`, a map) and what keeps books of the steps in them
(`opero.durable`) may not know each other. They meet here: one leaves a `Fork` in the context, the other
asks it for the branches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, Protocol

__all__ = ["Branches", "fork"]


class Branches(Protocol):
    """The branches of one parallel group. Both verbs change the calling context, which must be a copy."""

    def enter(self, index: int) -> object:
        """From now on this context belongs to the branch of that number, from 0."""
        ...

    def aside(self) -> object:
        """From now on this context belongs to what only serves the branches, a worker say, and is itself none."""
        ...


fork: Final[ContextVar[Callable[[], Branches] | None]] = ContextVar("opero_fork", default=None)
"""Called, once, where a parallel group begins; None where nobody keeps books."""
