# this_file: src/opero/utils/fork.py
"""Reset what a forked child process must not share with its parent: locks, threads, connections.

A child has only the thread that called `fork`: a lock that another thread held stays locked for ever, and a
connection or file position is used by both processes. One hook runs all registered functions, in order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakSet

F = TypeVar("F", bound=Callable[[], object])


class Forkable(Protocol):
    """An object that can be reset in a forked child."""

    def after_fork(self) -> None:
        """Drop what belongs to the parent process."""
        ...


_functions: Final[list[Callable[[], object]]] = []
_objects: Final[WeakSet[Forkable]] = WeakSet()


def run_after_fork(function: F) -> F:
    """Call a function in each forked child; also usable as a decorator.

    Args:
        function: Takes no arguments. It must not wait for a lock that it did not make itself.

    Returns:
        The function.
    """
    _functions.append(function)
    return function


def reset_after_fork(thing: Forkable) -> None:
    """Call `thing.after_fork()` in each forked child, after the functions; `thing` is held weakly."""
    _objects.add(thing)


def _in_child() -> None:
    for function in (*_functions, *(thing.after_fork for thing in list(_objects))):
        try:
            function()
        except Exception as error:  # noqa: BLE001 - the others must run: reported as hooks of `os` are
            report: Any = SimpleNamespace(
                exc_type=type(error),
                exc_value=error,
                exc_traceback=error.__traceback__,
                err_msg="Exception ignored after fork",
                object=function,
            )
            sys.unraisablehook(report)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
