# this_file: src/opero/durable/sqlite_store.py
"""Keep a journal in one SQLite file that all engines and processes of one host share."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Final

import opero.utils.checks as checks
from opero.durable.records import (
    ENDED,
    Acquire,
    Annotate,
    Cancel,
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
from opero.errors import JournalError, UnserializableError
from opero.limits.state_file import try_lock
from opero.utils.fork import run_after_fork
from opero.utils.sqlite import SqliteFile

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
_OTHER_OWNERS: Final = "SELECT DISTINCT owner FROM workflow WHERE owner IS NOT NULL AND owner <> ?"
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
        OperoUsageError: `path` is no path, or `synchronous` something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: str = "FULL") -> None:
        checks.path("path", path)
        checks.one_of("FULL", "NORMAL")("synchronous", synchronous)
        self.path: Path = Path(path).absolute()
        self._is_open = False
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

    # --- owners -------------------------------------------------------------------------------------------------

    def join(self) -> str:
        """Become an owner, by a lock that the kernel takes back when this process dies; return its id.

        No clock is read and no lease expires: a live process keeps its work, however long it is
        suspended, and a dead one's can be taken over at once.
        """
        owner = uuid.uuid4().hex
        try:
            fd = os.open(self._owner_file(owner), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try_lock(fd)
        except OSError as error:
            raise self._failure(error) from error
        with _descriptors_lock:
            _descriptors[owner] = fd
        return owner

    def leave(self, owner: str) -> None:
        """Stop being an owner."""
        with _descriptors_lock:
            fd = _descriptors.pop(owner, None)
        if fd is not None:
            self._owner_file(owner).unlink(missing_ok=True)
            os.close(fd)

    def _is_dead(self, owner: str) -> bool:
        """Return whether an owner's process has died, or has left."""
        with _descriptors_lock:
            if owner in _descriptors:
                return False
            try:
                fd = os.open(self._owner_file(owner), os.O_RDWR)
            except FileNotFoundError:
                return True
            try:
                return try_lock(fd)
            finally:
                os.close(fd)

    def _owner_file(self, owner: str) -> Path:
        return self.path.with_name(f"{self.path.name}.own-{owner}")

    # --- writing and reading ------------------------------------------------------------------------------------

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
        if type(op) is Acquire:
            self._free_the_dead(db, op, now)
        return _WRITERS[type(op)](db, op, now)

    def _free_the_dead(self, db: sqlite3.Connection, op: Acquire, now: float) -> None:
        for (owner,) in db.execute(_OTHER_OWNERS, (op.owner,)).fetchall():
            if self._is_dead(owner):
                for record in _select(db, "WHERE owner = ?", (owner,)):
                    _recover(db, record, now, op.max_recoveries)
                self._owner_file(owner).unlink(missing_ok=True)

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
        rows = self._read(f"{_SELECT} WHERE id = ?", (workflow,))
        return _record_of(_sound(rows, WorkflowRecord)[0]) if rows else None

    def find(
        self, name: str | None = None, states: Iterable[State] = (), limit: int | None = None
    ) -> list[WorkflowRecord]:
        """Return workflows, the youngest first."""
        wanted = tuple(states)
        conditions = ["name = ?"] * (name is not None)
        if wanted:
            conditions.append(f"state IN ({_marks(wanted)})")
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        values = (*(() if name is None else (name,)), *wanted, -1 if limit is None else limit)
        rows = self._read(f"{_SELECT} {where}ORDER BY created DESC, id LIMIT ?", values)
        return [_record_of(row) for row in _sound(rows, WorkflowRecord)]

    def steps(self, workflow: str) -> list[StepRecord]:
        """Return a workflow's steps in the order of their first record."""
        rows = self._read(f"{_SELECT_STEPS} ORDER BY place", (workflow,))
        return [
            StepRecord(path, name, digest, _STEP_STATES[state], *others)
            for path, name, digest, state, *others in _sound(rows, StepRecord)
        ]

    def attention(self, owner: str) -> tuple[bool, float | None]:
        """Return whether an owner may find something, and when the next sleeper wakes."""
        now = time.time()
        queued = self._read("SELECT 1 FROM workflow WHERE state = 'queued' LIMIT 1")
        others = self._read(_OTHER_OWNERS, (owner,))
        wake = self._read(
            "SELECT min(wake) FROM workflow WHERE state IN ('sleeping', 'waiting') AND owner IS NULL"
        )[0][0]
        ready = bool(queued) or (wake is not None and wake <= now)
        return ready or any(self._is_dead(other) for (other,) in others), wake

    def unowned(self, before: float) -> list[str]:
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


def _marks(values: Collection[Any]) -> str:
    """Return a question mark for each value."""
    return ", ".join("?" * len(values))


_COLUMNS: Final = tuple(column.name for column in fields(WorkflowRecord))
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM workflow"  # noqa: S608 - fixed names
_SAVE: Final = (
    f"INSERT OR REPLACE INTO workflow ({', '.join(_COLUMNS)}) VALUES ({_marks(_COLUMNS)})"  # noqa: S608 - as above
)
_STEP_COLUMNS: Final = "path, name, hash, state, value, attempts, wake, began, ended, place"
_SELECT_STEPS: Final = f"SELECT {_STEP_COLUMNS} FROM step WHERE workflow = ?"  # noqa: S608 - as above
# A step counts only while the workflow is its owner's.
_PUT_STEP: Final = (
    f"INSERT INTO step (workflow, {_STEP_COLUMNS}) SELECT {_marks(range(11))} "  # noqa: S608 - as above
    "WHERE EXISTS (SELECT 1 FROM workflow WHERE id = ? AND owner = ? AND epoch = ?) "
    "ON CONFLICT (workflow, path) DO UPDATE SET state = excluded.state, value = excluded.value, "
    "attempts = excluded.attempts, wake = excluded.wake, ended = excluded.ended"
)


_KINDS: Final[dict[Any, set[type]]] = {
    "str": {str}, "str | None": {str, NoneType}, "State": {str}, "StepState": {str},
    "int": {int}, "bool": {int}, "float": {int, float}, "float | None": {int, float, NoneType},
}  # fmt: skip
"""What SQLite gives for a field of a record, by its annotation."""
_STATES: Final[dict[Any, set[Any]]] = {"State": {*State}, "StepState": {*StepState}}


def _sound(rows: list[Any], record: type[WorkflowRecord | StepRecord]) -> list[Any]:
    """Return rows whose values are those of a record.

    Raises:
        UnserializableError: They are not: somebody, or something, has changed the file.
    """
    for column, values in zip(fields(record), zip(*rows, strict=True), strict=False):
        known = _STATES.get(column.type)
        if not _KINDS[column.type].issuperset(map(type, values)) or (
            known is not None and not known.issuperset(values)
        ):
            raise UnserializableError(f"a row of the journal is damaged: its {column.name}.")
    return rows


def _record_of(row: tuple[Any, ...]) -> WorkflowRecord:
    """Return the record in a row of `_SELECT`."""
    record = WorkflowRecord(**dict(zip(_COLUMNS, row, strict=True)))
    record.state, record.cancel = State(record.state), bool(record.cancel)
    return record


def _select(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> list[WorkflowRecord]:
    return [_record_of(row) for row in db.execute(f"{_SELECT} {where}", values).fetchall()]


def _get(db: sqlite3.Connection, workflow: str) -> WorkflowRecord | None:
    return next(iter(_select(db, "WHERE id = ?", (workflow,))), None)


def _save(db: sqlite3.Connection, record: WorkflowRecord, now: float) -> None:
    record.updated = now
    db.execute(_SAVE, [getattr(record, name) for name in _COLUMNS])


def _put_step(db: sqlite3.Connection, op: PutStep | Take) -> bool:
    step = op.step
    values = (
        op.workflow, step.path, step.name, step.hash, str(step.state), step.value, step.attempts, step.wake,
        step.began, step.ended, step.order, op.workflow, op.owner, op.epoch,
    )  # fmt: skip
    return db.execute(_PUT_STEP, values).rowcount == 1


def _create(db: sqlite3.Connection, op: Create, now: float) -> WorkflowRecord:
    found = _get(db, op.record.id)
    if found is not None:
        return found
    op.record.created = now
    _save(db, op.record, now)
    return op.record


def _acquire(db: sqlite3.Connection, op: Acquire, now: float) -> list[WorkflowRecord]:
    states = "'queued', 'blocked'" if op.blocked else "'queued'"
    least, most = op.recoveries
    where = (
        f"WHERE name IN ({_marks(op.names)}) AND owner IS NULL AND (state IN ({states}) "
        f"OR (state IN ('sleeping', 'waiting') AND wake <= ?)) "
        f"AND recoveries BETWEEN ? AND ? ORDER BY {'recoveries, ' if least else ''}created LIMIT ?"
    )
    acquired = _select(db, where, (*op.names, now, least, most, op.limit))
    for record in acquired:
        record.owner, record.state, record.epoch = op.owner, State.RUNNING, record.epoch + 1
        record.wake, record.error, record.progress = None, None, _count_steps(db, record)
        _save(db, record, now)
    return acquired


def _count_steps(db: sqlite3.Connection, record: WorkflowRecord) -> int:
    found = db.execute("SELECT count(*) FROM step WHERE workflow = ?", (record.id,)).fetchone()
    return int(found[0])


def _recover(db: sqlite3.Connection, record: WorkflowRecord, now: float, most: int) -> None:
    """Free a workflow whose owner has died; one that has killed its owners too often is dead."""
    if record.state is State.RUNNING and not record.cancel:
        progressed = _count_steps(db, record) > record.progress
        record.recoveries = 1 if progressed else record.recoveries + 1
        if record.recoveries > most:
            record.state = State.DEAD
            record.error = f"given up: its process has died {most + 1} times in a row before another step was recorded"
    _free(db, record, now)


def _free(db: sqlite3.Connection, record: WorkflowRecord, now: float) -> None:
    """Save a workflow without an owner, whose writes count no more; it is queued if it was running."""
    if record.cancel:
        record.state = State.CANCELLED
    elif record.state is State.RUNNING:
        record.state = State.QUEUED
    record.owner, record.epoch = None, record.epoch + 1
    _save(db, record, now)
    _wake_waiting(db, record.id)


def _move(db: sqlite3.Connection, op: Move, now: float) -> bool:
    # A process that frees a workflow has survived it.
    free = ", owner = NULL, recoveries = 0" if op.free else ""
    changed = db.execute(
        "UPDATE workflow SET state = ?, output = ?, error = ?, failed_step = ?, wake = ?, updated = ?"  # noqa: S608 - fixed
        f"{free} WHERE id = ? AND owner = ? AND epoch = ?",
        (str(op.state), op.output, op.error, op.failed_step, op.wake, now, op.workflow, op.owner, op.epoch),
    ).rowcount  # fmt: skip
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
        record.state, record.wake, record.epoch = State.CANCELLED, None, record.epoch + 1
        db.execute("DELETE FROM signal WHERE workflow = ?", (op.workflow,))
    else:
        record.cancel = True
    _save(db, record, now)
    return record


def _resume(db: sqlite3.Connection, op: Resume, now: float) -> bool:
    record = _get(db, op.workflow)
    again = (State.FAILED, State.CANCELLED, State.DEAD, State.BLOCKED)
    if record is None or record.state not in again:
        return False
    if record.failed_step is not None:
        key = (record.id, record.failed_step)
        db.execute("DELETE FROM step WHERE workflow = ? AND path = ?", key)
    record.state, record.output, record.error, record.failed_step = State.QUEUED, None, None, None
    record.cancel, record.recoveries, record.epoch = False, 0, record.epoch + 1
    _save(db, record, now)
    return True


def _fork(db: sqlite3.Connection, op: Fork, now: float) -> WorkflowRecord | None:
    record = _get(db, op.workflow)
    if record is None:
        return None
    made = WorkflowRecord(
        id=op.new, name=record.name, version=op.version, args=record.args, hash=record.hash
    )
    made.created = now
    _save(db, made, now)
    kept = f"{_SELECT_STEPS} AND place < ? AND state IN ('done', 'failed')"
    db.execute(
        f"INSERT INTO step SELECT ?, kept.* FROM ({kept}) AS kept",  # noqa: S608 - fixed text
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
    record = _get(db, op.workflow)
    if record is None or record.state is not State.IN_DOUBT:
        return False
    where, key = "WHERE workflow = ? AND path = ? AND state = 'started'", (op.workflow, op.path)
    if op.step is None:
        changed = db.execute(f"DELETE FROM step {where}", key)  # noqa: S608 - fixed text
    else:
        changed = db.execute(
            f"UPDATE step SET state = ?, value = ?, ended = ? {where}",  # noqa: S608 - fixed text
            (op.step.state, op.step.value, now, *key),
        )
    if changed.rowcount == 0:
        return False
    record.state, record.error, record.epoch = State.QUEUED, None, record.epoch + 1
    _save(db, record, now)
    return True


def _drop(db: sqlite3.Connection, op: Drop, now: float) -> int:
    found = [one for one in _select(db, "WHERE owner = ?", (op.owner,)) if one.id not in op.keep]
    for record in found:
        _free(db, record, now)
    return len(found)


def _wake(db: sqlite3.Connection, op: Wake, now: float) -> bool:
    record = _get(db, op.workflow)
    if record is None or record.owner is not None or record.epoch != op.epoch:
        return False
    if record.state not in (State.SLEEPING, State.WAITING) or not (record.wake or 0.0) > now:
        return False
    record.wake = now
    _save(db, record, now)
    db.execute(
        "UPDATE step SET wake = ? WHERE workflow = ? AND state = 'pending' AND wake > ?",
        (now, op.workflow, now),
    )
    return True


def _annotate(db: sqlite3.Connection, op: Annotate, now: float) -> int:
    return db.execute(
        f"UPDATE workflow SET error = ? WHERE name = ? AND {_COULD_RUN}",  # noqa: S608 - fixed text
        (op.error, op.name, op.before, op.before),
    ).rowcount


_WRITERS: Final[dict[type[Op], Callable[..., Any]]] = {
    Acquire: _acquire,
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


def _after_fork() -> None:
    """A child holds none of its parent's locks."""
    global _descriptors_lock  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _descriptors_lock = threading.Lock()
    for fd in _descriptors.values():
        os.close(fd)
    _descriptors.clear()


run_after_fork(_after_fork)
