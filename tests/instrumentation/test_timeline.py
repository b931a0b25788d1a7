# this_file: tests/instrumentation/test_timeline.py
"""The timeline."""

from __future__ import annotations

import re

import pytest

from opero import opero
from opero.events import CacheHit, event_bus
from opero.instrumentation import Timeline
from opero.testing import flaky


def without_times(text: str) -> list[str]:
    return [re.sub(r"\d+(\.\d+)?(e-\d+)? s", "# s", line).strip() for line in text.splitlines()]


def test_calls_are_drawn_as_they_are_nested() -> None:
    inner = opero(min_delay=0)(flaky("ok", failures=1))

    @opero(cache=False, retries=0)
    def outer() -> None:
        inner()
        inner()
        raise KeyError

    with Timeline() as timeline:
        with pytest.raises(KeyError):
            outer()
        event_bus.emit(CacheHit(function="elsewhere"))
    name = outer.__qualname__
    assert without_times(str(timeline)) == [
        f"# s  {name}",
        "# s  │ flaky",
        "# s  │ │ not in the cache",
        "# s  │ │ attempt 1 failed with ConnectionError after # s",
        "# s  │ │ attempt 2 in # s",
        "# s  │ └ ok after # s in 2 attempts",
        "# s  │ flaky",
        "# s  │ │ served from the cache",
        "# s  │ └ ok, hit",
        "# s  │ attempt 1 failed with KeyError after # s",
        "# s  └ KeyError after # s in 1 attempt",
        "# s  served from the cache",
    ]
    assert repr(timeline) == "<Timeline of 12 events>"


def test_an_empty_timeline_says_so() -> None:
    timeline = Timeline()
    with timeline:
        pass
    assert str(timeline) == "nothing happened"


def test_a_timeline_is_bounded() -> None:
    with Timeline(longest=1) as timeline:
        for _ in range(3):
            event_bus.emit(CacheHit(function="f"))
    assert str(timeline).splitlines()[-1] == "… and 2 events more"
