# this_file: src/opero/instrumentation/prometheus.py
"""Turn events into Prometheus metrics."""

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
    event_bus,
)
from opero.utils.lazy import load_extra
from opero.utils.secrets import mask_urls

if TYPE_CHECKING:
    from opero.events import Event, EventBus, Subscription


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
        self,
        registry: Any = None,
        *,
        prefix: str = "opero",
        buckets: Iterable[float] | None = None,
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
