# this_file: src/opero/durable/sqlite_store.py
"""Keep a journal in one SQLite file that all engines and processes of one host share."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from opero.durable.records import (
    ENDED,
    Annotate,
    Cancel,
    Claim,
    Create,
    Drop,
    Fork,
    Move,
    Op,
    PutStep,
    Resolve,
    Resume,
    Send,
    State,
    StepRecord,
    StepState,
    Take,
    Wake,
    WorkflowRecord,
)
from opero.errors import JournalError, OperoUsageError
from opero.limits.state_file import try_lock
from opero.utils.fork import run_after_fork
from opero.utils.sqlite import SqliteFile

__all__ = ["Owners", "SqliteStore"]

_VERSION: Final = 1

_SCHEMA: Final = f"""
CREATE TABLE IF NOT EXISTS workflow (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT, args TEXT NOT NULL, hash TEXT NOT NULL,
    state TEXT NOT NULL, output TEXT, error TEXT, failed_step TEXT,
    owner TEXT, epoch INTEGER NOT NULL, recoveries INTEGER NOT NULL, progress INTEGER NOT NULL,
    wake REAL, cancel INTEGER NOT NULL, created REAL NOT NULL, updated REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS workflow_open ON workflow (state, wake)
    WHERE state NOT IN ('done', 'failed', 'cancelled', 'dead');
CREATE INDEX IF NOT EXISTS workflow_owned ON workflow (owner) WHERE owner IS NOT NULL;
CREATE INDEX IF NOT EXISTS workflow_age ON workflow (created);
CREATE TABLE IF NOT EXISTS step (
    workflow TEXT NOT NULL, path TEXT NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL,
    state TEXT NOT NULL, value TEXT, attempts INTEGER NOT NULL, wake REAL,
    began REAL NOT NULL, ended REAL, place INTEGER NOT NULL,
    PRIMARY KEY (workflow, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS signal (
    number INTEGER PRIMARY KEY, workflow TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS signal_of ON signal (workflow, name);
PRAGMA user_version = {_VERSION}
"""
_TABLES: Final = {"workflow", "step", "signal"}
_COULD_RUN: Final = (
    "owner IS NULL AND error IS NULL AND ((state = 'queued' AND updated <= ?) "
    "OR (state IN ('sleeping', 'waiting') AND wake <= ?))"
)
_STEP_STATES: Final = {state.value: state for state in StepState}


def _verify(db: sqlite3.Connection) -> None:
    """Refuse a database that is no journal, or one from the future.

    Raises:
        JournalError: It is one.
    """
    found = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    path = db.execute("PRAGMA database_list").fetchone()[2]
    if tables and not (found and tables >= _TABLES):
        raise JournalError(f"{path} is a database, but no journal of opero's.")
    if found > _VERSION:
        raise JournalError(
            f"{path} was written by a newer opero (format {found}, this one knows {_VERSION}): update opero."
        )


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
        self._is_open = False
        self._owners = Owners(self.path)
        self._file = SqliteFile(
            self.path, script=_SCHEMA, verify=_verify, error=JournalError, synchronous=synchronous
        )

    def open(self) -> None:
        """Open the file, and make its tables if it is new.

        Raises:
            JournalError: It is no journal, from a newer opero, or cannot be written.
        """
        if self._is_open and self._file.is_open:
            return
        if not self.path.parent.is_dir():
            raise JournalError(f"{self.path}: the folder {self.path.parent} does not exist.")
        self._is_open = True
        try:
            self.apply(())
        except BaseException:
            self._is_open = False
            raise

    def close(self) -> None:
        """Close the file."""
        self._is_open = False
        self._file.close()

    def join(self) -> str:
        """Become an owner, by a lock that the kernel holds for this process; return its id."""
        try:
            return self._owners.join()
        except OSError as error:
            raise self._failure(error) from error

    def leave(self, owner: str) -> None:
        """Stop being an owner."""
        self._owners.leave(owner)

    def apply(self, ops: Sequence[Op]) -> list[Any]:
        """Write in one transaction and answer each write as its class says.

        Raises:
            JournalError: Nothing was written.
        """
        self._check_open()
        try:
            with self._file.transaction() as db:
                now = time.time()
                return [
                    # Steps are by far the most frequent.
                    _put_step(db, op) if type(op) is PutStep else self._write(db, op, now)
                    for op in ops
                ]
        except OSError as error:
            raise self._failure(error) from error

    def _write(self, db: sqlite3.Connection, op: Op, now: float) -> Any:
        if type(op) is Claim:
            return _claim(db, op, now, self._owners)
        return _WRITERS[type(op)](db, op, now)

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        self._check_open()
        return self._file.read(sql, values)

    def _check_open(self) -> None:
        if not self._is_open:
            raise JournalError(f"{self.path} is not open: its Orchestrator was stopped.")

    def _failure(self, error: OSError) -> JournalError:
        return JournalError(f"{self.path}: {error.strerror or error}.")

    def __repr__(self) -> str:
        return f"<SqliteStore {str(self.path)!r}>"

    # --- reading ------------------------------------------------------------------------------------------------

    def get(self, workflow: str) -> WorkflowRecord | None:
        """Return one workflow."""
        rows = self._read(f"{_SELECT_WORKFLOW} WHERE id = ?", (workflow,))
        return _workflow_of(rows[0]) if rows else None

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
            f"{_SELECT_WORKFLOW}{condition} ORDER BY created DESC, id LIMIT ?", values
        )
        return [_workflow_of(row) for row in rows]

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
        """Return whether a claim may find something, and when the next sleeper wakes."""
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

    def unclaimed(self, before: float) -> list[str]:
        """Return the names of workflows that could run since before a time, and have neither an owner nor a reason."""
        rows = self._read(
            f"SELECT DISTINCT name FROM workflow WHERE {_COULD_RUN}",  # noqa: S608 - fixed text
            (before, before),
        )
        return [row[0] for row in rows]

    def cancelled(self, owner: str) -> list[str]:
        """Return the ids of an owner's workflows whose cancellation was requested."""
        rows = self._read("SELECT id FROM workflow WHERE owner = ? AND cancel = 1", (owner,))
        return [row[0] for row in rows]

    def signalled(self, owner: str) -> list[tuple[str, str]]:
        """Return id and name of signals that are stored for an owner's workflows."""
        return self._read(
            "SELECT DISTINCT s.workflow, s.name FROM signal s JOIN workflow w ON w.id = s.workflow "
            "WHERE w.owner = ?",
            (owner,),
        )


# --- writes ---------------------------------------------------------------------------------------------------------

_COLUMNS: Final = (
    "id", "name", "version", "args", "hash", "state", "output", "error", "failed_step", "owner", "epoch",
    "recoveries", "progress", "wake", "cancel", "created", "updated",
)  # fmt: skip
_SELECT_WORKFLOW: Final = f"SELECT {', '.join(_COLUMNS)} FROM workflow"  # noqa: S608 - fixed names
_INSERT_WORKFLOW: Final = (
    f"INSERT INTO workflow ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - as above
)
# A step counts only while the workflow is its owner's.
_PUT_STEP: Final = (
    "INSERT INTO step (workflow, path, name, hash, state, value, attempts, wake, began, ended, place) "
    "SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? "
    "WHERE EXISTS (SELECT 1 FROM workflow WHERE id = ? AND owner = ? AND epoch = ?) "
    "ON CONFLICT (workflow, path) DO UPDATE SET state = excluded.state, value = excluded.value, "
    "attempts = excluded.attempts, wake = excluded.wake, ended = excluded.ended"
)


def _workflow_of(row: tuple[Any, ...]) -> WorkflowRecord:
    """Return the record in a row of `_SELECT_WORKFLOW`."""
    found = dict(zip(_COLUMNS, row, strict=True))
    found["state"] = State(found["state"])
    found["cancel"] = bool(found["cancel"])
    return WorkflowRecord(**found)


def _put_step(db: sqlite3.Connection, op: PutStep | Take) -> bool:
    step = op.step
    values = (
        op.workflow, step.path, step.name, step.hash, str(step.state), step.value, step.attempts, step.wake,
        step.began, step.ended, step.order, op.workflow, op.owner, op.epoch,
    )  # fmt: skip
    return db.execute(_PUT_STEP, values).rowcount == 1


def _get(db: sqlite3.Connection, workflow: str) -> WorkflowRecord | None:
    row = db.execute(f"{_SELECT_WORKFLOW} WHERE id = ?", (workflow,)).fetchone()
    return None if row is None else _workflow_of(row)


def _insert(db: sqlite3.Connection, record: WorkflowRecord) -> None:
    db.execute(_INSERT_WORKFLOW, [_plain(getattr(record, name)) for name in _COLUMNS])


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, State) else value


def _create(db: sqlite3.Connection, op: Create, now: float) -> WorkflowRecord:
    found = _get(db, op.record.id)
    if found is not None:
        return found
    op.record.created = op.record.updated = now
    _insert(db, op.record)
    return op.record


def _claim(db: sqlite3.Connection, op: Claim, now: float, owners: Owners) -> list[WorkflowRecord]:
    _free_the_dead(db, op, now, owners)
    states = "'queued', 'blocked'" if op.blocked else "'queued'"
    names = ", ".join("?" * len(op.names))
    only = "" if op.only is None else " AND id = ?"
    least, most = op.recoveries
    order = "recoveries, created" if least else "created"
    query = (
        f"{_SELECT_WORKFLOW} WHERE name IN ({names}) AND owner IS NULL AND (state IN ({states}) "
        f"OR (state IN ('sleeping', 'waiting') AND wake <= ?)){only} AND recoveries BETWEEN ? AND ? "
        f"ORDER BY {order} LIMIT ?"
    )
    values = (*op.names, now, *(() if op.only is None else (op.only,)), least, most, op.limit)
    claimed = [_workflow_of(row) for row in db.execute(query, values).fetchall()]
    for record in claimed:
        record.owner, record.state, record.epoch = op.owner, State.RUNNING, record.epoch + 1
        record.wake, record.error, record.updated = None, None, now
        db.execute(
            "UPDATE workflow SET owner = ?, state = 'running', epoch = epoch + 1, wake = NULL, updated = ?, "
            "error = NULL, progress = (SELECT count(*) FROM step WHERE workflow = id) WHERE id = ?",
            (op.owner, now, record.id),
        )
    return claimed


def _free_the_dead(db: sqlite3.Connection, op: Claim, now: float, owners: Owners) -> None:
    rows = db.execute(
        "SELECT DISTINCT owner FROM workflow WHERE owner IS NOT NULL AND owner <> ?", (op.owner,)
    )
    for owner in [row[0] for row in rows.fetchall()]:
        if owners.dead(owner):
            for row in db.execute(f"{_SELECT_WORKFLOW} WHERE owner = ?", (owner,)).fetchall():
                _recover(db, _workflow_of(row), now, op.max_recoveries)
            owners.remove_dead(owner)


def _recover(db: sqlite3.Connection, record: WorkflowRecord, now: float, most: int) -> None:
    """Free a workflow whose owner has died; one that has killed its owners too often is dead."""
    recoveries, state, error = record.recoveries, record.state, record.error
    if record.cancel:
        state = State.CANCELLED
    elif state is State.RUNNING:
        count = db.execute("SELECT count(*) FROM step WHERE workflow = ?", (record.id,)).fetchone()[
            0
        ]
        recoveries = 1 if count > record.progress else recoveries + 1
        state = State.QUEUED
        if recoveries > most:
            state = State.DEAD
            error = f"given up: its process has died {most + 1} times in a row before another step was recorded"
    db.execute(
        "UPDATE workflow SET owner = NULL, epoch = epoch + 1, state = ?, recoveries = ?, error = ?, updated = ? "
        "WHERE id = ?",
        (str(state), recoveries, error, now, record.id),
    )
    _wake_waiting(db, record.id)


def _move(db: sqlite3.Connection, op: Move, now: float) -> bool:
    changed = db.execute(
        "UPDATE workflow SET state = ?, output = ?, error = ?, failed_step = ?, wake = ?, owner = ?, updated = ?, "
        # Its process has survived this run.
        "recoveries = CASE WHEN ? THEN 0 ELSE recoveries END WHERE id = ? AND owner = ? AND epoch = ?",
        (
            str(op.state),
            op.output,
            op.error,
            op.failed_step,
            op.wake,
            None if op.free else op.owner,
            now,
            op.free,
            op.workflow,
            op.owner,
            op.epoch,
        ),
    ).rowcount
    if changed and op.state in ENDED:
        db.execute("DELETE FROM signal WHERE workflow = ?", (op.workflow,))
    elif changed and op.free and op.state is State.WAITING:
        # A signal that came while it was being put aside must not be overlooked.
        _wake_waiting(db, op.workflow)
    return changed == 1


def _wake_waiting(db: sqlite3.Connection, workflow: str) -> None:
    db.execute(
        "UPDATE workflow SET state = 'queued', wake = NULL WHERE id = ? AND state = 'waiting' AND owner IS NULL "
        "AND EXISTS (SELECT 1 FROM signal s JOIN step p ON p.workflow = s.workflow "
        "AND p.name = 'wait for ' || s.name AND p.state = 'pending' WHERE s.workflow = ?)",
        (workflow, workflow),
    )


def _cancel(db: sqlite3.Connection, op: Cancel, now: float) -> WorkflowRecord | None:
    record = _get(db, op.workflow)
    if record is None or record.state in ENDED:
        return record
    if record.owner is None:
        db.execute(
            "UPDATE workflow SET state = 'cancelled', cancel = 0, wake = NULL, epoch = epoch + 1, updated = ? "
            "WHERE id = ?",
            (now, op.workflow),
        )
        db.execute("DELETE FROM signal WHERE workflow = ?", (op.workflow,))
    else:
        db.execute("UPDATE workflow SET cancel = 1, updated = ? WHERE id = ?", (now, op.workflow))
    return _get(db, op.workflow)


def _resume(db: sqlite3.Connection, op: Resume, now: float) -> bool:
    record = _get(db, op.workflow)
    again = (State.FAILED, State.CANCELLED, State.DEAD, State.BLOCKED)
    if record is None or record.state not in again:
        return False
    if record.failed_step is not None:
        db.execute(
            "DELETE FROM step WHERE workflow = ? AND path = ?", (op.workflow, record.failed_step)
        )
    db.execute(
        "UPDATE workflow SET state = 'queued', error = NULL, failed_step = NULL, output = NULL, cancel = 0, "
        "recoveries = 0, epoch = epoch + 1, updated = ? WHERE id = ?",
        (now, op.workflow),
    )
    return True


def _fork(db: sqlite3.Connection, op: Fork, now: float) -> WorkflowRecord | None:
    record = _get(db, op.workflow)
    if record is None:
        return None
    made = WorkflowRecord(
        id=op.new, name=record.name, version=op.version, args=record.args, hash=record.hash, created=now, updated=now
    )  # fmt: skip
    _insert(db, made)
    db.execute(
        "INSERT INTO step SELECT ?, path, name, hash, state, value, attempts, wake, began, ended, place "
        "FROM step WHERE workflow = ? AND place < ? AND state IN ('done', 'failed')",
        (op.new, op.workflow, op.before),
    )
    return made


def _send(db: sqlite3.Connection, op: Send, now: float) -> bool:
    record = _get(db, op.workflow)
    if record is None or record.state in ENDED:
        return False
    db.execute(
        "INSERT INTO signal (workflow, name, value) VALUES (?, ?, ?)",
        (op.workflow, op.name, op.value),
    )
    _wake_waiting(db, op.workflow)
    return True


def _take(db: sqlite3.Connection, op: Take, now: float) -> str | bool | None:
    row = db.execute(
        "SELECT number, value FROM signal WHERE workflow = ? AND name = ? ORDER BY number LIMIT 1",
        (op.workflow, op.name),
    ).fetchone()
    if row is not None:
        op.step.state, op.step.value, op.step.ended = StepState.DONE, row[1], op.at or now
    if not _put_step(db, op):
        return False
    if row is None:
        return None
    db.execute("DELETE FROM signal WHERE number = ?", (row[0],))
    return str(row[1])


def _resolve(db: sqlite3.Connection, op: Resolve, now: float) -> bool:
    key = (op.workflow, op.path)
    found = db.execute(
        "SELECT 1 FROM step JOIN workflow ON workflow.id = step.workflow WHERE step.workflow = ? AND path = ? "
        "AND step.state = 'started' AND workflow.state = 'in_doubt'",
        key,
    ).fetchone()
    if found is None:
        return False
    if op.step is None:
        db.execute("DELETE FROM step WHERE workflow = ? AND path = ?", key)
    else:
        step: StepRecord = op.step
        db.execute(
            "UPDATE step SET state = ?, value = ?, ended = ? WHERE workflow = ? AND path = ?",
            (str(step.state), step.value, now, *key),
        )
    db.execute(
        "UPDATE workflow SET state = 'queued', error = NULL, epoch = epoch + 1, updated = ? WHERE id = ?",
        (now, op.workflow),
    )
    return True


def _drop(db: sqlite3.Connection, op: Drop, now: float) -> int:
    rows = db.execute("SELECT id FROM workflow WHERE owner = ?", (op.owner,)).fetchall()
    free = [row[0] for row in rows if row[0] not in op.keep]
    for workflow in free:
        db.execute(
            "UPDATE workflow SET owner = NULL, epoch = epoch + 1, "
            "state = CASE WHEN cancel = 1 THEN 'cancelled' WHEN state = 'running' THEN 'queued' ELSE state END, "
            "updated = ? WHERE id = ?",
            (now, workflow),
        )
        _wake_waiting(db, workflow)
    return len(free)


def _wake(db: sqlite3.Connection, op: Wake, now: float) -> bool:
    changed = db.execute(
        "UPDATE workflow SET wake = ? WHERE id = ? AND epoch = ? AND owner IS NULL AND wake > ? "
        "AND state IN ('sleeping', 'waiting')",
        (now, op.workflow, op.epoch, now),
    ).rowcount
    if changed:
        db.execute(
            "UPDATE step SET wake = ? WHERE workflow = ? AND state = 'pending' AND wake > ?",
            (now, op.workflow, now),
        )
    return changed == 1


def _annotate(db: sqlite3.Connection, op: Annotate, now: float) -> int:
    del now
    return db.execute(
        f"UPDATE workflow SET error = ? WHERE name = ? AND {_COULD_RUN}",  # noqa: S608 - fixed text
        (op.error, op.name, op.before, op.before),
    ).rowcount


_WRITERS: Final[dict[type[Op], Callable[..., Any]]] = {
    Create: _create,
    Move: _move,
    Cancel: _cancel,
    Resume: _resume,
    Fork: _fork,
    Send: _send,
    Take: _take,
    Resolve: _resolve,
    Drop: _drop,
    Wake: _wake,
    Annotate: _annotate,
}


# --- owners ---------------------------------------------------------------------------------------------------------

_descriptors: Final[dict[str, int]] = {}
"""Descriptors of the owners of this process, which must not be opened again: closing any descriptor of a file
drops the process's locks on it."""
_descriptors_lock = threading.Lock()


class Owners:
    """The owners of one journal: each holds a lock that the kernel takes back when its process dies.

    No clock is read and no lease expires: a live process keeps its work, however long it is suspended, and
    a dead one's can be taken over at once.

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
        with _descriptors_lock:
            _descriptors[owner] = fd
        return owner

    def leave(self, owner: str) -> None:
        """Stop being that owner."""
        with _descriptors_lock:
            fd = _descriptors.pop(owner, None)
        if fd is not None:
            self._path(owner).unlink(missing_ok=True)
            os.close(fd)

    def dead(self, owner: str) -> bool:
        """Return whether an owner's process has died, or has left."""
        with _descriptors_lock:
            if owner in _descriptors:
                return False
            try:
                fd = os.open(self._path(owner), os.O_RDWR)
            except FileNotFoundError:
                return True
            try:
                return try_lock(fd)
            finally:
                os.close(fd)

    def remove_dead(self, owner: str) -> None:
        """Remove the file of a dead owner."""
        self._path(owner).unlink(missing_ok=True)

    def _path(self, owner: str) -> Path:
        return self._journal.with_name(f"{self._journal.name}.own-{owner}")


def _after_fork() -> None:
    """A child holds none of its parent's locks."""
    global _descriptors_lock  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _descriptors_lock = threading.Lock()
    for fd in _descriptors.values():
        os.close(fd)
    _descriptors.clear()


run_after_fork(_after_fork)
