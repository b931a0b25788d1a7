# this_file: tests/durable/stores/memory_store.py
"""A toy: a journal in the memory of one process, which shows how little a store has to know."""

from __future__ import annotations

import copy
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opero.durable.records import ENDED, State, StepRecord, StepState, WorkflowRecord
from opero.errors import JournalError

if TYPE_CHECKING:
    from opero.durable import records as r


class MemoryJournal:
    """What several stores share, as processes share a file."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.workflows: dict[str, WorkflowRecord] = {}
        self.steps: dict[str, dict[str, StepRecord]] = {}
        self.signals: list[tuple[str, str, str]] = []
        self.living: set[str] = set()


class MemoryStore:
    """A `JournalStore`; nothing of it survives the process."""

    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal
        self._opened = False

    def open(self) -> None:
        self._opened = True

    def close(self) -> None:
        self._opened = False

    def join(self) -> str:
        owner = uuid.uuid4().hex
        self._journal.living.add(owner)
        return owner

    def leave(self, owner: str) -> None:
        self._journal.living.discard(owner)

    # --- writing --------------------------------------------------------------------------------------------------

    def apply(self, ops: Sequence[r.Op]) -> list[Any]:
        with self._data() as data:
            before = copy.deepcopy((data.workflows, data.steps, data.signals))
            try:
                return [self._write(data, op) for op in ops]
            except BaseException as error:
                data.workflows, data.steps, data.signals = before
                raise JournalError(str(error)) from error

    def _write(self, data: MemoryJournal, op: r.Op) -> Any:
        if type(op).__name__ == "Wake":
            return self._wakeup(data, op)
        return getattr(self, f"_{type(op).__name__.lower()}")(data, op)

    def _create(self, data: MemoryJournal, op: r.Create) -> WorkflowRecord:
        found = data.workflows.get(op.record.id)
        if found is not None:
            return replace(found)
        op.record.created = op.record.updated = time.time()
        data.workflows[op.record.id] = replace(op.record)
        return op.record

    def _acquire(self, data: MemoryJournal, op: r.Acquire) -> list[WorkflowRecord]:
        for found in data.workflows.values():
            if found.owner is not None and found.owner not in data.living:
                self._recover(data, found, op.max_recoveries)
        wanted = {State.QUEUED, State.BLOCKED} if op.blocked else {State.QUEUED}
        now = time.time()
        acquired = []
        least, most = op.recoveries
        for found in sorted(
            data.workflows.values(), key=lambda w: (w.recoveries if least else 0, w.created)
        ):
            due = found.wake is not None and found.wake <= now
            ready = found.state in wanted or (
                found.state in (State.SLEEPING, State.WAITING) and due
            )
            mine = found.name in op.names and least <= found.recoveries <= most
            if len(acquired) < op.limit and mine and ready and found.owner is None:
                found.owner, found.state, found.epoch = op.owner, State.RUNNING, found.epoch + 1
                found.wake, found.error, found.updated = None, None, now
                found.progress = len(data.steps.get(found.id, ()))
                acquired.append(replace(found))
        return acquired

    def _recover(self, data: MemoryJournal, found: WorkflowRecord, most: int) -> None:
        found.owner, found.epoch = None, found.epoch + 1
        if found.cancel:
            found.state = State.CANCELLED
        elif found.state is State.RUNNING:
            more = len(data.steps.get(found.id, ())) > found.progress
            found.recoveries = 1 if more else found.recoveries + 1
            found.state = State.QUEUED
            if found.recoveries > most:
                found.state = State.DEAD
                found.error = f"given up: its process has died {most + 1} times in a row"
        self._wake(data, found.id)

    def _owned(self, data: MemoryJournal, op: Any) -> WorkflowRecord | None:
        found = data.workflows.get(op.workflow)
        ours = found is not None and (found.owner, found.epoch) == (op.owner, op.epoch)
        return found if ours else None

    def _putstep(self, data: MemoryJournal, op: r.PutStep | r.Take) -> bool:
        if self._owned(data, op) is None:
            return False
        data.steps.setdefault(op.workflow, {})[op.step.path] = replace(op.step)
        return True

    def _move(self, data: MemoryJournal, op: r.Move) -> bool:
        found = self._owned(data, op)
        if found is None:
            return False
        found.state, found.output, found.error = op.state, op.output, op.error
        found.failed_step, found.wake, found.updated = op.failed_step, op.wake, time.time()
        found.owner = None if op.free else op.owner
        found.recoveries = 0 if op.free else found.recoveries
        if op.state in ENDED:
            self._forget_signals(data, op.workflow)
        elif op.free:
            self._wake(data, op.workflow)
        return True

    def _wake(self, data: MemoryJournal, workflow: str) -> None:
        found = data.workflows[workflow]
        sent = {f"wait for {name}" for of, name, _ in data.signals if of == workflow}
        waits = any(
            step.state is StepState.PENDING and step.name in sent
            for step in data.steps.get(workflow, {}).values()
        )
        if found.state is State.WAITING and found.owner is None and waits:
            found.state, found.wake = State.QUEUED, None

    def _forget_signals(self, data: MemoryJournal, workflow: str) -> None:
        data.signals = [signal for signal in data.signals if signal[0] != workflow]

    def _cancel(self, data: MemoryJournal, op: r.Cancel) -> WorkflowRecord | None:
        found = data.workflows.get(op.workflow)
        if found is not None and found.state not in ENDED:
            if found.owner is None:
                found.state, found.wake, found.epoch = State.CANCELLED, None, found.epoch + 1
                self._forget_signals(data, op.workflow)
            else:
                found.cancel = True
        return None if found is None else replace(found)

    def _resume(self, data: MemoryJournal, op: r.Resume) -> bool:
        found = data.workflows.get(op.workflow)
        again = (State.FAILED, State.CANCELLED, State.DEAD, State.BLOCKED)
        if found is None or found.state not in again:
            return False
        if found.failed_step is not None:
            data.steps.get(found.id, {}).pop(found.failed_step, None)
        found.state, found.error, found.failed_step, found.output = State.QUEUED, None, None, None
        found.cancel, found.recoveries, found.epoch = False, 0, found.epoch + 1
        return True

    def _fork(self, data: MemoryJournal, op: r.Fork) -> WorkflowRecord | None:
        found = data.workflows.get(op.workflow)
        if found is None:
            return None
        made = WorkflowRecord(
            id=op.new, name=found.name, version=op.version, args=found.args, hash=found.hash
        )
        made.created = made.updated = time.time()
        data.workflows[op.new] = replace(made)
        data.steps[op.new] = {
            path: replace(step)
            for path, step in data.steps.get(op.workflow, {}).items()
            if step.order < op.before and step.state in (StepState.DONE, StepState.FAILED)
        }
        return made

    def _send(self, data: MemoryJournal, op: r.Send) -> bool:
        found = data.workflows.get(op.workflow)
        if found is None or found.state in ENDED:
            return False
        data.signals.append((op.workflow, op.name, op.value))
        self._wake(data, op.workflow)
        return True

    def _take(self, data: MemoryJournal, op: r.Take) -> str | bool | None:
        first = next((s for s in data.signals if s[:2] == (op.workflow, op.name)), None)
        if first is not None:
            op.step.state, op.step.value, op.step.ended = StepState.DONE, first[2], op.at or 1.0
        if not self._putstep(data, op):
            return False
        if first is None:
            return None
        data.signals.remove(first)
        return first[2]

    def _resolve(self, data: MemoryJournal, op: r.Resolve) -> bool:
        found = data.workflows.get(op.workflow)
        step = data.steps.get(op.workflow, {}).get(op.path)
        if found is None or found.state is not State.IN_DOUBT or step is None:
            return False
        if step.state is not StepState.STARTED:
            return False
        if op.step is None:
            del data.steps[op.workflow][op.path]
        else:
            step.state, step.value, step.ended = op.step.state, op.step.value, time.time()
        found.state, found.error, found.epoch = State.QUEUED, None, found.epoch + 1
        return True

    def _drop(self, data: MemoryJournal, op: r.Drop) -> int:
        dropped = 0
        for found in data.workflows.values():
            if found.owner != op.owner or found.id in op.keep:
                continue
            dropped += 1
            found.owner, found.epoch = None, found.epoch + 1
            if found.cancel:
                found.state = State.CANCELLED
            elif found.state is State.RUNNING:
                found.state = State.QUEUED
            self._wake(data, found.id)
        return dropped

    def _wakeup(self, data: MemoryJournal, op: r.Wake) -> bool:
        found, now = data.workflows.get(op.workflow), time.time()
        if found is None or found.owner is not None or found.epoch != op.epoch:
            return False
        if found.state not in (State.SLEEPING, State.WAITING) or (found.wake or 0) <= now:
            return False
        found.wake = now
        for step in data.steps.get(op.workflow, {}).values():
            if step.state is StepState.PENDING and (step.wake or 0) > now:
                step.wake = now
        return True

    def _annotate(self, data: MemoryJournal, op: r.Annotate) -> int:
        found = [w for w in self._could_run(data, op.before) if w.name == op.name]
        for one in found:
            one.error = op.error
        return len(found)

    def _could_run(self, data: MemoryJournal, before: float) -> list[WorkflowRecord]:
        return [
            w
            for w in data.workflows.values()
            if w.owner is None
            and w.error is None
            and (
                (w.state is State.QUEUED and w.updated <= before)
                or (w.state in (State.SLEEPING, State.WAITING) and (w.wake or 9e9) <= before)
            )
        ]

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, workflow: str) -> WorkflowRecord | None:
        with self._data() as data:
            found = data.workflows.get(workflow)
            return None if found is None else replace(found)

    def find(
        self, name: str | None = None, states: Iterable[State] = (), limit: int | None = None
    ) -> list[WorkflowRecord]:
        wanted = set(states) or set(State)
        with self._data() as data:
            found = [
                replace(w)
                for w in data.workflows.values()
                if name in (None, w.name) and w.state in wanted
            ]
        return sorted(found, key=lambda w: -w.created)[:limit]

    def steps(self, workflow: str) -> list[StepRecord]:
        with self._data() as data:
            found = data.steps.get(workflow, {}).values()
            return sorted((replace(step) for step in found), key=lambda step: step.order)

    def attention(self, owner: str) -> tuple[bool, float | None]:
        with self._data() as data:
            found = list(data.workflows.values())
            asleep = [w.wake for w in found if w.owner is None and w.wake is not None]
            queued = any(w.state is State.QUEUED for w in found)
            orphaned = any(w.owner is not None and w.owner not in data.living for w in found)
        wake = min(asleep, default=None)
        return queued or orphaned or (wake is not None and wake <= time.time()), wake

    def unowned(self, before: float) -> list[str]:
        with self._data() as data:
            return list({w.name: 0 for w in self._could_run(data, before)})

    def cancelled(self, owner: str) -> list[str]:
        with self._data() as data:
            return [w.id for w in data.workflows.values() if w.owner == owner and w.cancel]

    def signalled(self, owner: str) -> list[tuple[str, str]]:
        with self._data() as data:
            return list(
                {(of, n): 0 for of, n, _ in data.signals if data.workflows[of].owner == owner}
            )

    def _data(self) -> _Locked:
        if not self._opened:
            raise JournalError("the journal is not open")
        return _Locked(self._journal)


class _Locked:
    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal

    def __enter__(self) -> MemoryJournal:
        self._journal.lock.acquire()
        return self._journal

    def __exit__(self, *_: object) -> None:
        self._journal.lock.release()
