# this_file: src/opero/events/types.py
"""Define one class for each kind of event, readable as an object and as a mapping.

The module is loaded when the first event is sent or a class is asked for: a dataclass costs a quarter of a
millisecond to define, so `import opero` must not load it.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform

from opero.errors import OperoUsageError
from opero.utils.ambient import parent_run_id, run_id
from opero.utils.secrets import mask_text, masked_repr


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class _FrozenData:
    """Makes a frozen dataclass of each class of this module; classes of other code are decorated there."""

    def __init_subclass__(cls) -> None:
        if cls.__module__ == __name__:
            dataclass(frozen=True, kw_only=True, repr=False)(cls)


class Event(_FrozenData):
    """Base of all events.

    An event also reads like a mapping of its attributes: `event["attempt"]`, `event.get("error")`,
    `dict(event)`. The key "type" is the kind of event in lower case.

    Attributes:
        function: Qualified name of the decorated function, or the name of what runs (a task, a workflow). Events
            of a decorated function get it when they are sent.
        at: Wall-clock seconds since the epoch.
        run_id: The run that it happened in, None outside of any.
        parent_id: The run that this one is part of.
        module: Module in which `function` is defined; None where it is not known.

    Example:
        >>> event = Event(function="fetch")
        >>> event["function"], event.name, event.get("attempt", 0), "attempt" in event
        ('fetch', 'fetch', 0, False)
    """

    type: ClassVar[str] = "event"
    """Value of `event["type"]`."""
    quiet: ClassVar[bool] = False
    """Whether it goes only to handlers that name its class: there are too many of its kind for all handlers."""

    function: str = ""
    at: float = field(default_factory=time.time)
    run_id: str | None = field(default_factory=run_id)
    parent_id: str | None = field(default_factory=parent_run_id)
    module: str | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "type" not in vars(cls):
            cls.type = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @property
    def name(self) -> str:
        """Name of what runs; the same as `function`."""
        return self.function

    # --- as a mapping ------------------------------------------------------------------------------------------------

    def keys(self) -> tuple[str, ...]:
        """Return the names of the mapping, "type" first."""
        return ("type", *(f.name for f in fields(self)))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, `default` if the event has none of that name."""
        return self[key] if key in self.keys() else default

    def items(self) -> list[tuple[str, Any]]:
        """Return names and values."""
        return [(key, self[key]) for key in self.keys()]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        # An error's message is other code's: it may hold anything.
        shown = ", ".join(
            f"{f.name}={(mask_text(repr(value)) if f.name == 'error' else masked_repr(value, f.name))}"
            for f in fields(self)
            if f.repr
            for value in [getattr(self, f.name)]
        )
        return f"{type(self).__name__}({shown})"


# --- calls ----------------------------------------------------------------------------------------


class CallStarted(Event):
    """A call enters the stages. Sent only to handlers that name this class, as every call sends one."""

    quiet = True


class CallEnded(Event):
    """A call has left the stages, whichever way. Sent only to handlers that name this class.

    Attributes:
        source: "fresh", "hit", ... as on the receipt.
        attempts: Attempts made, 0 where the value was not computed by this call.
        calls: Real calls made.
        error: What it ended with, cancellation included; None if it returned, or was closed before its end.
        seconds: From `CallStarted` to here.
        slept: Seconds of pauses between attempts.
        waited: Seconds in the queues of rate and concurrency limits.
    """

    quiet = True

    source: str
    attempts: int
    calls: int
    error: BaseException | None
    seconds: float
    slept: float
    waited: float


class AttemptFailed(Event):
    """One real call of the function failed (or its result was rejected, then `error` is None).

    Attributes:
        attempt: Number of the attempt, from 1.
        value: Label of the fallback value it was made with, None without fallback.
        error: The function's own exception.
        seconds: How long the real call took; None if there was no listener when it began.
    """

    attempt: int
    value: str | None
    error: BaseException | None
    seconds: float | None = None


class RetryScheduled(Event):
    """Another attempt will be made.

    Attributes:
        attempt: Number of the attempt to come.
        delay: Seconds of pause before it.
    """

    attempt: int
    delay: float


class RetriesNested(Event):
    """Another attempt will be made although another opero function, called by this one, has used up its retries.

    Attributes:
        inner: Name of that function.
    """

    inner: str


class RetryBudgetSpent(Event):
    """A call fails for good, because the retry budget has no retry left.

    Attributes:
        budget: Its name.
    """

    budget: str


class ValueCooling(Event):
    """A service asked to wait, and the fallback value that was used with it is skipped for that time.

    Attributes:
        value: Its label.
        seconds: How long.
        source: The header or attribute that asked for it.
    """

    value: str
    seconds: float
    source: str


class FallbackUsed(Event):
    """The next value of the fallback parameter is tried.

    Attributes:
        value: Its label.
        index: Its place in the caller's list, from 0.
    """

    value: str
    index: int


class LimiterWaited(Event):
    """A call waited for its slot.

    Attributes:
        seconds: How long.
    """

    seconds: float


class LimiterPaused(Event):
    """A service asked this function to wait, and the limiter lets no call through for that time.

    Attributes:
        seconds: How long.
        source: The header or attribute that asked for it.
    """

    seconds: float
    source: str


class CacheHit(Event):
    """A stored result was served."""


class CacheMiss(Event):
    """No fresh result was stored; the function is called."""


class CacheStale(Event):
    """An expired result was served, because the function failed.

    Attributes:
        expired: Seconds since its expiry.
        error: What the call failed with; None if it was not made, because another one has just failed.
    """

    expired: float
    error: BaseException | None


class CacheRefreshed(Event):
    """A result was computed again in the background (`cache_refresh`).

    Attributes:
        renewed: Whether there is a new result; if not, the old one stays.
        error: What the call failed with; None if it worked or its result was rejected.
    """

    renewed: bool
    error: BaseException | None


class CacheSkipped(Event):
    """A result was not stored, or the cache could not be used.

    Attributes:
        reason: A sentence that says why.
    """

    reason: str


class FunctionEdited(Event):
    """A function's source differs from the one whose results lie on disk or on a server.

    Those results are still used; `cache_version` or `f.cache.clear()` starts afresh.
    """


class CallSucceeded(Event):
    """A call returned a value that was not in the cache.

    Attributes:
        attempts: Attempts it took.
        calls: Real calls it took.
        seconds: Since the call's start; None if there was no listener then.
    """

    attempts: int
    calls: int
    seconds: float | None = None


class CallTimedOut(Event):
    """A real call took longer than its `timeout`.

    Attributes:
        seconds: The limit.
    """

    seconds: float


class DeadlinePassed(Event):
    """A call ends because of its deadline.

    Attributes:
        where: What the call was doing: "during the call", "waiting for a permit", ...
    """

    where: str


class CallGaveUp(Event):
    """A call failed for good.

    Attributes:
        attempts: Attempts made.
        calls: Real calls made.
        error: The exception that the caller gets.
        seconds: Since the call's start; None if there was no listener then.
    """

    attempts: int
    calls: int
    error: BaseException
    seconds: float | None = None


class CircuitChanged(Event):
    """A circuit breaker went from one state to another.

    `function` is the function that it guards, or the circuit's own name where it guards several or
    none.

    Attributes:
        circuit: Its name.
        old_state, new_state: "closed", "open", "half_open", "forced_open" or "disabled".
        retry_after: Seconds until it may let a call through again, where it has just opened; None otherwise.
        breaker: The `CircuitBreaker`; None in events that come from another process.
    """

    type = "circuit"

    circuit: str
    old_state: str
    new_state: str
    retry_after: float | None
    breaker: Any = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> Any:
        # A breaker stays in its process.
        return functools.partial(CircuitChanged, **{**vars(self), "breaker": None}), ()


class HandlerFailed(Event):
    """A handler raised. Sent only to handlers that name this class; without any, it is written to stderr.

    Attributes:
        handler: The handler; `function` is its name.
        error: What it raised.
        event: The event that the handler was called with.
    """

    quiet = True

    handler: object
    error: Exception
    event: Event


# --- tasks, workflows, maps -----------------------------------------------------------------------


class _DetailedEvent(Event):
    """An event with details that its sender may add; they are keys of the mapping too.

    Attributes:
        details: Further facts by name.
    """

    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def keys(self) -> tuple[str, ...]:
        """Return the names of the mapping, "type" first."""
        own = [key for key in Event.keys(self) if key != "details"]
        return (*own, *(key for key in self.details if key not in own))

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key) if key in Event.keys(self) else self.details[key]


class TaskChanged(_DetailedEvent):
    """A task, or something composed of tasks, went into another state.

    Attributes:
        task: The task itself.
        state: A `TaskState`.
        result: Return value; a key of the mapping only after success.
        error: What it failed with; a key of the mapping only after a failure.
        attempt: Number of the attempt, from 1.
        seconds: How long it has been running.
        details: Further facts by name.
    """

    type = "task"

    task: Any
    state: Any
    result: Any = field(default=None, hash=False)
    error: BaseException | None = None
    attempt: int = 1
    seconds: float | None = None

    def keys(self) -> tuple[str, ...]:
        """Return the names of the mapping, "type" first."""
        missing = {"error"} if self.error is None else set()
        if getattr(self.state, "name", self.state) != "SUCCEEDED":
            missing.add("result")
        return tuple(key for key in _DetailedEvent.keys(self) if key not in missing)


class WorkflowChanged(_DetailedEvent):
    """A durable workflow went into another state.

    Attributes:
        workflow_id: Its id in the journal.
        state: The new state.
        result: What it returned, once it has succeeded.
        error: What it failed with.
        seconds: How long this run of it has taken.
        details: Further facts by name.
    """

    type = "workflow"

    workflow_id: str
    state: Any
    result: Any = field(default=None, hash=False)
    error: BaseException | None = None
    seconds: float | None = None


class StepChanged(_DetailedEvent):
    """A step of a durable workflow went into another state.

    Attributes:
        workflow_id: Id of the workflow in the journal.
        step: The step's place in it.
        state: The new state.
        replayed: Whether the result came from the journal, so that nothing was executed.
        error: What it failed with.
        seconds: How long it took.
        details: Further facts by name.
    """

    type = "step"

    workflow_id: str
    step: str
    state: Any
    replayed: bool = False
    error: BaseException | None = None
    seconds: float | None = None


class MapWaiting(Event):
    """A map stands, or will stand, for more than a minute; sent once for each map.

    Attributes:
        done: Items that are finished.
        total: All items; None while that is not known.
        reason: What it waits for, where that is a limit; None if an item takes so long.
        seconds: Seconds since the last item was finished.
    """

    done: int
    total: int | None
    reason: str | None = None
    seconds: float | None = None


class MapProgress(Event):
    """A map has got further.

    Attributes:
        done: Items that are finished, one way or another.
        total: All items; None while that is not known.
        failed: Items that failed, among those done.
        cached: Items whose result was in the cache, among those done.
        seconds: Seconds since the map began.
        finished: Whether this is the map's last event.
    """

    type = "map"

    done: int
    total: int | None
    failed: int = 0
    cached: int = 0
    seconds: float | None = None
    finished: bool = False


class CustomEvent(_DetailedEvent):
    """A dict that other code sent through the bus; keys of the dict take precedence over attributes.

    Attributes:
        details: The dict.
    """

    type = "custom"

    def __getitem__(self, key: str) -> Any:
        return self.details[key] if key in self.details else _DetailedEvent.__getitem__(self, key)


def event_from_dict(mapping: Mapping[str, Any] | Event) -> Event:
    """Make the event that a dict describes.

    A dict with the type "task" and a task becomes a `TaskChanged`, so that handlers of that class get it.

    Example:
        >>> event_from_dict({"type": "task", "task": "fetch", "state": "RETRYING", "tries": 2})["tries"]
        2
        >>> event_from_dict({"type": "mine", "speed": 9})["type"]
        'mine'

    Raises:
        OperoUsageError: It is no mapping.
    """
    if not isinstance(mapping, Mapping):
        raise OperoUsageError(
            f"event={mapping!r} must be an event or a dict: emit({{'type': 'mine'}})."
        )
    if mapping.get("type") == "task" and "task" in mapping:
        own = ("state", "result", "error", "attempt", "seconds")
        given = {key: mapping[key] for key in own if key in mapping}
        task = mapping["task"]
        name = mapping.get("name", getattr(task, "name", task))
        remainder = {k: v for k, v in mapping.items() if k not in {"type", "task", "name", *own}}
        return TaskChanged(
            function=str(name), task=task, details=remainder, **{"state": None, **given}
        )
    name = mapping.get("function", mapping.get("name", mapping.get("type", "custom")))
    return CustomEvent(function=str(name), details=dict(mapping))
