# this_file: src/opero/limits/shared_counts.py
"""Whole numbers that several processes count in: words of a small mapped file, behind a lock.

The lock is a record lock, which the kernel takes back from a process that is killed. Each word is stored whole, so that
such a process leaves at worst one step uncounted.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from opero.limits import file_lock
from opero.limits.shared_file import open_once, open_own

__all__ = ["SharedCounts", "open_counts"]


class SharedCounts:
    """This process's view of the numbers in a file; `open_counts` makes it.

    Args:
        path: The file.
        count: How many there are.
        create: Whether the file may be new.

    Attributes:
        fd: The only descriptor of the file in this process.
        words: The numbers, 0 at first; to be used within `alone` only.
    """

    def __init__(self, path: str, count: int, *, create: bool) -> None:
        self.path = path
        self.fd: int = open_own(path, create=create)
        self.begin()
        try:
            with self.alone():
                found = os.fstat(self.fd).st_size
                if found < 8 * count:
                    # Zeros, not a hole: a full disk must show here, not as a bus error in a later store.
                    os.lseek(self.fd, 0, os.SEEK_END)
                    os.write(self.fd, bytes(8 * count - found))
                mapped = mmap.mmap(self.fd, 8 * count, access=mmap.ACCESS_WRITE)
        except BaseException:
            os.close(self.fd)
            raise
        self.words: memoryview = memoryview(mapped).cast("q")

    def begin(self) -> None:
        """Make the lock of this process's threads anew: a forked child has none of its parent's."""
        # Reentrant, because a signal handler may make a call.
        self._lock = threading.RLock()
        self._depth = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all others out, in whatever process."""
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    file_lock.lock(self.fd)
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    file_lock.unlock(self.fd)

    def __repr__(self) -> str:
        return f"<SharedCounts {self.path}>"


def open_counts(path: str, count: int, *, create: bool) -> SharedCounts:
    """Return this process's numbers of a file, opening it if need be.

    Raises:
        OSError: The file cannot be opened.
    """
    return open_once(path, lambda: SharedCounts(path, count, create=create))
