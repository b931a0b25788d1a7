# this_file: src/opero/tasks/policies.py
"""Tasks with options: core's pipeline around the function, and its retries told as states of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from opero import events
from opero.core.call import Call
from opero.core.function import describe_function
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.errors import OperoUsageError
from opero.tasks.callee import is_plain
from opero.tasks.task import off_loop, running_task

if TYPE_CHECKING:
    from opero.events import Event
    from opero.tasks.callee import Callee

__all__ = ["with_policies"]


def with_policies(
    fn: Any, callee: Callee, options: Mapping[str, Any] | None
) -> Callable[..., Awaitable[Any]]:
    """Return a coroutine function that calls `fn` through the stages that it or `options` ask for.

    Raises:
        OperoUsageError: An option is unknown or wrong.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OperoUsageError(f"options={options!r} must be a dict: options=dict(retries=3).")
    given = dict(options or {})
    if hasattr(fn, "__opero__"):
        decorated = _told(fn, given)
        return decorated if callee.is_async else off_loop(decorated)
    made = Options.of("Task", **{"cache": False, "retries": 0, **given})
    if made.retries or made.stop:
        made = made.replace("Task", on_event=[*_listeners(made), _hear])
    info = describe_function(fn)
    if not callee.is_async:
        # On the loop, so that a pause between attempts holds no thread.
        info = dataclasses.replace(info, fn=off_loop(fn), kind="async")
    pipeline = Pipeline(info, made)

    def call(*args: Any, **kwargs: Any) -> Any:
        return pipeline.run(Call(args, kwargs))

    return call


def _told(fn: Any, given: dict[str, Any]) -> Any:
    """Return an `@opero` function with other options, which tells of its retries; the same one for equal tasks."""
    shareable = not given and is_plain(fn)
    if shareable and fn in _variants:
        return _variants[fn]
    options: Options = fn.options.replace("Task", **given)
    changes = dict(given)
    if options.retries or options.stop:
        changes["on_event"] = [*_listeners(options), _hear]
    variant = fn.with_options(**changes) if changes else fn
    if shareable and variant is not fn:
        _variants[fn] = variant
    return variant


_variants: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _listeners(options: Options) -> tuple[Any, ...]:
    heard = options.on_event
    return () if heard is None else (heard,) if callable(heard) else tuple(heard)


def _hear(event: Event) -> None:
    """Take note of a retry in the run that it happens in."""
    run = running_task.get()
    if run is None or run.done:
        return  # a refresh behind the scenes, say
    if isinstance(event, events.AttemptFailed):
        run.error = event.error
    elif isinstance(event, events.RetryScheduled):
        run.retries(event.attempt, event.delay)
