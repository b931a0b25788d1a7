# this_file: src/opero/durable/stores/writing.py
"""How each kind of write changes the tables of an SQLite journal; runs within a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero.durable.records import (
    ENDED,
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
    WorkflowRecord,
)

if TYPE_CHECKING:
    from opero.durable.stores.owner import Owners

__all__ = ["SELECT_WORKFLOW", "workflow_of", "write"]

_COLUMNS: Final = (
    "id", "name", "version", "args", "hash", "state", "output", "error", "failed_step", "owner", "epoch",
    "recoveries", "progress", "wake", "cancel", "created", "updated",
)  # fmt: skip
SELECT_WORKFLOW: Final = f"SELECT {', '.join(_COLUMNS)} FROM workflow"  # noqa: S608 - fixed names
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


def workflow_of(row: tuple[Any, ...]) -> WorkflowRecord:
    """Return the record in a row of `SELECT_WORKFLOW`."""
    found = dict(zip(_COLUMNS, row, strict=True))
    found["state"] = State(found["state"])
    found["cancel"] = bool(found["cancel"])
    return WorkflowRecord(**found)


def write(db: sqlite3.Connection, op: Op, now: float, owners: Owners) -> Any:
    """Write, and answer as the class of `op` says."""
    if type(op) is PutStep:  # by far the most frequent
        return _put_step(db, op)
    if type(op) is Claim:
        return _claim(db, op, now, owners)
    return _WRITERS[type(op)](db, op, now)


def _put_step(db: sqlite3.Connection, op: PutStep | Take) -> bool:
    step = op.step
    values = (
        op.workflow, step.path, step.name, step.hash, str(step.state), step.value, step.attempts, step.wake,
        step.began, step.ended, step.order, op.workflow, op.owner, op.epoch,
    )  # fmt: skip
    return db.execute(_PUT_STEP, values).rowcount == 1


def _get(db: sqlite3.Connection, workflow: str) -> WorkflowRecord | None:
    row = db.execute(f"{SELECT_WORKFLOW} WHERE id = ?", (workflow,)).fetchone()
    return None if row is None else workflow_of(row)


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
    query = (
        f"{SELECT_WORKFLOW} WHERE name IN ({names}) AND owner IS NULL AND (state IN ({states}) "
        f"OR (state IN ('sleeping', 'waiting') AND wake <= ?)){only} ORDER BY created LIMIT ?"
    )
    values = (*op.names, now, *(() if op.only is None else (op.only,)), op.limit)
    claimed = [workflow_of(row) for row in db.execute(query, values).fetchall()]
    for record in claimed:
        record.owner, record.state, record.epoch = op.owner, State.RUNNING, record.epoch + 1
        record.wake, record.updated = None, now
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
            for row in db.execute(f"{SELECT_WORKFLOW} WHERE owner = ?", (owner,)).fetchall():
                _recover(db, workflow_of(row), now, op.max_recoveries)
            owners.bury(owner)


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
        "UPDATE workflow SET state = ?, output = ?, error = ?, failed_step = ?, wake = ?, owner = ?, updated = ? "
        "WHERE id = ? AND owner = ? AND epoch = ?",
        (
            str(op.state),
            op.output,
            op.error,
            op.failed_step,
            op.wake,
            None if op.free else op.owner,
            now,
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


class _Writer(Protocol):
    def __call__(self, db: sqlite3.Connection, op: Any, now: float, /) -> Any: ...


_WRITERS: Final[dict[type[Op], _Writer | Callable[..., Any]]] = {
    Create: _create,
    Move: _move,
    Cancel: _cancel,
    Resume: _resume,
    Fork: _fork,
    Send: _send,
    Take: _take,
    Resolve: _resolve,
    Drop: _drop,
}
