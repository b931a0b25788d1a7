# this_file: src/opero/durable/forks.py
"""What a forked child must not touch: its parent's threads are not there, its locks may be held for ever."""

from __future__ import annotations

import os
from typing import Final, Protocol
from weakref import WeakSet

__all__ = ["Forkable", "forget_in_children"]


class Forkable(Protocol):
    """Something that starts afresh in a forked child."""

    def after_fork(self) -> None:
        """Forget what belongs to the parent."""
        ...


_all: Final[WeakSet[Forkable]] = WeakSet()


def forget_in_children(thing: Forkable) -> None:
    """Have `after_fork` called in each forked child."""
    _all.add(thing)


def _after_fork() -> None:
    for thing in list(_all):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
