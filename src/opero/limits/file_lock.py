# this_file: src/opero/limits/file_lock.py
"""Locks on a file that the system takes back when their holder is killed.

Each function takes the descriptor of an open file. Releasing what is not held does nothing, so that
a release may stand in a `finally` that also covers the taking.
"""

from __future__ import annotations

import errno
import sys
import time
from typing import Final

__all__ = ["alone", "lock", "try_lock", "unlock", "use"]

# Far behind any content: Windows refuses reads of locked bytes.
_DECISION: Final = 1 << 30
_USE: Final = _DECISION + 1
_RETRY: Final = 0.0002

if sys.platform == "win32":
    import msvcrt
    import os

    def lock(fd: int) -> None:
        """Wait until this process holds the file."""
        while True:
            os.lseek(fd, _DECISION, os.SEEK_SET)
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EDEADLK):
                    raise
                time.sleep(_RETRY)
            else:
                return

    def try_lock(fd: int, place: int = _DECISION) -> bool:
        """Take the file, or one byte of it, if no other process holds that."""
        os.lseek(fd, place, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
            return False
        return True

    def unlock(fd: int, place: int = _DECISION) -> None:
        """Let the next process have the file, or a byte of it."""
        os.lseek(fd, place, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
        except OSError:
            pass

    def use(fd: int) -> None:
        """Do nothing: Windows' own library offers no shared locks through `msvcrt`."""

    def alone(fd: int) -> bool:
        """Return False: nobody can tell."""
        return False

else:
    import fcntl

    def lock(fd: int) -> None:
        """Wait until this process holds the file."""
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX, 1, _DECISION)
            except OSError as error:
                # The kernel looks for circles among processes, not threads: two threads in each of
                # two processes may look like one, although no thread ever holds two files.
                if error.errno != errno.EDEADLK:
                    raise
                time.sleep(_RETRY)
            else:
                return

    def try_lock(fd: int, place: int = _DECISION) -> bool:
        """Take the file, or one byte of it, if no other process holds that."""
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def unlock(fd: int, place: int = _DECISION) -> None:
        """Let the next process have the file, or a byte of it."""
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, place)

    def use(fd: int) -> None:
        """Show that this process uses the file, until it ends or closes it."""
        fcntl.lockf(fd, fcntl.LOCK_SH, 1, _USE)

    def alone(fd: int) -> bool:
        """Tell whether no other process uses the file; follow with `use`."""
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _USE)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True
