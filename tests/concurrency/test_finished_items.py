# this_file: tests/concurrency/test_finished_items.py
"""The order in which finished items leave."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency.executors.base import Batch, ItemOutcome
from opero.concurrency.scheduler import ChunkSize, ErrorPolicy, Scheduler

pytestmark = pytest.mark.internal


def batch_of(*indices: int) -> Batch:
    return Batch(list(indices), [f"item {n}" for n in indices], [10 * n for n in indices])


def scheduler_of(*, ordered: bool) -> Scheduler:
    return Scheduler(size=ChunkSize(1.0), ordered=ordered, errors=ErrorPolicy(), recover=Mock())


def taken(scheduler: Scheduler) -> list[int]:
    found: list[int] = []
    while (batch := scheduler.hand_out()) is not None:
        found += batch.idx
        assert batch.values == [10 * n for n in batch.idx]
    return found


@given(st.lists(st.integers(1, 5), max_size=20), st.integers(0, 2**32).map(random.Random))
def test_in_order_hands_out_everything_in_order(sizes: list[int], rng: random.Random) -> None:
    indices = list(range(sum(sizes)))
    rng.shuffle(indices)
    scheduler, seen, start = scheduler_of(ordered=True), [], 0
    scheduler.admit(len(indices))
    for size in sizes:
        scheduler.finish(batch_of(*sorted(indices[start : start + size])))
        start += size
        seen += taken(scheduler)
        # What is held back leaves no room beside it.
        open_or_held = scheduler.open + start - len(seen)
        assert scheduler.room(100) == max(0, 100 - open_or_held)
    assert seen == list(range(sum(sizes)))


def test_a_stream_reads_ahead_what_its_consumer_takes_in_a_second() -> None:
    scheduler = scheduler_of(ordered=True)
    scheduler._size.size = 5000
    assert [scheduler.room(4), scheduler.room(4, streamed_s=9.0)] == [20_000, 1000]
    scheduler.admit(1000)
    scheduler.finish(batch_of(*range(600)))
    assert scheduler.room(4, streamed_s=2.0) == 0, "nobody has taken any"
    assert len(taken(scheduler)) == 600
    assert scheduler.room(4, streamed_s=2.0) == 1000 + 600 // 2 - 400


def test_what_is_out_of_order_waits() -> None:
    scheduler = scheduler_of(ordered=True)
    scheduler.finish(batch_of(1, 2))
    assert scheduler.hand_out() is None
    scheduler.finish(batch_of(0))
    assert taken(scheduler) == [0, 1, 2]


def test_when_the_rest_will_not_come_gaps_are_jumped() -> None:
    scheduler = scheduler_of(ordered=True)
    scheduler.finish(batch_of(7))
    scheduler.finish(batch_of(2, 3))
    scheduler.stop("enough")
    assert taken(scheduler) == [2, 3, 7]


def test_completion_order_hands_out_at_once() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler.finish(batch_of(5))
    scheduler.finish(batch_of(1, 9))
    assert taken(scheduler) == [5, 1, 9]


def test_a_run_keeps_what_is_odd_about_its_items() -> None:
    broken = ItemOutcome(error=KeyError())
    batch = Batch([3, 4, 9, 10, 11], list("abcde"), [0, 1, 2, 3, 4], {1: broken, 4: broken}, "hit")
    runs = list(batch.runs())
    assert [(run.idx, run.items, run.values, list(run.odd), run.origin) for run in runs] == [
        (range(3, 5), ["a", "b"], [0, 1], [1], "hit"),
        (range(9, 12), ["c", "d", "e"], [2, 3, 4], [2], "hit"),
    ]
