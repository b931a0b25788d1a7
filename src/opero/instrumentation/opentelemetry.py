# this_file: src/opero/instrumentation/opentelemetry.py
"""Events as OpenTelemetry spans: one for each call, its attempts as events of the span. Only the API is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.events import CallEnded, CallStarted, TaskChanged, WorkflowChanged, event_bus
from opero.events.types import Event
from opero.utils.lazy import load_extra
from opero.utils.secrets import mask_text, mask_urls

if TYPE_CHECKING:
    from opero.events import EventBus, Subscription


_STAMPS = frozenset({"type", "function", "at", "run_id", "parent_id", "module", "details", "error"})
_BEGINS = frozenset({"PENDING", "RUNNING"})
_ENDS = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "DONE", "DEAD"})


class OpenTelemetryListener:
    """Makes a span of each call, task and workflow; give it to a bus with `listen()`.

    While a call runs, its span is the current one, so that spans of an instrumented HTTP client become its children. A
    call within a call, a task within a sequence are children of the outer one. Attributes begin with "opero.";
    an error's type is "error.type", as in the semantic conventions.

    Args:
        tracer_provider: Where the tracer comes from; the global provider by default.
        messages: Record exceptions with message and traceback, masked; they may still hold private data. Only types
            otherwise.

    Raises:
        ModuleNotFoundError: opentelemetry-api is not installed.
    """

    def __init__(self, tracer_provider: Any = None, *, messages: bool = False) -> None:
        self._api = load_extra("opentelemetry.trace", "otel")
        self._contexts = load_extra("opentelemetry.context", "otel")
        self._tracer = self._api.get_tracer("opero", tracer_provider=tracer_provider)
        self._messages = messages
        self._spans: dict[str, tuple[Any, Any]] = {}

    def listen(self, bus: EventBus = event_bus) -> Subscription:
        """Trace what happens on a bus from now on."""
        return bus.subscribe(self, types=[Event])

    def __call__(self, event: Event) -> None:
        """Record one event."""
        if event.run_id is None:
            return
        if isinstance(event, CallStarted):
            self._begin(event, event.run_id, current=True)
        elif isinstance(event, CallEnded):
            self._end(event, event.run_id)
        elif isinstance(event, TaskChanged | WorkflowChanged):
            state = str(getattr(event.state, "name", event.state)).upper()
            if state in _BEGINS and event.run_id not in self._spans:
                # Its events may come from another task than the one that it runs in.
                self._begin(event, event.run_id, current=False)
            elif state in _ENDS:
                self._end(event, event.run_id)
            else:
                self._add(event, event.run_id)
        else:
            self._add(event, event.run_id)

    def _begin(self, event: Event, run_id: str, *, current: bool) -> None:
        around = self._spans.get(event.parent_id or "")
        parent = None
        # A span that any library has started within the outer run is nearer than the outer run itself.
        if around is not None and not self._api.get_current_span().get_span_context().is_valid:
            parent = self._api.set_span_in_context(around[0])
        attributes = {"opero.run_id": run_id}
        if event.module:
            attributes["opero.module"] = event.module
            attributes["code.function.name"] = f"{event.module}.{event.function}"
        span = self._tracer.start_span(event.function, context=parent, attributes=attributes)
        token = None
        if current:
            token = self._contexts.attach(self._api.set_span_in_context(span))
        self._spans[run_id] = (span, token)

    def _add(self, event: Event, run_id: str) -> None:
        known = self._spans.get(run_id)
        if known is not None:
            known[0].add_event(event.type, attributes=_attributes(event))

    def _end(self, event: Event, run_id: str) -> None:
        span, token = self._spans.pop(run_id, (None, None))
        if span is None:
            return
        span.set_attributes(_attributes(event))
        error = event.get("error")
        if error is not None:
            if self._messages:
                span.add_event("exception", attributes=_exception(error))
            status = self._api.Status(self._api.StatusCode.ERROR, type(error).__name__)
            span.set_status(status)
        # A coroutine that is closed by the garbage collector ends in another context than its own, which is gone.
        if token is not None and self._api.get_current_span() is span:
            self._contexts.detach(token)
        span.end()


def trace_calls(
    tracer_provider: Any = None, *, messages: bool = False, bus: EventBus = event_bus
) -> Subscription:
    """Make a span of each call from now on: `OpenTelemetryListener(...).listen(bus)`.

    Returns:
        The subscription: `cancel()` it, or use it as a context manager.
    """
    return OpenTelemetryListener(tracer_provider, messages=messages).listen(bus)


def _attributes(event: Event) -> dict[str, str | bool | int | float]:
    """Return the facts of an event that a span can hold; of an error its type."""
    facts: dict[str, str | bool | int | float] = {}
    for key, value in event.items():
        if key not in _STAMPS and isinstance(value, str | bool | int | float):
            facts[f"opero.{key}"] = mask_urls(value) if isinstance(value, str) else value
    error = event.get("error")
    if error is not None:
        facts["error.type"] = type(error).__name__
    return facts


def _exception(error: BaseException) -> dict[str, str]:
    """Return the attributes of an exception event, as the semantic conventions name them, with secrets masked."""
    import traceback

    return {
        "exception.type": f"{type(error).__module__}.{type(error).__qualname__}",
        "exception.message": mask_text(str(error)),
        "exception.stacktrace": mask_text("".join(traceback.format_exception(error))),
    }
