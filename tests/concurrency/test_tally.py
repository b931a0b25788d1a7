# this_file: tests/concurrency/test_tally.py
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency.chunks import ChunkProgress


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(1, 5))
def test_it_knows_what_is_left_in_whatever_order_and_portions_items_are_reported(
    order: list[int], count: int, portion: int
) -> None:
    tally = ChunkProgress(12)
    for begin in range(0, count, portion):
        tally.report(sorted(order[begin : min(begin + portion, count)]))
    done = set(order[:count])
    assert list(tally.left()) == [n for n in range(12) if n not in done]
    assert tally.open == 12 - count
    assert [tally.has(n) for n in range(12)] == [n in done for n in range(12)]


def test_a_chunk_is_over_when_all_that_is_kept_is_reported() -> None:
    tally = ChunkProgress(5)
    tally.report(range(2))
    assert tally.cut(3) == range(3, 5)
    assert not tally.over
    tally.report([2])
    assert tally.over


def test_what_was_given_back_is_not_given_back_again() -> None:
    tally = ChunkProgress(5)
    assert tally.cut(3) == range(3, 5)
    assert not tally.cut(4)
    assert tally.kept == 3
