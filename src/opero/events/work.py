# this_file: src/opero/events/work.py
"""Events of what is made of several calls: tasks, workflows and their steps, maps; and of foreign code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opero.events.event import Event

__all__ = [
    "CustomEvent",
    "MapProgress",
    "StepChanged",
    "TaskChanged",
    "WorkflowChanged",
    "event_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told(Event):
    """An event to which its sender may add details; they are keys of the mapping too.

    Attributes:
        details: What else there is to tell.
    """

    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def keys(self) -> tuple[str, ...]:
        """Names of what the event tells, "type" first."""
        own = [key for key in Event.keys(self) if key != "details"]
        return (*own, *(key for key in self.details if key not in own))

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key) if hasattr(type(self), key) else self.details[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskChanged(_Told):
    """A task, or something composed of tasks, went into another state.

    Attributes:
        task: The task itself.
        state: A `TaskState`.
        result: What it returned; a key of the mapping only once it has succeeded.
        error: What it failed with; a key of the mapping only then.
        attempt: Number of the attempt, from 1.
        seconds: How long it has been running.
        details: What else there is to tell.
    """

    type = "task"

    task: Any
    state: Any
    result: Any = field(default=None, hash=False)
    error: BaseException | None = None
    attempt: int = 1
    seconds: float | None = None

    def keys(self) -> tuple[str, ...]:
        """Names of what the event tells, "type" first."""
        missing = {"error"} if self.error is None else set()
        if getattr(self.state, "name", self.state) != "SUCCEEDED":
            missing.add("result")
        return tuple(key for key in _Told.keys(self) if key not in missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowChanged(_Told):
    """A durable workflow went into another state.

    Attributes:
        workflow_id: Its id in the journal.
        state: The new state.
        result: What it returned, once it has succeeded.
        error: What it failed with.
        seconds: How long this run of it has taken.
        details: What else there is to tell.
    """

    type = "workflow"

    workflow_id: str
    state: Any
    result: Any = field(default=None, hash=False)
    error: BaseException | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChanged(_Told):
    """A step of a durable workflow went into another state.

    Attributes:
        workflow_id: Id of the workflow in the journal.
        step: The step's place in it.
        state: The new state.
        replayed: Whether the result came from the journal, so that nothing was executed.
        error: What it failed with.
        seconds: How long it took.
        details: What else there is to tell.
    """

    type = "step"

    workflow_id: str
    step: str
    state: Any
    replayed: bool = False
    error: BaseException | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MapProgress(Event):
    """A map has got further.

    Attributes:
        done: Items that are finished, one way or another.
        total: All items, None if nobody knows yet.
        failed: Items that failed, among those done.
        cached: Items whose result was in the cache, among those done.
        seconds: Seconds since the map began.
        finished: Whether this is the map's last word.
    """

    type = "map"

    done: int
    total: int | None
    failed: int = 0
    cached: int = 0
    seconds: float | None = None
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomEvent(_Told):
    """What other code sent through the bus as a dict; what stands in the dict goes before all else.

    Attributes:
        details: The dict.
    """

    type = "custom"

    def __getitem__(self, key: str) -> Any:
        return self.details[key] if key in self.details else _Told.__getitem__(self, key)


def event_of(told: Mapping[str, Any]) -> Event:
    """Make the event that a dict describes.

    A dict with the type "task" and a task becomes a `TaskChanged`, so that those who ask for that class hear it.

    Example:
        >>> event_of({"type": "task", "task": "fetch", "state": "RETRYING", "tries": 2})["tries"]
        2
        >>> event_of({"type": "mine", "speed": 9})["type"]
        'mine'
    """
    if told.get("type") == "task" and "task" in told:
        own = ("state", "result", "error", "attempt", "seconds")
        given = {key: told[key] for key in own if key in told}
        task = told["task"]
        name = told.get("name", getattr(task, "name", task))
        rest = {k: v for k, v in told.items() if k not in {"type", "task", "name", *own}}
        return TaskChanged(function=str(name), task=task, details=rest, **{"state": None, **given})
    name = told.get("function", told.get("name", told.get("type", "custom")))
    return CustomEvent(function=str(name), details=dict(told))
