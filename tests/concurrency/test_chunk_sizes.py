# this_file: tests/concurrency/test_chunk_sizes.py
"""The size of chunks."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opero.concurrency.scheduler import HEAVIEST, LARGEST, ChunkSize

pytestmark = pytest.mark.internal

times = st.floats(min_value=0, max_value=100)


@given(st.lists(st.tuples(st.integers(0, 100), times)))
def test_it_starts_with_one_item_and_grows_step_by_step(samples: list[tuple[int, float]]) -> None:
    chunks = ChunkSize(target_s=0.03)
    assert chunks.size == 1
    for items, busy in samples:
        before = chunks.size
        chunks.measured(items, busy)
        assert 1 <= chunks.size <= LARGEST
        assert chunks.size <= 4 * before or 4 * chunks.size * busy <= 0.03 * items * (1 + 1e-9)


@given(st.integers(2, LARGEST), times)
def test_a_small_sample_never_raises_the_size(size: int, busy: float) -> None:
    chunks = ChunkSize(target_s=0.03)
    chunks.size = size
    chunks.measured(size - 1, busy)
    assert chunks.size <= size


def test_it_settles_where_a_chunk_takes_its_target() -> None:
    chunks = ChunkSize(target_s=0.03)
    for _ in range(10):
        chunks.measured(chunks.size, 0.002 * chunks.size)
    assert chunks.size == 15


def test_slow_items_travel_alone() -> None:
    chunks = ChunkSize(target_s=0.03)
    chunks.measured(1, 0.02)
    assert chunks.size == 1


def test_what_was_given_back_starts_anew() -> None:
    chunks = ChunkSize(target_s=0.03)
    for _ in range(10):
        chunks.measured(chunks.size, 0)
    assert chunks.size == LARGEST
    chunks.restart()
    assert chunks.size == 1


def test_a_size_that_the_user_wants_stays() -> None:
    chunks = ChunkSize(target_s=0.03, fixed=7)
    chunks.measured(7, 100)
    chunks.restart()
    assert (chunks.size, chunks.share(3, 4)) == (7, 7)


def test_it_may_reach_a_quarter_of_what_fits_at_once() -> None:
    chunks = ChunkSize(target_s=0.03)
    chunks.measured(1, 0.0006)
    assert chunks.size == 12


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, LARGEST))
@example(left=1, slots=1, size=LARGEST)
def test_the_last_items_are_spread_over_all_slots(left: int, slots: int, size: int) -> None:
    chunks = ChunkSize(target_s=0.03)
    chunks.size = size
    share = chunks.share(left, slots)
    whole = 1 if size < LARGEST else 0  # of the largest ones it counts what was wanted
    assert share == max(1, whole * size // 32, min(size, -(-left // slots)))


@given(st.integers(1, 100), st.integers(1, 10 * HEAVIEST), st.integers(1, 50))
def test_large_items_travel_in_chunks_that_stay_small(items: int, weight: int, least: int) -> None:
    chunks = ChunkSize(target_s=0.03, least=least)
    for _ in range(10):
        chunks.measured(max(items, chunks.size), 0)
        chunks.weighed(items, weight)
    assert chunks.size == min(LARGEST, max(least, HEAVIEST * items // weight))


def test_a_size_that_the_user_wants_stays_whatever_items_weigh() -> None:
    chunks = ChunkSize(target_s=0.03, fixed=7)
    chunks.weighed(7, 100 * HEAVIEST)
    assert chunks.size == 7


@given(st.integers(0, LARGEST), st.integers(1, 64))
def test_what_is_left_of_the_quickest_items_is_not_cut_into_crumbs(left: int, slots: int) -> None:
    chunks = ChunkSize(target_s=0.03)
    for _ in range(10):
        chunks.measured(chunks.size, 1e-6 * chunks.size)
    # A chunk holds a sixth of its target then, and a 32nd of the target is worth a journey.
    assert chunks.share(left, slots) >= 900
    # Slower ones are shared out more finely.
    chunks.measured(LARGEST, 6e-6 * LARGEST)
    assert chunks.share(left, 10 * LARGEST) <= LARGEST // 32
