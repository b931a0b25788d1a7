# this_file: src/opero/durable/workflows.py
"""`@workflow`: a function that an engine runs, and runs again after a crash, until it has ended."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from opero.durable.arguments import Parameters
from opero.durable.registry import WorkflowSpec, workflows
from opero.errors import OperoUsageError
from opero.utils.async_utils import is_async_function

__all__ = ["workflow"]

F = TypeVar("F", bound=Callable[..., Any])


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
            defined last. None: runs go on with whatever code there is, and a difference is found
            at the step where it shows.

    Raises:
        OperoUsageError: The name is taken, or the function cannot be a workflow.

    Example:
        >>> @workflow("greeting")
        ... def greet(name: str) -> str:
        ...     return f"Hello, {name}"
        >>> greet("Ada")
        'Hello, Ada'
    """
    if isinstance(first, str):
        name, first = first, None
    if first is None:
        return lambda fn: _register(fn, name, version)
    if not callable(first):
        raise OperoUsageError(f"workflow({first!r}): give a name or a function.")
    return _register(first, name, version)


def _register(fn: Any, name: str | None, version: str | int | None) -> Any:
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise OperoUsageError(
            f"workflow {fn.__name__}() is a generator: return its result instead."
        )
    spec = WorkflowSpec(
        name or fn.__name__,
        None if version is None else str(version),
        fn,
        is_async_function(fn),
        Parameters(inspect.signature(fn)),
    )
    workflows.add(spec)
    return fn
