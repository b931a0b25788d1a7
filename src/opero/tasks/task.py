# this_file: src/opero/tasks/task.py
"""Define work: `Task` (one function with its arguments), `Sequence`, `CircuitGroup`, and what they have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from opero.core.call import Call
from opero.errors import OperoUsageError
from opero.events.bus import Emitter
from opero.tasks.callee import callee_of, with_policies
from opero.tasks.state import NOTHING, TaskRun, TaskState, carry_out, running_task
from opero.utils.ambient import require_loop
from opero.utils.async_utils import call_in_thread, run_async
from opero.utils.checks import text_or_none

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable

    from opero.limits.breaker import CircuitBreaker, CircuitState
    from opero.utils.units import Duration

__all__ = [
    "CircuitGroup",
    "Returns",
    "Runnable",
    "Sequence",
    "Task",
    "as_runnable",
    "run",
    "run_sync",
]

_started: Final[set[asyncio.Task[Any]]] = set()
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
        if options is not None or hasattr(fn, "__opero__"):
            self._call = with_policies(fn, callee, options)
        else:
            self._call = fn if callee.is_async else functools.partial(call_in_thread, fn)

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
            return await self._call(*args, **self._kwargs)
        finally:
            del run  # as above


Returns = Literal["all", "last"]


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
        if returns not in ("all", "last"):
            raise OperoUsageError(f'returns={returns!r} must be "all" or "last".')
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
