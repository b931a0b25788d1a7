# this_file: src/opero/durable/run.py
"""One run of a workflow from its start or its last crash to its end or its next pause."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast
from weakref import WeakSet

from opero.durable.records import PutStep, StepRecord, StepState, WorkflowRecord
from opero.durable.scope import Scope
from opero.durable.turns import turns_of
from opero.errors import JournalError

if TYPE_CHECKING:
    from opero.durable.group_commit import GroupCommit
    from opero.durable.records import Op, Take

__all__ = ["Ending", "LostOwnership", "Run", "Unwind", "Why", "WorkflowCancelled"]


_FAILURES: Final = 100
"""Errors of steps that are remembered, to tell which one ends the workflow."""


class Unwind(BaseException):
    """Ends a workflow function that goes on later, or elsewhere; no `except Exception` stops it."""


class LostOwnership(Unwind):
    """The workflow belongs to another engine by now: nothing that this one does counts any more."""


class WorkflowCancelled(BaseException):
    """Raised at the next step of a synchronous workflow that was cancelled."""


class Why(Enum):
    """Why a run ends before its function has returned."""

    SLEEP = "sleep"
    WAIT = "wait"
    STOP = "stop"
    BLOCKED = "blocked"
    DOUBT = "doubt"
    LOST = "lost"
    JOURNAL = "journal"


@dataclass(frozen=True, slots=True)
class Ending:
    """Why, and what is written about it.

    Attributes:
        why: Why.
        text: For people.
        wake: Wall-clock seconds at which it shall go on, None if that is nobody's business.
    """

    why: Why
    text: str | None = None
    wake: float | None = None


class Run:
    """What is known of a workflow while it runs in this process.

    Args:
        record: The workflow.
        steps: Its journal.
        journal: Where steps are written.
        on_loop: Whether it is a coroutine on an engine's event loop.

    Attributes:
        id: The workflow's id.
        record: The workflow.
        steps: Its steps by path.
        root: The scope of the workflow function.
        ending: Set once no further step may begin.
        cancelling: Whether it was told that it is cancelled; from then on nothing is journaled.
        failed: The last errors of steps that were raised in the workflow, and the steps' paths.
        tasks: Tasks that a coroutine has made.
        unwind: Ends the workflow function from outside; set by the engine for coroutines.
    """

    def __init__(
        self,
        record: WorkflowRecord,
        steps: Iterable[StepRecord],
        journal: GroupCommit,
        *,
        on_loop: bool,
    ) -> None:
        self.id: str = record.id
        self.record: WorkflowRecord = record
        self.steps: dict[str, StepRecord] = {step.path: step for step in steps}
        self.root: Scope = Scope(self, of_task=on_loop)
        self.ending: Ending | None = None
        self.cancelling: bool = False
        self.failed: deque[tuple[Exception, str]] = deque(maxlen=_FAILURES)
        self.unwind: Callable[[], object] | None = None
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._cancel_wanted = record.cancel
        self._journal = journal
        self._lock = threading.Lock()
        self._active: dict[str, StepRecord] = {}
        self._noted: set[str] = set()
        self._facts: list[tuple[asyncio.Future[Any], StepRecord]] = []
        self._listeners: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        last = max((step.order for step in self.steps.values()), default=0)
        self._order = itertools.count(last + 1)
        journal.not_before(max((step.ended or 0.0 for step in self.steps.values()), default=0.0))

    # --- beginning and ending a step --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what ends the workflow function, if something does."""
        if self.ending is not None:
            raise LostOwnership if self.ending.why is Why.LOST else Unwind(self.ending.text)
        if self._cancel_wanted and not self.cancelling:
            self.cancelling = True
            raise WorkflowCancelled(f"workflow {self.id!r} was cancelled")

    def new_step(self, path: str, name: str, digest: str, **fields: Any) -> StepRecord:
        """Return a record for a step that begins now, or goes on after a crash."""
        found = self.steps.get(path)
        if found is not None:
            for field, value in fields.items():
                setattr(found, field, value)
            return found
        made = StepRecord(
            path=path, name=name, hash=digest, began=time.time(), order=next(self._order), **fields
        )
        self.steps[path] = made
        return made

    def begin(self, step: StepRecord) -> None:
        """Count a step as running: a stop waits for it."""
        with self._lock:
            self._active[step.path] = step

    def finish(self, step: StepRecord) -> None:
        """Count it no longer."""
        with self._lock:
            self._active.pop(step.path, None)
            self._noted.discard(step.path)
            idle = not self._active
        if idle and self.ending is not None and self.unwind is not None:
            self.unwind()

    def end(self, ending: Ending) -> None:
        """Let no further step begin; running ones are waited for, then the function is unwound."""
        with self._lock:
            if self.ending is None:
                self.ending = ending
            idle = not self._active
        if idle and self.unwind is not None:
            self.unwind()

    def cancel(self) -> bool:
        """Want it cancelled; tell whether that is new."""
        new, self._cancel_wanted = not self._cancel_wanted, True
        return new

    @property
    def active(self) -> list[StepRecord]:
        """Steps that run just now, the oldest first."""
        with self._lock:
            return list(self._active.values())

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, step: StepRecord) -> None:
        """Record a step, durably.

        Raises:
            LostOwnership: The workflow belongs to somebody else.
            Unwind: It could not be written.
        """
        if self.cancelling:
            return
        try:
            answer = self._journal.write(self._put(step))
        except JournalError as error:
            self._unwritten(error)
        self.owned(answer)

    async def awrite(self, step: StepRecord) -> None:
        """Record a step, durably, without blocking the event loop.

        Raises:
            LostOwnership: The workflow belongs to somebody else.
            Unwind: It could not be written.
        """
        if self.cancelling:
            return
        try:
            answer = await self._journal.awrite(self._put(step), self)
        except JournalError as error:
            self._unwritten(error)
        self.owned(answer)

    def write_soon(self, step: StepRecord) -> None:
        """Record a fact: on an event loop without waiting; no activity begins before it is durable.

        Raises:
            LostOwnership: The workflow belongs to somebody else.
            Unwind: It could not be written.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.write(step)
        else:
            self._facts.append((self._journal.submit(self._put(step)), step))

    async def asettle(self) -> None:
        """Wait until all facts are durable; errors as for `write`."""
        while self._facts:
            told, _ = self._facts[0]
            try:
                answer = await asyncio.shield(told)  # several branches may wait for it
            except JournalError as error:
                self._unwritten(error)
            self._facts = [fact for fact in self._facts if fact[0] is not told]
            self.owned(answer)

    def settle(self) -> None:
        """Have all facts durable now; errors as for `write`."""
        if self._facts:
            facts, self._facts = self._facts, []
            self.write_all([step for _, step in facts])

    def write_all(self, steps: Sequence[StepRecord]) -> None:
        """Record steps, all of them in one transaction.

        Raises:
            LostOwnership: The workflow belongs to somebody else.
            Unwind: They could not be written.
        """
        if self.cancelling:
            return
        try:
            answers = self._journal.write_all([self._put(step) for step in steps])
        except JournalError as error:
            self._unwritten(error)
        self.owned(all(answers))

    async def turn(self, step: StepRecord) -> None:
        """Wait until it is a recorded step's turn to give its outcome."""
        loop = asyncio.get_running_loop()
        told = loop.create_future()

        def tell() -> None:
            if not told.done():
                told.set_result(None)

        turns_of(loop).queue(self, step.ended or 0.0, tell)
        await told

    def take(self, op: Take) -> str | None:
        """Record a waiting step, with a signal's value if one is there, and return that.

        Raises:
            LostOwnership: The workflow belongs to somebody else.
            Unwind: It could not be written.
        """
        try:
            answer = self._journal.write(op)
        except JournalError as error:
            self._unwritten(error)
        self.owned(answer)
        return cast("str | None", answer)

    async def atake(self, op: Take) -> str | None:
        """Do the same without blocking the event loop."""
        try:
            answer = await self._journal.awrite(op, self)
        except JournalError as error:
            self._unwritten(error)
        self.owned(answer)
        return cast("str | None", answer)

    def listen(self, name: str) -> asyncio.Event:
        """Return an event of the running loop that is set when a signal of that name has come."""
        told = asyncio.Event()
        with self._lock:
            self._listeners.setdefault(name, []).append((asyncio.get_running_loop(), told))
        return told

    def unlisten(self, name: str, told: asyncio.Event) -> None:
        """Set it no longer."""
        with self._lock:
            self._listeners[name] = [pair for pair in self._listeners[name] if pair[1] is not told]

    def signalled(self, name: str) -> None:
        """Tell those who wait for a signal that one has come."""
        with self._lock:
            listeners = list(self._listeners.get(name, ()))
        for loop, told in listeners:
            loop.call_soon_threadsafe(told.set)

    @property
    def listening(self) -> bool:
        """Whether anybody waits for a signal."""
        return any(self._listeners.values())

    def _unwritten(self, error: JournalError) -> NoReturn:
        """End the run: a step that is not recorded must not be followed by another one."""
        self.end(Ending(Why.JOURNAL, str(error)))
        raise Unwind(str(error)) from error

    def post(self, op: Op) -> None:
        """Leave something to be written some time soon."""
        if not self.cancelling:
            self._journal.post(op)

    def post_step(self, step: StepRecord) -> None:
        """Leave a step to be written some time soon: what it is doing, not what came of it."""
        self.post(self._put(step))

    def note_long(self, since: float) -> None:
        """Write down the steps that have been running since before, so that others can see them."""
        for step in self.active:
            if step.began < since and step.path not in self._noted:
                self._noted.add(step.path)
                # A map has no place of its own: its items are the steps.
                if step.state is StepState.STARTED and step.order:
                    self.post_step(step)

    def owned(self, answer: object) -> None:
        """Go on only if a fenced write went through.

        Raises:
            LostOwnership: It did not.
        """
        if answer is False:
            self.end(Ending(Why.LOST))
            raise LostOwnership(self.id)

    def _put(self, step: StepRecord) -> PutStep:
        record = self.record
        assert record.owner is not None  # noqa: S101 - a run belongs to somebody
        return PutStep(self.id, record.owner, record.epoch, _copy(step))


def _copy(step: StepRecord) -> StepRecord:
    """What is queued for writing must not change meanwhile."""
    from copy import copy

    return copy(step)
