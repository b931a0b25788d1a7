# this_file: tests/caching/test_lulls.py
"""Fresh failures by key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.caching import lulls as module
from opero.caching.lulls import Lulls

if TYPE_CHECKING:
    import pytest


def begun(lulls: Lulls, key: Any, **given: Any) -> None:
    lulls.begin(key, **({"now": 0.0, "seconds": 5.0, "excused": True} | given))


def test_only_some_failures_excuse_an_expired_entry() -> None:
    lulls = Lulls()
    begun(lulls, "a", excused=False)
    assert lulls.lasts("a", 1)
    assert not lulls.excused("a", 1)


def test_a_later_failure_counts() -> None:
    lulls = Lulls()
    begun(lulls, "a", excused=False)
    begun(lulls, "a", now=3.0)
    assert lulls.excused("a", 7)


def test_a_success_ends_it() -> None:
    lulls = Lulls()
    begun(lulls, "a")
    lulls.end("a")
    lulls.end("a")
    assert not lulls.lasts("a", 1)


def test_those_that_are_over_take_no_room() -> None:
    lulls = Lulls()
    for n in range(100):
        begun(lulls, n, now=float(n))
    assert len(lulls) == 5


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    lulls = Lulls()
    for key in "abcde":
        begun(lulls, key)
    assert [key for key in "abcde" if lulls.lasts(key, 1)] == ["c", "d", "e"]


def test_all_are_forgotten_at_once() -> None:
    lulls = Lulls()
    begun(lulls, "a")
    lulls.clear()
    assert not lulls.lasts("a", 1)
