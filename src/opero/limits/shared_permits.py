# this_file: src/opero/limits/shared_permits.py
"""Permits that several processes share: locks on the bytes of a small file, one byte for each permit.

They are record locks, which the kernel takes back from the dead: a process that is killed with a permit has given it
back. They belong to a process, so who of its threads holds which is of no importance; they are counted here.
"""

from __future__ import annotations

import threading
from random import randrange

from opero.limits import file_lock
from opero.limits.shared_file import open_once, open_own

__all__ = ["SharedPermits", "open_permits"]


class SharedPermits:
    """This process's view of the permits in a file; `open_permits` makes it.

    Args:
        path: The file.
        limit: How many there are.
        create: Whether the file may be new.

    Attributes:
        fd: The only descriptor of the file in this process.
        held: Permits that this process holds.
    """

    def __init__(self, path: str, limit: int, *, create: bool) -> None:
        self.path = path
        self.limit = limit
        self.fd: int = open_own(path, create=create)
        self.begin()

    def begin(self) -> None:
        """Hold nothing: a forked child has none of its parent's locks."""
        # Reentrant, because a collected coroutine may give its permit back at any allocation.
        self._lock = threading.RLock()
        self._held: list[int] = []
        self._last = randrange(self.limit)

    @property
    def held(self) -> int:
        """How many this process holds."""
        return len(self._held)

    def take(self) -> bool:
        """Take a permit if any is free, in whatever process."""
        with self._lock:
            for step in range(self.limit):
                place = (self._last + step) % self.limit
                if place not in self._held and file_lock.try_lock(self.fd, place):
                    self._held.append(place)
                    self._last = place
                    return True
            return False

    def give(self) -> None:
        """Give a permit back; nothing happens if this process holds none."""
        with self._lock:
            if self._held:
                file_lock.unlock(self.fd, self._held.pop())

    def __repr__(self) -> str:
        return f"<SharedPermits {self.path}: {self.held} of {self.limit} held here>"


def open_permits(path: str, limit: int, *, create: bool) -> SharedPermits:
    """Return this process's permits of a file, opening it if need be.

    Raises:
        OSError: The file cannot be opened.
    """
    return open_once(path, lambda: SharedPermits(path, limit, create=create))
