# this_file: tests/composition/test_planted_secret.py
"""One secret is planted wherever a program may put one; no output of opero holds it, in any encoding."""

from __future__ import annotations

import base64
import io
import logging
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from opero import (
    CircuitBreaker,
    ConcurrencyLimit,
    Orchestrator,
    OrchestratorConfig,
    RateLimiter,
    failures,
    opero,
    operomap,
)
from opero.cli import main
from opero.durable import Orchestrator as Durable
from opero.durable import activity, workflow
from opero.errors import OperoError
from opero.events import Event
from opero.instrumentation import PrometheusListener, Timeline, log_events, trace_calls
from opero.tasks import Task, run_sync
from opero.testing import NotRecordedError, capture_events, record, replay

SECRET = "hunter2-pl4nted"
URL = f"https://me:{SECRET}@host/p?page=7&api_key={SECRET}#access_token={SECRET}"
FORMS = (
    SECRET,
    SECRET.encode().hex(),
    base64.b64encode(SECRET.encode()).decode().rstrip("=")[:-1],
    base64.b64encode(f":{SECRET}".encode()).decode().rstrip("=")[2:-1],
    base64.b64encode(f"::{SECRET}".encode()).decode().rstrip("=")[3:-1],
)


def holds_secret(output: object) -> list[str]:
    text = f"{output}\n{output!r}"
    return [form for form in FORMS if form in text]


def fails(url: Any, api_key: str = SECRET, *, headers: Any = None) -> Any:
    raise ConnectionError(f"GET {URL} failed, Authorization: Bearer {SECRET}")


def answers(url: Any, api_key: str = SECRET) -> Any:
    return {
        "sent": api_key,
        "raw": api_key.encode(),
        "basic": base64.b64encode(f"me:{api_key}".encode()).decode(),
        "url": f"https://host/?token={api_key}",
    }


@pytest.mark.parametrize("kind", [fails, answers])
def test_a_call_shows_no_secret(kind: Any, tmp_path: Path) -> None:
    output: list[object] = []
    lines = io.StringIO()
    logger = logging.getLogger("planted")
    logger.propagate = False
    logger.setLevel("DEBUG")
    logger.addHandler(logging.StreamHandler(lines))
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    registry = CollectorRegistry()
    breaker = CircuitBreaker(fail_max=1, name=f"redis://:{SECRET}@host/0")
    fetch = opero(
        retries=1,
        min_delay=0,
        arg_fallback="url",
        circuit_breaker=breaker,
        cache_namespace="planted",
        cache_ignore=("headers",) if kind is fails else (),
    )(kind)
    with (
        capture_events(Event) as events,
        warnings.catch_warnings(record=True) as warned,
        log_events(logger, messages=True, types=[Event]),
        trace_calls(provider, messages=True),
        PrometheusListener(registry).listen(),
        Timeline() as timeline,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            try:
                fetch([URL, f"redis//:{SECRET}@host"])
            except Exception as error:  # noqa: BLE001 - any will do
                # The message is the function's own; all else is opero's.
                output += [getattr(error, "__notes__", [])]
                output += [e for e in failures(error) if isinstance(e, OperoError)]
    output += [list(events), [str(w.message) for w in warned], lines.getvalue(), str(timeline)]
    output += [[span.to_json() for span in exporter.get_finished_spans()]]
    output += [generate_latest(registry).decode(), fetch.explain(), fetch.options, fetch.stats]
    output += [fetch.cache, fetch.cache.info(), fetch]
    assert [one for one in output if holds_secret(one)] == []
    logger.handlers.clear()


@pytest.mark.parametrize("kind", [fails, answers])
def test_a_recording_holds_no_secret(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    fetch = opero(cache=False, retries=0)(kind)
    with record(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fetch("https://host/", SECRET)
        except ConnectionError:
            pass
    assert holds_secret(path.read_text()) == []
    with pytest.raises((ConnectionError, NotRecordedError)) as caught, replay(path):
        fetch("https://host/", SECRET)
    assert holds_secret(caught.value) == []


@pytest.mark.parametrize(
    "options",
    [
        {"cache_backend": f"redis://user:{SECRET}@127.0.0.1:1/0"},
        {"cache_backend": f"rdis://u:{SECRET}@h/0"},
        {"cache_backend": f"redis:/:{SECRET}@h/0"},
        {"cache_backend": f"redis://:a/{SECRET}@h/0"},
        {"cache_namespace": f"https://h/?sig={SECRET}"},
        {"rate_limit": f"5 per https://u:{SECRET}@h"},
        {"cache_ttl": f"redis://:{SECRET}@h"},
        {"arg_fallback": {"url": [URL, f"amqp://a:{SECRET}@b"]}},
    ],
    ids=str,
)
def test_options_and_errors_about_them_show_no_secret(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any
        try:
            made = opero(**options)(answers)
        except OperoError as error:
            made = error
    if isinstance(made, OperoError):
        assert holds_secret("".join(traceback.format_exception_only(made))) == []
    else:
        assert [holds_secret(one) for one in (made.options, made, made.explain())] == [[]] * 3


def test_tasks_and_orchestrators_show_no_secret() -> None:
    with capture_events(Event) as events:
        for call in (
            lambda: run_sync(Task(fails, URL, options={"retries": 1, "min_delay": 0})),
            lambda: Orchestrator(OrchestratorConfig(fallbacks=[fails])).execute_sync(fails, URL),
        ):
            with pytest.raises(ConnectionError) as caught:
                call()
            assert holds_secret(getattr(caught.value, "__notes__", [])) == []
    assert holds_secret(list(events)) == []


def test_results_of_maps_show_no_secret() -> None:
    mapped = operomap(mode="thread", cache=False, retries=0, progress=False)(fails)
    result = mapped.map([URL])
    output = [result, result._repr_html_(), result.failures, str(result.failures[0])]
    assert [one for one in output if holds_secret(one)] == []


@pytest.mark.parametrize(
    "make",
    [
        CircuitBreaker,
        lambda name: ConcurrencyLimit(2, name=name),
        lambda name: RateLimiter(5, name=name),
    ],
)
def test_a_guard_that_an_address_names_shows_no_secret(make: Any) -> None:
    assert holds_secret(make(URL)) == []


@activity
def pay(url: str, api_key: str) -> str:
    return f"paid at {url} with token={api_key}"


@workflow
def order(url: str, api_key: str) -> str:
    return pay(url, api_key)


def test_the_command_line_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERO_REDIS_URL", f"redis://:{SECRET}@host/0")
    path = str(tmp_path / "journal.db")
    with Durable(path) as durable:
        run_id = durable.invoke_workflow("order", URL, SECRET)
        assert SECRET in durable.wait(run_id)["output"]
    for command in (
        ["info"],
        ["info", "--json"],
        *(
            [*verb, *form, "--db", path]
            for verb in (
                ["workflows", "list"],
                ["workflows", "show", run_id],
                ["workflows", "steps", run_id],
            )
            for form in ([], ["--json"])
        ),
        ["cache", "list", "--backend", f"redis://:{SECRET}@127.0.0.1:1/0"],
        ["cache", "list", "--backend", f"rdis://:{SECRET}@127.0.0.1:1/0"],
    ):
        main(command)
        assert holds_secret("".join(capsys.readouterr())) == [], command
