# this_file: tests/concurrency/test_outbox.py
"""Large results leave a worker in segments that it writes again only when the map has emptied them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from opero.concurrency.executors.base import ItemOutcome
from opero.concurrency.outbox import Outbox
from opero.concurrency.parcel import Parcel, put
from opero.concurrency.segment import CAN_PASS, FULL, Intake
from opero.concurrency.slate import Slate

pytestmark = pytest.mark.skipif(not CAN_PASS, reason="descriptors cannot be sent here")


class Large:
    """Something whose content travels beside its pickle."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Large, (pickle.PickleBuffer(self.content),)


def large(n: int) -> Large:
    return Large(bytearray([n]) * 100_000)


@pytest.fixture
def slate() -> Iterator[Slate]:
    slate = Slate()
    yield slate
    slate.close()


class Map:
    """The other side."""

    def __init__(self, slate: Slate) -> None:
        self._slate = slate
        self._intake = Intake(lambda view: memoryview(bytearray(view)))
        self.kept: list[bool] = []

    def receive(self, box: Outbox, *entries: Any) -> Parcel:
        load, fd = box.ship()
        return Parcel(put(entries, load), fd, self._intake)

    def empty(self, parcel: Parcel) -> list[bytes]:
        found = [bytes(parcel.open(n).content) for n in range(len(parcel.entries))]
        self.kept.append(parcel.kept)
        if parcel.kept:
            self._slate.empty_one()
        return found


def test_a_map_that_is_slow_finds_everything_as_it_was_sent(slate: Slate) -> None:
    box, other = Outbox(slate), Map(slate)
    coming: list[Parcel] = []
    found = []
    for n in range(40):
        coming.append(other.receive(box, box.seal(large(n), None)))
        if n % 5 == 4:
            found += [one for parcel in coming for one in other.empty(parcel)]
            coming.clear()
    assert found == [bytes([n]) * 100_000 for n in range(40)]
    # Two at a time are used again; what came while they were under way was given away.
    assert other.kept == 8 * [True, True, False, False, False]


def test_results_share_a_segment_until_it_is_full(slate: Slate) -> None:
    box, other = Outbox(slate), Map(slate)
    entries = []
    while not box.full:
        entries.append(box.seal(large(len(entries)), None))
    assert len(entries) == FULL // 100_000 + 1
    assert other.empty(other.receive(box, *entries))[7] == bytes([7]) * 100_000
    assert not box.full


def test_small_and_plain_results_take_no_segment(slate: Slate) -> None:
    box = Outbox(slate)
    assert box.seal(7, None) == 7
    assert pickle.loads(box.seal([7], None)[0]) == [7]
    assert box.ship() == ((), None)


def test_results_of_outcomes_are_sealed_in_them(slate: Slate) -> None:
    box, other = Outbox(slate), Map(slate)
    outcome = ItemOutcome(value=large(3), attempts=2)
    assert box.seal(None, outcome) is None
    assert other.empty(other.receive(box, outcome.value)) == [bytes([3]) * 100_000]


def test_what_cannot_be_pickled_leaves_nothing_in_the_segment(slate: Slate) -> None:
    class Odd:
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise ValueError("no")

    box = Outbox(slate)
    entry = box.seal([large(1), Odd()], None)
    assert len(entry) == 1
    assert "cannot travel" in entry[0]
    assert box.ship() == ((), None)
