# this_file: tests/core/test_value_cooldown.py
"""Cooldowns: by content of the value, for as long as asked, within bounds."""

from __future__ import annotations

import pytest

from opero.core import fallback as cooldown
from opero.core.fallback import Cooldowns, part_key

pytestmark = pytest.mark.internal


def test_values_of_one_content_cool_together_wherever_they_stand():
    resting = Cooldowns()
    assert not resting
    resting.begin(["a"], 0, until=15.0)
    assert resting
    assert resting.left(["a"], 3, now=10.0) == 5.0
    assert resting.left(["b"], 0, now=10.0) == 0.0


def test_values_without_content_go_by_their_place():
    resting = Cooldowns()
    resting.begin(lambda: 0, 1, until=15.0)
    assert resting.left(object(), 1, now=10.0) == 5.0
    assert resting.left(object(), 0, now=10.0) == 0.0


def test_values_of_different_types_are_different():
    assert len({part_key(value, 0) for value in (1, True, "1", b"1")}) == 4


@pytest.mark.parametrize(("second", "left"), [(12.0, 5.0), (30.0, 20.0)])
def test_the_longer_request_counts(second, left):
    resting = Cooldowns()
    resting.begin("a", 0, until=15.0)
    resting.begin("a", 0, until=second)
    assert resting.left("a", 0, now=10.0) == left


def test_what_is_over_is_forgotten():
    resting = Cooldowns()
    resting.begin("a", 0, until=15.0)
    assert resting.left("a", 0, now=15.0) == 0.0
    assert len(resting) == 0


def test_memory_is_bounded_and_the_soonest_goes_first(monkeypatch):
    monkeypatch.setattr(cooldown, "_MOST", 3)
    resting = Cooldowns()
    for n, until in enumerate((20.0, 10.0, 30.0, 40.0)):
        resting.begin(f"value {n}", n, until=until)
    assert len(resting) == 3
    assert resting.left("value 1", 1, now=0.0) == 0.0
    assert resting.left("value 0", 0, now=0.0) == 20.0
