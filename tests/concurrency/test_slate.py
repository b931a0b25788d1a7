# this_file: tests/concurrency/test_slate.py
"""What a worker does is read from its slate, also when it can no longer say so."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from opero.concurrency.slate import Slate


@pytest.fixture
def both() -> Iterator[tuple[Slate, Slate]]:
    """The slate as the map has it, and as the worker has it."""
    ours = Slate()
    theirs = Slate(os.dup(ours.fd))
    yield ours, theirs
    theirs.close()
    ours.close()


def test_on_a_new_slate_no_item_has_begun(both: tuple[Slate, Slate]) -> None:
    # Nor has a worker that comes to know it begun the first one.
    assert [slate.item for slate in both] == [None, None]


def test_the_map_reads_which_item_is_under_way(both: tuple[Slate, Slate]) -> None:
    ours, theirs = both
    theirs.begin_chunk(7)
    assert (ours.chunk, ours.item) == (7, None)
    for position in (0, 1, 4_999):
        theirs.begin_item(position)
        assert (ours.chunk, ours.item) == (7, position)
    theirs.begin_chunk(8)
    assert (ours.chunk, ours.item) == (8, None)


def test_the_last_words_can_be_read_when_it_is_closed(both: tuple[Slate, Slate]) -> None:
    ours, theirs = both
    theirs.begin_chunk(3)
    theirs.begin_item(2)
    ours.close()
    assert (ours.chunk, ours.item) == (3, 2)


def test_a_worker_reads_that_it_shall_stop(both: tuple[Slate, Slate]) -> None:
    ours, theirs = both
    assert not theirs.is_stopped()
    ours.stop()
    assert theirs.is_stopped()


def test_a_worker_reads_how_much_the_map_has_emptied(both: tuple[Slate, Slate]) -> None:
    ours, theirs = both
    ours.empty_one()
    ours.empty_one()
    assert theirs.taken == 2
