# this_file: src/opero/tasks/task.py
"""Define work: `Task` (one function with its arguments), `Sequence`, `CircuitGroup`; a `TaskRun` is one execution."""

from __future__ import annotations

import functools
import inspect
from asyncio import CancelledError
from asyncio import Task as Carrier
from collections.abc import Callable, Generator, Iterable, Mapping
from contextvars import ContextVar
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal

from opero import events
from opero.core.call import Call
from opero.core.deadline import current_deadline
from opero.errors import OperoUsageError
from opero.events.bus import Emitter, event_bus
from opero.tasks.callee import callee_of, with_policies
from opero.utils import ambient
from opero.utils.ambient import Run, require_loop
from opero.utils.async_utils import call_in_thread, run_async
from opero.utils.checks import has, must_be, none_or, one_of, text_or_none
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from opero.events import Event
    from opero.limits.breaker import CircuitBreaker
    from opero.limits.breaker_state import CircuitState
    from opero.tasks.callee import Callee
    from opero.utils.units import Duration


# --- runs ----------------------------------------------------------------------------------------


class TaskState(StrEnum):
    """State of a run of a task.

    Attributes:
        PENDING: Not started.
        RUNNING: Started and not ended.
        SUCCEEDED: Returned.
        FAILED: Raised.
        RETRYING: An attempt has failed and another one follows.
        CANCELLED: Cancelled.
    """

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRYING = "retrying"
    CANCELLED = "cancelled"


NOTHING: Final[Any] = object()
"""Stands for a value that was not given; None may be one."""


class TaskRun(Run):
    """One execution of a task, or of a composition of tasks. `start()` returns one; it may be awaited.

    Attributes:
        task: The definition.
        id: Its id, on its events too.
        parent_id: Id of the run that it is part of.
        state: Its state.
        attempt: Number of the attempt, from 1.
        started, ended: Readings of a monotonic clock in seconds; None before.
        result: Return value; None before the end.
        error: The exception that it, or its last attempt, raised; None if there is none.

    Example:
        >>> import asyncio
        >>> from opero.tasks import Task
        >>> async def main():
        ...     run = Task(str.upper, "tea").start()
        ...     print(run.state.name, await run, run.state.name)
        >>> asyncio.run(main())
        PENDING TEA SUCCEEDED
    """

    __slots__ = (
        "__weakref__", "attempt", "carrier", "ended", "error", "given", "passes", "result", "state", "task"
    )  # fmt: skip

    started: float | None

    def __init__(self, task: Runnable, given: Any = NOTHING) -> None:
        super().__init__(task.name)
        self.task: Final = task
        self.given: Final = given
        self.state: TaskState = TaskState.PENDING
        self.attempt: int = 1
        self.ended: float | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.passes: Any = NOTHING
        self.carrier: Carrier[Any] | None = None

    @property
    def seconds(self) -> float | None:
        """Duration, up to now while it runs; None before it starts."""
        if self.started is None:
            return None
        return (ambient.clock().monotonic() if self.ended is None else self.ended) - self.started

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.ended is not None

    def cancel(self) -> bool:
        """Cancel it, if `start()` started it; return whether that was still possible."""
        return self.carrier is not None and self.carrier.cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the end and return the result. A waiter that is cancelled cancels the run too."""
        if self.carrier is None:
            raise OperoUsageError(f"{self!r} was not started by start(), so it cannot be awaited.")
        return self.carrier.__await__()

    # --- changes of state --------------------------------------------------------------------------

    def begin(self) -> None:
        """Start: it is the current run from now on."""
        self.started = ambient.clock().monotonic()
        self.__enter__()
        self._set_state(TaskState.RUNNING)

    def retries(self, attempt: int, delay: float) -> None:
        """Note that an attempt has failed, with `error`, and another one follows.

        Args:
            attempt: Number of the next one.
            delay: Seconds of pause before it.
        """
        self.attempt = attempt
        self._set_state(TaskState.RETRYING, delay=delay)

    def succeed(self, result: Any) -> None:
        """End with a result."""
        self.result, self.error = result, None
        if self.passes is NOTHING:
            self.passes = result
        self._end(TaskState.SUCCEEDED)

    def fail(self, error: BaseException) -> None:
        """End with an error, a cancellation included."""
        self.error = error
        cancelled = isinstance(error, CancelledError | GeneratorExit)
        self._end(TaskState.CANCELLED if cancelled else TaskState.FAILED)

    def _end(self, state: TaskState) -> None:
        self.ended = ambient.clock().monotonic()
        self._set_state(state)
        self.__exit__(None, None, None)

    def _set_state(self, state: TaskState, **details: Any) -> None:
        self.state = self.task.state = state
        if event_bus.subscriptions:
            from opero.events.types import TaskChanged

            event_bus.emit(
                TaskChanged(
                    function=self.name,
                    module=self.task.module,
                    # Not those of the context: a retry is reported from inside the call's own run.
                    run_id=self.id,
                    parent_id=self.parent_id,
                    task=self.task,
                    state=state,
                    result=self.result,
                    error=self.error,
                    attempt=self.attempt,
                    seconds=self.seconds,
                    details=details,
                )
            )

    def __repr__(self) -> str:
        seconds = self.seconds
        took = (
            ""
            if seconds is None
            else f" {'after' if self.done else 'for'} {format_seconds(seconds)}"
        )
        return f"<TaskRun {self.id} {self.name} {self.state}{took}>"


async def carry_out(run: TaskRun) -> Any:
    """Execute the definition, keep the run's state, and return or raise what the definition does."""
    run.begin()
    try:
        result = await run.task.execute(run)
    except BaseException as error:
        run.fail(error)
        raise
    else:
        run.succeed(result)
        return result
    finally:
        # The run holds its error: a frame that the error passes through must not hold the run.
        del run


def _note_retry(event: Event) -> None:
    """Note a failed attempt or a retry in the run of the task."""
    run = running_task.get()
    if run is None or run.done:
        return  # a refresh in the background, for example
    if isinstance(event, events.AttemptFailed):
        run.error = event.error
    elif isinstance(event, events.RetryScheduled):
        run.retries(event.attempt, event.delay)


running_task: Final[ContextVar[TaskRun | None]] = ContextVar("opero_task", default=None)
"""The run of the task whose function this context belongs to."""


# --- definitions ----------------------------------------------------------------------------------

_started: Final[set[Carrier[Any]]] = set()
"""Started runs: the event loop itself holds them weakly."""


class Runnable:
    """A definition of work, which may be run any number of times, also at once, and holds no run.

    Attributes:
        name: Shown in events and errors.
        module: Module of its function, where it has one.
        takes_input: Whether it takes a value: in a sequence, the last result.
        state: The latest state of any of its runs. A run's own state is on the `TaskRun`.
    """

    module: str | None = None
    takes_input: bool = False

    def __init__(self, name: str | None, default: str) -> None:
        text_or_none("name", name)
        self.name: str = name or default
        self.state: TaskState = TaskState.PENDING

    async def run(self, value: Any = NOTHING, /) -> Any:
        """Run it and return its result.

        Args:
            value: The input, where it takes one.

        Raises:
            OperoUsageError: There is a value and no function that takes it.
        """
        return await carry_out(self.new_run(value))

    def start(self, value: Any = NOTHING, /) -> TaskRun:
        """Start a run on the event loop and return it at once; it may be awaited, inspected and cancelled.

        Args:
            value: As for `run`.

        Raises:
            OperoUsageError: As for `run`.
        """
        from asyncio import get_running_loop

        require_loop("start a run")
        run = self.new_run(value)
        carrier = get_running_loop().create_task(carry_out(run), name=run.name)
        run.carrier = carrier
        _started.add(carrier)
        carrier.add_done_callback(_started.discard)
        return run

    def new_run(self, value: Any = NOTHING) -> TaskRun:
        """Return a run that has not started."""
        if value is not NOTHING and not self.takes_input:
            raise OperoUsageError(
                f"{self!r} takes no input: its arguments are fixed, or it has no parameter for one. "
                "Call run() without a value."
            )
        return TaskRun(self, value)

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        raise NotImplementedError

    def __or__(self, then: Any) -> Sequence:
        """Return a sequence of this and the next."""
        return _join(self, as_runnable(then))

    def __ror__(self, first: Any) -> Sequence:
        return _join(as_runnable(first), self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def as_runnable(step: Any) -> Runnable:
    """Return a definition: the argument itself, or a task that calls it if it is a function.

    Raises:
        OperoUsageError: It is neither.

    Example:
        >>> as_runnable(len)
        <Task len>
    """
    if isinstance(step, Runnable):
        return step
    if inspect.iscoroutine(step):
        # It will not be awaited, and Python would warn about that as well.
        step.close()
        raise OperoUsageError(
            f"{step.__name__}() was called already, and its coroutine can run only once: "
            f"write Task({step.__name__}, ...) with its arguments."
        )
    if not callable(step):
        raise OperoUsageError(
            f"{type(step).__name__} cannot be a step: give a Task, a Sequence, a Parallel, a CircuitGroup "
            "or a function."
        )
    return Task(step)


class Task(Runnable):
    """A function with its arguments, to be run any number of times.

    A coroutine function is awaited; any other one runs in a thread, with a copy of the context, so that the
    event loop is free. Nothing is cached, retried or limited unless `options` or an `@opero` function say so.

    Args:
        fn: The function.
        args: Its positional arguments. In a sequence, a task without any gets the last result as the first
            one, if the function has a parameter for it that needs a value.
        name: Shown in events and errors; the function's by default.
        options: Options of `@opero` for this task, as a dict; for an `@opero` function those that differ.
        kwargs: Keyword arguments of the function; `functools.partial` takes those called `name` or `options`.

    Raises:
        OperoUsageError: The function cannot be called with these arguments, or an option is wrong.

    Example:
        >>> from opero.tasks import Task, run_sync
        >>> run_sync(Task(sorted, [3, 1, 2], reverse=True))
        [3, 2, 1]
        >>> from opero.testing import flaky
        >>> run_sync(Task(flaky("ok"), options=dict(retries=2, min_delay=0)))
        'ok'
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(fn, Runnable):
            raise OperoUsageError(f"Task({fn!r}): it can run already; use it as it is.")
        callee = callee_of(fn)
        super().__init__(name, callee.name)
        callee.check(args, kwargs)
        self.takes_input: bool = callee.takes_input(args, kwargs)
        self.module: str | None = callee.module
        self._args = args
        self._kwargs = kwargs
        self._call: Callable[..., Awaitable[Any]]
        self._plain: tuple[Callable[..., Any], Callee] | None = None
        if options is not None or hasattr(fn, "__opero__"):
            self._call = with_policies(fn, callee, options, _note_retry)
        else:
            self._call = fn if callee.is_async else functools.partial(call_in_thread, fn)
            self._plain = fn, callee

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        token = running_task.set(run)
        try:
            return await self._execute_with_policies()
        finally:
            try:
                running_task.reset(token)
            except ValueError:
                pass  # it was closed by the garbage collector, in another context than its own
            # The run will hold the error that passes through this frame.
            del run, token

    async def _execute_with_policies(self) -> Any:
        """Call the function through the stages that `options` switch on.

        It may be replaced on a task by a function that calls it, once or more often; the input comes from the
        run that it is called in.
        """
        run = running_task.get()
        try:
            args = self._args
            if run is not None and run.task is self and run.given is not NOTHING:
                args = (run.given,)
            if self._plain is not None and current_deadline() is not None:
                # From now on it is a call that a deadline can cut short.
                self._call, self._plain = with_policies(*self._plain, None, _note_retry), None
            return await self._call(*args, **self._kwargs)
        finally:
            del run  # as above


Returns = Literal["all", "last"]
_returns = one_of("all", "last")
_breaker = none_or(must_be("a CircuitBreaker", has("guard", "acquire"), instance=True))


class Sequence(Runnable):
    """Steps that run one after the other; the first that fails ends the sequence with its own error.

    A step gets the last result as its first argument if it has no positional arguments of its own and its function
    needs one; that is decided here, when the sequence is made. After a nested sequence it gets that one's
    last result, after a `Parallel` the list.

    Args:
        steps: Tasks, sequences, parallels, circuit groups, or functions.
        returns: "all" for the list of results in order, "last" for the last one.
        name: Shown in events and errors; the names of the steps by default.

    Raises:
        OperoUsageError: Something is no step.

    Example:
        >>> from opero.tasks import Sequence, Task, run_sync
        >>> shout = Sequence(Task(str.strip, " tea "), str.upper, name="shout")
        >>> run_sync(shout)
        ['tea', 'TEA']
        >>> run_sync(Sequence(shout, len, returns="last"))
        3
    """

    def __init__(
        self,
        *steps: Runnable | Callable[..., Any],
        returns: Returns = "all",
        name: str | None = None,
    ) -> None:
        _returns("returns", returns)
        made = tuple(as_runnable(step) for step in steps)
        super().__init__(name, _names(made) or type(self).__name__)
        self.steps: tuple[Runnable, ...] = made
        self.returns: Returns = returns
        self.takes_input: bool = made[0].takes_input if made else True
        self._piped = False

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        try:
            results: list[Any] = []
            passed = run.given
            for step in self.steps:
                result, passed = await _one(step, passed if step.takes_input else NOTHING)
                results.append(result)
            run.passes = passed
            if self.returns == "all":
                return results
            return results[-1] if results else None
        finally:
            # The run will hold the error that passes through this frame.
            del run


async def _one(step: Runnable, given: Any) -> tuple[Any, Any]:
    """Run one step; return its result and the input of the next one."""
    run = TaskRun(step, given)
    try:
        return await carry_out(run), run.passes
    finally:
        del run  # as above


def _join(first: Runnable, then: Runnable) -> Sequence:
    """Make a sequence of two; sequences that `|` made are extended instead of nested."""
    made = Sequence(*_parts(first), *_parts(then))
    made._piped = True  # noqa: SLF001 - private to this module
    return made


def _parts(runnable: Runnable) -> Iterable[Runnable]:
    piped = isinstance(runnable, Sequence) and runnable._piped  # noqa: SLF001 - as above
    return runnable.steps if isinstance(runnable, Sequence) and piped else (runnable,)


def _names(steps: tuple[Runnable, ...]) -> str:
    names = [step.name for step in steps]
    if len(names) > 3:
        names[1:-1] = ["…"]
    return " | ".join(names)


class CircuitGroup(Sequence):
    """Steps behind a circuit breaker: after too many failed runs they are not called for a while.

    It runs its steps as a `Sequence` does. A run that fails counts as one failure, and ends with its own error, also
    the one that opens the circuit; while that is open, runs end at once with `CircuitOpenError`. All runs of the
    group share the breaker.

    Args:
        steps: As for `Sequence`.
        fail_max: Runs in a row that may fail; 5 by default.
        reset_timeout: How long the circuit stays open; 30 s by default.
        breaker: A breaker with further rules, maybe shared, instead of these two.
        returns: As for `Sequence`.
        name: Shown in events and errors, the breaker's too; the names of the steps by default.

    Raises:
        OperoUsageError: Something is no step, or a rule is wrong.

    Example:
        >>> from opero.tasks import CircuitGroup, run_sync
        >>> from opero.testing import flaky
        >>> group = CircuitGroup(flaky("ok", failures=9), fail_max=1, reset_timeout="1m", name="shop")
        >>> for _ in range(2):
        ...     try:
        ...         run_sync(group)
        ...     except Exception as error:
        ...         print(type(error).__name__)
        ConnectionError
        CircuitOpenError
        >>> group.breaker.state
        <CircuitState.OPEN: 'open'>
    """

    def __init__(
        self,
        *steps: Runnable | Callable[..., Any],
        fail_max: int | None = None,
        reset_timeout: Duration | None = None,
        breaker: CircuitBreaker | None = None,
        returns: Returns = "all",
        name: str | None = None,
    ) -> None:
        # Loaded here: tasks without a breaker need neither.
        from opero.core.circuit_breaker import Circuit
        from opero.limits.breaker import CircuitBreaker

        super().__init__(*steps, returns=returns, name=name)
        _breaker("breaker", breaker)
        rules: dict[str, Any] = {"fail_max": fail_max, "reset_timeout": reset_timeout}
        rules = {rule: value for rule, value in rules.items() if value is not None}
        if breaker is not None and rules:
            raise OperoUsageError(
                f"{next(iter(rules))}= and breaker= exclude each other: give the rule to the CircuitBreaker."
            )
        self.breaker: CircuitBreaker = (
            CircuitBreaker.unregistered(self.name, **rules) if breaker is None else breaker
        )
        self._guarded = Circuit(self.breaker, Emitter(self.name)).wrap_async(_proceed)

    @property
    def current_state(self) -> CircuitState:
        """State of the circuit: `group.breaker.state`."""
        return self.breaker.state

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        call = Call((self, run), {})
        try:
            return await self._guarded(call)
        finally:
            # The run will hold the error that passes through these frames.
            call.args = ()
            del run


async def _proceed(call: Call) -> Any:
    """Run the steps, behind the breaker."""
    return await Sequence.execute(*call.args)


async def run(what: Runnable | Callable[..., Any], value: Any = NOTHING, /) -> Any:
    """Run a task, or a composition of tasks, and return its result.

    Args:
        what: What to run; a function is run as a task.
        value: The input, where it takes one.

    Example:
        >>> import asyncio
        >>> asyncio.run(run(len, "tea"))
        3
    """
    return await as_runnable(what).run(value)


def run_sync(what: Runnable | Callable[..., Any], value: Any = NOTHING, /) -> Any:
    """Do the same from synchronous code, also where an event loop runs (a notebook), on a loop of its own.

    Args:
        what: As for `run`.
        value: As for `run`.

    Example:
        >>> run_sync(len, "tea")
        3
    """
    return run_async(run(what, value))
