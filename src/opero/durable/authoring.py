# this_file: src/opero/durable/authoring.py
"""Write workflows: decorate them and their activities, and record what they take from outside.

An engine runs a workflow until it ends. The results of its activities are recorded, and so are time, chance, ids,
pauses and signals, so that a replay sees the same. Outside a workflow each of them is the plain thing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import inspect
import math
import random as chance
import threading
import time
import uuid as ids
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload
from weakref import WeakValueDictionary

from opero.core.call import Call
from opero.core.decorate import decorate
from opero.core.options import Options
from opero.durable.records import Move, State, StepRecord, StepState, Take
from opero.durable.step import Scope, Step, current, is_unknown_thread, running_step
from opero.durable.values import Parameters
from opero.durable.workflow_run import Ending
from opero.errors import OperoUsageError, UnknownWorkflowError, did_you_mean
from opero.utils import ambient
from opero.utils.ambient import running_loop
from opero.utils.async_utils import is_async_function
from opero.utils.checks import text_or_none
from opero.utils.steps import BlockingStep, StepLogic, run_async, run_sync
from opero.utils.units import Duration, parse_seconds

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline
    from opero.events import Event


F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_GLANCE: Final = 5.0
"""Longest wait on the monotonic clock before the wall clock is read again: it may have been wrong."""


# --- the registry -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class WorkflowSpec:
    """A registered workflow.

    Attributes:
        name: Its name.
        version: Its version, None without.
        fn: The function.
        is_async: Whether it is a coroutine function.
        parameters: Its signature.
    """

    name: str
    version: str | None
    fn: Callable[..., Any]
    is_async: bool
    parameters: Parameters


class WorkflowRegistry:
    """The workflows and activities of a process by name; tests may clear both.

    A workflow that is defined again (a notebook's cell that runs twice, a reloaded module) replaces the
    old one; another one of the same name is an error.

    Attributes:
        workflows: The versions of each workflow, the youngest last.
        activities: The activities that are in use; it keeps none alive.
    """

    def __init__(self) -> None:
        self.workflows: dict[str, dict[str | None, WorkflowSpec]] = {}
        self.activities: MutableMapping[str, Callable[..., Any]] = WeakValueDictionary()
        self._lock = threading.Lock()

    def add(self, spec: WorkflowSpec) -> None:
        """Register a workflow.

        Raises:
            OperoUsageError: Another function has the name.
        """
        with self._lock:
            versions = self.workflows.setdefault(spec.name, {})
            old = versions.get(spec.version)
            if old is not None and _place(old.fn) != _place(spec.fn):
                raise OperoUsageError(
                    f"@workflow({spec.name!r}) stands for {_place(old.fn)} and {_place(spec.fn)}: "
                    "give one of them another name."
                )
            # The youngest comes last: it is what is started from now on.
            versions.pop(spec.version, None)
            versions[spec.version] = spec

    def find(self, name: str, version: str | None) -> WorkflowSpec | None:
        """Return that version of a workflow, for a run without one the youngest; None if there is none."""
        versions = self.workflows.get(name, {})
        youngest = next(reversed(versions.values()), None) if version is None else None
        return versions.get(version, youngest)

    def latest(self, name: str) -> WorkflowSpec:
        """Return the youngest version of a workflow.

        Raises:
            UnknownWorkflowError: There is none.
        """
        for spec in reversed(self.workflows.get(name, {}).values()):
            return spec
        raise UnknownWorkflowError(
            f"no workflow {name!r} is registered.{did_you_mean(name, self.workflows)} "
            "Import the module that defines it."
        )

    def names(self, *, is_async: bool) -> tuple[str, ...]:
        """Return the names of the workflows whose youngest versions are coroutine functions, or are none."""
        latest = [spec for one in self.workflows.copy().values() for spec in [*one.values()][-1:]]
        return tuple(spec.name for spec in latest if spec.is_async is is_async)


def _place(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


_registry: Final = WorkflowRegistry()


def get_registry() -> WorkflowRegistry:
    """Return the workflows and activities of this process."""
    return _registry


# --- the decorators -----------------------------------------------------------------------------------------------


def _declare(by: str, first: Any, name: str | None, make: Callable[[Any, str | None], Any]) -> Any:
    """Return what a decorator returns that is used bare, with parentheses or with a name."""
    if isinstance(first, str):
        name, first = first, None
    text_or_none("name", name)
    if first is None:
        return lambda fn: make(fn, name)
    if not callable(first):
        raise OperoUsageError(f"{by}({first!r}): give a name or a function.")
    return make(first, name)


@overload
def workflow(fn: F, /) -> F: ...
@overload
def workflow(
    first: str | None = None, /, *, name: str | None = None, version: str | int | None = None
) -> Callable[[F], F]: ...
def workflow(
    first: Any = None, /, *, name: str | None = None, version: str | int | None = None
) -> Any:
    """Make a function a workflow: `@workflow`, `@workflow()` or `@workflow("name", version=…)`.

    The function itself stays as it is: called directly, it is a plain call. Started through an
    `Orchestrator`, it is run from the top after a crash, while the steps that are recorded return
    at once. So what it does between its activities must come out the same each time: take the
    time, chance and ids from `opero.durable.now`, `random` and `uuid`.

    Args:
        first: The name under which it is started, or the function.
        name: The same as a keyword. Default: the function's own.
        version: Runs are finished by the version that started them; new ones take the version
            defined last. None: runs go on with the present code, and a difference is found at the step
            where it shows.

    Raises:
        OperoUsageError: The name is taken, or the function cannot be a workflow.

    Example:
        >>> @workflow("greeting")
        ... def greet(name: str) -> str:
        ...     return f"Hello, {name}"
        >>> greet("Ada")
        'Hello, Ada'
    """
    text = None if version is None else str(version)
    return _declare("workflow", first, name, functools.partial(_make_workflow, text))


def _make_workflow(version: str | None, fn: Any, name: str | None) -> Any:
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise OperoUsageError(
            f"workflow {fn.__name__}() is a generator: return its result instead."
        )
    name = name or fn.__name__
    signature = inspect.signature(fn)
    taken = signature.parameters.get("workflow_id")
    if taken is not None and taken.kind in (taken.POSITIONAL_OR_KEYWORD, taken.KEYWORD_ONLY):
        raise OperoUsageError(
            f"workflow {name!r} has a parameter 'workflow_id', which invoke_workflow() takes for the id of "
            "the run: give the parameter another name, or make it positional-only (put a / behind it) and "
            "pass it by position."
        )
    parameters = Parameters(signature, f"workflow {name}()")
    _registry.add(WorkflowSpec(str(name), version, fn, is_async_function(fn), parameters))
    return fn


@overload
def activity(fn: F, /) -> F: ...
@overload
def activity(
    first: str | None = None, /, *, name: str | None = None, idempotent: bool = True, **options: Any
) -> Callable[[F], F]: ...
def activity(
    first: Any = None, /, *, name: str | None = None, idempotent: bool = True, **options: Any
) -> Any:
    """Make a function a step of workflows: `@activity`, `@activity()` or `@activity("name", …)`.

    Within a workflow each call is a step: its outcome is recorded, and when the workflow is run
    again after a crash, the record is returned instead of calling the function. It runs at least
    once; a recorded result is never computed again. Outside workflows it is a plain call.

    Args:
        first: The name under which it is recorded, or the function.
        name: The same as a keyword. Default: the function's own.
        idempotent: Whether it may be called again if it is unknown, after a crash, how far a call
            got. With False the workflow waits ("in doubt") until `Orchestrator.resolve` decides.
        options: opero's options for its calls (`retries`, `timeout`, `rate_limit`, …), all off
            unless given. Results are recorded, so there is no cache.

    Raises:
        OperoUsageError: An option cannot work.

    Example:
        >>> @activity("charge", retries=3, timeout=10, idempotent=False)
        ... def charge(customer: str, cents: int) -> str:
        ...     return f"receipt of {customer}"
        >>> charge("ada", 500)
        'receipt of ada'
    """
    return _declare("activity", first, name, functools.partial(_make_activity, idempotent, options))


def _make_activity(idempotent: bool, given: dict[str, Any], fn: Any, name: str | None) -> Any:
    cached = sorted(option for option in given if option.startswith("cache"))
    if cached:
        raise OperoUsageError(
            f"activity() takes no {cached[0]}: results of activities are recorded, never cached."
        )
    options = Options.of("activity", **{"cache": False, "retries": 0, **given})
    if options.retries or options.stop is not None:
        # A listener costs each call something, and only retries are recorded.
        options = options.replace("activity", on_event=(*options.listeners, _record_retry))
    plain = decorate(fn, options, by="activity")
    pipeline: Pipeline = plain.__opero__
    info = pipeline.info
    if info.kind in ("generator", "async_generator"):
        raise OperoUsageError(f"activity {info.name}() is a generator: return a list instead.")
    made = _recorded(plain, pipeline, name or info.name, idempotent)
    _registry.activities[name or info.name] = made
    return made


def _check_plain_call(name: str, scope: Scope | None) -> None:
    """Refuse a call that belongs to a workflow, and would not be recorded.

    Raises:
        OperoUsageError: A workflow function has made this thread, or may have made it, or has ended.
    """
    if scope is not None:
        scope.run.refuse_late_call()
    elif running_step.get() is None and is_unknown_thread():
        raise OperoUsageError(
            f"activity {name}() was called in a thread that a workflow has made itself. There it would not be "
            "recorded, and run again in each replay: call it in the workflow's own thread, in branches of "
            "opero.tasks.Parallel, in a function under operomap, or with asyncio.gather or asyncio.to_thread."
        )


def _record_retry(event: Event) -> None:
    step = running_step.get()
    if step is not None and type(event).__name__ == "RetryScheduled":
        scheduled: Any = event
        step.retries(scheduled.attempt, scheduled.delay)


# --- a call within a workflow -------------------------------------------------------------------------------------


def _recorded(plain: Any, pipeline: Pipeline, name: str, idempotent: bool) -> Any:
    """Return the function of an activity, whose calls within a workflow are its steps, and plain calls elsewhere.

    Args:
        plain: The function with its options.
        pipeline: What calls it.
        name: Under which it is recorded.
        idempotent: Whether a call that may have happened may happen again.
    """
    parameters = Parameters(pipeline.info.declared, f"activity {name}()")

    def next_step(scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        digest = parameters.digest(args, kwargs)
        matches = functools.partial(parameters.matches, args=args, kwargs=kwargs)
        return Step(scope, name, digest, idempotent=idempotent, matches=matches)

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is None or scope.run.cancelling:
            _check_plain_call(name, scope)
            return pipeline.run(Call(args, kwargs))
        with scope:
            step = next_step(scope, args, kwargs)
            if step.recorded:
                return step.outcome()
            step.run.settle()
            with step:
                try:
                    if not idempotent:
                        step.run.write(step.record)
                    while pause := step.pause():
                        ambient.clock().sleep(min(pause, _GLANCE))
                    call = Call(args, kwargs)
                    call.attempts = step.attempt
                    value = pipeline.run(call)
                    step.succeeded(value)
                except Exception as error:  # noqa: BLE001 - it is recorded and raised
                    failure = step.failed(error)
                    step.run.write(step.record)
                    raise failure  # noqa: B904 - it is the error itself, or one that names it as its cause
                step.run.write(step.record)
                return value

    @functools.wraps(plain)
    async def awrapper(*args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is None or scope.run.cancelling:
            _check_plain_call(name, scope)
            return await pipeline.run(Call(args, kwargs))
        with scope:
            step = next_step(scope, args, kwargs)
            if step.recorded:
                await step.run.in_order(step.record)
                return step.outcome()
            await step.run.asettle()
            with step:
                try:
                    if not idempotent:
                        await step.run.awrite(step.record)
                    while pause := step.pause():
                        await ambient.clock().asleep(min(pause, _GLANCE))
                    call = Call(args, kwargs)
                    call.attempts = step.attempt
                    value = await pipeline.run(call)
                    step.succeeded(value)
                except Exception as error:  # noqa: BLE001 - it is recorded and raised
                    failure = step.failed(error)
                    await step.run.awrite(step.record)
                    raise failure  # noqa: B904 - it is the error itself, or one that names it as its cause
                await step.run.awrite(step.record)
                return value

    return awrapper if pipeline.info.kind == "async" else wrapper


# --- time, chance, ids ----------------------------------------------------------------------------------------------

_HELD: Final = 1.0
"""Seconds of a pause for which a synchronous workflow keeps its thread; for longer ones it is put aside."""


def now() -> dt.datetime:
    """Return the present time in UTC; on replay, the time it was then."""
    return _fact("now", lambda: dt.datetime.now(dt.UTC))


def uuid() -> ids.UUID:
    """Return a new random UUID; on replay, the one drawn then. Good as an idempotency key."""
    return _fact("uuid", ids.uuid4)


def random() -> float:
    """Return a random number from [0, 1); on replay, the one drawn then."""
    return _fact("random", chance.random)


def _fact(name: str, make: Callable[[], T]) -> T:
    scope = current()
    if scope is None or scope.run.cancelling:
        return make()
    with scope:
        step = Step(scope, name)
        if step.recorded:
            found: T = step.outcome()
            return found
        value = make()
        step.succeeded(value)
        step.run.write_soon(step.record)
        return value


# --- pauses -------------------------------------------------------------------------------------------------------


def sleep(seconds: Duration) -> Any:
    """Pause a workflow; it survives restarts and ends when it would have ended anyway.

    Within an event loop it is to be awaited. A synchronous workflow that sleeps for longer than a
    second gives up its thread: its function is unwound (its `finally` blocks run) and run again
    when it is time.

    Args:
        seconds: The pause, as a duration.

    Raises:
        OperoUsageError: It is no duration.
    """
    pause = parse_seconds(seconds, "sleep")
    scope = current()
    if scope is None or scope.run.cancelling:
        return time.sleep(pause) if running_loop() is None else asyncio.sleep(pause)
    return _drive(_sleep(scope, pause))


def _sleep(scope: Scope, pause: float) -> StepLogic[None]:
    with scope:
        step = Step(scope, "sleep")
        if step.recorded:
            yield _in_order(step)
            return
        wait = _Wait(scope, step, pause)
        yield _written(step)
        yield BlockingStep(wait.hold, wait.ahold)
        step.succeeded(None)
        yield _written(step)


class _Wait:
    """A step that waits until a time on the wall clock, which also counts what passes while no process runs.

    Args:
        scope: The line that waits.
        step: The step; one that was waiting before a crash keeps its time.
        pause: Seconds from now on, None for ever.
    """

    def __init__(self, scope: Scope, step: Step, pause: float | None) -> None:
        step.wait_until(None if pause is None else time.time() + pause)
        self.run = scope.run
        self._in_branch = not scope.root
        self._quiet = not scope.run.active
        self._wake = step.record.wake
        # In case the wall clock was wrong when the pause began.
        self._latest = None if pause is None else time.monotonic() + pause

    def left(self) -> float:
        """Return the seconds until then."""
        if self._wake is None:
            return math.inf
        left = self._wake - time.time()
        return left if self._latest is None else min(left, self._latest - time.monotonic())

    def put_aside(self, state: State) -> None:
        """Unwind the workflow until then, unless this is only a branch of it.

        Raises:
            Unwind: As it says.
        """
        if not self._in_branch:
            self.run.end(Ending(state, wake=self._wake, latest=self._latest))
            self.run.check()

    def move(self, state: State) -> None:
        """Show the workflow in another state if nothing else of it runs."""
        if self._quiet:
            wake = None if state is State.RUNNING else self._wake
            self.run.post(Move(*self.run.ownership, state, wake=wake, free=False))

    def hold(self) -> None:
        """Wait in this thread for a short pause, or in a branch; else put the workflow aside."""
        if (self._wake or 0.0) - time.time() > _HELD:
            self.put_aside(State.SLEEPING)
        while (left := self.left()) > 0:
            ambient.clock().sleep(min(left, 0.1))
            self.run.check()

    async def ahold(self) -> None:
        """Wait; the workflow counts as sleeping if nothing else of it runs."""
        self.move(State.SLEEPING)
        while (left := self.left()) > 0:
            await ambient.clock().asleep(min(left, _GLANCE))
        self.move(State.RUNNING)


# --- signals ------------------------------------------------------------------------------------------------------


def wait_for(name: str, timeout: Duration | None = None) -> Any:
    """Wait for a signal and return its value; within an event loop it is to be awaited.

    Signals of a name are kept until they are taken, in the order in which they were sent. A
    synchronous workflow that waits gives up its thread, as for `sleep`.

    Args:
        name: Its name, as in `Orchestrator.signal(workflow_id, name, value)`.
        timeout: Longest wait, as a duration; None waits for ever.

    Raises:
        TimeoutError: It has not come in time.
        OperoUsageError: This is no workflow.
    """
    scope = current()
    if scope is None:
        raise OperoUsageError(
            f"wait_for({name!r}) only works in a workflow that an Orchestrator runs."
        )
    pause = None if timeout is None else parse_seconds(timeout, "timeout")
    return _drive(_receive(scope, name, pause))


def _receive(scope: Scope, name: str, pause: float | None) -> StepLogic[Any]:
    with scope:
        step = Step(scope, f"wait for {name}")
        if step.recorded:
            yield _in_order(step)
            return step.outcome()
        run, wait = step.run, _Wait(scope, step, pause)
        take = Take(*run.ownership, name, step.record)
        arrived = None if running_loop() is None else run.listen(name)
        try:
            while (value := (yield BlockingStep(run.apply, run.aapply, (take,)))) is None:
                if wait.left() <= 0:
                    failure = step.failed(TimeoutError(f"signal {name!r} has not come in time"))
                    yield _written(step)
                    raise failure
                yield BlockingStep(_wait_aside, _wait_for_signal, (wait, arrived))
        finally:
            if arrived is not None:
                run.unlisten(arrived)
        if arrived is not None:
            wait.move(State.RUNNING)
        step.record.state, step.record.value = StepState.DONE, value
        return step.outcome()


def _wait_aside(wait: _Wait, arrived: None) -> None:
    """Put the workflow aside until the signal comes; a branch of it looks again soon."""
    del arrived
    wait.put_aside(State.WAITING)
    time.sleep(0.05)
    wait.run.check()


async def _wait_for_signal(wait: _Wait, arrived: asyncio.Event) -> None:
    wait.move(State.WAITING)
    left = wait.left()
    with suppress(TimeoutError):
        async with asyncio.timeout(None if left == math.inf else max(0.0, min(left, _GLANCE))):
            await arrived.wait()
    arrived.clear()


# --- in a thread and on an event loop -----------------------------------------------------------------------------


def _drive(logic: StepLogic[Any]) -> Any:
    """Run it here, or return a coroutine that does where there is an event loop."""
    return run_sync(logic) if running_loop() is None else run_async(logic)


def _written(step: Step) -> BlockingStep:
    return BlockingStep(step.run.write, step.run.awrite, (step.record,))


def _in_order(step: Step) -> BlockingStep:
    return BlockingStep(_at_once, step.run.in_order, (step.record,))


def _at_once(record: StepRecord) -> None:
    """A synchronous workflow has one line, whose steps are in order."""
