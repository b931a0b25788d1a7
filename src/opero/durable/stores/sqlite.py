# this_file: src/opero/durable/stores/sqlite.py
"""A journal in one SQLite file, shared by all engines and processes of one host."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from opero.durable.records import Op, State, StepRecord, StepState, WorkflowRecord
from opero.durable.stores import writing
from opero.durable.stores.owner import Owners
from opero.durable.stores.schema import SCHEMA, VERSION
from opero.errors import JournalError, OperoUsageError
from opero.utils.fork import reset_after_fork

__all__ = ["SqliteStore"]

_STEP_STATES: Final = {state.value: state for state in StepState}
_BUSY_SECONDS: Final = 30.0
_orphans: Final[list[sqlite3.Connection | None]] = []
"""Connections of a forked child's parent: closing them there would disturb the parent's."""


class SqliteStore:
    """A journal in an SQLite file.

    One connection writes, in transactions that hold all writes that wait just then (group commit);
    another one reads. Write-ahead log, and `synchronous=FULL`: what has been recorded survives a
    power cut. No network file systems: SQLite's locks do not hold there.

    Args:
        path: The file; it is made if it is not there, its folder must be.
        synchronous: "FULL", or "NORMAL" for a machine that does not lose power: a crash of the
            program then still loses nothing, a power cut may lose the last moments.

    Raises:
        OperoUsageError: `synchronous` is something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: str = "FULL") -> None:
        if synchronous not in ("FULL", "NORMAL"):
            raise OperoUsageError(f'synchronous={synchronous!r} must be "FULL" or "NORMAL".')
        self.path: Path = Path(path).absolute()
        self._synchronous = synchronous
        self._owners = Owners(self.path)
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._closing: weakref.finalize[..., SqliteStore] | None = None
        reset_after_fork(self)

    # --- opening ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the file, and make its tables if it is new.

        Raises:
            JournalError: It is no journal, from a newer opero, or cannot be written.
        """
        if self._writer is not None:
            return
        if not self.path.parent.is_dir():
            raise JournalError(f"{self.path}: the folder {self.path.parent} does not exist.")
        new = not self.path.exists()
        with self._explained():
            if new:
                # Workflows carry arguments and results: they are nobody else's business.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            writer = self._connect()
            try:
                self._prepare(writer)
                reader = self._connect()
            except BaseException:
                writer.close()
                raise
        self._reader, self._writer = reader, writer
        # Who only wants to look at a journal closes nothing.
        self._closing = weakref.finalize(
            self, _close, ((writer, self._writing), (reader, self._reading))
        )

    def _connect(self) -> sqlite3.Connection:
        made = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            made.execute("PRAGMA journal_mode=WAL")
            made.execute(f"PRAGMA synchronous={self._synchronous}")
        except BaseException:
            made.close()
            raise
        return made

    def _prepare(self, writer: sqlite3.Connection) -> None:
        """Make the tables of a new journal; refuse what is none, or one from the future."""
        found = writer.execute("PRAGMA user_version").fetchone()[0]
        tables = writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found > VERSION:
            raise JournalError(
                f"{self.path} was written by a newer opero (format {found}, this one knows {VERSION}): "
                "update opero."
            )
        if found == 0 and tables:
            raise JournalError(f"{self.path} is a database, but no journal of opero's.")
        if found < VERSION:
            writer.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")

    def close(self) -> None:
        """Close the file."""
        self._writer = self._reader = None
        if self._closing is not None:
            self._closing()

    def after_fork(self) -> None:
        """Forget the parent's connections: a child that wants to know opens its own."""
        _orphans.extend((self._writer, self._reader))
        self._writer = self._reader = None
        self._reading, self._writing = threading.Lock(), threading.Lock()
        if self._closing is not None:
            self._closing.detach()

    # --- owners -------------------------------------------------------------------------------------------------

    def join(self) -> str:
        """Become an owner, by a lock that the kernel holds for this process; return its id."""
        with self._explained():
            return self._owners.join()

    def leave(self, owner: str) -> None:
        """Be an owner no longer."""
        self._owners.leave(owner)

    # --- writing ------------------------------------------------------------------------------------------------

    def apply(self, ops: Sequence[Op]) -> list[Any]:
        """Write in one transaction and answer each write as its class says.

        Raises:
            JournalError: Nothing was written.
        """
        with self._writing, self._explained():
            connection = self._open(self._writer)
            connection.execute("BEGIN IMMEDIATE")
            try:
                now = time.time()
                answers = [writing.write(connection, op, now, self._owners) for op in ops]
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        return answers

    # --- reading ------------------------------------------------------------------------------------------------

    def get(self, workflow: str) -> WorkflowRecord | None:
        """Return one workflow."""
        rows = self._read(f"{writing.SELECT_WORKFLOW} WHERE id = ?", (workflow,))
        return writing.workflow_of(rows[0]) if rows else None

    def find(
        self,
        name: str | None = None,
        states: Iterable[State] = (),
        limit: int | None = None,
    ) -> list[WorkflowRecord]:
        """Return workflows, the youngest first."""
        wanted = [str(state) for state in states]
        where: list[str] = []
        values: list[Any] = []
        if name is not None:
            where.append("name = ?")
            values.append(name)
        if wanted:
            where.append(f"state IN ({', '.join('?' * len(wanted))})")
            values += wanted
        condition = f" WHERE {' AND '.join(where)}" if where else ""
        values.append(-1 if limit is None else limit)
        rows = self._read(
            f"{writing.SELECT_WORKFLOW}{condition} ORDER BY created DESC, id LIMIT ?", values
        )
        return [writing.workflow_of(row) for row in rows]

    def steps(self, workflow: str) -> list[StepRecord]:
        """Return a workflow's steps in the order of their first record."""
        rows = self._read(
            "SELECT path, name, hash, state, value, attempts, wake, began, ended, place FROM step "
            "WHERE workflow = ? ORDER BY place",
            (workflow,),
        )
        return [
            StepRecord(
                path=path, name=name, hash=digest, state=_STEP_STATES[state], value=value, attempts=attempts,
                wake=wake, began=began, ended=ended, order=order,
            )
            for path, name, digest, state, value, attempts, wake, began, ended, order in rows
        ]  # fmt: skip

    def attention(self, owner: str) -> tuple[bool, float | None]:
        """Tell whether a claim may find something, and when the next sleeper wakes."""
        now = time.time()
        queued = self._read("SELECT 1 FROM workflow WHERE state = 'queued' LIMIT 1")
        others = self._read(
            "SELECT DISTINCT owner FROM workflow WHERE owner IS NOT NULL AND owner <> ?", (owner,)
        )
        wake = self._read(
            "SELECT min(wake) FROM workflow WHERE state IN ('sleeping', 'waiting') AND owner IS NULL"
        )[0][0]
        ready = bool(queued) or (wake is not None and wake <= now)
        return ready or any(self._owners.dead(other) for (other,) in others), wake

    def cancelled(self, owner: str) -> list[str]:
        """Return the ids of an owner's workflows that somebody wants cancelled."""
        rows = self._read("SELECT id FROM workflow WHERE owner = ? AND cancel = 1", (owner,))
        return [row[0] for row in rows]

    def signalled(self, owner: str) -> list[tuple[str, str]]:
        """Return id and name of signals that are there for an owner's workflows."""
        return self._read(
            "SELECT DISTINCT s.workflow, s.name FROM signal s JOIN workflow w ON w.id = s.workflow "
            "WHERE w.owner = ?",
            (owner,),
        )

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading, self._explained():
            return self._open(self._reader).execute(sql, values).fetchall()

    # --- failing ------------------------------------------------------------------------------------------------

    def _open(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise JournalError(f"{self.path} is not open: its Orchestrator was stopped.")
        return connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the database's errors into one that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: {_advice(error)}") from error
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror or error}.") from error

    def __repr__(self) -> str:
        return f"<SqliteStore {str(self.path)!r}>"


def _close(connections: Iterable[tuple[sqlite3.Connection, threading.Lock]]) -> None:
    # At the end of a program threads may still be at work, and must not find a connection gone under their hands.
    for connection, lock in connections:
        with lock:
            connection.close()


def _advice(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", None) or ""
    if name.startswith("SQLITE_FULL"):
        return "the disk is full. Nothing recorded so far is lost: make room and start again."
    if name.startswith("SQLITE_READONLY"):
        return "the file cannot be written. Check its permissions and those of its folder."
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return f"the file is damaged, or no SQLite database ({error}). Restore a copy of it."
    if name.startswith("SQLITE_BUSY"):
        return f"another program held the file for more than {_BUSY_SECONDS:.0f} s."
    if name.startswith("SQLITE_CANTOPEN"):
        return "the file cannot be opened. Check the path and its permissions."
    if name.startswith("SQLITE_IOERR"):
        return f"the disk failed ({error})."
    return str(error)
