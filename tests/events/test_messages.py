# this_file: tests/events/test_messages.py
"""Events as lines for a log."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from typing import Any

import pytest

from opero.events import (
    AttemptFailed,
    CacheHit,
    CacheMiss,
    CacheSkipped,
    CallEnded,
    CallGaveUp,
    CallSucceeded,
    CallTimedOut,
    CircuitChanged,
    CustomEvent,
    DeadlinePassed,
    Event,
    FallbackUsed,
    HandlerFailed,
    LimiterPaused,
    LimiterWaited,
    MapProgress,
    RetriesNested,
    RetryBudgetSpent,
    RetryScheduled,
    StepChanged,
    TaskChanged,
    ValueCooling,
    WorkflowChanged,
)
from opero.events.messages import describe_event, log_event

pytestmark = pytest.mark.internal

SECRET = ConnectionError("https://me:hunter2@db/\nmore")


class State(enum.Enum):
    FAILED = 1


def made(kind: Any, **given: Any) -> Event:
    event: Event = kind(function="f", **given)
    return event


WORDS = [
    (
        made(AttemptFailed, attempt=1, value="model='x'", error=SECRET, seconds=0.5),
        30,
        "attempt 1 with model='x' failed with ConnectionError after 0.500 s",
    ),
    (
        made(AttemptFailed, attempt=2, value=None, error=None),
        30,
        "attempt 2 gave a rejected result",
    ),
    (made(RetryScheduled, attempt=2, delay=0.25), 20, "attempt 2 in 0.25 s"),
    (made(FallbackUsed, value="api_key[1]", index=1), 20, "falls back on api_key[1]"),
    (made(LimiterWaited, seconds=1.5), 10, "waited 1.5 s for a limit"),
    (made(LimiterWaited, seconds=7200.4), 10, "waited 2 h for a limit"),
    (
        made(LimiterPaused, seconds=9.0, source="Retry-After"),
        30,
        "the service asks for a pause of 9 s (Retry-After)",
    ),
    (
        made(ValueCooling, value="model='x'", seconds=9.0, source="Retry-After"),
        30,
        "skips model='x' for 9 s (Retry-After)",
    ),
    (
        made(RetriesNested, inner="get"),
        30,
        "retries a call of get, which has used up its own retries",
    ),
    (made(RetryBudgetSpent, budget="api"), 30, "retry budget 'api' is spent"),
    (made(DeadlinePassed, where="during the call"), 30, "the deadline passed during the call"),
    (
        made(CircuitChanged, circuit="c", old_state="closed", new_state="open", retry_after=3.0),
        30,
        "circuit 'c' went from closed to open",
    ),
    (made(CallTimedOut, seconds=2), 30, "a call took longer than 2 s"),
    (made(CacheHit), 10, "served from the cache"),
    (made(CacheMiss), 10, "not in the cache"),
    (made(CacheSkipped, reason="too large"), 30, "cache: too large"),
    (made(CallSucceeded, attempts=1, calls=1), 10, "succeeded in 1 attempt"),
    (
        made(CallGaveUp, attempts=3, calls=3, error=SECRET, seconds=4.0),
        40,
        "gave up after 4.000 s and 3 attempts with ConnectionError",
    ),
    (
        made(TaskChanged, task=1, state=State.FAILED, error=SECRET, seconds=1.0),
        20,
        "task failed after 1.000 s with ConnectionError",
    ),
    (made(WorkflowChanged, workflow_id="w", state="RUNNING"), 20, "workflow running"),
    (made(StepChanged, workflow_id="w", step="1", state="DONE"), 10, "step done"),
    (
        made(HandlerFailed, handler=print, error=SECRET, event=CacheHit(function="g")),
        40,
        "the event handler raised ConnectionError",
    ),
    (
        made(MapProgress, done=3, total=None),
        10,
        "map done=3 failed=0 cached=0 finished=False",
    ),
    (made(CustomEvent, details={"type": "mine", "body": [1]}), 10, "custom"),
    (
        made(
            CallEnded,
            source="hit",
            attempts=0,
            calls=0,
            error=SECRET,
            seconds=0.0,
            slept=0.0,
            waited=0.0,
        ),
        10,
        "call_ended source='hit' attempts=0 calls=0 error=ConnectionError seconds=0.0 slept=0.0 waited=0.0",
    ),
]


@pytest.mark.parametrize(("event", "level", "text"), WORDS, ids=lambda v: getattr(v, "type", ""))
def test_an_event_has_a_level_and_a_sentence(event: Event, level: int, text: str) -> None:
    assert describe_event(event) == (level, f"f: {text}")


def test_messages_of_errors_are_shown_on_request_only() -> None:
    event = made(CallGaveUp, attempts=1, calls=1, error=SECRET)
    assert "hunter2" not in describe_event(event)[1]
    received = describe_event(event, messages=True)[1]
    assert received.endswith("with ConnectionError: https://***@db/")
    silent = made(CallGaveUp, attempts=1, calls=1, error=ValueError())
    assert describe_event(silent, messages=True)[1].endswith("with ValueError")


def test_an_event_class_of_other_code_is_described_by_its_fields() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class DoorOpened(Event):
        door: str
        width: float
        key: object = None

    assert describe_event(DoorOpened(function="f", door="front", width=0.9)) == (
        10,
        "f: door_opened door='front' width=0.9",
    )


def test_a_logger_gets_the_line_and_the_event(caplog: pytest.LogCaptureFixture) -> None:
    event = made(RetryScheduled, attempt=2, delay=1.0)
    logger = logging.getLogger("shop")
    with caplog.at_level(logging.INFO, "shop"):
        log_event(logger, event)
        log_event(logger, made(CacheHit))
    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == ("f: attempt 2 in 1 s", logging.INFO)
    assert record.event is event  # type: ignore[attr-defined]
