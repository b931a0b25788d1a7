# this_file: tests/concurrency/test_finished_items.py
"""The order in which finished items leave."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency.executors.base import Batch, ItemOutcome
from opero.concurrency.scheduler import FinishedItems

pytestmark = pytest.mark.internal


def batch_of(*indices: int) -> Batch:
    return Batch(list(indices), [f"item {n}" for n in indices], [10 * n for n in indices])


def taken(order: FinishedItems) -> list[int]:
    found: list[int] = []
    while order.ready:
        batch = order.ready.popleft()
        order.held -= len(batch)
        found += batch.idx
        assert batch.values == [10 * n for n in batch.idx]
    return found


@given(st.lists(st.integers(1, 5), max_size=20), st.randoms(use_true_random=False))
def test_in_order_hands_out_everything_in_order(sizes: list[int], rng: random.Random) -> None:
    indices = list(range(sum(sizes)))
    rng.shuffle(indices)
    order, seen, start = FinishedItems(ordered=True), [], 0
    for size in sizes:
        order.put(batch_of(*sorted(indices[start : start + size])))
        start += size
        seen += taken(order)
        assert order.held == start - len(seen)
    assert seen == list(range(sum(sizes)))


def test_what_is_out_of_order_waits() -> None:
    order = FinishedItems(ordered=True)
    order.put(batch_of(1, 2))
    assert not order.ready
    assert order.held == 2
    order.put(batch_of(0))
    assert taken(order) == [0, 1, 2]
    assert order.held == 0


def test_when_the_rest_will_not_come_gaps_are_jumped() -> None:
    order = FinishedItems(ordered=True)
    order.put(batch_of(7))
    order.put(batch_of(2, 3))
    order.skip_missing()
    assert taken(order) == [2, 3, 7]


def test_completion_order_hands_out_at_once() -> None:
    order = FinishedItems(ordered=False)
    order.put(batch_of(5))
    order.put(batch_of(1, 9))
    assert (taken(order), order.held) == ([5, 1, 9], 0)


def test_a_run_keeps_what_is_odd_about_its_items() -> None:
    broken = ItemOutcome(error=KeyError())
    batch = Batch([3, 4, 9, 10, 11], list("abcde"), [0, 1, 2, 3, 4], {1: broken, 4: broken}, "hit")
    runs = list(batch.runs())
    assert [(run.idx, run.items, run.values, list(run.odd), run.origin) for run in runs] == [
        (range(3, 5), ["a", "b"], [0, 1], [1], "hit"),
        (range(9, 12), ["c", "d", "e"], [2, 3, 4], [2], "hit"),
    ]
