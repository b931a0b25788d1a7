# this_file: src/opero/utils/fork.py
"""Reset state in forked children: the package's only fork hook.

A forked child has one thread, the one that forked. Locks that other threads of the parent held stay
locked for ever, and threads, event loops and connections of the parent cannot be used. So a module
registers a function here, and an object its `after_fork`, that replaces them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Protocol
from weakref import WeakSet

__all__ = ["Forkable", "reset_after_fork", "run_after_fork"]


class Forkable(Protocol):
    """An object that has to be reset in a forked child."""

    def after_fork(self) -> object:
        """Replace locks, and drop what belongs to the parent."""
        ...


_functions: Final[list[Callable[[], object]]] = []
_objects: Final[WeakSet[Forkable]] = WeakSet()


def run_after_fork(function: Callable[[], object]) -> None:
    """Call a function in each forked child; functions run in the order in which they were given.

    Args:
        function: Called without arguments. It is kept for good: give module-level functions only.
    """
    _functions.append(function)


def reset_after_fork(thing: Forkable) -> None:
    """Call `thing.after_fork()` in each forked child, as long as the object lives.

    Args:
        thing: Kept by a weak reference.
    """
    _objects.add(thing)


def _reset_child() -> None:
    failure: Exception | None = None
    for reset in (*_functions, *(thing.after_fork for thing in list(_objects))):
        try:
            reset()
        except Exception as error:  # noqa: BLE001 - the others must still be reset
            failure = error
    if failure is not None:
        raise failure  # the interpreter reports it, and the child goes on


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_child)
