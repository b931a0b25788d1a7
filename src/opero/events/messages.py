# this_file: src/opero/events/messages.py
"""Describe events as log lines: a level and a sentence without any argument value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from opero.utils.secrets import mask_text, mask_urls, masked_repr

if TYPE_CHECKING:
    from opero.events.types import Event

__all__ = ["EventLogger", "describe_event", "log_event"]

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40  # as in `logging`, which is not loaded for it
_LONGEST = 200
_STAMPS = frozenset({"type", "function", "at", "run_id", "parent_id", "module", "details"})


class EventLogger(Protocol):
    """The methods that are used of a logger: the standard library's and its adapters have them."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the standard library's name
        """Return whether a line of this level would be written."""
        ...

    def log(
        self, level: int, msg: object, /, *args: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """Write a line."""
        ...


def describe_event(event: Event, *, messages: bool = False) -> tuple[int, str]:
    """Return the level and the text for one event.

    Args:
        event: The event.
        messages: Whether errors are shown with their messages, which may hold private data.

    Example:
        >>> from opero.events import RetryScheduled
        >>> describe_event(RetryScheduled(function="fetch", attempt=2, delay=0.25))
        (20, 'fetch: attempt 2 in 0.25 s')
    """
    entry = _SENTENCES.get(type(event).__name__)
    if entry is None:
        return DEBUG, f"{event.function}: {_anything(event, messages=messages)}"
    level, sentence = entry
    error = event.get("error")
    text = f"{event.function}: {sentence(event, _error(error, messages=messages))}"
    return level, mask_urls(text)


def log_event(logger: EventLogger, event: Event, *, messages: bool = False) -> None:
    """Write an event to a logger of the standard library; the event itself is `record.event`."""
    level, text = describe_event(event, messages=messages)
    if logger.isEnabledFor(level):
        logger.log(level, "%s", text, extra={"event": event})


def _error(error: object, *, messages: bool) -> str:
    if error is None:
        return ""
    text = type(error).__name__
    if messages:
        lines = str(error).splitlines()
        text += f": {mask_text(lines[0])[:_LONGEST]}" if lines else ""
    return text


def _seconds(event: Event) -> str:
    seconds = event.get("seconds")
    return "" if seconds is None else f" after {seconds:.3f} s"


def _with(event: Event) -> str:
    value = event.get("value")
    return f" with {value}" if value else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _state(event: Event) -> str:
    state = event["state"]
    return str(getattr(state, "name", state)).lower()


def _changed(event: Event, error: str) -> str:
    return f"{event['type']} {_state(event)}{_seconds(event)}{f' with {error}' if error else ''}"


def _anything(event: Event, *, messages: bool) -> str:
    parts = []
    for key, value in event.items():
        if key in _STAMPS or value is None:
            continue
        if isinstance(value, BaseException):
            parts.append(f"{key}={_error(value, messages=messages)}")
        elif isinstance(value, str | int | float | bool):
            parts.append(f"{key}={masked_repr(value, key)}")
    return " ".join([event.type, *parts])


# By name, so that the classes are not loaded for it.
_SENTENCES: dict[str, tuple[int, Callable[[Any, str], str]]] = {
    "AttemptFailed": (
        WARNING,
        lambda e, error: (
            f"attempt {e.attempt}{_with(e)} "
            f"{f'failed with {error}' if error else 'gave a rejected result'}{_seconds(e)}"
        ),
    ),
    "RetryScheduled": (INFO, lambda e, _: f"attempt {e.attempt} in {e.delay:.3g} s"),
    "FallbackUsed": (INFO, lambda e, _: f"falls back on {e.value}"),
    "LimiterWaited": (DEBUG, lambda e, _: f"waited {e.seconds:.3g} s for a limit"),
    "MapWaiting": (
        WARNING,
        lambda e, _: (
            f"the map stands at {e.done}{'' if e.total is None else f' of {e.total}'} items"
            f"{'' if e.reason is None else f', {e.reason}'}{_seconds(e)}"
        ),
    ),
    "LimiterPaused": (
        WARNING,
        lambda e, _: f"the service asks for a pause of {e.seconds:.3g} s ({e.source})",
    ),
    "ValueCooling": (
        WARNING,
        lambda e, _: f"skips {e.value} for {e.seconds:.3g} s ({e.source})",
    ),
    "RetriesNested": (
        WARNING,
        lambda e, _: f"retries a call of {e.inner}, which has used up its own retries",
    ),
    "RetryBudgetSpent": (WARNING, lambda e, _: f"retry budget {e.budget!r} is spent"),
    "DeadlinePassed": (WARNING, lambda e, _: f"the deadline passed {e.where}"),
    "CircuitChanged": (
        WARNING,
        lambda e, _: f"circuit {e.circuit!r} went from {e.old_state} to {e.new_state}",
    ),
    "CallTimedOut": (WARNING, lambda e, _: f"a call took longer than {e.seconds:.3g} s"),
    "CacheHit": (DEBUG, lambda e, _: "served from the cache"),
    "CacheMiss": (DEBUG, lambda e, _: "not in the cache"),
    "CacheSkipped": (WARNING, lambda e, _: f"cache: {e.reason}"),
    "CallSucceeded": (
        DEBUG,
        lambda e, _: f"succeeded{_seconds(e)} in {_count(e.attempts, 'attempt')}",
    ),
    "CallGaveUp": (
        ERROR,
        lambda e, error: f"gave up{_seconds(e)} and {_count(e.attempts, 'attempt')} with {error}",
    ),
    "TaskChanged": (INFO, _changed),
    "WorkflowChanged": (INFO, _changed),
    "StepChanged": (DEBUG, _changed),
    "HandlerFailed": (ERROR, lambda e, error: f"the event handler raised {error}"),
}
