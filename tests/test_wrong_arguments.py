# this_file: tests/test_wrong_arguments.py
"""Arguments of a wrong type: the error names the argument and the value, whatever was called."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.tables import rows

import opero
from opero import (
    ConcurrencyLimit,
    ContextAdapter,
    EventBus,
    FallbackChain,
    OperoUsageError,
    Orchestrator,
    OrchestratorConfig,
    RetryBudget,
    add_classifier,
    clear_cache,
    get_logger,
    log_context,
)
from opero.durable import Orchestrator as DurableOrchestrator
from opero.durable import SqliteStore, activity, workflow
from opero.events import RetryScheduled
from opero.instrumentation import log_events
from opero.tasks import CircuitGroup, Parallel, Sequence, Task, run_sync
from opero.utils import configure_logging, ensure_async, run_async


def _listening() -> EventBus:
    bus = EventBus()
    bus.subscribe(print)
    return bus


def _log_context(logger: Any) -> None:
    with log_context(logger):
        pass


WRONG: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
    "classifier=": (add_classifier, [None, 5, "final"]),
    "namespace=": (clear_cache, [5, b"x", [5]]),
    "backend=": (lambda wrong: clear_cache(backend=wrong), [5, print]),
    "name=": (lambda wrong: ConcurrencyLimit(2, name=wrong), [5, b"x"]),
    "ratio=": (RetryBudget, ["x", None, -1]),
    "deadline=": (opero.deadline, ["soon", None, -1, float("nan")]),
    # --- orchestrator ---
    "config=": (lambda wrong: Orchestrator(config=wrong), [5, "x", OrchestratorConfig]),
    "options=": (lambda wrong: OrchestratorConfig(options=wrong), [None, 5, "x", [5]]),
    "logger=": (lambda wrong: OrchestratorConfig(logger=wrong), [5, "app"]),
    "primary=": (FallbackChain, [None, 5, "x"]),
    "function=": (Orchestrator().execute_sync, [None, 5, "x"]),
    # --- events and logs ---
    "event=": (_listening().emit, [None, 5, "x", print]),
    "types=": (lambda wrong: EventBus().subscribe(print, wrong), [None, 5, [5], "x"]),
    "queue=": (lambda wrong: EventBus().subscribe(print, queue=wrong), [None, 0, "x", 1.5]),
    "level=": (configure_logging, ["x", 1.5, print]),
    "to=": (log_events, [5, print]),
    "logger= ": (_log_context, [None, 5, "app"]),
    "logger=  ": (ContextAdapter, [None, 5, "app"]),
    # --- tasks ---
    "a task needs something callable": (Task, [None, 5, "x"]),
    "cannot be a step": (run_sync, [None, 5, "x"]),
    "breaker=": (lambda wrong: CircuitGroup(len, breaker=wrong), [5, "x", opero.CircuitBreaker]),
    "returns=": (lambda wrong: Sequence(len, returns=wrong), [None, 5, "first"]),
    "on_error=": (lambda wrong: Parallel(len, on_error=wrong), [None, 5, "skip"]),
    "limit=": (lambda wrong: Parallel(len, limit=wrong), [0, 1.5, "x"]),
    # --- durable ---
    "path=": (DurableOrchestrator, [None, 5, ""]),
    "path= ": (SqliteStore, [None, 5, ""]),
    "store=": (lambda wrong: DurableOrchestrator(store=wrong), [5, "x", SqliteStore]),
    "max_workers=": (lambda wrong: DurableOrchestrator("w.db", wrong), [0, None, "x", 1.5]),
    "name= ": (lambda wrong: activity(name=wrong), [5, ""]),
    "name=  ": (lambda wrong: workflow(name=wrong), [5, ""]),
    # --- functions ---
    "ensure_async() takes": (ensure_async, [None, 5, "x"]),
    "run_async() takes": (run_async, [None, 5, asyncio.sleep]),
}  # fmt: skip


@rows(("named", "call", "wrong"), [(n, call, w) for n, (call, ws) in WRONG.items() for w in ws])
def test_a_wrong_argument_is_named(named: str, call: Any, wrong: object) -> None:
    with pytest.raises(OperoUsageError, match=re.escape(named.strip())) as caught:
        call(wrong)
    assert repr(wrong) in str(caught.value) or type(wrong).__name__ in str(caught.value)


def test_a_single_event_class_may_stand_for_a_list() -> None:
    bus = EventBus()
    found: list[Any] = []
    bus.subscribe(found.append, RetryScheduled)
    bus.emit(RetryScheduled(attempt=2, delay=0))
    bus.emit({"type": "mine"})
    assert [type(event) for event in found] == [RetryScheduled]


def test_context_is_written_through_several_adapters() -> None:
    inner = ContextAdapter(get_logger("wrong_arguments"), {"a": 1})
    assert "a=1" in repr(inner)
    assert ContextAdapter(inner, {"b": 2}).context == {"b": 2}  # type: ignore[arg-type]
