# this_file: src/opero/durable/registry.py
"""Workflows by name and version."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from opero.durable.arguments import Parameters
from opero.errors import OperoUsageError, UnknownWorkflowError, did_you_mean

__all__ = ["Registry", "WorkflowSpec", "workflows"]


@dataclass(frozen=True, slots=True, eq=False)
class WorkflowSpec:
    """A registered workflow.

    Attributes:
        name: Its name.
        version: Its version, None without.
        fn: The function.
        is_async: Whether it is a coroutine function.
        parameters: What its arguments are called.
    """

    name: str
    version: str | None
    fn: Callable[..., Any]
    is_async: bool
    parameters: Parameters


class Registry:
    """What is known under which name.

    A function that is defined again (a notebook's cell that runs twice, a reloaded module) takes
    the place of the old one; another one of the same name is an error.

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
        """Return the versions that are known."""
        return list(self._known.get(name, {}))

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self._known)


def _place(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


workflows: Final = Registry()
