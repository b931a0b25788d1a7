# this_file: src/opero/durable/workflows.py
"""Decorate and register workflows: functions that an engine runs, and runs again after a crash, until they end."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, overload

from opero.durable.values import Parameters
from opero.errors import OperoUsageError, UnknownWorkflowError, did_you_mean
from opero.utils.async_utils import is_async_function

__all__ = ["RESERVED", "WorkflowRegistry", "WorkflowSpec", "workflow", "workflows"]

F = TypeVar("F", bound=Callable[..., Any])

RESERVED: Final = ("workflow_id",)
"""Keywords of `invoke_workflow`, which no workflow can have as a parameter that is given by name."""


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
    """The workflows of a process by name and version.

    A function that is defined again (a notebook's cell that runs twice, a reloaded module) replaces the
    old one; another one of the same name is an error.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str | None, WorkflowSpec]] = {}
        self._lock = threading.Lock()

    def add(self, spec: WorkflowSpec) -> None:
        """Register.

        Raises:
            OperoUsageError: Another function has the name.
        """
        with self._lock:
            versions = self._known.setdefault(spec.name, {})
            old = versions.get(spec.version)
            if old is not None and _place(old.fn) != _place(spec.fn):
                raise OperoUsageError(
                    f"@workflow({spec.name!r}) stands for {_place(old.fn)} and {_place(spec.fn)}: "
                    "give one of them another name."
                )
            # The youngest comes last: it is what is started from now on.
            versions.pop(spec.version, None)
            versions[spec.version] = spec

    def latest(self, name: str) -> WorkflowSpec:
        """Return the youngest version.

        Raises:
            UnknownWorkflowError: There is none.
        """
        versions = self._known.get(name)
        if not versions:
            raise UnknownWorkflowError(
                f"no workflow {name!r} is registered.{did_you_mean(name, self._known)} "
                "Import the module that defines it."
            )
        return next(reversed(versions.values()))

    def get(self, name: str, version: str | None) -> WorkflowSpec | None:
        """Return that very version, None if there is none."""
        return self._known.get(name, {}).get(version)

    def versions(self, name: str) -> list[str | None]:
        """Return the registered versions of a name."""
        return list(self._known.get(name, {}))

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self._known)


def _place(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


workflows: Final = WorkflowRegistry()


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
    name = called = name or fn.__name__
    signature = inspect.signature(fn)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in signature.parameters.values():
        if parameter.name in RESERVED and parameter.kind in by_name:
            raise OperoUsageError(
                f"workflow {name!r} has a parameter {parameter.name!r}, which invoke_workflow() takes for the id of "
                "the run: give the parameter another name, or make it positional-only (put a / behind it) and "
                "pass it by position."
            )
    spec = WorkflowSpec(
        called,
        None if version is None else str(version),
        fn,
        is_async_function(fn),
        Parameters(signature, f"workflow {name}()"),
    )
    workflows.add(spec)
    return fn
