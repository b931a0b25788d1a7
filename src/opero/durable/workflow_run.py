# this_file: src/opero/durable/workflow_run.py
"""Hold the state of one run of a workflow, from its start or last crash to its end or next pause."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn
from weakref import WeakSet

from opero.durable.journal import Journal, order_of
from opero.durable.records import (
    RECORDED,
    Move,
    Op,
    PutStep,
    State,
    StepRecord,
    StepState,
    WorkflowRecord,
)
from opero.durable.values import (
    decode,
    encode,
    keepable,
    message_of,
    pack_error,
    rebuild_error,
    unpack_error,
)
from opero.errors import (
    ActivityError,
    DurableError,
    JournalError,
    NonDeterminismError,
    OperoUsageError,
    UnserializableError,
    WorkflowEndedError,
)
from opero.events.bus import event_bus
from opero.utils.ambient import running_loop
from opero.utils.waiters import TaskWaiter

_FAILURES: Final = 100
"""Errors of steps that are remembered, to find the one that ends the workflow."""


class Unwind(BaseException):
    """Ends a workflow function that goes on later, or elsewhere; no `except Exception` stops it."""


class WorkflowCancelled(BaseException):
    """Raised at the next step of a synchronous workflow that was cancelled."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a run before its function has returned.

    Attributes:
        state: What the workflow becomes; None if nothing that this run does counts any more: it belongs
            to another engine, or its journal cannot be written.
        text: The reason, for people.
        wake: Wall-clock seconds at which it goes on, None if no time decides it.
        latest: The same on the monotonic clock, in case the wall clock was wrong.
        stranded: Whether the journal cannot be written.
    """

    state: State | None
    text: str | None = None
    wake: float | None = None
    latest: float | None = None
    stranded: bool = False


class WorkflowRun:
    """The state of a workflow while it runs in this process.

    Args:
        record: The workflow.
        steps: Its journal.
        journal: Where steps are written.
        on_loop: Whether it is a coroutine on an engine's event loop.

    Attributes:
        id: The workflow's id.
        record: The workflow.
        ownership: With which each of its writes begins.
        on_loop: Whether it is a coroutine on an engine's event loop.
        steps: Its steps by path.
        unread: Paths of steps whose recorded outcome the workflow has not asked for yet.
        ending: Set once no further step may begin.
        over: Whether the workflow function and its tasks have ended.
        cancelling: Whether the workflow function has received its cancellation; from then on nothing is journaled.
        progressed: Whether a step was recorded since the workflow was acquired.
        failed: The last errors of steps that were raised in the workflow, and the steps' paths.
        tasks: Tasks that a coroutine has made.
        unwind: Ends the workflow function from outside; set by the engine for coroutines.
    """

    def __init__(
        self,
        record: WorkflowRecord,
        steps: Iterable[StepRecord],
        journal: Journal,
        *,
        on_loop: bool,
    ) -> None:
        self.id: str = record.id
        self.record: WorkflowRecord = record
        self.ownership: tuple[str, str, int] = record.ownership
        self.on_loop: bool = on_loop
        self.steps: dict[str, StepRecord] = {step.path: step for step in steps}
        self.unread: set[str] = set(self.steps)
        self.ending: Ending | None = None
        self.over: bool = False
        self.cancelling: bool = False
        self.progressed: bool = False
        self.failed: deque[tuple[Exception, str]] = deque(maxlen=_FAILURES)
        self.unwind: Callable[[], object] | None = None
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._cancel_requested = record.cancel
        self._journal = journal
        self._lock = threading.Lock()
        self._active: dict[str, StepRecord] = {}
        self._noted: set[str] = set()
        self._facts: list[tuple[asyncio.Future[Any], StepRecord]] = []
        self._listeners: dict[asyncio.Event, tuple[str, asyncio.AbstractEventLoop]] = {}
        last = max((step.order for step in self.steps.values()), default=0)
        self._order = itertools.count(last + 1)
        journal.not_before(max((step.ended or 0.0 for step in self.steps.values()), default=0.0))

    # --- beginning and ending a step --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what ends the workflow function, if something does; anything else may not begin a step any more."""
        if self.over:
            self.refuse_late_call()
        if self.ending is not None:
            raise Unwind(self.ending.text)
        if self._cancel_requested and not self.cancelling:
            self.cancelling = True
            raise WorkflowCancelled(f"workflow {self.id!r} was cancelled")

    def refuse_late_call(self) -> None:
        """Raise if the workflow is over: what a thread still does in its context would not be recorded."""
        if self.over:
            raise OperoUsageError(
                f"workflow {self.id!r} has ended, so that what one of its threads calls now would not be recorded: "
                "wait for the thread in the workflow."
            )

    def find(
        self, path: str, name: str, digest: str, matches: Callable[[str], bool] | None = None
    ) -> StepRecord | None:
        """Return what the journal has at the place of a call, None if it has nothing.

        Args:
            path: The place.
            name: What the program calls.
            digest: Digest of the arguments it calls it with.
            matches: Returns whether another digest is that of the same call, spelled differently.

        Raises:
            NonDeterminismError: The journal has something else there; the run is blocked.
        """
        found = self.steps.get(path)
        if found is None:
            return None
        if found.name != name or (
            found.hash != digest and not (matches is not None and matches(found.hash))
        ):
            recorded, called = _shown(found.name, found.hash), _shown(name, digest)
            error = NonDeterminismError(self.id, path, recorded, called)
            self.block(str(error))
            raise error
        self.unread.discard(path)
        return found

    def outcome(self, step: StepRecord) -> Any:
        """Return the recorded result of a step, or its error.

        Raises:
            Unwind: It cannot be rebuilt; the run is blocked.
        """
        text = step.value or "null"
        try:
            if step.state is StepState.DONE:
                return decode(text)
            return self.note_failure(rebuild_error(text), step)
        except UnserializableError as reason:
            raise self.block(f"step {step.path}, {step.name}: {reason}") from reason

    def note_failure(self, error: Exception, step: StepRecord) -> Exception:
        """Remember whose error it is, in case it ends the workflow, and return it."""
        self.failed.append((error, step.path))
        return error

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
        """Stop counting a step as running."""
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

    def block(self, reason: str) -> Unwind:
        """End the run as blocked, its journal untouched, and return what unwinds the workflow function."""
        self.end(Ending(State.BLOCKED, reason))
        return Unwind(reason)

    def cancel(self) -> bool:
        """Request its cancellation; return whether that is new."""
        new, self._cancel_requested = not self._cancel_requested, True
        return new

    @property
    def active(self) -> list[StepRecord]:
        """Steps that are running, the oldest first."""
        with self._lock:
            return list(self._active.values())

    def unread_steps(self) -> list[StepRecord]:
        """Return the recorded steps that the workflow has not asked for; parts of a recorded item count with it."""
        return [
            step
            for path in self.unread
            if (step := self.steps[path]).state in RECORDED
            and not any(parent in self.steps for parent in _parents(path))
        ]

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, step: StepRecord) -> None:
        """Record a step, durably; raises as `apply` does."""
        if not self.cancelling:
            self.apply(self._put(step))
            self.progressed = True

    async def awrite(self, step: StepRecord) -> None:
        """Record a step, durably, without blocking the event loop; raises as `apply` does."""
        if not self.cancelling:
            await self.aapply(self._put(step))
            self.progressed = True

    def apply(self, op: Op) -> Any:
        """Write, durably, and return the answer.

        Raises:
            Unwind: The workflow belongs to another engine, or it could not be written.
        """
        try:
            return self._verify(self._journal.write(op))
        except JournalError as error:
            self._strand(error)

    async def aapply(self, op: Op) -> Any:
        """Do what `apply` does without blocking the event loop."""
        try:
            return self._verify(await self._journal.submit(op, self))
        except JournalError as error:
            self._strand(error)

    def write_soon(self, step: StepRecord) -> None:
        """Record a fact: on an event loop without waiting; no activity begins before it is durable.

        Raises as `apply` does.
        """
        if running_loop() is None:
            self.write(step)
        else:
            self._facts.append((self._journal.submit(self._put(step)), step))

    async def asettle(self) -> None:
        """Wait until all facts are durable; raises as `apply` does."""
        while self._facts:
            written, _ = self._facts[0]
            try:
                answer = await asyncio.shield(written)  # several branches may wait for it
            except JournalError as error:
                self._strand(error)
            self._facts = [fact for fact in self._facts if fact[0] is not written]
            self._verify(answer)

    def settle(self) -> None:
        """Make all facts durable now; raises as `apply` does."""
        if self._facts:
            facts, self._facts = self._facts, []
            self.write_all([step for _, step in facts])

    def write_all(self, steps: Sequence[StepRecord]) -> None:
        """Record steps, all of them in one transaction; raises as `apply` does."""
        if self.cancelling:
            return
        try:
            self._verify(all(self._journal.write_all([self._put(step) for step in steps])))
        except JournalError as error:
            self._strand(error)
        self.progressed = True

    def in_order(self, step: StepRecord) -> Coroutine[Any, Any, bool]:
        """Return what is to be awaited until a recorded step's outcome is the next in replay order."""
        waiter = TaskWaiter()
        order_of(asyncio.get_running_loop()).queue(self, step.ended or 0.0, waiter.wake)
        return waiter.wait()

    def post(self, op: Op) -> None:
        """Queue a write that nothing waits for."""
        if not self.cancelling:
            self._journal.post(op)

    def note_long(self, since: float) -> None:
        """Write down the steps that have been running since before, so that other processes can see them."""
        for step in self.active:
            if step.began < since and step.path not in self._noted:
                self._noted.add(step.path)
                # A map has no place of its own: its items are the steps.
                if step.state is StepState.STARTED and step.order:
                    self.post(self._put(replace(step)))

    def _verify(self, answer: Any) -> Any:
        """Return the answer of a write; end the run if the workflow belongs to another engine."""
        if answer is False:
            self.end(Ending(None))
            raise Unwind(self.id)
        return answer

    def _strand(self, error: JournalError) -> NoReturn:
        """End the run: a step that is not recorded must not be followed by another one."""
        self.end(Ending(None, str(error), stranded=True))
        raise Unwind(str(error)) from error

    def _put(self, step: StepRecord) -> PutStep:
        return PutStep(*self.ownership, step)

    # --- signals ----------------------------------------------------------------------------------------------------

    def listen(self, name: str) -> asyncio.Event:
        """Return an event of the running loop that is set when a signal of that name has come."""
        arrived = asyncio.Event()
        self._listeners[arrived] = name, asyncio.get_running_loop()
        return arrived

    def unlisten(self, arrived: asyncio.Event) -> None:
        """Stop setting it."""
        del self._listeners[arrived]

    def signalled(self, name: str) -> None:
        """Wake what waits for a signal of that name."""
        for arrived, (wanted, loop) in self._listeners.copy().items():
            if wanted == name:
                loop.call_soon_threadsafe(arrived.set)

    @property
    def listening(self) -> bool:
        """Whether a signal is waited for."""
        return bool(self._listeners)

    # --- notifications ----------------------------------------------------------------------------------------------

    def notify_state(
        self, state: State, *, result: Any = None, error: BaseException | None = None
    ) -> None:
        """Notify listeners that the workflow went into another state."""
        if event_bus.subscriptions:
            from opero.events import WorkflowChanged

            record = self.record
            event_bus.emit(
                WorkflowChanged(
                    function=record.name,
                    workflow_id=record.id,
                    state=state,
                    result=result,
                    error=error,
                    seconds=time.time() - record.updated,
                )
            )

    def notify_step(
        self, step: StepRecord, *, replayed: bool = False, error: BaseException | None = None
    ) -> None:
        """Notify listeners that a step has begun or ended, or that its outcome was found in the journal."""
        if event_bus.subscriptions:
            from opero.events import StepChanged

            event_bus.emit(
                StepChanged(
                    function=step.name,
                    workflow_id=self.id,
                    step=step.path,
                    state=step.state,
                    replayed=replayed,
                    error=error,
                    seconds=None if step.ended is None else step.ended - step.began,
                )
            )


def _shown(name: str, digest: str) -> str:
    return f"{name}({digest[:6]})" if digest else name


def _parents(path: str) -> Iterable[str]:
    """Return the paths of the steps that a step may be part of: "4/17" and "4" for "4/17/1"."""
    parts = path.split("/")
    return ("/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))


# --- the end ------------------------------------------------------------------------------------------------------


def finalize(run: WorkflowRun, value: Any, error: BaseException | None) -> Move | None:
    """Return the state of a workflow whose function has ended.

    Args:
        run: Its run.
        value: What the function returned.
        error: What it raised, None if it returned.

    Returns:
        What is to be written; None if it has another owner, or nothing can be written.
    """
    record, ending = run.record, run.ending
    move = Move(*record.ownership, State.DONE)
    over = error is None or isinstance(error, Exception)
    # A function that has come to its end needs no further step, so a stop in the meantime changes nothing.
    if ending is not None and not (over and ending.state is State.QUEUED):
        if ending.state is None:
            return None
        move.state, move.error, move.wake = ending.state, ending.text, ending.wake
        return move
    if run.cancelling and isinstance(error, WorkflowCancelled | asyncio.CancelledError):
        move.state = State.CANCELLED
        return move
    if error is None:
        try:
            move.output = encode(value, f"result of {record.name}()")
        except UnserializableError as refusal:
            error = refusal
        else:
            return move
    failure = (
        keepable(error)
        if isinstance(error, Exception)
        else ActivityError(type(error).__name__, str(error))
    )
    move.state, move.error = State.FAILED, pack_error(failure)
    for raised, path in run.failed:
        if raised is error or raised is failure:
            move.failed_step = path
    return move


def outcome_of(record: WorkflowRecord) -> Any:
    """Return the result of a workflow, or raise what it has ended with."""
    match record.state:
        case State.DONE:
            return decode(record.output or "null")
        case State.FAILED:
            raise unpack_error(record.error or "{}")
        case State.CANCELLED | State.DEAD:
            why = f": {record.error}" if record.error else ""
            raise WorkflowEndedError(f"workflow {record.id!r} is {record.state}{why}")
        case _:
            raise DurableError(
                f"workflow {record.id!r} is {record.state}: {message_of(record.error)}"
            )
