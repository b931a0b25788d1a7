# this_file: src/opero/caching/background.py
"""Work that nobody waits for: on a few daemon threads, or in a task of the running event loop."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Coroutine
from threading import Condition
from typing import TYPE_CHECKING, Any, Final

from opero.utils.threads import ThreadCall, run_in_thread

if TYPE_CHECKING:
    from asyncio import Task

__all__ = ["start_task", "start_thread"]

_MOST: Final = 8
"""Threads at work at the same time, of all functions together."""

_DRAIN_SECONDS: Final = 2.0
"""How long the interpreter waits at its exit for what is under way."""


class _Crew:
    """The threads at work; they never keep the interpreter alive for longer than it drains."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._working = 0
        self._drains = False

    def join(self) -> bool:
        """Take a place; False if all are taken."""
        with self._changed:
            if not self._drains:
                self._drains = True
                atexit.register(self.drain)
            if self._working >= _MOST:
                return False
            self._working += 1
        return True

    def leave(self) -> None:
        """Give the place back."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def drain(self, seconds: float = _DRAIN_SECONDS) -> bool:
        """Wait until nobody works any more; False if time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._working, seconds)

    def renew(self) -> None:
        """After a fork: the threads of the parent do not exist here."""
        self._changed = Condition()
        self._working = 0


_crew = _Crew()
_tasks: set[Task[Any]] = set()
"""An event loop holds its tasks by weak references only."""


def start_thread(work: Callable[[], object]) -> bool:
    """Run `work` in a copy of the caller's context, on a daemon thread.

    Nothing is queued, because what waits behind a call that hangs would hang as well.

    Args:
        work: What to run; it must not raise.

    Returns:
        False if all threads are busy or the system has no more: then nothing runs.
    """
    if not _crew.join():
        return False

    def run() -> None:
        try:
            work()
        finally:
            _crew.leave()

    try:
        run_in_thread(ThreadCall(run))
    except RuntimeError:
        _crew.leave()
        return False
    return True


def start_task(work: Coroutine[Any, Any, object]) -> None:
    """Run `work` as a task of the running event loop, in a copy of the caller's context.

    It is cancelled with the loop's other tasks when `asyncio.run` ends.

    Args:
        work: A coroutine that does not raise.
    """
    from asyncio import get_running_loop

    task = get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_crew.renew)
