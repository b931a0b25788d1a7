# this_file: src/opero/limits/shared_file.py
"""Small files that processes of one user share: opened once in each of them, and gone with their owner.

Closing any descriptor of a file gives up all record locks that the process has on it. So a process has one descriptor
per file, and never closes it while somebody uses the file.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

__all__ = ["open_once", "open_own", "private_path"]


class _HasFile(Protocol):
    fd: int


T = TypeVar("T", bound=_HasFile)


class _OpenFiles:
    """What this process has open, by path."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self.kept: list[int] = []

    def close(self, path: str, fd: int) -> None:
        """Close the descriptor of an object that is gone."""
        with self.lock:
            if path in self.users:
                # The file was opened again before this ran: closing would drop the new one's locks.
                self.kept.append(fd)
            else:
                os.close(fd)

    def after_fork(self) -> None:
        self.lock = threading.RLock()


_files = _OpenFiles()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_files.after_fork)


def open_once(path: str, make: Callable[[], T]) -> T:
    """Return this process's object for a file; its descriptor is closed when the object is gone.

    Args:
        path: The file.
        make: Makes the object, with the descriptor as `fd`, if there is none.
    """
    with _files.lock:
        user = cast("T | None", _files.users.get(path))
        if user is None:
            user = make()
            _files.users[path] = user
            weakref.finalize(user, _files.close, path, user.fd).atexit = False
        return user


def open_own(path: str, *, create: bool) -> int:
    """Open a file that only this user may have made, and return its descriptor.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    for flag in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW"):
        flags |= getattr(os, flag, 0)
    fd = os.open(path, flags, 0o600)
    try:
        _refuse_strangers(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_strangers(fd: int, path: str) -> None:
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or (hasattr(os, "geteuid") and about.st_uid != os.geteuid()):
        raise PermissionError(f"{path} is no plain file of this user")


def private_path(owner: object) -> str:
    """Return the path of a file to be made for this user only, which goes with `owner`."""
    folder = Path(tempfile.mkdtemp(prefix="opero-"))
    weakref.finalize(owner, _remove, folder, os.getpid())
    return str(folder / "slot")


def _remove(folder: Path, creator: int) -> None:
    # A forked child inherits the finalizer, but not the file.
    if os.getpid() == creator:
        try:
            for file in folder.glob("slot*"):
                file.unlink(missing_ok=True)
            folder.rmdir()
        except OSError:
            pass
