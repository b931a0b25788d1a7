# this_file: src/opero/durable/engine.py
"""What runs workflows: threads for synchronous functions, one event loop for coroutines, and a watch.

claim → replay and run → end, or put aside (asleep, waiting, blocked, in doubt)
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from opero.durable.body import acall, call, end_tasks
from opero.durable.conclusion import conclude
from opero.durable.crew import Crew, LoopThread
from opero.durable.group_commit import GroupCommit
from opero.durable.news import tell_workflow
from opero.durable.records import Claim, Create, Drop, Move, State, WorkflowRecord
from opero.durable.registry import WorkflowSpec, workflows
from opero.durable.run import Ending, Run, Why
from opero.errors import JournalError, OperoWarning

if TYPE_CHECKING:
    from opero.durable.store import Store

__all__ = ["Engine"]

_GLANCE: Final = 0.5
"""Seconds between two looks at what other processes have done; a dead one's work is found by one of them."""
_GRACE: Final = 1.0
"""Seconds that running steps get to end when the program ends without a stop."""
_MANY: Final = 200
"""Coroutines that are claimed at once; more follow at once."""


class Engine:
    """Runs the workflows of one journal in this process.

    Args:
        store: The journal.
        max_workers: Most synchronous workflows at once; each takes a thread while it runs.
        max_recoveries: Times in a row that a process may die under a workflow without progress.
    """

    def __init__(self, store: Store, max_workers: int, max_recoveries: int) -> None:
        self.store: Final = store
        self.journal: Final = GroupCommit(store)
        self.owner: Final = store.join()
        self._crew = Crew(max_workers)
        self._loop = LoopThread()
        self._max_recoveries = max_recoveries
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._idle = threading.Condition(self._lock)
        self._ended: dict[str, list[Callable[[], object]]] = {}
        self._stranded: dict[str, Move] = {}
        self._stopping = False
        self._wanted = threading.Event()
        self._retry_blocked = True
        try:
            # What can go on does so before anybody asks how it is.
            self._look()
        except BaseException:
            store.leave(self.owner)
            raise
        self._watcher = threading.Thread(target=self._watch, name="opero-watch", daemon=True)
        self._watcher.start()
        self._pid = os.getpid()
        atexit.register(self._at_exit)

    # --- starting workflows ---------------------------------------------------------------------------------------

    def create(self, record: WorkflowRecord, spec: WorkflowSpec) -> WorkflowRecord:
        """Write a new workflow down and run it, at once if there is room; return what stands under its id."""
        mine = self._take_room(spec)
        if mine:
            record.owner, record.epoch, record.state = self.owner, 1, State.RUNNING
        try:
            found: WorkflowRecord = self.journal.write(Create(record))
        except BaseException:
            if mine:
                self._give_room(spec)
            raise
        return self._created(record, found, spec, mine)

    async def acreate(self, record: WorkflowRecord, spec: WorkflowSpec) -> WorkflowRecord:
        """Do the same without blocking the event loop."""
        mine = self._take_room(spec)
        if mine:
            record.owner, record.epoch, record.state = self.owner, 1, State.RUNNING
        try:
            found: WorkflowRecord = await self.journal.awrite(Create(record))
        except BaseException:
            if mine:
                self._give_room(spec)
            raise
        return self._created(record, found, spec, mine)

    def _created(
        self, record: WorkflowRecord, found: WorkflowRecord, spec: WorkflowSpec, mine: bool
    ) -> WorkflowRecord:
        if found is not record:
            if mine:
                self._give_room(spec)
        elif mine:
            self._launch(record, spec, new=True)
        else:
            self._wanted.set()
        return found

    def _take_room(self, spec: WorkflowSpec) -> bool:
        return not self._stopping and (spec.is_async or self._crew.take())

    def _give_room(self, spec: WorkflowSpec) -> None:
        if not spec.is_async:
            self._crew.give()

    def _launch(self, record: WorkflowRecord, spec: WorkflowSpec, *, new: bool) -> None:
        """Run a workflow that is this engine's; room has been taken for it."""
        try:
            steps = () if new else self.store.steps(record.id)
        except JournalError as error:
            self._give_room(spec)
            self._strand(Run(record, (), self.journal, on_loop=False), str(error))
            return
        run = Run(record, steps, self.journal, on_loop=spec.is_async)
        with self._lock:
            self._runs[record.id] = run
            if self._stopping:
                run.ending = Ending(Why.STOP)
        if spec.is_async:
            self._loop.run(self._drive(run, spec))
        else:
            self._crew.run(partial(self._work, run, spec))

    # --- running them -----------------------------------------------------------------------------------------------

    def _work(self, run: Run, spec: WorkflowSpec) -> None:
        """Run a synchronous workflow in this thread."""
        value, error = None, None
        try:
            value = call(run, spec)
        except BaseException as caught:  # noqa: BLE001 - whatever it is, it is the workflow's end
            error = caught
        move = conclude(run, value, error)
        if move is not None:
            try:
                self.journal.write(move)
            except JournalError as failure:
                self._strand(run, str(failure), move)
        self._give_room(spec)
        self._leave(run, move, value, error)

    async def _drive(self, run: Run, spec: WorkflowSpec) -> None:
        """Run an asynchronous workflow on the event loop."""
        loop = asyncio.get_running_loop()
        # In a task of its own: what is to be written about its end cannot be cancelled along with it.
        task = loop.create_task(acall(run, spec))
        run.unwind = lambda: loop.call_soon_threadsafe(task.cancel)
        if run.ending is not None:
            task.cancel()
        value, error = None, None
        try:
            value = await task
        except BaseException as caught:  # noqa: BLE001 - whatever it is, it is the workflow's end
            error = caught
        run.unwind = None
        move = conclude(run, value, error)
        await end_tasks(run)
        if move is not None:
            try:
                await self.journal.awrite(move)
            except JournalError as failure:
                self._strand(run, str(failure), move)
        self._leave(run, move, value, error)

    def _leave(self, run: Run, move: Move | None, value: Any, error: BaseException | None) -> None:
        """Forget a run, and tell those who wait for its end."""
        if move is not None:
            failure = error if isinstance(error, Exception) else None
            tell_workflow(run.record, move.state, result=value, error=failure)
        with self._idle:
            if self._runs.get(run.id) is run:
                del self._runs[run.id]
            told = self._ended.pop(run.id, [])
            self._idle.notify_all()
        for tell in told:
            tell()
        ending = run.ending
        if ending is not None and ending.why is Why.JOURNAL:
            self._strand(run, ending.text or "")
        # What was put aside may be due by now, and a thread is free.
        self._wanted.set()

    def _strand(self, run: Run, text: str, move: Move | None = None) -> None:
        """Remember what could not be written; the watch tries until the journal takes it."""
        record = run.record
        assert record.owner is not None  # noqa: S101 - it ran here
        with self._lock:
            new = record.id not in self._stranded
            self._stranded[record.id] = move or Move(
                record.id, record.owner, record.epoch, State.QUEUED
            )
        if new:
            _tell(f"workflow {record.id!r} goes on when its journal can be written again: {text}")

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = 0.0
        while not self._wanted.wait(pause) or not self._stopping:
            self._wanted.clear()
            try:
                pause = self._look()
            except JournalError as error:
                _tell(str(error))
                pause = _GLANCE

    def _look(self) -> float:
        """Do what there is to do, and return the seconds until the next look."""
        self._free_stranded()
        for workflow in self.store.cancelled(self.owner):
            self.cancel(workflow)
        with self._lock:
            runs = list(self._runs.values())
        if any(run.listening for run in runs):
            for workflow, name in self.store.signalled(self.owner):
                self.signalled(workflow, name)
        for run in runs:
            run.note_long(time.time() - _GLANCE)
        found, wake = self.store.attention(self.owner)
        if (found or self._retry_blocked) and self._claim():
            return 0.0
        return _GLANCE if wake is None else min(_GLANCE, max(0.0, wake - time.time()))

    def _claim(self) -> bool:
        """Claim what there is room for; tell whether there may be more."""
        blocked, self._retry_blocked = self._retry_blocked, False
        more = False
        names = workflows.names()
        for is_async in (True, False):
            some = tuple(n for n in names if workflows.latest(n).is_async is is_async)
            room = _MANY if is_async else self._crew.room
            if not some or room <= 0 or self._stopping:
                continue
            claimed = self.journal.write(
                Claim(self.owner, some, room, blocked, None, self._max_recoveries)
            )
            for record in claimed:
                self._adopt(record)
            more = more or len(claimed) == _MANY
        return more

    def _adopt(self, record: WorkflowRecord) -> None:
        """Run a workflow that was claimed, if the version that started it is known here."""
        spec = workflows.get(record.name, record.version)
        if spec is None and record.version is None:
            spec = workflows.latest(record.name)
        assert record.owner is not None  # noqa: S101 - it was claimed
        if spec is None:
            known = ", ".join(repr(v) for v in workflows.versions(record.name))
            text = (
                f"it was started by version {record.version!r} of {record.name!r}, and this program has {known}: "
                "bring that version back, or fork the workflow"
            )
            self.journal.write(
                Move(record.id, record.owner, record.epoch, State.BLOCKED, error=text)
            )
            return
        if not spec.is_async:
            self._crew.take(always=True)
        self._launch(record, spec, new=False)

    def _free_stranded(self) -> None:
        with self._lock:
            stranded = dict(self._stranded)
        for workflow, move in stranded.items():
            self.journal.write(move)
            with self._lock:
                self._stranded.pop(workflow, None)
                told = self._ended.pop(workflow, [])
            for tell in told:
                tell()

    # --- from outside -----------------------------------------------------------------------------------------------

    def look(self, *, blocked: bool = False) -> None:
        """Look at once at what there is to do.

        Args:
            blocked: Whether blocked workflows are tried again.
        """
        self._retry_blocked = self._retry_blocked or blocked
        self._wanted.set()

    def cancel(self, workflow: str) -> None:
        """Cancel a workflow that runs here."""
        with self._lock:
            run = self._runs.get(workflow)
        if run is not None and run.cancel() and run.unwind is not None:
            run.cancelling = True
            run.unwind()

    def signalled(self, workflow: str, name: str) -> None:
        """Tell a workflow that runs here that a signal has come."""
        with self._lock:
            run = self._runs.get(workflow)
        if run is not None:
            run.signalled(name)

    def active(self, workflow: str) -> str | None:
        """Return the name of the activity that a workflow runs just now, None if it does not run here."""
        with self._lock:
            run = self._runs.get(workflow)
        steps = [] if run is None else run.active
        return steps[-1].name if steps else None

    def on_end(self, workflow: str, tell: Callable[[], object]) -> bool:
        """Call something once a run that is under way here has ended; tell whether one is."""
        with self._lock:
            if workflow not in self._runs and workflow not in self._stranded:
                return False
            self._ended.setdefault(workflow, []).append(tell)
            return True

    def stop(self, timeout: float | None) -> bool:
        """End all runs after the step that they are at; tell whether all have ended in time."""
        atexit.unregister(self._at_exit)
        with self._lock:
            self._stopping = True
            runs = list(self._runs.values())
        self._wanted.set()
        for run in runs:
            run.end(Ending(Why.STOP))
        with self._idle:
            clean = self._idle.wait_for(lambda: not self._runs, timeout)
            left = tuple(self._runs)
        self._watcher.join()
        try:
            self.journal.write(Drop(self.owner, left))
        except JournalError as error:
            _tell(str(error))
        if clean:
            self.journal.close()
            self._crew.close()
            self._loop.close()
            self.store.leave(self.owner)
        return clean

    def _at_exit(self) -> None:
        """Let go of everything when the program ends without a stop; steps get a moment to end."""
        if os.getpid() == self._pid and self.stop(_GRACE):
            self.store.close()


def _tell(text: str) -> None:
    """Warn; where warnings are errors, the thread that runs everything must not die of one."""
    with suppress(OperoWarning):
        warnings.warn(text, OperoWarning, stacklevel=3)
