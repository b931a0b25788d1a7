# this_file: src/opero/durable/step.py
"""Locate a call in its workflow, look it up in the journal, or record its outcome.

The key of a step in the journal is its path. A single counter would give concurrent branches numbers in
the order of their timing. Here every task, and every branch of a parallel group, counts its own steps: "3"
is the third step of the workflow, "c2/1" the first step of the second task that it created, "4/17/1" the
first step of branch 17 of the group that is its fourth step. Groups find this through `opero.utils.ambient`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from opero.concurrency.executors.base import Finished, ItemOutcome
from opero.core.failures import raise_again
from opero.durable.records import RECORDED, State, StepRecord, StepState
from opero.durable.values import Parameters, encode, keepable, pack_error
from opero.durable.workflow_run import Ending, Unwind, WorkflowRun
from opero.errors import OperoUsageError
from opero.utils.fork import run_after_fork

# --- places ---------------------------------------------------------------------------------------------------------

current_scope: Final[contextvars.ContextVar[Scope | None]] = contextvars.ContextVar(
    "opero_durable_scope", default=None
)
"""The scope of this context; None outside workflows, and in activities: what they call is no step."""


class Scope:
    """A line of steps that follow each other; a step is taken within a `with` block of it.

    Args:
        run: The workflow's run.
        prefix: What the paths of its steps begin with.
        of_task: Whether it was made for one task, so that the running task need not be looked up.
    """

    __slots__ = ("_busy", "_children", "_of_task", "_steps", "_tasks", "prefix", "run")

    def __init__(self, run: WorkflowRun, prefix: str = "", *, of_task: bool = False) -> None:
        self.run: WorkflowRun = run
        self.prefix: str = prefix
        self._busy = threading.Lock()
        self._of_task = of_task
        self._steps = 0
        self._children = 0
        self._tasks: WeakKeyDictionary[asyncio.Task[Any], Scope] | None = None

    @property
    def root(self) -> bool:
        """Whether it is the line of the workflow function itself."""
        return not self.prefix

    def next_path(self) -> str:
        """Number the next step."""
        self._steps += 1
        return f"{self.prefix}{self._steps}"

    def child(self) -> Scope:
        """Return the scope of the next task."""
        self._children += 1
        return Scope(self.run, f"{self.prefix}c{self._children}/", of_task=True)

    def branch(self, path: str, index: int) -> Scope:
        """Return the scope of one branch of the group that is the step `path`."""
        return Scope(self.run, f"{path}/{index}/", of_task=True)

    def attempt(self, number: int) -> Scope:
        """Return the scope of another attempt at what is done here."""
        return Scope(self.run, f"{self.prefix}r{number}/", of_task=True)

    def __enter__(self) -> None:
        """Begin a step.

        Raises:
            OperoUsageError: Another one is running on this line.
        """
        if not self._busy.acquire(blocking=False):
            raise OperoUsageError(
                "two steps of a workflow run at once in threads that it made itself, so their order could not be "
                "repeated: use opero.tasks.Parallel, operomap, or tasks of an asynchronous workflow."
            )

    def __exit__(self, *_: object) -> None:
        """End the step."""
        self._busy.release()

    def of_running_task(self) -> Scope:
        """Return the scope of the running task, on a loop that is not an engine's."""
        loop = asyncio._get_running_loop()  # noqa: SLF001 - costs a tenth of the error that `current_task` raises
        task = None if loop is None else asyncio.current_task(loop)
        if task is None:
            return self
        if self._tasks is None:
            self._tasks = WeakKeyDictionary()
        found = self._tasks.get(task)
        if found is None:
            found = self._tasks[task] = self.child()
        return found


def current() -> Scope | None:
    """Return the scope of the caller, None outside workflows."""
    scope = current_scope.get()
    if scope is None or scope._of_task:  # noqa: SLF001 - a matter of this module
        return scope
    return scope.of_running_task()


def task_factory(
    loop: asyncio.AbstractEventLoop,
    coro: Any,
    *,
    context: contextvars.Context | None = None,
    **more: Any,
) -> asyncio.Task[Any]:
    """Make a task with a scope of its own, numbered when it is created, not when it first runs."""
    scope = current_scope.get() if context is None else context.get(current_scope)
    if scope is not None:
        # A context that was given belongs to the caller.
        context = contextvars.copy_context() if context is None else context.copy()
        context.run(current_scope.set, scope.child())
        task = asyncio.Task(coro, loop=loop, context=context, **more)
        scope.run.tasks.add(task)
        return task
    return asyncio.Task(coro, loop=loop, context=context, **more)


class GroupBranches:
    """The branches of one parallel group, known by their numbers.

    Args:
        scope: The line in which the group was begun; None for a group that is no part of a workflow.
        path: Its place there.
    """

    def __init__(self, scope: Scope | None, path: str = "") -> None:
        self._scope = scope
        self._path = path

    def enter(self, index: int) -> None:
        """Make this context the branch of that number."""
        if self._scope is not None:
            current_scope.set(self._scope.branch(self._path, index))

    def aside(self) -> None:
        """Take this context out of the workflow."""
        current_scope.set(None)


def begin_branches() -> GroupBranches:
    """Begin a group; it counts nothing within an activity, and where a cancelled workflow cleans up."""
    scope = current()
    if scope is None or scope.run.cancelling:
        return GroupBranches(None)
    scope.run.check()
    return GroupBranches(scope, scope.next_path())


# --- steps ----------------------------------------------------------------------------------------------------------

running_step: Final[contextvars.ContextVar[Step | None]] = contextvars.ContextVar(
    "opero_durable_step", default=None
)
"""The step whose activity runs in this context, for what its pipeline reports."""


class Step:
    """The next step of a line. A `with` block of it is a call of its activity.

    Args:
        scope: The line.
        name: What is called.
        digest: Of its arguments, "" without.
        idempotent: Whether a call that may have happened may happen again.
        matches: Returns whether another digest is that of the same call, spelled differently.

    Attributes:
        record: What the journal has, or will have.
        recorded: Whether its outcome is in the journal.
        attempt: Number of the attempt to begin with.

    Raises:
        NonDeterminismError: The journal has something else at this place; the run is blocked.
        Unwind: The run is over, or it is unknown whether the step has happened, and it must not happen twice.
    """

    __slots__ = (
        "_outer", "_wake", "attempt", "idempotent", "record", "recorded", "run",
    )  # fmt: skip

    def __init__(
        self,
        scope: Scope,
        name: str,
        digest: str = "",
        *,
        idempotent: bool = True,
        matches: Callable[[str], bool] | None = None,
    ) -> None:
        self.run: WorkflowRun = scope.run
        run = scope.run
        run.check()
        path = scope.next_path()
        self.idempotent: bool = idempotent
        self.recorded: bool = False
        self.attempt: int = 1
        self._wake: float | None = None
        found = run.find(path, name, digest, matches)
        if found is not None and found.state in RECORDED:
            self.recorded = True
            self.record: StepRecord = found
            return
        if found is not None:
            if found.state is StepState.STARTED and not idempotent:
                text = (
                    f"step {path}, {name}, was running when its process died, and must not run twice: "
                    f"find out what happened and call resolve({run.id!r}, {path!r}, ...)"
                )
                run.end(Ending(State.IN_DOUBT, text))
                raise Unwind(text)
            self.attempt, self._wake = found.attempts, found.wake
        self.record = run.new_step(
            path, name, digest, state=StepState.STARTED, attempts=self.attempt
        )

    def __enter__(self) -> None:
        """Begin an activity: what it calls is no step."""
        self.run.begin(self.record)
        self.run.notify_step(self.record)
        self._outer = current_scope.set(None), running_step.set(self)

    def __exit__(self, *_: object) -> None:
        """End the activity."""
        scope, step = self._outer
        running_step.reset(step)
        current_scope.reset(scope)
        self.run.finish(self.record)

    def outcome(self) -> Any:
        """Return or raise what is recorded.

        Raises:
            Exception: The recorded error.
            Unwind: The record cannot be rebuilt; the run is blocked.
        """
        outcome = self.run.outcome(self.record)
        failed = self.record.state is StepState.FAILED
        self.run.notify_step(self.record, replayed=True, error=outcome if failed else None)
        if failed:
            raise_again(outcome)
        return outcome

    def pause(self) -> float:
        """Return the seconds that are left, by the wall clock, of the pause in which its process died."""
        return 0.0 if self._wake is None else max(0.0, self._wake - time.time())

    def wait_until(self, wake: float | None) -> None:
        """Make it a step that waits, until a time; one that was waiting before a crash keeps its time."""
        self.record.wake = wake if self._wake is None else self._wake
        self.record.state = StepState.PENDING

    def succeeded(self, value: object) -> None:
        """Take the result; it still has to be written.

        Raises:
            UnserializableError: The journal cannot keep it.
        """
        self._end(StepState.DONE, encode(value, f"result of {self.record.name}()"), None)

    def failed(self, error: Exception) -> Exception:
        """Take an error, which still has to be written, and return what the workflow gets."""
        error = keepable(error)
        self._end(StepState.FAILED, pack_error(error), error)
        return self.run.note_failure(error, self.record)

    def retries(self, attempt: int, delay: float) -> None:
        """Record, before it begins, that another attempt follows: a crash must not give it back."""
        self.record.attempts = attempt
        if self.idempotent:
            self.record.state = StepState.RETRYING
            self.record.wake = time.time() + delay
        self.run.write(self.record)

    def _end(self, state: StepState, text: str, error: Exception | None) -> None:
        record = self.record
        record.state, record.value = state, text
        record.wake, record.ended = None, time.time()
        self.run.notify_step(record, error=error)


# --- items of maps --------------------------------------------------------------------------------------------------

# A map takes one number of the line in which it is called; "4/17" is its item 17, and steps that the mapped function
# takes for it are "4/17/1" and so on. Maps find this through `recording` in `opero.concurrency.executors.base`.

_SIGNATURE: Final = inspect.signature(lambda item: item)


class ItemJournal:
    """The items of one map in a workflow's journal.

    Args:
        scope: The line in which the map was called.
        path: The map's place there.
        name: The mapped function.
    """

    def __init__(self, scope: Scope, path: str, name: str) -> None:
        self._scope = scope
        self._run = scope.run
        self._path = path
        self._name = name
        self._item = Parameters(_SIGNATURE, f"{name}()")
        self._attempts: dict[int, int] = {}
        # A stop waits for the items that are running.
        self._map = StepRecord(
            path=path, name=name, hash="", state=StepState.STARTED, began=time.time()
        )
        self._run.begin(self._map)

    def enter(self, index: int, item: Any, /) -> None:
        """Give an attempt at an item a line of steps of its own."""
        del item
        attempt = self._attempts[index] = self._attempts.get(index, 0) + 1
        scope = self._scope.branch(self._path, index)
        # The steps of the first attempt are recorded with their errors; the second takes them anew.
        current_scope.set(scope if attempt == 1 else scope.attempt(attempt))

    def find_known(self, idx: Sequence[int], items: Sequence[Any], /) -> Mapping[int, ItemOutcome]:
        """Return what is recorded of these items.

        Raises:
            NonDeterminismError: The journal has other items; the workflow is blocked.
            Unwind: The workflow is being put aside, so that no further item may begin, or an outcome cannot be
            rebuilt.
        """
        run, known = self._run, {}
        run.check()
        for index, item in zip(idx, items, strict=True):
            path = f"{self._path}/{index}"
            if path not in run.steps:
                continue
            found = run.find(path, self._name, self._digest(item))
            if found is not None and found.state in RECORDED:
                outcome, done = run.outcome(found), found.state is StepState.DONE
                value, error = (outcome, None) if done else (None, outcome)
                known[index] = ItemOutcome(value=value, error=error, attempts=0, calls=0)
        return known

    def keep(self, finished: Sequence[Finished], /) -> None:
        """Record what became of items, all of them in one transaction.

        Raises:
            UnserializableError: The journal cannot keep a result, or compare an item.
            Unwind: They are not recorded, or the workflow is being put aside.
        """
        run = self._run
        run.write_all([self._step(*one) for one in finished])
        run.check()

    def close(self) -> None:
        """Stop counting the map as running."""
        self._run.finish(self._map)

    def _step(self, index: int, item: Any, outcome: ItemOutcome) -> StepRecord:
        now = time.time()
        step = self._run.new_step(
            f"{self._path}/{index}",
            self._name,
            self._digest(item),
            state=StepState.DONE,
            attempts=max(1, outcome.attempts),
            ended=now,
        )
        if isinstance(outcome.error, Exception):
            # The first run gets the type that a replay will get.
            outcome.error = self._run.note_failure(keepable(outcome.error), step)
            step.state, step.value = StepState.FAILED, pack_error(outcome.error)
        else:
            step.value = encode(outcome.value, f"result of {self._name}() for item {index}")
        return step

    def _digest(self, item: Any) -> str:
        return self._item.digest((item,), {})


def record_map(name: str) -> ItemJournal | None:
    """Begin to record a map; None outside workflows, and where a cancelled one cleans up."""
    scope = current()
    if scope is None or scope.run.cancelling:
        return None
    scope.run.check()
    return ItemJournal(scope, scope.next_path(), name)


# --- threads ------------------------------------------------------------------------------------------------------

active_runs: Final[set[WorkflowRun]] = set()
"""Runs whose workflow function is being executed in this process."""


class _MadeInWorkflow(int):
    """A true value of `Thread.daemon` that marks threads which a workflow function has made."""


class EngineThread(threading.Thread):
    """A daemon thread of an engine, which recognises the threads that workflow functions make in it.

    New threads take `daemon` from the thread that makes them, unless it is given. In a workflow
    function it has a value of its own, which is inherited by the threads of those threads too.
    """

    @property
    def daemon(self) -> bool:
        """Whether the program may end while the thread runs: always, but see the class."""
        return True if current_scope.get() is None else cast("bool", _MadeInWorkflow(True))

    @daemon.setter
    def daemon(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise RuntimeError("threads of an engine are daemons")


def is_unknown_thread() -> bool:
    """Return whether a workflow function has made this thread, or may have: `threading` does not know it."""
    thread = threading.current_thread()
    made = isinstance(thread.daemon, _MadeInWorkflow)
    return made or (bool(active_runs) and type(thread).__name__ == "_DummyThread")


# A child is no part of the workflow that it was forked in.
@run_after_fork
def _leave_workflow() -> None:
    current_scope.set(None)
    active_runs.clear()
