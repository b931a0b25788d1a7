# this_file: tests/concurrency/test_policy.py
"""How many items may fail."""

from __future__ import annotations

from opero.concurrency.scheduler import ErrorPolicy


def test_without_a_bound_all_may_fail() -> None:
    assert ErrorPolicy().count(1000, failed=1000) is None


def test_a_number_ends_the_map_when_it_is_reached() -> None:
    budget = ErrorPolicy(3)
    assert budget.count(100, failed=2) is None
    assert budget.count(1, failed=1) == "3 items failed, and max_errors=3 ends the map there"


def test_a_share_counts_from_twenty_finished_items_on() -> None:
    budget = ErrorPolicy(0.5)
    assert budget.count(19, failed=19) is None
    assert budget.count(1, failed=0) == "19 of 20 items failed, more than max_errors=0.5 allows"


def test_a_share_that_is_just_reached_is_allowed() -> None:
    budget = ErrorPolicy(0.5)
    assert budget.count(20, failed=10) is None
    assert budget.count(1, failed=1) is not None
