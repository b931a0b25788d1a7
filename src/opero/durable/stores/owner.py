# this_file: src/opero/durable/stores/owner.py
"""Who is alive on this host: every owner holds a lock that the kernel takes back when its process dies.

No clock is asked and no lease runs out, so that a live process can never be robbed, however long it
is stopped, and a dead one's work can be taken over at once.
"""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import Final

from opero.limits.file_lock import try_lock
from opero.utils.fork import run_after_fork

__all__ = ["Owners"]

_mine: Final[dict[str, int]] = {}
"""Descriptors of the owners of this process, which must not be opened again: closing any descriptor of a file
drops the process's locks on it."""
_guard = threading.Lock()


class Owners:
    """The owners of one journal.

    Args:
        journal: Path of the journal; an owner's file stands beside it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal

    def join(self) -> str:
        """Become an owner and return its id."""
        owner = uuid.uuid4().hex
        fd = os.open(self._path(owner), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try_lock(fd)
        with _guard:
            _mine[owner] = fd
        return owner

    def leave(self, owner: str) -> None:
        """Be that owner no longer."""
        with _guard:
            fd = _mine.pop(owner, None)
        if fd is not None:
            self._path(owner).unlink(missing_ok=True)
            os.close(fd)

    def dead(self, owner: str) -> bool:
        """Tell whether an owner's process has died, or has left."""
        with _guard:
            if owner in _mine:
                return False
            try:
                fd = os.open(self._path(owner), os.O_RDWR)
            except FileNotFoundError:
                return True
            try:
                return try_lock(fd)
            finally:
                os.close(fd)

    def bury(self, owner: str) -> None:
        """Remove what a dead owner has left."""
        self._path(owner).unlink(missing_ok=True)

    def _path(self, owner: str) -> Path:
        return self._journal.with_name(f"{self._journal.name}.own-{owner}")


def _after_fork() -> None:
    """A child holds none of its parent's locks."""
    global _guard  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _guard = threading.Lock()
    for fd in _mine.values():
        os.close(fd)
    _mine.clear()


run_after_fork(_after_fork)
