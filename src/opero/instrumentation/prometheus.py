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

__all__ = ["PrometheusListener"]

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
        timed = where if buckets is None else {**where, "buckets": tuple(buckets)}

        def counter(name: str, doc: str, *labels: str) -> Any:
            return client.Counter(f"{prefix}_{name}", doc, ("module", *labels), **where)

        def histogram(name: str, doc: str) -> Any:
            return client.Histogram(f"{prefix}_{name}", doc, ("module", "function"), **timed)

        def gauge(name: str, doc: str, *labels: str) -> Any:
            return client.Gauge(f"{prefix}_{name}", doc, ("module", *labels), **where)

        of_function = "function"
        self._calls = counter("calls", "Calls that ended.", of_function, "source", "outcome")
        self._duration = histogram("call_duration_seconds", "Seconds from start to end of a call.")
        self._running = gauge("calls_in_progress", "Calls that are under way.", of_function)
        self._failed = counter("attempts_failed", "Real calls that failed.", of_function, "error")
        self._given_up = counter(
            "calls_given_up", "Calls that failed for good.", of_function, "error"
        )
        self._retries = counter("retries", "Attempts after the first.", of_function)
        self._fallbacks = counter("fallbacks", "Fallback values tried.", of_function)
        self._timeouts = counter("timeouts", "Real calls that took too long.", of_function)
        self._waits = histogram("limiter_wait_seconds", "Seconds a call waited for a limit.")
        self._cache = counter("cache_requests", "Answers of the cache.", of_function, "result")
        self._state = gauge("circuit_state", "1 for the state a circuit is in.", "circuit", "state")
        self._changes = counter("circuit_changes", "Changes of a circuit.", "circuit", "state")
        self._actions: dict[type[Event], Callable[[Any], None]] = {
            CallStarted: lambda e: self._running.labels(_module(e), e.function).inc(),
            CallEnded: self._ended,
            AttemptFailed: lambda e: self._failed.labels(
                _module(e), e.function, _kind(e.error)
            ).inc(),
            CallGaveUp: lambda e: self._given_up.labels(
                _module(e), e.function, _kind(e.error)
            ).inc(),
            RetryScheduled: lambda e: self._retries.labels(_module(e), e.function).inc(),
            FallbackUsed: lambda e: self._fallbacks.labels(_module(e), e.function).inc(),
            CallTimedOut: lambda e: self._timeouts.labels(_module(e), e.function).inc(),
            LimiterWaited: lambda e: self._waits.labels(_module(e), e.function).observe(e.seconds),
            CacheHit: lambda e: self._cache.labels(_module(e), e.function, "hit").inc(),
            CacheMiss: lambda e: self._cache.labels(_module(e), e.function, "miss").inc(),
            CircuitChanged: self._changed,
        }

    def listen(self, bus: EventBus = event_bus) -> Subscription:
        """Count what happens on a bus from now on."""
        return bus.subscribe(self, types=self._actions)

    def __call__(self, event: Event) -> None:
        """Count one event."""
        act = self._actions.get(type(event))
        if act is not None:
            act(event)

    def _ended(self, event: CallEnded) -> None:
        outcome = "ok" if event.error is None else _kind(event.error)
        self._calls.labels(_module(event), event.function, event.source, outcome).inc()
        self._duration.labels(_module(event), event.function).observe(event.seconds)
        self._running.labels(_module(event), event.function).dec()

    def _changed(self, event: CircuitChanged) -> None:
        self._changes.labels(_module(event), mask_urls(event.circuit), event.new_state).inc()
        for state in _STATES:
            self._state.labels(_module(event), mask_urls(event.circuit), state).set(
                state == event.new_state
            )


def _module(event: Event) -> str:
    return event.module or ""


def _kind(error: BaseException | None) -> str:
    return "rejected result" if error is None else type(error).__name__
