# this_file: tests/instrumentation/test_prometheus.py
"""Events as metrics, with the real client library."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from opero import CircuitBreaker, opero
from opero.events import event_bus
from opero.instrumentation import PrometheusListener
from opero.testing import FakeClock, flaky


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """Return the only sample with these labels, whatever its module."""
    samples = [s for metric in registry.collect() for s in metric.samples if s.name == name]
    found = [s.value for s in samples if labels.items() <= s.labels.items()]
    assert len(found) <= 1
    return found[0] if found else None


def test_calls_are_counted_by_their_end(registry: CollectorRegistry, face: Any) -> None:
    fetch = opero(min_delay=0, retries=1)(face.of(flaky("ok", failures=1)))
    with PrometheusListener(registry).listen():
        face.run(fetch)
        face.run(fetch)
    name = fetch.__qualname__
    ended = {"function": name, "outcome": "ok"}
    assert value(registry, "opero_calls_total", source="fresh", **ended) == 1
    assert value(registry, "opero_calls_total", source="hit", **ended) == 1
    assert value(registry, "opero_call_duration_seconds_count", function=name) == 2
    assert value(registry, "opero_calls_in_progress", function=name) == 0
    assert (
        value(registry, "opero_attempts_failed_total", function=name, error="ConnectionError") == 1
    )
    assert value(registry, "opero_retries_total", function=name) == 1
    for result in ("hit", "miss"):
        assert value(registry, "opero_cache_requests_total", function=name, result=result) == 1


def test_calls_that_fail_are_counted_by_their_error(registry: CollectorRegistry) -> None:
    fetch = opero(cache=False, retries=0)(flaky("ok", failures=9, error=KeyError))
    with PrometheusListener(registry).listen(), pytest.raises(KeyError):
        fetch()
    labels = {"function": "flaky", "error": "KeyError"}
    assert value(registry, "opero_calls_given_up_total", **labels) == 1
    assert (
        value(registry, "opero_calls_total", function="flaky", source="fresh", outcome="KeyError")
        == 1
    )


def test_a_call_under_way_is_in_progress(registry: CollectorRegistry) -> None:
    seen: list[float | None] = []
    fetch = opero(cache=False)(
        lambda: seen.append(value(registry, "opero_calls_in_progress", function=fetch.__qualname__))
    )
    with PrometheusListener(registry).listen():
        fetch()
    assert seen == [1]


def test_waits_fallbacks_timeouts_and_rejections_are_counted(
    registry: CollectorRegistry, clock: FakeClock
) -> None:
    @opero(
        cache=False, rate_limit="1/s", retries=0, arg_fallback="x", retry_if_result=lambda r: not r
    )
    def fetch(x: Any) -> Any:
        return x

    with PrometheusListener(registry, prefix="shop", buckets=[0.5, 2]).listen():
        fetch([0, 1])
        fetch([0, 1])
    name = fetch.__qualname__
    assert value(registry, "shop_fallbacks_total", function=name) == 2
    assert (
        value(registry, "shop_attempts_failed_total", function=name, error="rejected result") == 2
    )
    assert value(registry, "shop_limiter_wait_seconds_bucket", function=name, le="0.5") == 0
    waits = value(registry, "shop_limiter_wait_seconds_bucket", function=name, le="2.0")
    assert waits
    assert clock.elapsed > 0


def test_the_state_of_a_circuit_is_a_gauge(registry: CollectorRegistry) -> None:
    breaker = CircuitBreaker(fail_max=1, name="geocoder")
    fetch = opero(cache=False, retries=0, circuit_breaker=breaker)(flaky("ok", failures=9))
    with PrometheusListener(registry).listen(), pytest.raises(ConnectionError):
        fetch()
    assert value(registry, "opero_circuit_state", circuit="geocoder", state="open") == 1
    assert value(registry, "opero_circuit_state", circuit="geocoder", state="closed") == 0
    assert value(registry, "opero_circuit_changes_total", circuit="geocoder", state="open") == 1


def test_a_single_function_may_be_counted(registry: CollectorRegistry) -> None:
    fetch = opero(on_event=PrometheusListener(registry))(lambda: 1)
    fetch()
    page = generate_latest(registry).decode()
    assert (
        f'opero_cache_requests_total{{function="{fetch.__qualname__}",module="{__name__}"' in page
    )
    assert not event_bus.active


def test_a_missing_library_is_met_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'opero\[prometheus\]'"):
        PrometheusListener()


def test_functions_of_one_name_in_two_modules_are_two_series(registry: CollectorRegistry) -> None:
    with PrometheusListener(registry).listen():
        for name in ("users_api", "billing_api"):
            module = types.ModuleType(name)
            exec("def get(x): return x", module.__dict__)
            opero(cache=False)(module.get)(1)
    for name in ("users_api", "billing_api"):
        labels = {"module": name, "function": "get", "source": "fresh", "outcome": "ok"}
        assert registry.get_sample_value("opero_calls_total", labels) == 1


def test_circuits_of_one_name_in_two_modules_are_two_series(registry: CollectorRegistry) -> None:
    with PrometheusListener(registry).listen():
        for name in ("users_api", "billing_api"):
            module = types.ModuleType(name)
            exec("def get(x): raise OSError(x)", module.__dict__)
            fetch = opero(cache=False, retries=0, circuit_breaker=CircuitBreaker(fail_max=1))(
                module.get
            )
            with pytest.raises(OSError, match="1"):
                fetch(1)
    for name in ("users_api", "billing_api"):
        labels = {"module": name, "circuit": "get", "state": "open"}
        assert registry.get_sample_value("opero_circuit_changes_total", labels) == 1
