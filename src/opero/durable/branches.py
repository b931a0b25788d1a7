# this_file: src/opero/durable/branches.py
"""Parallel groups within a workflow: each branch has a line of steps of its own, known by its number.

The group takes one number of the line in which it was begun; "4/17/1" is the first step of branch 17
of the group at place 4. What runs branches finds this through `opero.core.context`.
"""

from __future__ import annotations

from opero.durable.scope import Scope, current, enter, outside

__all__ = ["Branching", "begin_branches"]


class Branching:
    """The branches of one group.

    Args:
        scope: The line in which the group was begun; None for a group that is no part of a workflow.
        path: Its place there.
    """

    def __init__(self, scope: Scope | None, path: str = "") -> None:
        self._scope = scope
        self._path = path

    def enter(self, index: int) -> None:
        """Make this context the branch of that number."""
        if self._scope is not None:
            enter(self._scope.branch(self._path, index))

    def aside(self) -> None:
        """Take this context out of the workflow."""
        outside()


def begin_branches() -> Branching:
    """Begin a group; it counts nothing within an activity, and where a cancelled workflow cleans up."""
    scope = current()
    if scope is None or scope.run.cancelling:
        return Branching(None)
    scope.run.check()
    return Branching(scope, scope.next_path())
