# this_file: src/opero/caching/stores/disk.py
"""Keep entries in a folder that survives restarts and is shared by processes: `cache_backend="disk"`.

Bytes stand in one SQLite file, large ones in files beside it, which are ten times as fast from half a
megabyte on. The folder belongs to this user alone (0700), and is used for nothing else: a tag shows
that it is a cache and opero's (https://bford.info/cachedir/; backup programs know it).
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from opero.caching.stores.base import LONGEST_LEASE, Backoff, StoredItem, portions
from opero.errors import StoreError, warn_user
from opero.utils.sqlite import ForeignDatabase, SqliteFile, is_damage, is_full, is_lock

if TYPE_CHECKING:
    from opero.caching.stores.base import KeyOwner, Row


ACROSS_HOSTS: Final = False

_TIMEOUT: Final = 1.0
"""Seconds that a writer waits for others. Readers never wait."""

_MAX_BYTES: Final = 256_000_000
_FILE_FROM: Final = 131_072
"""Bytes from which on a value gets a file: smaller ones are quicker inside the database."""

_SMALL_WRITES: Final = 16
_BYTES_WRITTEN: Final = 262_144
"""After so many writes or bytes expired entries are removed, and the oldest if there is no room."""

_UNWATCHED: Final = 0.05
"""Seconds for which hits go on without a look whether the folder is still there."""

_DATABASE: Final = "cache.db"
_DAY: Final = 86_400.0
_HOUR: Final = 3_600.0

_NAME: Final = r"[0-9a-f]{2}/[0-9a-f]{30}\.val"
_BEYOND: Final = chr(0x10FFFF)
_FLAGS: Final = (
    # A pipe in place of a file would be waited for.
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
)

_FORMAT: Final = [0x6F706463, 1]  # "opdc", and the version of the tables
_SCRIPT: Final = f"""
PRAGMA application_id = {_FORMAT[0]};
PRAGMA user_version = {_FORMAT[1]};
CREATE TABLE Cache (key TEXT PRIMARY KEY, expires REAL, size INTEGER NOT NULL, filename TEXT, value BLOB);
CREATE INDEX CacheExpires ON Cache (expires) WHERE expires IS NOT NULL;
CREATE INDEX CacheFiles ON Cache (size) WHERE filename IS NOT NULL;
CREATE TABLE Lease (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE Setting (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO Setting VALUES ('swept', strftime('%s', 'now'))
"""  # noqa: S608 - fixed

_FOREIGN: Final = "SELECT 1 FROM sqlite_master WHERE type IN ('view', 'trigger') LIMIT 1"

# What is larger than any entry may be is not read: its length is.
_GET: Final = (
    "SELECT CASE WHEN length(value) <= ? THEN value ELSE length(value) END, filename FROM Cache"
    " WHERE key = ? AND (expires IS NULL OR expires > ?)"
)
_ADD: Final = "INSERT INTO Cache VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
_SET: Final = "INSERT OR REPLACE INTO Cache VALUES (?, ?, ?, ?, ?)"
# So many of the oldest as make room; not all at once, because pages of the database become free as a whole only.
_OLDEST: Final = (
    "rowid IN (SELECT id FROM (SELECT id, sum(size) OVER (ORDER BY id) - size AS older"
    " FROM (SELECT rowid AS id, size FROM Cache ORDER BY rowid LIMIT 20)) WHERE older < ?)"
)
_ACQUIRE: Final = (
    "INSERT INTO Lease VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE"
    " SET owner = excluded.owner, until = excluded.until"
    " WHERE Lease.owner = excluded.owner OR Lease.until <= ? OR Lease.until > ?"
)


def settle(text: str) -> str:
    """Return "disk", or "disk:" and an absolute path."""
    path = text.partition(":")[2]
    return f"disk:{_absolute(path)}" if path else "disk"


def locate(text: str) -> str:
    """Return the path of the folder."""
    return text.partition(":")[2] or default_folder()


def open_at(place: str) -> DiskStore:
    """Return the store of a folder."""
    return DiskStore(place)


def default_folder() -> str:
    """Return `OPERO_CACHE_DIR`, or a folder among the user's caches."""
    folder = os.environ.get("OPERO_CACHE_DIR")
    if folder:
        return _absolute(folder)
    from platformdirs import user_cache_dir

    return os.path.join(user_cache_dir("opero", appauthor=False), "results")


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


class DiskStore:
    """Bytes in a folder, in SQLite and, if they are large, in files.

    The folder is made when it is first needed, and made anew when it was deleted. It holds at most
    `max_bytes`, the largest number that any function using it has asked for; then what was stored
    first goes first.

    Args:
        folder: Absolute path.

    Attributes:
        folder: As text.
        max_bytes: The largest bound that a function of this process has asked for.

    Example:
        >>> import tempfile
        >>> store = DiskStore(tempfile.mkdtemp() + "/cache")
        >>> store.set("key", b"value", ttl=60)
        >>> store.get("key"), store.get("other"), store.clear("k"), store.get("key")
        (b'value', None, 1, None)
        >>> store.close()
    """

    name = "disk"
    blocking = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder: str = os.fspath(folder)
        self.max_bytes: int | None = None
        self._file = SqliteFile(
            os.path.join(self.folder, _DATABASE),
            script=_SCRIPT,
            verify=self._verify,
            prepare=self._prepare,
            name=f"the disk cache {folder}",
            timeout=_TIMEOUT,
            on_damage="replace",
            unwatched=_UNWATCHED,
        )
        self._backoff = Backoff()
        self._warned = False
        self._writes = _SMALL_WRITES  # a process may live for one write only
        self._written = 0

    def allow(self, max_bytes: int) -> None:
        """Allow the folder to hold so many bytes; it may hold more already."""
        self.max_bytes = max(max_bytes, self.max_bytes or 0)
        self._writes = _SMALL_WRITES

    # --- entries ----------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        largest = self.max_bytes or _MAX_BYTES
        rows = self._file.read(_GET, (largest, key, time.time()), brief=True)
        if not rows:
            return None
        value, filename = rows[0]
        if type(value) is bytes and filename is None:
            return value
        if type(value) is int:
            raise StoreError("an entry in its folder is larger than cache_max_bytes")
        if value is not None or type(filename) is not str or not re.fullmatch(_NAME, filename):
            raise StoreError("an entry in its folder is not of opero")
        try:
            return self._read_file(filename, largest)
        except OSError:  # another process has just deleted it
            self._file.watch()
            return None

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys."""
        return [self.get(key) for key in keys]

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        size, now = len(blob), time.time()
        if size < _FILE_FROM:
            # Mostly there are none, and one statement is half the cost of a transaction of several.
            expires = None if ttl is None else now + ttl
            if self._write(_ADD, (key, expires, size, None, blob)):
                self._count(1, size)
                return
        self._store([(key, blob, ttl)])

    def set_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        for portion in portions(rows):
            self._store(portion)

    def delete(self, key: str) -> bool:
        """Remove one key and return whether it was there."""
        return self._remove("key = ?", (key,)) == 1

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return how many there were."""
        removed = self._remove("key >= ? AND key < ?", (prefix, prefix + _BEYOND))
        self._file.write("PRAGMA incremental_vacuum")
        return removed

    def scan(self, prefix: str) -> Iterator[StoredItem]:
        """Iterate over the keys that begin with a text, in their order."""
        start = prefix
        while True:
            rows = self._file.read(
                "SELECT key, CAST(size AS INTEGER), CAST(expires AS REAL) FROM Cache"
                " WHERE key >= ? AND key < ? ORDER BY key LIMIT 100",
                (start, prefix + _BEYOND),
            )
            for key, size, expires in rows:
                yield StoredItem(str(key), size, expires)
            if not rows:
                return
            start = f"{rows[-1][0]}\0"  # what comes next after the last one

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys."""
        ((count, size),) = self._file.read(
            "SELECT count(*), sum(size) FROM Cache"
            " WHERE key >= ? AND key < ? AND (expires IS NULL OR expires > ?)",
            (prefix, prefix + _BEYOND, time.time()),
        )
        return count, size or 0

    # --- leases -----------------------------------------------------------------------------------

    def acquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Take or extend leases: one statement each, so that one of several owners gets it."""
        now = time.time()
        times = now + seconds, now, now + LONGEST_LEASE + seconds
        if len(owners) == 1:  # half the cost of a transaction
            return [self._write(_ACQUIRE, (*owners[0], *times)) == 1]
        with self._transaction() as connection:
            return [connection.execute(_ACQUIRE, (*o, *times)).rowcount == 1 for o in owners]

    def release(self, owners: Sequence[KeyOwner]) -> None:
        """Give leases back."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM Lease WHERE key = ? AND owner = ?", owners)

    # --- upkeep -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections; a later verb opens the folder again."""
        self._file.close()

    def __repr__(self) -> str:
        return f"<DiskStore {self.folder}>"

    # --- writing ----------------------------------------------------------------------------------

    def _store(self, rows: Sequence[Row]) -> None:
        """Write rows in one transaction, and make room for them now and then."""
        now = time.time()
        made: list[tuple[object]] = []
        try:
            places = [
                (None, blob) if len(blob) < _FILE_FROM else (self._write_file(blob, made), None)
                for _, blob, _ in rows
            ]
            with self._transaction() as connection:
                replaced = [
                    found
                    for key, _, _ in rows
                    for found in connection.execute(
                        "SELECT filename FROM Cache WHERE key = ? AND filename IS NOT NULL", (key,)
                    )
                ]
                connection.executemany(
                    _SET,
                    [
                        (key, None if ttl is None else now + ttl, len(blob), *place)
                        for (key, blob, ttl), place in zip(rows, places, strict=True)
                    ],
                )
        except BaseException:
            self._delete_files(made)
            raise
        if replaced:
            self._delete_files(replaced)
        self._count(len(rows), sum([len(blob) for _, blob, _ in rows]))

    def _count(self, rows: int, size: int) -> None:
        """Count what was written, and make room now and then."""
        self._writes += rows
        self._written += size
        if self._writes >= _SMALL_WRITES or self._written >= _BYTES_WRITTEN:
            self._make_room()

    def _write_file(self, blob: bytes, made: list[tuple[object]]) -> str:
        """Return the name of a file with a large value, which is noted in `made`."""
        name = os.urandom(16).hex()
        filename = f"{name[:2]}/{name[2:]}.val"
        try:
            self._file.watch()
            self._prepare()
            os.makedirs(f"{self.folder}/{name[:2]}", mode=0o700, exist_ok=True)
            made.append((filename,))
            with open(f"{self.folder}/{filename}", "xb", opener=_open_closed) as file:
                file.write(blob)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StoreError(
                f"the disk cache {self.folder} cannot be written ({reason})"
            ) from error
        return filename

    def _make_room(self) -> None:
        """Remove what has expired, and what was stored first while there is too much."""
        self._writes = self._written = 0
        with self._transaction() as connection:
            removed = _remove_rows(
                connection,
                "rowid IN (SELECT rowid FROM Cache WHERE expires IS NOT NULL AND expires < ? LIMIT 100)",
                (time.time(),),
            )
            limit = _agree_on_limit(connection, self.max_bytes)
            while (excess := _used(connection) - limit) > 0:
                oldest = _remove_rows(connection, _OLDEST, (excess,))
                if not oldest:
                    break
                removed += oldest
        self._delete_files(removed)

    def _remove(self, where: str, values: tuple[object, ...]) -> int:
        try:
            with self._transaction() as connection:
                removed = _remove_rows(connection, where, values)
        except StoreError as error:
            if is_damage(error.__cause__):
                return 0  # all is gone with the damaged file
            if not is_full(error.__cause__):
                raise
            # On a full disk the files go first, because removing rows takes room, too.
            self._delete_files(self._file.read(f"SELECT filename FROM Cache WHERE {where}", values))  # noqa: S608 - fixed
            with self._transaction() as connection:
                removed = _remove_rows(connection, where, values)
        self._delete_files(removed)
        return len(removed)

    def _write(self, statement: str, values: tuple[object, ...]) -> int:
        """Execute one statement and return the number of rows that it changed."""
        with self._guarded():
            return self._file.write(statement, values)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Return a block of several statements."""
        with self._guarded(), self._file.transaction() as connection:
            yield connection

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Return a block that writes.

        After a write that waited for a lock in vain, the next ones fail at once: a writer that was stopped
        while it wrote must not cost every call as much as the first.
        """
        self._backoff.check()
        try:
            yield
        except StoreError as error:
            if not is_lock(error.__cause__):
                raise
            self._backoff.failed(_BUSY)
            raise StoreError(_BUSY) from error.__cause__
        self._backoff.over()

    # --- files beside the database ----------------------------------------------------------------

    def _read_file(self, filename: str, largest: int) -> bytes:
        with open(f"{self.folder}/{filename}", "rb", opener=_open_closed) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreError("an entry in its folder is not of opero")
            found = file.read(largest + 1)
        if len(found) > largest:
            raise StoreError("an entry in its folder is larger than cache_max_bytes")
        return found

    def _delete_files(self, rows: Iterable[tuple[object]]) -> None:
        """Delete the files of rows that are gone; another process may have done so."""
        for (filename,) in rows:
            if type(filename) is str and re.fullmatch(_NAME, filename):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.folder}/{filename}")

    # --- opening ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the folder ready, each time that the file in it is opened."""
        try:
            prepare_folder(self.folder)
        except StoreError as error:
            # Users that asked for a disk cache should know why each call is computed.
            self._warn(f"There is no disk cache: {error}.")
            raise

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warn_user(text)

    def _verify(self, connection: sqlite3.Connection) -> None:
        """Refuse the file of another program or version, and clean up once a day."""
        names = ("application_id", "user_version")
        known = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == _FORMAT
        # A view in place of a table, or a trigger, could compute for ever.
        known = known and not connection.execute(_FOREIGN).fetchall()
        if self._file.read_only:
            self._warn(
                f"The disk cache {self.folder} is read-only: what it holds is used, and nothing is added."
            )
            if not known:
                raise StoreError(f"{self.folder} was written by another version of opero")
            return
        if not known:
            raise ForeignDatabase("it is of another program or version")
        now = time.time()
        if _setting(connection, "swept") < now - _DAY:
            connection.execute("INSERT OR REPLACE INTO Setting VALUES ('swept', ?)", (int(now),))
            self._sweep(connection, now - _HOUR)

    def _sweep(self, connection: sqlite3.Connection, before: float) -> None:
        """Delete the files that killed writers have left, and leases that ended long ago."""
        connection.execute("DELETE FROM Lease WHERE until < ?", (before,))
        known = {
            filename
            for (filename,) in connection.execute(
                "SELECT filename FROM Cache WHERE filename IS NOT NULL"
            )
        }
        for folder in ("", *(name for name in os.listdir(self.folder) if len(name) == 2)):
            for name in os.listdir(f"{self.folder}/{folder}"):
                filename = f"{folder}/{name}"
                ours = re.fullmatch(_NAME, filename) or filename.startswith(f"/.{_DATABASE}.")
                path = f"{self.folder}/{filename}"
                with suppress(OSError):  # another process was quicker
                    if ours and filename not in known and os.path.getmtime(path) < before:
                        os.unlink(path)


_BUSY: Final = "other processes keep its folder locked"


# --- rows ---------------------------------------------------------------------------------------------------


def _remove_rows(
    connection: sqlite3.Connection, where: str, values: tuple[object, ...] = ()
) -> list[tuple[str | None]]:
    """Delete rows and return the names of their files."""
    found = connection.execute(f"SELECT filename FROM Cache WHERE {where}", values).fetchall()  # noqa: S608 - fixed
    if found:
        connection.execute(f"DELETE FROM Cache WHERE {where}", values)  # noqa: S608 - fixed
    return found


def _setting(connection: sqlite3.Connection, key: str) -> int:
    """Return a number that the folder remembers, 0 if there is none."""
    found = connection.execute("SELECT value FROM Setting WHERE key = ?", (key,)).fetchall()
    try:
        return int(found[0][0])
    except (IndexError, TypeError, ValueError):  # it is not there, or no number
        return 0


def _agree_on_limit(connection: sqlite3.Connection, wanted: int | None) -> int:
    """Return the largest bound that any function has asked for, now or earlier."""
    if wanted is not None:
        connection.execute(
            "INSERT INTO Setting VALUES ('size_limit', ?)"
            " ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)",
            (wanted,),
        )
    return _setting(connection, "size_limit") or _MAX_BYTES


def _used(connection: sqlite3.Connection) -> int:
    """Return how many bytes the entries take, in the database and in files."""
    (used,) = connection.execute(
        "SELECT (SELECT page_count FROM pragma_page_count) * page_size - freelist_count * page_size"
        " + coalesce((SELECT sum(size) FROM Cache WHERE filename IS NOT NULL), 0)"
        " FROM pragma_page_size, pragma_freelist_count"
    ).fetchone()
    return int(used)


# --- the folder -------------------------------------------------------------------------------------------------------

_TAG: Final = "CACHEDIR.TAG"
_SIGNATURE: Final = b"""\
Signature: 8a477f597d28d172789f06886806bc55
# A cache of opero. It can be deleted at any time; what it holds is computed again.
"""


def prepare_folder(folder: str) -> None:
    """Make a folder ready to hold a cache: there, this user's own, closed to all others.

    A folder that this user may only read is as good if it belongs to root: an image layer, say.

    Raises:
        StoreError: It cannot be made, belongs to another user, could be replaced by one, or holds something
            else.
    """
    try:
        _make(folder)
        about = _owned(folder)
        tagged = _tagged(folder)
        if not tagged and os.listdir(folder) and not (_tagged(folder) or _holds_database(folder)):
            raise StoreError(f"{folder} holds other files: give the cache a folder of its own")
        if os.name == "posix":
            _refuse_open_parents(folder)
            if stat.S_IMODE(about.st_mode) & 0o077 and about.st_uid == os.geteuid():
                if tagged and about.st_mode & 0o022:
                    raise StoreError(
                        f"others can write to {folder}, so what it holds cannot be trusted: delete it"
                    )
                os.chmod(folder, 0o700)
        if not tagged:
            with (
                suppress(FileExistsError),
                open(os.path.join(folder, _TAG), "xb", opener=_open_closed) as file,
            ):
                file.write(_SIGNATURE)
    except OSError as error:
        raise StoreError(f"{folder} cannot be used ({type(error).__name__})") from error


def _open_closed(path: str, flags: int) -> int:
    return os.open(path, flags | _FLAGS, 0o600)


def _make(folder: str) -> None:
    """Make a folder and those above it, all closed to others."""
    if not os.path.isdir(folder):
        if os.path.dirname(folder) != folder:
            _make(os.path.dirname(folder))
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)


def _owned(folder: str) -> os.stat_result:
    """Return what is known about a folder that is ours, as are its database and the link that may lead to it."""
    about = os.stat(folder)
    if not stat.S_ISDIR(about.st_mode):
        raise StoreError(f"{folder} is not a folder")
    if hasattr(os, "geteuid"):
        ours = os.geteuid()
        trusted = {ours} if os.access(folder, os.W_OK) else {ours, 0}
        # The system's own links, like /tmp on macOS, are as good as ours.
        if about.st_uid not in trusted or os.lstat(folder).st_uid not in {ours, 0}:
            raise StoreError(
                f"{folder} belongs to another user: give the cache a folder of your own, "
                'with OPERO_CACHE_DIR or cache_backend="disk:PATH"'
            )
        path = os.path.join(folder, _DATABASE)
        try:
            database = os.lstat(path)
        except FileNotFoundError:
            return about
        if not stat.S_ISREG(database.st_mode) or database.st_uid not in trusted:
            raise StoreError(f"{path} is no plain file, or belongs to another user: delete it")
        if not os.access(path, os.R_OK):
            raise StoreError(f"{path} cannot be read")
    return about


def _refuse_open_parents(folder: str) -> None:
    """Refuse a folder that other users could replace by one of their own."""
    parent = os.path.realpath(folder)
    while (parent := os.path.dirname(path := parent)) != path:
        about = os.stat(parent)
        if about.st_mode & stat.S_IWOTH and not about.st_mode & stat.S_ISVTX:
            raise StoreError(
                f"others can write to {parent}, and so replace {folder}: give the cache another folder"
            )


def _tagged(folder: str) -> bool:
    try:
        with open(os.path.join(folder, _TAG), "rb", opener=_open_closed) as file:
            # Another process may just be writing it.
            return _SIGNATURE.startswith(file.read(1000))
    except FileNotFoundError:
        return False


def _holds_database(folder: str) -> bool:
    """Whether a folder that has lost its tag is a cache of opero's."""
    try:
        with open(os.path.join(folder, _DATABASE), "rb", opener=_open_closed) as file:
            return file.read(_HEADER_SIZE)[_ID_AT:][:4] == _FORMAT[0].to_bytes(4, "big")
    except FileNotFoundError:
        return False


_HEADER_SIZE: Final = 100
_ID_AT: Final = 68
"""Where SQLite keeps `application_id` (https://sqlite.org/fileformat.html)."""
