# this_file: src/opero/durable/decorators.py
"""Decorate workflows, which an engine runs until they end, and activities, whose results a workflow records."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload
from weakref import WeakValueDictionary

from opero.core.call import Call
from opero.core.decorate import decorate
from opero.core.options import Options
from opero.durable.step import Scope, Step, current, is_unknown_thread, running_step
from opero.durable.values import Parameters
from opero.errors import OperoUsageError, UnknownWorkflowError, did_you_mean
from opero.utils import ambient
from opero.utils.async_utils import is_async_function

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline
    from opero.events import Event


F = TypeVar("F", bound=Callable[..., Any])

_GLANCE: Final = 5.0
"""Longest wait before the wall clock is read again: it may have been wrong."""


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
