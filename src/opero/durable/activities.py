# this_file: src/opero/durable/activities.py
"""Decorate activities: functions whose results a workflow records, with opero's options around their calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from opero.core.call import Call
from opero.core.decorate import decorate
from opero.core.options import Options
from opero.durable.step import (
    Scope,
    Step,
    current,
    current_scope,
    is_unknown_thread,
    running_step,
    step_at,
)
from opero.durable.values import Parameters
from opero.errors import OperoUsageError
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline
    from opero.events import Event

__all__ = ["activity"]

F = TypeVar("F", bound=Callable[..., Any])

_GLANCE: Final = 5.0
"""Longest wait before the wall clock is read again: it may have been wrong."""


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
    if isinstance(first, str):
        name, first = first, None
    if first is None:
        return lambda fn: _make(fn, name, idempotent, options)
    if not callable(first):
        raise OperoUsageError(f"activity({first!r}): give a name or a function.")
    return _make(first, name, idempotent, options)


@dataclass(frozen=True, slots=True, eq=False)
class _Activity:
    """The properties of an activity that its steps need.

    Attributes:
        name: Under which it is recorded.
        idempotent: Whether a call that may have happened may happen again.
        parameters: Its signature.
    """

    name: str
    idempotent: bool
    parameters: Parameters


def _make(fn: Any, name: str | None, idempotent: bool, given: dict[str, Any]) -> Any:
    cached = sorted(option for option in given if option.startswith("cache"))
    if cached:
        raise OperoUsageError(
            f"activity() takes no {cached[0]}: results of activities are recorded, never cached."
        )
    given = {"retries": 0, **given}
    if given["retries"] or given.get("stop") is not None:
        # A listener costs each call something, and only retries are recorded.
        listener = given.pop("on_event", None)
        listeners = () if listener is None else (listener,) if callable(listener) else listener
        given["on_event"] = (*listeners, _record_retry)
    options = Options.of("activity", cache=False, **given)
    plain = decorate(fn, options, by="activity")
    pipeline: Pipeline = plain.__opero__
    info = pipeline.info
    if info.kind in ("generator", "async_generator"):
        raise OperoUsageError(f"activity {info.name}() is a generator: return a list instead.")
    name = name or info.name
    spec = _Activity(name, idempotent, Parameters(info.declared, f"activity {name}()"))

    if info.kind == "async":

        @functools.wraps(plain)
        async def awrapper(*args: Any, **kwargs: Any) -> Any:
            scope = current()
            if scope is None or scope.run.cancelling:
                if scope is None:
                    _check_thread(spec.name)
                return await pipeline.run(Call(args, kwargs))
            return await _arun_step(spec, pipeline, scope, args, kwargs)

        return awrapper

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is None or scope.run.cancelling:
            if scope is None:
                _check_thread(spec.name)
            return pipeline.run(Call(args, kwargs))
        return _run_step(spec, pipeline, scope, args, kwargs)

    return wrapper


def _check_thread(name: str) -> None:
    """Refuse a call that belongs to a workflow, and would not be recorded.

    Raises:
        OperoUsageError: A workflow function has made this thread.
    """
    if running_step.get() is None and is_unknown_thread():
        raise OperoUsageError(
            f"activity {name}() was called in a thread that a workflow has made itself. There it would not be "
            "recorded, and run again in each replay: call it in the workflow's own thread, in branches of "
            "opero.tasks.Parallel, in a function under operomap, or with asyncio.gather or asyncio.to_thread."
        )


# --- a call within a workflow -------------------------------------------------------------------------------------


def _run_step(
    spec: _Activity,
    pipeline: Pipeline,
    scope: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    scope.enter()
    try:
        step = _step(spec, scope, args, kwargs)
        if step.recorded:
            return step.outcome()
        run = step.run
        run.settle()
        run.begin(step.record)
        run.notify_step(step.record)
        # What the activity calls is no step.
        outer, inner = current_scope.set(None), running_step.set(step)
        try:
            if not step.idempotent:
                run.write(step.record)
            while pause := step.pause():
                ambient.clock().sleep(min(pause, _GLANCE))
            call = Call(args, kwargs)
            call.attempts = step.attempt
            value = pipeline.run(call)
            step.succeeded(value)
        except Exception as error:  # noqa: BLE001 - it is recorded and raised
            failure = step.failed(error)
            run.write(step.record)
            raise failure  # noqa: B904 - it is the error itself, or one that names it as its cause
        else:
            run.write(step.record)
            return value
        finally:
            running_step.reset(inner)
            current_scope.reset(outer)
            run.finish(step.record)
    finally:
        scope.leave()


async def _arun_step(
    spec: _Activity,
    pipeline: Pipeline,
    scope: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    scope.enter()
    try:
        step = _step(spec, scope, args, kwargs)
        run = step.run
        if step.recorded:
            await run.in_order(step.record)
            return step.outcome()
        await run.asettle()
        run.begin(step.record)
        run.notify_step(step.record)
        outer, inner = current_scope.set(None), running_step.set(step)
        try:
            if not step.idempotent:
                await run.awrite(step.record)
            while pause := step.pause():
                await ambient.clock().asleep(min(pause, _GLANCE))
            call = Call(args, kwargs)
            call.attempts = step.attempt
            value = await pipeline.run(call)
            step.succeeded(value)
        except Exception as error:  # noqa: BLE001 - it is recorded and raised
            failure = step.failed(error)
            await run.awrite(step.record)
            raise failure  # noqa: B904 - it is the error itself, or one that names it as its cause
        else:
            await run.awrite(step.record)
            return value
        finally:
            running_step.reset(inner)
            current_scope.reset(outer)
            run.finish(step.record)
    finally:
        scope.leave()


def _step(spec: _Activity, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    parameters = spec.parameters
    digest = parameters.digest(args, kwargs)

    def matches(recorded: str) -> bool:
        return parameters.matches(recorded, args, kwargs)

    return step_at(scope, spec.name, digest, idempotent=spec.idempotent, matches=matches)


def _record_retry(event: Event) -> None:
    step = running_step.get()
    if step is not None and type(event).__name__ == "RetryScheduled":
        scheduled: Any = event
        step.retries(scheduled.attempt, scheduled.delay)
