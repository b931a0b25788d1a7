# this_file: src/opero/utils/sqlite.py
"""Open SQLite files that threads and processes share, and keep them usable.

`SqliteFile` is under the disk cache, the checkpoint of a map and the durable journal. It knows what
can happen to a file: it is new, locked, damaged, deleted, replaced, read-only, of another program, or
the disk is full. A new file is prepared under another name and linked into place, so that of
several programs that begin it at once each finds it whole, and none waits for the others.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, NoReturn

from opero.errors import OperoError, StoreError, warn_user
from opero.utils.fork import reset_after_fork

Damage = Literal["replace", "replace database", "raise"]
"""What to do with a damaged file: "replace" sets it aside and begins a new one, "replace database" does
so only if it looks like a database, "raise" is an error. With "raise" it is an error, too, when another file,
or none, stands under the name of an open one; with the others that one is opened, or made."""

_HEADER: Final = b"SQLite format 3\0"
_BESIDE: Final = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a file."""

_inherited: Final[list[object]] = []
"""Connections of a parent process. SQLite forbids even to close them in a child."""

_AGAIN: Final = 1.0
"""Seconds in which a file is not replaced twice: what damages it is still at work."""

FileId = tuple[int, int]


class ForeignDatabase(sqlite3.DatabaseError):
    """What `verify` or `adapt` raises to have a file of another program or version treated like a damaged one."""


_ADVICE: Final = {
    "SQLITE_FULL": "the disk is full. Nothing recorded so far is lost: make room and start again.",
    "SQLITE_READONLY": "the file cannot be written. Check its permissions and those of its folder.",
    "SQLITE_CORRUPT": "the file is damaged ({error}). Restore a copy of it.",
    "SQLITE_NOTADB": "the file is damaged, or no SQLite database ({error}). Restore a copy of it.",
    "SQLITE_BUSY": "another program held the file for more than {timeout:.0f} s.",
    "SQLITE_CANTOPEN": "the file cannot be opened ({error}). Check the path and its permissions.",
    "SQLITE_IOERR": "the disk failed ({error}).",
}
"""By the beginning of the name of an error."""


def advice(error: Exception, timeout: float = 0.0) -> str:
    """Say what an error of SQLite means for the user.

    Args:
        error: The error.
        timeout: For how many seconds a locked file was waited for.
    """
    name = _error_name(error)
    found = [text for start, text in _ADVICE.items() if name.startswith(start)]
    return found[0].format(error=error, timeout=timeout) if found else str(error)


_UNUSABLE: Final = (sqlite3.Error, UnicodeDecodeError)
"""What a file that cannot be used raises: the names in a damaged one may be no text."""


def _without_content(error: Exception) -> Exception:
    """Return an error that shows nothing of what is in the file: SQLite shows texts that it cannot decode."""
    if isinstance(error, UnicodeDecodeError) or str(error).startswith("Could not decode"):
        return ForeignDatabase("the file is damaged: a text in it is not UTF-8.")
    return error


def is_damage(error: BaseException | None) -> bool:
    """Whether an error says that the content of a file is damaged, or is no database."""
    damaged = _error_name(error).startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
    # An open file that was emptied has no tables.
    return damaged or isinstance(error, ForeignDatabase) or str(error).startswith("no such table")


def is_lock(error: BaseException | None) -> bool:
    """Whether an error says that other programs keep a file locked."""
    return _error_name(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL"))


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that there is no room for a file to grow."""
    return _error_name(error).startswith("SQLITE_FULL")


def _error_name(error: BaseException | None) -> str:
    return getattr(error, "sqlite_errorname", None) or ""


class SqliteFile:
    """One SQLite file, opened when it is first used, for all threads of this process.

    One connection reads, another one writes, so that readers never wait for writers; a brief read takes
    whichever is free. Both belong to this process: a forked child opens its own. They are closed with the object.

    Args:
        path: Where it is; its folder must be there.
        script: SQL that makes the tables of a new file.
        verify: Gets each connection when it is opened, before anything is changed: raises whatever should
            reach the caller if the file is of another program or version, or brings an older layout up to date.
        prepare: Called before the file is opened or made: makes its folder, say, and checks it.
        error: The class of errors that are raised in place of those of SQLite.
        name: What messages call it: "checkpoint 'run.db'".
        timeout: Seconds to wait for other writers.
        synchronous: "NORMAL" survives the death of the program, "FULL" a power cut.
        on_damage: See `Damage`.
        unwatched: For how many seconds `read` may go on without looking whether the file is still
            there. Writing always looks.

    Attributes:
        read_only: Whether this process may read, and not write, as far as it has opened the file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "answers.db"
        >>> file = SqliteFile(path, script="CREATE TABLE Answer (text TEXT)")
        >>> file.write("INSERT INTO Answer VALUES (?)", ("42",))
        1
        >>> file.read("SELECT text FROM Answer")
        [('42',)]
        >>> file.close()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        script: str,
        verify: Callable[[sqlite3.Connection], object] | None = None,
        prepare: Callable[[], object] | None = None,
        error: type[OperoError] = StoreError,
        name: str | None = None,
        timeout: float = 30.0,
        synchronous: str = "NORMAL",
        on_damage: Damage = "raise",
        unwatched: float = 0.0,
    ) -> None:
        self.path: str = os.fspath(path)
        self.timeout = timeout
        self._script = script
        self._verify = verify
        self._prepare = prepare
        self._error = error
        self._name = name or self.path
        self._synchronous = synchronous
        self._on_damage: Damage = on_damage
        self._unwatched = unwatched
        self._watched = 0.0
        self._replaced = -_AGAIN
        reset_after_fork(self)
        self._forget()

    def _forget(self) -> None:
        """Be as new, with locks that no thread holds."""
        # Taken in this order. Reentrant, because a destructor may use the file at any allocation.
        self._writing = threading.RLock()
        self._reading = threading.RLock()
        self._opening = threading.RLock()
        self._reader: _Connection | None = None
        self._writer: _Connection | None = None
        self._file_id: FileId | None = None
        self._latest: FileId | None = None
        self.read_only: bool = False

    # --- reading and writing ----------------------------------------------------------------------

    def read(
        self, statement: str, values: Sequence[object] = (), *, brief: bool = False
    ) -> list[Any]:
        """Return the rows of a query.

        Args:
            statement: The query.
            values: Its parameters.
            brief: Whether it is over so soon that a writer may wait for it. Then the connection that writes
                is asked if it is free: the other one reads anew from disk what was just written, and is only
                opened where that is not enough.
        """
        now = time.monotonic()
        if now - self._watched >= self._unwatched:
            self.watch()
            self._watched = now
        try:
            asked: bool = brief and not self.read_only
            try:
                # While Ctrl-C comes before the answer, `asked` stays true.
                if asked and (asked := self._writing.acquire(False)):
                    writer = self._writer
                    if writer is None and self._reader is None:
                        writer = self._open_writer()  # few programs need another one beside it
                    if writer is not None:
                        found = writer.execute(statement, values).fetchall()
                        return found  # noqa: RET504 - Ctrl-C comes where it is stored
            except self._error:
                if not self.read_only:
                    raise
            finally:
                if asked:
                    try:
                        self._writing.release()
                    except RuntimeError:
                        pass  # another thread has it
            with self._reading:
                return self._open_reader().execute(statement, values).fetchall()
        except _UNUSABLE as error:
            self._recover(error)
        return self.read(statement, values)

    def write(self, statement: str, values: Sequence[object] = ()) -> int:
        """Execute one statement that writes and return the number of rows that it changed."""
        try:
            with self._writing:
                return self._open_writer().execute(statement, values).rowcount
        except _UNUSABLE as error:
            self._recover(error)
        return self.write(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Return a block whose statements are written together, or not at all if it raises.

        A damaged file that is found in the block is replaced, and the block's work is lost: the error says
        so. Within the block, use the connection only.
        """
        try:
            with self._writing:
                connection = self._open_writer()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        except _UNUSABLE as error:
            self._recover(error)
            self._raise(error)

    @property
    def is_open(self) -> bool:
        """Whether a connection is open."""
        return self._reader is not None or self._writer is not None

    def close(self) -> None:
        """Close the connections, when no other thread is using them; the next use opens the file again."""
        with self._writing:
            writer, self._writer = self._writer, None
            _close(writer)
        with self._reading:
            reader, self._reader = self._reader, None
            _close(reader)
        self._file_id = None

    def after_fork(self) -> None:
        """In a forked child: never touch the connections of the parent process."""
        _inherited.extend((self._reader, self._writer))
        self._forget()

    def watch(self) -> None:
        """Look whether the open file is still the one under its name.

        Raises:
            OperoError: It is not, and `on_damage` is "raise".
        """
        opened = self._file_id
        if opened is None or opened == _file_id(self.path):
            return
        if self._on_damage == "raise":
            raise self._error(
                f"{self._name}: the file was deleted or replaced while it was in use. What is recorded from "
                "now on would be lost: restore it, and start again."
            )
        self.close()

    # --- opening ----------------------------------------------------------------------------------

    def _open_reader(self) -> _Connection:
        if self._reader is None:
            self._reader = self._open(writing=False)
        return self._reader

    def _open_writer(self) -> _Connection:
        self.watch()
        if self._writer is None:
            self._writer = self._open(writing=True)
        return self._writer

    def _open(self, *, writing: bool) -> _Connection:
        """Open a connection to the file, which is made if it is not there."""
        with self._opening:
            while True:
                try:
                    if self._prepare is not None:
                        self._prepare()
                    if _file_id(self.path) is None:
                        self._create()
                    self._latest = found = _file_id(self.path)
                    made = self._connect(writing=writing)
                except OSError as error:
                    reason = error.strerror or type(error).__name__
                    raise self._error(
                        f"{self._name}: unable to open the file ({reason})."
                    ) from error
                except UnicodeDecodeError:  # of a message of SQLite's
                    raise ForeignDatabase(
                        "the file is damaged: its tables have no names."
                    ) from None
                if found is not None and found == _file_id(self.path):
                    # Where the other connection has an earlier file open, `watch` notices.
                    self._file_id = self._file_id or found
                    return made
                made.close()  # another process has put another file there meanwhile

    def _connect(self, *, writing: bool) -> _Connection:
        read_only = self.read_only = not _is_writable(self.path)
        if writing and read_only:
            raise self._error(f"{self._name}: the file or its folder is read-only.")
        empty = os.path.getsize(self.path) == 0
        if self._lasts and not empty:
            self._verify_untouched()
        made = self._open_unwritable() if read_only else self._raw(self.path)
        try:
            if empty and not read_only:
                self._fill(made)
            if self._verify is not None:
                self._verify(made)
            if not read_only:
                _close_to_others(self.path)
            if writing:
                made.execute(f"PRAGMA synchronous={self._synchronous}")
                self._use_log(made)
        except BaseException:
            made.close()
            raise
        return made

    def _fill(self, connection: sqlite3.Connection) -> None:
        """Make the tables in a file that was there and empty."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in self._script.split(";"):
                    connection.execute(statement)
        finally:
            connection.execute("COMMIT")

    def _verify_untouched(self) -> None:
        """Refuse a file of another program before SQLite writes anything beside or into it."""
        if self._verify is None or os.path.exists(self.path + "-wal"):
            return
        connection = self._raw(f"{_address(self.path)}&immutable=1", uri=True)
        try:
            self._verify(connection)
        finally:
            connection.close()

    def _raw(self, target: str, *, uri: bool = False) -> _Connection:
        # Used by one thread at a time, but not always by the same.
        made = sqlite3.connect(
            target,
            timeout=self.timeout,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
            uri=uri,
        )
        made.process = os.getpid()
        try:
            made.execute("PRAGMA schema_version")  # opens the file: an error comes now
        except BaseException:
            made.close()
            raise
        return made

    def _use_log(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if not is_lock(error):  # slower without it, and as safe
                    raise

    def _open_unwritable(self) -> _Connection:
        """Open a file that this process may only read."""
        if os.path.exists(self.path + "-wal"):
            # If it cannot be read without writing, go without what stands only there.
            with suppress(sqlite3.OperationalError):
                return self._raw(_address(self.path), uri=True)
        return self._raw(f"{_address(self.path)}&immutable=1", uri=True)

    def _create(self) -> None:
        """Make the file, or leave it to the process that is quicker."""
        folder, name = os.path.split(self.path)
        draft = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}")
        _move_leftovers(self.path)
        try:
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            connection = sqlite3.connect(draft, isolation_level=None)
            try:
                # If power fails now there is no file, or one that counts as damaged.
                connection.execute(f"PRAGMA synchronous={'FULL' if self._lasts else 'OFF'}")
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(f"BEGIN; {self._script}; COMMIT;")
            finally:
                connection.close()
            _put_in_place(draft, self.path)
        finally:
            for ending in ("", *_BESIDE):
                _unlink(draft + ending)

    @property
    def _lasts(self) -> bool:
        return self._on_damage != "replace"

    # --- failing ----------------------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """Replace a damaged file; return if the operation is worth another try."""
        error = _without_content(error)
        if not is_damage(error) or self._on_damage == "raise":
            if _error_name(error).startswith("SQLITE_IOERR") and self._on_damage != "raise":
                with self._writing, self._reading:
                    self.close()  # the next operation opens the file anew
            self._raise(error)
        with self._writing, self._reading:
            damaged = self._latest
            self.close()
            if damaged is None or time.monotonic() - self._replaced < _AGAIN:
                self._raise(error)
            if damaged == _file_id(self.path):
                if self._on_damage == "replace database" and not _looks_like_one(self.path):
                    self._raise(error)
                self._set_aside(damaged, error)
            self._replaced = time.monotonic()

    def _set_aside(self, damaged: FileId, error: Exception) -> None:
        aside = f"{self.path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        try:
            os.rename(self.path, aside)
            if _file_id(aside) != damaged:  # another process was quicker: this is its new file
                _put_in_place(aside, self.path)
                _unlink(aside)
                return
            for ending in _BESIDE:
                with suppress(FileNotFoundError):
                    os.rename(self.path + ending, aside + ending)
        except OSError as problem:
            reason = problem.strerror or type(problem).__name__
            raise self._error(
                f"{self._name}: {error}, and it cannot be set aside ({reason})."
            ) from error
        warn_user(
            f"{self._name} was damaged ({error}). It was set aside as {aside}, and a new one is begun."
        )

    def _raise(self, error: Exception) -> NoReturn:
        error = _without_content(error)
        raise self._error(f"{self._name}: {advice(error, self.timeout)}") from error

    def __repr__(self) -> str:
        return f"<SqliteFile {self.path!r}, {'open' if self.is_open else 'closed'}>"


class _Connection(sqlite3.Connection):
    """A connection that is closed when it is collected, but not in a forked child."""

    process = 0

    def __del__(
        self, getpid: Callable[[], int] = os.getpid, inherited: list[object] = _inherited
    ) -> None:
        # At the end of a program the names of this module may be gone before the last connection.
        if self.process == getpid():
            self.close()
        elif self.process:
            inherited.append(self)


def _close(connection: _Connection | None) -> None:
    if connection is not None:
        with suppress(sqlite3.Error):
            connection.close()


# --- files ------------------------------------------------------------------------------------------------------------


def _file_id(path: str) -> FileId | None:
    """Return what identifies a file whatever its name, None if there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _address(path: str) -> str:
    """Return the URI of a file that is only read."""
    from urllib.parse import quote

    return f"file:{quote(os.path.abspath(path))}?mode=ro"


def _is_writable(path: str) -> bool:
    return os.access(path, os.W_OK) and os.access(os.path.dirname(path) or ".", os.W_OK)


def _close_to_others(path: str) -> None:
    """Take permissions from group and others where the file is this user's."""
    if os.name == "posix":
        found = os.stat(path)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077:
            os.chmod(path, stat.S_IMODE(found.st_mode) & 0o700)


def _looks_like_one(path: str) -> bool:
    """Whether a file is empty or begins like a database."""
    with open(path, "rb") as file:
        return file.read(len(_HEADER)) in (b"", _HEADER)


def _move_leftovers(path: str) -> None:
    """Move what stands beside a database that is gone: SQLite would read it into the new one."""
    # In this order: what another process has just begun is no leftover.
    found = [path + ending for ending in _BESIDE if os.path.exists(path + ending)]
    if found and not os.path.exists(path):
        for leftover in found:
            _unlink(leftover)


def _put_in_place(draft: str, path: str) -> None:
    """Give a file its name unless there is one already."""
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not os.path.exists(path):
            os.rename(draft, path)


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
