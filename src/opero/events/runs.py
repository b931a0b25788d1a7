# this_file: src/opero/events/runs.py
"""Identify executions: a run has an id and a parent, and events are stamped with both.

A call has a run only where there is a listener. The run is kept in a context variable, so that tasks
and threads that get a copy of the context belong to it.
"""

from __future__ import annotations

import itertools
import os
from contextvars import ContextVar, Token
from typing import Final, Self

from opero.utils.fork import run_after_fork


class Run:
    """One execution of something: a call, a task, a workflow, a map.

    As a context manager it is the current run within the block, and the parent of runs that begin there.

    Args:
        name: What is executed.
        id: Its id, where it is known already (a workflow that continues after a crash); a new one otherwise.
        parent_id: Id of the run that it belongs to; that of the current run by default.
        started: Clock reading at its start, where its duration is wanted.

    Example:
        >>> with Run("outer") as outer, Run("inner") as inner:
        ...     inner.parent_id == outer.id, current_run() is inner
        (True, True)
    """

    __slots__ = ("_token", "id", "name", "parent_id", "started")

    def __init__(
        self,
        name: str,
        *,
        id: str | None = None,
        parent_id: str | None = None,
        started: float | None = None,
    ) -> None:
        self.name: Final = name
        self.id: Final[str] = _next_id() if id is None else id
        self.parent_id: Final[str | None] = run_id() if parent_id is None else parent_id
        self.started: float | None = started
        self._token: Token[Run | None] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            try:
                _current.reset(token)
            except ValueError:
                # A coroutine that is closed by the garbage collector ends in another context
                # than its own, which is gone.
                pass

    def __repr__(self) -> str:
        of = f" of {self.parent_id}" if self.parent_id else ""
        return f"<Run {self.id} {self.name}{of}>"


_current: ContextVar[Run | None] = ContextVar("opero_run", default=None)


def current_run() -> Run | None:
    """Return the run that the calling code is part of; None without a listener or outside of any run."""
    return _current.get()


def run_id() -> str | None:
    """Return the id of the current run."""
    run = _current.get()
    return None if run is None else run.id


def parent_run_id() -> str | None:
    """Return the id of the run that the current one belongs to."""
    run = _current.get()
    return None if run is None else run.parent_id


_numbers = itertools.count(1)
_process = os.urandom(4).hex()


def _next_id() -> str:
    """Return an id that no other run has, in this process or another one."""
    return f"{_process}-{next(_numbers)}"


@run_after_fork
def _renew() -> None:
    global _process  # noqa: PLW0603 - a child process must not give out its parent's ids
    _process = os.urandom(4).hex()
