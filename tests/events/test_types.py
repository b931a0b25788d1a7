# this_file: tests/events/test_types.py
"""Every class of event is documented and sent."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from tests.tables import rows

import opero
from opero import CircuitBreaker, events
from opero.events import CircuitChanged
from opero.testing import capture_events, flaky

KINDS = sorted(
    name
    for name in events.__all__
    if isinstance(getattr(events, name), type)
    and issubclass(getattr(events, name), events.Event)
    and name != "Event"
)


@rows("name", KINDS)
def test_every_kind_is_explained(name: str, root: Path) -> None:
    table = (root / "docs" / "events.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|.*`{name}`.*\|", table, re.MULTILINE)


def test_every_event_class_is_sent_somewhere() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(opero.__file__).parent.rglob("*.py")
    )
    sent = re.findall(r"(?<!class )\b([A-Z]\w+)\((?:\w+=|$)", source, re.MULTILINE)
    assert sorted({*KINDS} - {*sent}) == []


def test_a_sent_event_carries_the_name_of_its_function() -> None:
    @opero.opero(cache=False, retries=1, min_delay=0)
    def fetch() -> str:
        return once()

    once = flaky("ok", failures=1)
    with capture_events() as seen:
        fetch()
    assert {event.function for event in seen} == {fetch.__qualname__}


def test_circuit_changed_has_the_breaker_which_stays_in_its_process() -> None:
    breaker = CircuitBreaker(fail_max=1, name="shop")
    with capture_events(CircuitChanged) as seen, pytest.raises(ConnectionError):
        opero.opero(cache=False, retries=0, circuit_breaker=breaker)(flaky("ok"))()
    (event,) = seen
    assert event["breaker"] is breaker
    copied = pickle.loads(pickle.dumps(event))
    assert copied == event
    assert copied["breaker"] is None
