# this_file: src/opero/instrumentation/exporters.py
"""Export events: as OpenTelemetry spans, and as Prometheus metrics.

A call is a span, with its attempts as events of it; only the API of OpenTelemetry is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from opero.events import (
    AttemptFailed,
    CacheHit,
    CacheMiss,
    CallEnded,
    CallGaveUp,
    CallStarted,
    CallTimedOut,
    CircuitChanged,
    FallbackUsed,
    LimiterWaited,
    RetryScheduled,
    TaskChanged,
    WorkflowChanged,
    event_bus,
)
from opero.events.types import Event
from opero.utils.lazy import load_extra
from opero.utils.secrets import mask_text, mask_urls

if TYPE_CHECKING:
    from opero.events import EventBus, Subscription


# --- OpenTelemetry --------------------------------------------------------------------------------

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


# --- Prometheus -----------------------------------------------------------------------------------

_STATES = ("closed", "open", "half_open", "forced_open", "disabled")


class PrometheusListener:
    """Counts and times calls; give it to a bus with `listen()`, or to one function with `on_event=`.

    | metric | labels beside module and function |
    |---|---|
    | `opero_calls_total` | source (fresh, hit, shared, ...), outcome (ok or the error's type) |
    | `opero_call_duration_seconds` (histogram) | |
    | `opero_calls_in_progress` (gauge) | |
    | `opero_attempts_failed_total`, `opero_calls_given_up_total` | error |
    | `opero_retries_total`, `opero_fallbacks_total`, `opero_timeouts_total` | |
    | `opero_limiter_wait_seconds` (histogram) | |
    | `opero_cache_requests_total` | result (hit, miss) |
    | `opero_circuit_state` (gauge, 1 for the state), `opero_circuit_changes_total` | circuit, state (no function) |

    Args:
        registry: Where the metrics are registered; the library's own registry by default.
        prefix: What their names begin with.
        buckets: Upper bounds of the histograms in seconds; the library's own by default.

    Raises:
        ModuleNotFoundError: prometheus-client is not installed.

    Example:
        >>> from prometheus_client import CollectorRegistry
        >>> from opero import opero
        >>> registry = CollectorRegistry()
        >>> with PrometheusListener(registry).listen():
        ...     opero(cache=False)(len)("abc")
        3
        >>> labels = {"module": "builtins", "function": "len", "source": "fresh", "outcome": "ok"}
        >>> registry.get_sample_value("opero_calls_total", labels)
        1.0
    """

    def __init__(
        self, registry: Any = None, *, prefix: str = "opero", buckets: Iterable[float] | None = None
    ) -> None:
        client = load_extra("prometheus_client", "prometheus")
        where: dict[str, Any] = {"registry": client.REGISTRY if registry is None else registry}

        def metric(kind: Any, name: str, doc: str, *labels: str, **options: Any) -> Any:
            return kind(f"{prefix}_{name}", doc, ("module", *labels), **{**where, **options})

        def counter(name: str, doc: str, *labels: str) -> Any:
            return metric(client.Counter, name, doc, "function", *labels)

        def histogram(name: str, doc: str) -> Any:
            bounds = {} if buckets is None else {"buckets": tuple(buckets)}
            return metric(client.Histogram, name, doc, "function", **bounds)

        self._calls = counter("calls", "Calls that ended.", "source", "outcome")
        self._duration = histogram("call_duration_seconds", "Seconds from start to end of a call.")
        self._running = metric(
            client.Gauge, "calls_in_progress", "Calls that are under way.", "function"
        )
        self._waits = histogram("limiter_wait_seconds", "Seconds a call waited for a limit.")
        self._state = metric(
            client.Gauge, "circuit_state", "1 for the state a circuit is in.", "circuit", "state"
        )
        self._changes = metric(
            client.Counter, "circuit_changes", "Changes of a circuit.", "circuit", "state"
        )
        cache = counter("cache_requests", "Answers of the cache.", "result")
        self._counters: dict[type[Event], tuple[Any, Callable[[Any], tuple[str, ...]]]] = {
            AttemptFailed: (counter("attempts_failed", "Real calls that failed.", "error"), _error),
            CallGaveUp: (counter("calls_given_up", "Calls that failed for good.", "error"), _error),
            RetryScheduled: (counter("retries", "Attempts after the first."), _nothing),
            FallbackUsed: (counter("fallbacks", "Fallback values tried."), _nothing),
            CallTimedOut: (counter("timeouts", "Real calls that took too long."), _nothing),
            CacheHit: (cache, lambda _: ("hit",)),
            CacheMiss: (cache, lambda _: ("miss",)),
        }
        """The events that are counted, each with its counter and what makes the counter's own labels."""

    def listen(self, bus: EventBus = event_bus) -> Subscription:
        """Count what happens on a bus from now on."""
        others = (CallStarted, CallEnded, LimiterWaited, CircuitChanged)
        return bus.subscribe(self, types=[*self._counters, *others])

    def __call__(self, event: Event) -> None:
        """Count one event."""
        where = event.module or "", event.function
        if type(event) in self._counters:
            counter, labels = self._counters[type(event)]
            counter.labels(*where, *labels(event)).inc()
        elif isinstance(event, CallStarted):
            self._running.labels(*where).inc()
        elif isinstance(event, CallEnded):
            outcome = "ok" if event.error is None else type(event.error).__name__
            self._calls.labels(*where, event.source, outcome).inc()
            self._duration.labels(*where).observe(event.seconds)
            self._running.labels(*where).dec()
        elif isinstance(event, LimiterWaited):
            self._waits.labels(*where).observe(event.seconds)
        elif isinstance(event, CircuitChanged):
            circuit = where[0], mask_urls(event.circuit)
            self._changes.labels(*circuit, event.new_state).inc()
            for state in _STATES:
                self._state.labels(*circuit, state).set(state == event.new_state)


def _nothing(_: Event) -> tuple[str, ...]:
    return ()


def _error(event: AttemptFailed | CallGaveUp) -> tuple[str, ...]:
    return ("rejected result" if event.error is None else type(event.error).__name__,)
