# this_file: src/opero/durable/activities.py
"""`@activity`: a function whose results a workflow records, with opero's options around its calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

from opero.core.call import Call
from opero.core.decorate import decorate
from opero.core.options import Options
from opero.durable.arguments import Parameters, digest_of
from opero.durable.scope import Scope, current
from opero.durable.step import Step, running_step, step_at
from opero.errors import OperoUsageError
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline
    from opero.events import Event

__all__ = ["activity"]

F = TypeVar("F", bound=Callable[..., Any])


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
    once; a recorded result is never computed again. Elsewhere it is a plain call.

    Args:
        first: The name under which it is recorded, or the function.
        name: The same as a keyword. Default: the function's own.
        idempotent: Whether it may be called again if it is unknown, after a crash, how far a call
            got. With False the workflow waits ("in doubt") until `Orchestrator.resolve` tells.
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
    """What a step needs to know of its activity.

    Attributes:
        name: Under which it is recorded.
        idempotent: Whether a call that may have happened may happen again.
        parameters: What its arguments are called.
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
    heard = given.pop("on_event", None)
    listeners = () if heard is None else (heard,) if callable(heard) else tuple(heard)
    options = Options.of(
        "activity",
        cache=False,
        on_event=(*listeners, _note_retry),
        **{"retries": 0, **given},
    )
    plain = decorate(fn, options, by="activity")
    pipeline: Pipeline = plain.__opero__
    info = pipeline.info
    if info.kind in ("generator", "async_generator"):
        raise OperoUsageError(f"activity {info.name}() is a generator: return a list instead.")
    spec = _Activity(name or info.name, idempotent, Parameters(info.declared))

    if info.kind == "async":

        @functools.wraps(plain)
        async def awrapper(*args: Any, **kwargs: Any) -> Any:
            scope = current()
            if scope is None or scope.run.cancelling:
                return await pipeline.run(Call(args, kwargs))
            return await _aperform(spec, pipeline, scope, args, kwargs)

        return awrapper

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is None or scope.run.cancelling:
            return pipeline.run(Call(args, kwargs))
        return _perform(spec, pipeline, scope, args, kwargs)

    return wrapper


# --- a call within a workflow -------------------------------------------------------------------------------------


def _perform(
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
        try:
            step.run.settle()
            with step.under_way():
                if not step.idempotent:
                    step.run.write(step.record)
                if pause := step.pause():
                    ambient.clock().sleep(pause)
                value = _settle(step, pipeline.run(_call(step, args, kwargs)))
        except Exception as error:  # noqa: BLE001 - it is recorded and raised
            failure = step.failed(error)
            step.run.write(step.record)
            raise failure  # noqa: B904 - it is the error itself, or one that names it as its cause
        else:
            step.run.write(step.record)
            return value
        finally:
            step.over()
    finally:
        scope.leave()


async def _aperform(
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
            await step.run.turn(step.record)
            return step.outcome()
        try:
            await step.run.asettle()
            with step.under_way():
                if not step.idempotent:
                    await step.run.awrite(step.record)
                if pause := step.pause():
                    await ambient.clock().asleep(pause)
                value = _settle(step, await pipeline.run(_call(step, args, kwargs)))
        except Exception as error:  # noqa: BLE001 - it is recorded and raised
            failure = step.failed(error)
            await step.run.awrite(step.record)
            raise failure  # noqa: B904 - it is the error itself, or one that names it as its cause
        else:
            await step.run.awrite(step.record)
            return value
        finally:
            step.over()
    finally:
        scope.leave()


def _step(spec: _Activity, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    bound = digest_of(spec.parameters, args, kwargs, f"activity {spec.name}()")
    return step_at(scope, spec.name, bound, idempotent=spec.idempotent)


def _call(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    call = Call(args, kwargs)
    call.attempts = step.attempt
    return call


def _settle(step: Step, value: Any) -> Any:
    step.succeeded(value)
    return value


def _note_retry(event: Event) -> None:
    step = running_step.get()
    if step is not None and type(event).__name__ == "RetryScheduled":
        scheduled: Any = event
        step.retries(scheduled.attempt, scheduled.delay)
