# this_file: tests/events/test_mappings.py
"""Events read as mappings, and dicts become events."""

from __future__ import annotations

import enum
import pickle
from typing import Any

import pytest

from opero.events import (
    CacheHit,
    CircuitChanged,
    CustomEvent,
    Event,
    EventBus,
    MapProgress,
    RetryScheduled,
    StepChanged,
    TaskChanged,
    WorkflowChanged,
)


class State(enum.Enum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


RETRY = RetryScheduled(function="fetch", attempt=2, delay=0.5)


def test_an_event_reads_like_a_dict() -> None:
    assert RETRY["attempt"] == 2
    assert RETRY.get("delay") == 0.5
    assert RETRY.get("speed", 7) == 7
    assert "delay" in RETRY
    assert "speed" not in RETRY
    assert dict(RETRY) == dict(RETRY.items())
    assert list(RETRY)[:2] == ["type", "function"]
    assert len(RETRY) == len(RETRY.keys())
    with pytest.raises(KeyError, match="'speed'"):
        RETRY["speed"]


@pytest.mark.parametrize("name", ["keys", "get", "__class__", "name"])
def test_keys_are_the_fields_of_an_event(name: str) -> None:
    with pytest.raises(KeyError):
        RETRY[name]


@pytest.mark.parametrize(
    ("kind", "received"),
    [
        (Event, "event"),
        (CacheHit, "cache_hit"),
        (RetryScheduled, "retry_scheduled"),
        (CircuitChanged, "circuit"),
        (TaskChanged, "task"),
        (WorkflowChanged, "workflow"),
        (StepChanged, "step"),
        (MapProgress, "map"),
        (CustomEvent, "custom"),
    ],
)
def test_an_event_has_its_type_as_a_key(kind: type[Event], received: str) -> None:
    assert kind.type == received


def test_a_task_event_has_the_keys_of_its_state() -> None:
    def keys(**given: Any) -> set[str]:
        return {"result", "error"} & set(TaskChanged(function="t", task="t", **given))

    assert keys(state=State.RUNNING) == set()
    assert keys(state=State.SUCCEEDED, result=None) == {"result"}
    assert keys(state="SUCCEEDED", result=None) == {"result"}
    assert keys(state=State.FAILED, error=ValueError()) == {"error"}


def test_details_are_keys_and_do_not_hide_fields() -> None:
    event = TaskChanged(function="t", task="t", state=1, details={"tries": 2, "state": 3})
    assert event["tries"] == 2
    assert event["state"] == 1
    assert "details" not in event
    assert pickle.loads(pickle.dumps(event)) == event


def test_a_dict_about_a_task_reaches_handlers_of_task_events() -> None:
    class Named:
        name = "Flaky"

    task, caught_events, bus = Named(), [], EventBus()
    with bus.subscribe(caught_events.append, [TaskChanged]):
        bus.emit({"type": "task", "task": task, "state": "RETRYING", "tries": 2, "wait": 0.1})
        bus.emit({"type": "circuit", "circuit": task})
    (event,) = caught_events
    assert (event.name, event.task, event.state) == ("Flaky", task, "RETRYING")
    assert (event["type"], event["tries"], event["wait"]) == ("task", 2, 0.1)


def test_any_other_dict_is_an_event_of_its_own() -> None:
    caught_events: list[Event] = []
    bus = EventBus()
    with bus.subscribe(caught_events.append):
        bus.emit({"type": "order", "name": "basket", "total": 3})
        bus.emit({})
    assert isinstance(caught_events[0], CustomEvent)
    assert (caught_events[0].name, caught_events[0]["type"], caught_events[0]["total"]) == (
        "basket",
        "order",
        3,
    )
    assert (caught_events[1].name, caught_events[1]["type"]) == ("custom", "custom")


def test_a_dict_costs_nothing_without_a_subscription() -> None:
    assert repr(EventBus().emit({"type": 5})) == "<emitted>"
