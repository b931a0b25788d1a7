# this_file: src/opero/caching/stores/database.py
"""twat-cache's disk engine, repaired: bytes in SQLite, large ones in files beside it.

The engine as it comes cannot be constructed, unpickles whatever lies in a row, writes a file for
each value and a transaction for each read. Here its folder, configuration and care are used; the
`diskcache` inside gets settings that are quick, and a `Disk` that reads and writes bytes only and
believes no file name.

Import this module only inside `guest.unnoticed`'s shadow, that is from `disk`.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

from opero.caching.stores.guest import unnoticed
from opero.caching.stores.protocol import Claim, Item, Row, StoreError

with unnoticed():
    from diskcache import Cache, Disk, Timeout
    from diskcache.core import DBNAME, MODE_BINARY, MODE_RAW, UNKNOWN
    from twat_cache.config import CacheConfig
    from twat_cache.engines.base import BaseCacheEngine
    from twat_cache.engines.diskcache import DiskCacheEngine

__all__ = ["DiskEngine", "Timeout"]

_FILE_FROM: Final = 32_768
"""Bytes from which on a value gets a file: smaller ones are quicker inside the database."""

_SMALL_WRITES: Final = 16
_BYTES_WRITTEN: Final = 262_144
_CULLED: Final = 10
"""After so many writes or bytes it is looked whether there is room, which costs as much as a write; then
what was written meanwhile may go, and some more."""

_READ: Final = (
    "SELECT mode, filename, value FROM Cache"
    " WHERE key = ? AND raw = 1 AND (expire_time IS NULL OR expire_time > ?)"
)

_CLAIM: Final = (
    "INSERT INTO Lease VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE"
    " SET owner = excluded.owner, until = excluded.until"
    " WHERE Lease.owner = excluded.owner OR Lease.until <= ?"
)
_RELEASE: Final = "DELETE FROM Lease WHERE key = ? AND owner = ?"

_NAME: Final = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.val")
_BEYOND: Final = chr(0x10FFFF)
_FLAGS: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_DAY: Final = 86_400.0
_HOUR: Final = 3_600.0


class _Bytes(Disk):  # type: ignore[misc]  # diskcache has no types
    """Bytes to rows and files, and back; nothing is ever unpickled.

    Attributes:
        written: Bytes since it was looked whether there is room.
    """

    written = 0

    def put(self, key: str) -> Any:
        """Return a key as it stands in a row."""
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """Return a key that stood in a row."""
        return str(key)

    def store(self, value: bytes, read: bool, key: object = UNKNOWN) -> Any:
        """Return what stands in a row for a value: size, mode, file name, bytes."""
        self.written += len(value)
        if len(value) < _FILE_FROM:
            return 0, MODE_RAW, None, value
        name = os.urandom(16).hex()
        filename = f"{name[:2]}/{name[2:]}.val"
        path = os.path.join(self._directory, filename)  # noqa: PTH118 - half the cost of a Path
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120 - as above
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _FLAGS, 0o600)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(value)
        except BaseException:
            self.remove(filename)
            raise
        return len(value), MODE_BINARY, filename, None

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> bytes:
        """Return the value of a row.

        Raises:
            OSError: Its file is gone; diskcache takes that for a miss.
            StoreError: The row is none of opero's.
        """
        if mode == MODE_RAW and type(value) is bytes and filename is None:
            return value
        if mode == MODE_BINARY and type(filename) is str and _NAME.fullmatch(filename):
            path = os.path.join(self._directory, filename)  # noqa: PTH118 - half the cost of a Path
            with open(os.open(path, os.O_RDONLY | _FLAGS), "rb") as file:  # noqa: PTH123 - a descriptor
                return file.read()
        raise StoreError("an entry in its folder is none of opero's")

    def remove(self, file_path: object) -> None:
        """Delete the file of a row that is gone; another process may have done so."""
        if type(file_path) is str and _NAME.fullmatch(file_path):
            try:
                os.unlink(os.path.join(self._directory, file_path))  # noqa: PTH108, PTH118 - as above
            except OSError:
                pass


_inherited: Final[list[object]] = []
"""Connections of a parent process. SQLite forbids even to close them here."""


class _Connection(sqlite3.Connection):
    """A connection that can be referred to weakly, and is closed when it is collected.

    It is part of a reference cycle, and from Python 3.13 on warns if it is collected before.
    """

    process = 0

    def release(
        self, getpid: Callable[[], int] = os.getpid, inherited: list[object] = _inherited
    ) -> None:
        """Close it, unless it belongs to a parent process."""
        # At the end of a program the names of this module may be gone before the last connection.
        if self.process != getpid():
            inherited.append(self)
            return
        try:
            self.close()
        except self.Error:
            pass

    __del__ = release


class _Closer:
    """Closes a connection when the thread that it belongs to ends, not only when it is collected."""

    __slots__ = ("_connection",)

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def __del__(self) -> None:
        self._connection.release()


class _Cache(Cache):  # type: ignore[misc]  # diskcache has no types
    """A diskcache whose connections are closed in time, and survive a fork."""

    def __init__(self, folder: Path, timeout: float, **settings: object) -> None:
        self._connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._local: threading.local  # a connection and its closer, for each thread
        self._writes = _SMALL_WRITES  # a process may live for one write only
        wait: Any = timeout  # inferred as a whole number from its default
        super().__init__(str(folder), timeout=wait, disk=_Bytes, **settings)

    @property
    def _con(self) -> _Connection:
        """This thread's connection."""
        found: _Connection | None = getattr(self._local, "con", None)
        return self._connect() if found is None else found

    def _connect(self) -> _Connection:
        # Used by one thread, but closed by whichever ends the program or collects the garbage.
        made = sqlite3.connect(
            os.path.join(self._directory, DBNAME),  # noqa: PTH118 - text, as everywhere in diskcache
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        made.process = os.getpid()
        self._local.con = made
        self._local.closer = _Closer(made)
        self._connections.add(made)
        try:
            settings = made.execute("SELECT key, value FROM Settings").fetchall()
        except sqlite3.OperationalError:
            return made  # the very first one
        for key, value in settings:
            if key.startswith("sqlite_"):
                self.reset(key, value, update=False)
        return made

    def fetch(self, key: str) -> bytes | None:
        """Do what `get` does, in half the time."""
        rows = self._con.execute(_READ, (key, time.time())).fetchall()
        if not rows:
            return None
        ((mode, filename, value),) = rows
        disk: Any = self._disk
        try:
            found: bytes = disk.fetch(mode, filename, value, False)
        except OSError:  # another process has just deleted it
            return None
        return found

    def _cull(self, now: float, sql: Any, cleanup: Any, limit: int | None = None) -> None:
        """Make room, not at every write; then as much as has been written meanwhile."""
        disk: Any = self._disk
        self._writes += 1
        if self._writes < _SMALL_WRITES and disk.written < _BYTES_WRITTEN:
            return
        writes, self._writes, disk.written = self._writes, 0, 0
        super()._cull(now, sql, cleanup, limit or _CULLED + writes)

    def close(self) -> None:
        """Close this thread's connection.

        Those of other threads are closed with this object, when none of them can be within it any
        more: SQLite crashes if one is closed that is being used.
        """
        mine: dict[str, object] = self._local.__dict__
        mine.pop("con", None)
        mine.pop("closer", None)

    def forsake(self) -> None:
        """After a fork: never touch the parent's connections again."""
        _inherited.extend((self._local, *self._connections))
        self._connections = weakref.WeakSet()
        self._local = threading.local()
        self._txn_id = None


class DiskEngine(DiskCacheEngine[..., bytes]):
    """Bytes by key in a folder.

    Args:
        folder: An absolute path that `prepare_folder` has seen.
        max_bytes: What the folder may take, if nobody has set that before.
        timeout: Seconds to wait for other writers.
    """

    def __init__(self, folder: Path, max_bytes: int, timeout: float) -> None:
        # Past the parent's own `__init__`: it would make a diskcache with slow settings.
        config = CacheConfig(folder_name=str(folder), maxsize=max_bytes)
        BaseCacheEngine.__init__(self, config)
        self._folder = folder
        os.close(os.open(folder / DBNAME, os.O_CREAT | os.O_RDWR | _FLAGS, 0o600))
        fresh = {} if (folder / DBNAME).stat().st_size else {"size_limit": max_bytes}
        self._disk_cache: Any = _Cache(
            folder, timeout, statistics=0, tag_index=0, disk_min_file_size=_FILE_FROM, **fresh
        )
        self._execute(
            "CREATE TABLE IF NOT EXISTS Lease ("
            "key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID"
        )
        self._execute("DELETE FROM Lease WHERE until < ?", time.time() - _HOUR)
        self.fetch: Callable[[str], bytes | None] = self._disk_cache.fetch
        self._sweep()

    def _execute(self, statement: str, *arguments: object) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self._disk_cache._sql(statement, arguments)  # noqa: SLF001 - its only door
        return cursor

    # --- entries ----------------------------------------------------------------------------------

    def _get_cached_value(self, key: Any) -> bytes | None:
        return self.fetch(key)

    def _set_cached_value(self, key: Any, value: bytes) -> None:
        self.store(key, value, None)

    def store(self, key: str, value: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        self._disk_cache.set(key, value, expire=ttl)

    def store_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        with self._together(len(rows)):
            for row in rows:
                self.store(*row)

    def delete(self, key: str) -> bool:
        """Remove a key and tell whether it was there."""
        return bool(self._disk_cache.delete(key))

    def clear_prefix(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return their number."""
        select = "SELECT rowid, key, filename FROM Cache WHERE key >= ? AND key < ? ORDER BY key LIMIT 100"
        delete = self._disk_cache._select_delete  # noqa: SLF001 - what its own `clear` is made of
        return int(delete(select, [prefix, prefix + _BEYOND], row_index=1))

    def scan(self, prefix: str) -> Iterator[Item]:
        """Iterate over what is stored under keys that begin with a text, in their order."""
        start = prefix
        while True:
            rows = self._execute(
                "SELECT key, CASE WHEN filename IS NULL THEN length(value) ELSE size END,"
                " expire_time FROM Cache WHERE key >= ? AND key < ? ORDER BY key LIMIT 100",
                start,
                prefix + _BEYOND,
            ).fetchall()
            for key, size, expires in rows:
                yield Item(str(key), size or 0, expires)
            if not rows:
                return
            start = f"{rows[-1][0]}\0"  # what comes next after the last one

    def measure(self, prefix: str) -> tuple[int, int]:
        """Return number and bytes of what is stored under keys that begin with a text."""
        ((count, size),) = self._execute(
            "SELECT count(*), sum(CASE WHEN filename IS NULL THEN length(value) ELSE size END)"
            " FROM Cache WHERE key >= ? AND key < ? AND (expire_time IS NULL OR expire_time > ?)",
            prefix,
            prefix + _BEYOND,
            time.time(),
        ).fetchall()
        return count, size or 0

    def allow(self, max_bytes: int) -> None:
        """Let the folder grow to so many bytes, if it may not already."""
        cache = self._disk_cache
        if max_bytes > cache.size_limit:
            self._execute(
                "UPDATE Settings SET value = max(value, ?) WHERE key = 'size_limit'", max_bytes
            )
            cache.reset("size_limit")

    # --- leases -----------------------------------------------------------------------------------

    def claim_many(self, claims: Sequence[Claim], seconds: float) -> list[bool]:
        """Take or extend leases: one statement each, so that one of several claims it."""
        now = time.time()
        with self._together(len(claims)):
            return [
                self._execute(_CLAIM, *claim, now + seconds, now).rowcount == 1 for claim in claims
            ]

    def release_many(self, claims: Sequence[Claim]) -> None:
        """Give leases back."""
        with self._together(len(claims)):
            for claim in claims:
                self._execute(_RELEASE, *claim)

    def _together(self, count: int) -> AbstractContextManager[object]:
        """Do so many writes in one transaction, which costs as much as one of them."""
        if count < 2:
            return nullcontext()
        together: AbstractContextManager[object] = self._disk_cache.transact()
        return together

    # --- care -------------------------------------------------------------------------------------

    def forsake(self) -> None:
        """After a fork: leave the parent's connections alone."""
        self._disk_cache.forsake()

    def _sweep(self) -> None:
        """Once a day, delete the files of writers that were killed before they wrote their row."""
        marker, now = self._folder / "swept", time.time()
        try:
            if marker.stat().st_mtime > now - _DAY:
                return
        except FileNotFoundError:
            pass
        marker.touch(mode=0o600)
        known = {
            name for (name,) in self._execute("SELECT filename FROM Cache WHERE filename NOT NULL")
        }
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*.val"):
            try:
                if f"{path.parent.name}/{path.name}" not in known and (
                    path.stat().st_mtime < now - _HOUR
                ):
                    path.unlink()
            except OSError:
                pass  # another process was quicker
