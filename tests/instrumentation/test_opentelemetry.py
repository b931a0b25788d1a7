# this_file: tests/instrumentation/test_opentelemetry.py
"""Events as spans, with the real SDK."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from opero import opero
from opero.events import Run, TaskChanged, event_bus
from opero.instrumentation import OpenTelemetryListener, trace_calls
from opero.testing import flaky


class Tracing:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> list[Any]:
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def tracing() -> Tracing:
    return Tracing()


def test_a_call_is_a_span_and_its_attempts_are_events(tracing: Tracing, face: Any) -> None:
    fetch = opero(cache=False, min_delay=0)(face.of(flaky("ok", failures=1)))
    with trace_calls(tracing.provider):
        face.run(fetch)
    (span,) = tracing.spans
    assert span.name == fetch.__qualname__
    assert [e.name for e in span.events] == ["attempt_failed", "retry_scheduled", "call_succeeded"]
    assert span.events[0].attributes["error.type"] == "ConnectionError"
    assert span.events[1].attributes["opero.attempt"] == 2
    assert span.attributes["opero.attempts"] == 2
    assert span.attributes["opero.source"] == "fresh"
    assert span.status.status_code is StatusCode.UNSET
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_call_that_fails_is_an_error_without_its_message(tracing: Tracing) -> None:
    fetch = opero(cache=False, retries=0)(flaky("ok", failures=9, error=ValueError("hunter2")))
    with trace_calls(tracing.provider), pytest.raises(ValueError, match="hunter2"):
        fetch()
    (span,) = tracing.spans
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "ValueError"
    assert "hunter2" not in span.to_json()
    with trace_calls(tracing.provider, messages=True), pytest.raises(ValueError, match="hunter2"):
        fetch()
    assert "hunter2" in tracing.spans[1].to_json()


def test_calls_within_a_call_are_its_children(tracing: Tracing, face: Any) -> None:
    inner = opero(face.of(lambda: 1))

    def nested() -> Any:
        return inner()

    async def anested() -> Any:
        await asyncio.sleep(0)
        return await inner()

    outer = opero(cache=False)(anested if face.asynchronous else nested)
    with trace_calls(tracing.provider):
        face.run(outer)
        face.run(outer)
    first, outer_span, hit, _ = tracing.spans
    assert first.parent.span_id == outer_span.context.span_id
    assert hit.attributes["opero.source"] == "hit"
    assert outer_span.parent is None


def test_spans_of_other_libraries_nest_in_both_directions(tracing: Tracing) -> None:
    tracer = tracing.provider.get_tracer("shop")

    @opero(cache=False)
    def fetch() -> None:
        with tracer.start_as_current_span("GET /"):
            pass

    with trace_calls(tracing.provider), tracer.start_as_current_span("request"):
        fetch()
    get, call, request = tracing.spans
    assert get.parent.span_id == call.context.span_id
    assert call.parent.span_id == request.context.span_id


def test_calls_side_by_side_have_spans_of_their_own(tracing: Tracing) -> None:
    @opero(cache=False)
    async def fetch(n: int) -> str:
        await asyncio.sleep(0)
        return trace.format_span_id(trace.get_current_span().get_span_context().span_id)

    async def main() -> list[str]:
        return await asyncio.gather(*(fetch(n) for n in range(5)))

    with trace_calls(tracing.provider):
        seen = asyncio.run(main())
    spans = {trace.format_span_id(s.context.span_id) for s in tracing.spans}
    assert len(spans) == 5
    assert spans == set(seen)


def test_a_task_is_a_span_around_its_calls(tracing: Tracing) -> None:
    with trace_calls(tracing.provider):
        with Run("Fetch1"):
            for state in ("RUNNING", "RETRYING", "SUCCEEDED"):
                event_bus.emit(TaskChanged(function="Fetch1", task="t", state=state))
                if state == "RUNNING":
                    opero(cache=False)(lambda: 1)()
        event_bus.emit(TaskChanged(function="no run", task="t", state="RUNNING"))
    call, task = tracing.spans
    assert (task.name, call.parent.span_id) == ("Fetch1", task.context.span_id)
    assert [e.name for e in task.events] == ["task"]


def test_a_coroutine_closed_in_another_context_ends_its_span_without_an_error(
    tracing: Tracing, caplog: pytest.LogCaptureFixture
) -> None:
    @opero(cache=False)
    async def hang() -> None:
        await asyncio.sleep(60)

    async def main() -> Any:
        coroutine = hang()
        coroutine.send(None)
        return coroutine

    with caplog.at_level(logging.DEBUG), trace_calls(tracing.provider):
        coroutine = asyncio.run(main())
        coroutine.close()
        gc.collect()
    (span,) = tracing.spans
    assert span.end_time is not None
    assert "error.type" not in span.attributes
    assert "detach" not in caplog.text


def test_an_end_without_a_start_is_ignored(tracing: Tracing) -> None:
    listener = OpenTelemetryListener(tracing.provider)

    @opero(cache=False)
    def fetch() -> None:
        subscribed.append(listener.listen())

    subscribed: list[Any] = []
    with event_bus.subscribe(lambda e: None):
        fetch()
    subscribed[0].cancel()
    assert tracing.spans == []


def test_a_missing_library_is_met_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'opero\[otel\]'"):
        trace_calls()
