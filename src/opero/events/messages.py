# this_file: src/opero/events/messages.py
"""Describe events as log lines: a level and a sentence without any argument value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from opero.utils.secrets import mask_text, mask_urls, masked_repr
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.events.types import Event


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
    level, sentence = _SENTENCES.get(type(event).__name__, (DEBUG, ""))
    if sentence:
        text = sentence.format(e=event, **_phrases(event, messages=messages))
    else:
        text = _anything(event, messages=messages)
    return level, mask_urls(f"{event.function}: {text}")


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


def _phrases(event: Event, *, messages: bool) -> dict[str, str]:
    """Return the parts of sentences that depend on more than one value."""
    error = _error(event.get("error"), messages=messages)
    attempts, seconds, state = event.get("attempts"), event.get("seconds"), event.get("state")
    span = event.get("delay") if seconds is None else seconds
    total, reason, value = event.get("total"), event.get("reason"), event.get("value")
    return {
        "after": "" if seconds is None else f" after {seconds:.3f} s",
        "attempts": f"{attempts} attempt{'s' * (attempts != 1)}",
        "error": error,
        "of_total": "" if total is None else f" of {total}",
        "outcome": f"failed with {error}" if error else "gave a rejected result",
        "reason": "" if reason is None else f", {reason}",
        "span": "" if span is None else format_seconds(span),
        "state": str(getattr(state, "name", state)).lower(),
        "with_error": f" with {error}" if error else "",
        "with_value": f" with {value}" if value else "",
    }


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


_CHANGED = "{e.type} {state}{after}{with_error}"

# By name, so that the classes are not loaded for it.
_SENTENCES: Final[dict[str, tuple[int, str]]] = {
    "AttemptFailed": (WARNING, "attempt {e.attempt}{with_value} {outcome}{after}"),
    "RetryScheduled": (INFO, "attempt {e.attempt} in {span}"),
    "FallbackUsed": (INFO, "falls back on {e.value}"),
    "LimiterWaited": (DEBUG, "waited {span} for a limit"),
    "MapWaiting": (WARNING, "the map stands at {e.done}{of_total} items{reason}{after}"),
    "LimiterPaused": (WARNING, "the service asks for a pause of {span} ({e.source})"),
    "ValueCooling": (WARNING, "skips {e.value} for {span} ({e.source})"),
    "RetriesNested": (WARNING, "retries a call of {e.inner}, which has used up its own retries"),
    "RetryBudgetSpent": (WARNING, "retry budget {e.budget!r} is spent"),
    "DeadlinePassed": (WARNING, "the deadline passed {e.where}"),
    "CircuitChanged": (WARNING, "circuit {e.circuit!r} went from {e.old_state} to {e.new_state}"),
    "CallTimedOut": (WARNING, "a call took longer than {span}"),
    "CacheHit": (DEBUG, "served from the cache"),
    "CacheMiss": (DEBUG, "not in the cache"),
    "CacheSkipped": (WARNING, "cache: {e.reason}"),
    "CallSucceeded": (DEBUG, "succeeded{after} in {attempts}"),
    "CallGaveUp": (ERROR, "gave up{after} and {attempts} with {error}"),
    "TaskChanged": (INFO, _CHANGED),
    "WorkflowChanged": (INFO, _CHANGED),
    "StepChanged": (DEBUG, _CHANGED),
    "HandlerFailed": (ERROR, "the event handler raised {error}"),
}
"""Level and sentence by event; `e` is the event, the other names are those of `_phrases`."""
