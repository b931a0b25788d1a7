# this_file: src/opero/limits/state_file.py
"""Keep a state in a small mapped file that processes of one user share, and that survives the kill of any of them.

- The lock is a record lock, which the kernel takes back from a process that is killed. It belongs to a process, so a
  forked child does not have it, and closing any descriptor of the file gives it up: each process has one descriptor
  per file, with a thread lock around it, and keeps it while the file is used.
- Numbers are stored whole (eight aligned bytes). A mark is set while the lock is held; a process that finds it repairs
  what a killed one has left.

A private file goes by the monotonic clock and is removed with its owner. The file of a name outlives programs and
reboots, so that it goes by the wall clock.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar
from zlib import crc32

from opero.utils.fork import reset_after_fork, run_after_fork

T = TypeVar("T")

# --- locks that the system takes back from the dead -----------------------------------------------

# Far behind any content: Windows refuses reads of locked bytes.
_DECISION: Final = 1 << 30
_USE: Final = _DECISION + 1
_RETRY: Final = 0.0002

if sys.platform == "win32":
    import msvcrt

    def lock(fd: int) -> None:
        """Wait until this process holds the file."""
        while not try_lock(fd):
            time.sleep(_RETRY)

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
        """Let the next process have the file, or a byte of it; nothing happens if it is not held."""
        os.lseek(fd, place, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
        except OSError:
            pass

    def _use(fd: int) -> None:
        """Do nothing: `msvcrt` offers no shared locks."""

    def _only_user(fd: int) -> bool:
        """Return False: it cannot be known."""
        return False

else:
    import fcntl

    def lock(fd: int) -> None:
        """Wait until this process holds the file."""
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX, 1, _DECISION)
            except OSError as error:
                # The kernel looks for circles among processes, not threads: two threads in each of two processes may
                # look like one, although no thread ever holds two files.
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
        """Let the next process have the file, or a byte of it; nothing happens if it is not held."""
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, place)

    def _use(fd: int) -> None:
        """Show that this process uses the file, until it ends or closes it."""
        fcntl.lockf(fd, fcntl.LOCK_SH, 1, _USE)

    def _only_user(fd: int) -> bool:
        """Return whether no other process uses the file; follow with `_use`."""
        return try_lock(fd, _USE)


# --- files ----------------------------------------------------------------------------------------

_MAGIC, _CHANGING = 0, 1
_HEADER: Final = 2
_VERSION: Final = 2
_LARGEST: Final = 1 << 26
"""Bytes of a file that are read: several times the largest state."""


class _OpenFiles:
    """The files that this process has open, by path."""

    def __init__(self) -> None:
        self.files: weakref.WeakValueDictionary[str, StateFile] = weakref.WeakValueDictionary()
        self.kept: list[int] = []
        self.after_fork()

    def after_fork(self) -> None:
        self.lock = threading.RLock()

    def close(self, path: str, fd: int) -> None:
        """Close the descriptor of an object that is gone."""
        with self.lock:
            if path in self.files:
                # The file was opened again before this ran: closing would drop the new one's locks.
                self.kept.append(fd)
            else:
                os.close(fd)


_open_files = _OpenFiles()
run_after_fork(_open_files.after_fork)


Make = Callable[[list[int] | None, "StateFile"], list[int]]
"""Returns the numbers that a file shall hold, given those that it holds (None: it is new) and itself."""


class StateFile:
    """Whole numbers that several processes share: cells of a mapped file, behind a lock.

    A process has one object for each file, which `open` returns.

    Attributes:
        path: The file.
        fd: The only descriptor of the file in this process.
        cells: The numbers; to be changed only while the lock is held.
        torn: While the lock is held: whether the one that held it before was killed or interrupted meanwhile.
    """

    __slots__ = ("__weakref__", "_header", "_held", "cells", "fd", "path", "thread_lock", "torn")

    cells: memoryview

    thread_lock: threading.RLock

    torn: bool

    _held: bool

    def __init__(self, path: str, kind: str, make: Make, *, create: bool) -> None:
        self.path: str = path
        self._reset()
        self.fd: int = _open_own(path, create=create)
        try:
            lock(self.fd)
            magic = int.from_bytes(f"opero{kind:.2}".encode() + bytes([_VERSION]), "big")
            self._load(magic, make, create)
            _use(self.fd)
            unlock(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    @classmethod
    def open(cls, path: str, kind: str, make: Make, *, create: bool) -> StateFile:
        """Return this process's object for a file, opening it if need be.

        Args:
            path: The file.
            kind: Two letters that say what it holds.
            make: See `Make`.
            create: Whether the file may be new.

        Raises:
            OSError: The file cannot be opened, mapped or locked, or holds something else.
        """
        with _open_files.lock:
            file = _open_files.files.get(path)
            if file is None:
                file = _open_files.files[path] = cls(path, kind, make, create=create)
                reset_after_fork(file)
                weakref.finalize(file, _open_files.close, path, file.fd).atexit = False
            return file

    def _load(self, magic: int, make: Make, create: bool) -> None:
        data = os.read(self.fd, os.fstat(self.fd).st_size)
        found = list(memoryview(data[: len(data) // 8 * 8]).cast("q"))
        old = found[_HEADER:] if len(found) >= _HEADER and found[_MAGIC] == magic else None
        if old is None and not create:
            raise OSError(f"{self.path} holds no such state")
        new = make(old, self)
        missing = 8 * (_HEADER + len(new)) - len(data)
        if missing > 0:
            # Zeros, not a hole: a full disk must show here, not as a bus error in a later store.
            os.write(self.fd, bytes(missing))
        mapped = mmap.mmap(self.fd, 8 * (_HEADER + len(new)), access=mmap.ACCESS_WRITE)
        cells = memoryview(mapped).cast("q")
        self._header = cells[:_HEADER]
        self.cells = cells[_HEADER:]
        if new != old:
            self._header[_MAGIC] = 0
            for place, number in enumerate(new):
                self.cells[place] = number
            self._header[_CHANGING] = 0
            self._header[_MAGIC] = magic

    @property
    def only_user(self) -> bool:
        """Whether no other process uses the file."""
        return _only_user(self.fd)

    def exclusively(self, work: Callable[[], T]) -> T:
        """Do something while no other thread or process uses the numbers; Ctrl-C may come at any instruction."""
        with self.thread_lock:
            if self._held:
                return work()
            try:
                self._held = True
                lock(self.fd)
                self.torn = self._header[_CHANGING] != 0
                self._header[_CHANGING] = 1
                result = work()
                self._header[_CHANGING] = 0
                return result
            finally:
                self._held = False
                try:
                    unlock(self.fd)
                except BaseException:
                    unlock(self.fd)  # Ctrl-C came as that began
                    raise

    def _reset(self) -> None:
        # Reentrant, because a signal handler may make a call.
        self.thread_lock = threading.RLock()
        self._held = False
        self.torn = False

    def after_fork(self) -> None:
        """Drop the parent's thread lock, and show that this process uses the file too."""
        self._reset()
        _use(self.fd)


def _open_own(path: str, *, create: bool) -> int:
    """Open a file that only this user may have made, and return its descriptor."""
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    for flag in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW"):
        flags |= getattr(os, flag, 0)
    fd = os.open(path, flags, 0o600)
    about = os.fstat(fd)
    foreign = hasattr(os, "geteuid") and about.st_uid != os.geteuid()
    if foreign or not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST:
        os.close(fd)
        raise PermissionError(f"{path} is no plain file of this user, or larger than any state")
    if about.st_mode & 0o077 and hasattr(os, "fchmod"):
        os.fchmod(fd, 0o600)
    return fd


def private_path(owner: object) -> str:
    """Return the path of a file to be made for this user only, which is removed with `owner`."""
    folder = Path(tempfile.mkdtemp(prefix="opero-"))
    weakref.finalize(owner, _remove, folder, os.getpid())
    return str(folder / "state")


def _remove(folder: Path, creator: int) -> None:
    # A forked child inherits the finalizer, but not the file.
    if os.getpid() == creator:
        try:
            for file in folder.glob("state*"):
                file.unlink(missing_ok=True)
            folder.rmdir()
        except OSError:
            pass


def state_path(name: str) -> str:
    """Return the path of a named state, in `OPERO_STATE_DIR` or the user's state directory."""
    folder = os.environ.get("OPERO_STATE_DIR")
    if not folder:
        from platformdirs import user_state_dir

        folder = user_state_dir("opero", appauthor=False)
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return str(Path(folder).resolve() / f"limiter-{readable}-{crc32(name.encode()):08x}.state")


def path_beside(path: str, secret: bytes, content: bytes) -> str:
    """Return the path of a file for a part of what lies at `path`.

    The hash in its name is keyed, so that likely contents, which may be secrets, cannot be tried out.
    """
    from hashlib import blake2b

    return f"{path}-{blake2b(content, key=secret[:64], digest_size=16).hexdigest()}"
