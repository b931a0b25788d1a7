# this_file: tests/concurrency/test_sheet.py
"""What a sheet reports, and what it gives back, to its worker and to whoever looks at it meanwhile."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from tests.concurrency.test_work import job_of

from opero.concurrency.chunks import ChunkProgress
from opero.concurrency.executors.base import Chunk, Done, GaveBack, ItemOutcome, MapJob, Report
from opero.concurrency.sheet import Sheet, sheet_of


def sheet_with(count: int, told: list[Report], **given: Any) -> Sheet:
    return sheet_of(Chunk(7, range(count), list(range(count))), job(**given), "w", told.append)


def job(*, target_s: float = 100.0, in_flight: int = 1) -> MapJob:
    return job_of(abs, target_s=target_s, in_flight=in_flight)


def taken(sheet: Sheet, count: int) -> list[int]:
    positions = sheet.positions()
    return [next(positions) for _ in range(count)]


def values_of(told: list[Report]) -> dict[int, Any]:
    return {
        p: v for r in told if isinstance(r, Done) for p, v in zip(r.places, r.values, strict=True)
    }


def test_who_looks_finds_what_is_done_while_the_next_item_is_at_work() -> None:
    told: list[Report] = []
    sheet = sheet_with(5, told)
    for position in taken(sheet, 3)[:2]:
        sheet.add(position, str(position), None)
    assert sheet.look()
    assert values_of(told) == {0: "0", 1: "1"}
    sheet.look()
    assert len(told) == 1, "nothing is told twice"


def test_the_rest_of_a_slow_chunk_is_given_back_to_who_looks() -> None:
    told: list[Report] = []
    sheet = sheet_with(5, told, target_s=0.0)
    (first,) = taken(sheet, 1)
    assert not sheet.look(), "nothing more to look for"
    assert told == [GaveBack(7, 1)]
    assert list(sheet.positions()) == []
    sheet.add(first, "0", None)
    sheet.end()
    assert values_of(told) == {0: "0"}
    assert len(told) == 2


def test_the_rest_of_a_chunk_in_time_stays() -> None:
    told: list[Report] = []
    sheet = sheet_with(5, told)
    taken(sheet, 1)
    sheet.look()
    assert told == []
    assert list(sheet.positions()) == [1, 2, 3, 4]


def test_between_two_items_everything_is_left_to_the_worker() -> None:
    told: list[Report] = []
    sheet = sheet_with(3, told, target_s=0.0)
    (first,) = taken(sheet, 1)
    sheet._due = sheet._late = float("inf")
    sheet.add(first, "0", None)
    sheet._late = 0.0
    sheet.look()
    assert told == []
    assert list(sheet.positions()) == [1, 2]


def test_an_item_that_ends_while_somebody_gives_back_the_rest_leaves_that_to_the_worker() -> None:
    class Racing(deque[int]):
        def pop(self, *_: Any) -> int:
            if not sheet.over and not sheet._values:
                sheet._values.append("0")
            return super().pop()

    told: list[Report] = []
    sheet = sheet_with(3, told, target_s=0.0)
    sheet._todo = Racing(sheet._todo)
    taken(sheet, 1)
    sheet.look()
    assert told == []
    assert list(sheet.positions()) == [1, 2]


def test_while_a_result_is_made_ready_nobody_else_reports() -> None:
    told: list[Report] = []
    sheet = sheet_with(3, told)
    first, second, _ = taken(sheet, 3)
    sheet.add(first, "0", None)
    sheet.hold()
    sheet.look()
    assert told == []
    sheet.add(second, "1", None)
    sheet.look()
    assert values_of(told) == {0: "0", 1: "1"}


def test_a_worker_that_ends_early_gives_back_what_it_has_not_begun() -> None:
    told: list[Report] = []
    sheet = sheet_with(3, told)
    for position in sheet.positions(lambda: bool(sheet._values)):
        sheet.add(position, position, None)
    sheet.end()
    assert [type(report) for report in told] == [Done, GaveBack]
    assert told[-1] == GaveBack(7, 1)


def test_items_that_finish_in_another_order_are_reported_by_their_places() -> None:
    told: list[Report] = []
    sheet = sheet_with(5, told, in_flight=5)
    taken(sheet, 5)
    odd = ItemOutcome(error=KeyError("x"))
    for position in (4, 1):
        sheet.add(position, position, odd if position == 4 else None)
    sheet.flush()
    for position in (3, 0, 2):
        sheet.add(position, position, None)
    sheet.end()
    first, last = told
    assert isinstance(first, Done)
    assert isinstance(last, Done)
    assert (first.places, first.values, first.odd) == ([1, 4], [1, None], {1: odd})
    assert (last.places, last.values, last.odd) == ([0, 2, 3], [0, 2, 3], {})


def test_neighbours_in_another_order_are_a_range_again() -> None:
    told: list[Report] = []
    sheet = sheet_with(3, told, in_flight=3)
    taken(sheet, 3)
    for position in (2, 0, 1):
        sheet.add(position, str(position), None)
    sheet.end()
    (done,) = told
    assert isinstance(done, Done)
    assert (done.places, done.values) == (range(3), ["0", "1", "2"])


def test_what_could_not_be_told_is_told_later() -> None:
    sheet = sheet_with(3, [])
    first, _ = taken(sheet, 2)
    sheet.add(first, "0", None)

    def fail(report: Report) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        sheet.look(fail)
    told: list[Report] = []
    sheet.look(told.append)
    assert values_of(told) == {0: "0"}


@pytest.fixture
def eager() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("target_s", [0.0, 0.0002])
def test_none_is_done_twice_or_forgotten_however_often_somebody_looks(target_s: float) -> None:
    for _ in range(60):
        told: list[Report] = []
        sheet = sheet_with(300, told, target_s=target_s)
        begun = threading.Event()
        over = threading.Event()

        def looks(sheet: Sheet = sheet, begun: Any = begun, over: Any = over) -> None:
            begun.set()
            while not over.is_set():
                sheet.look()

        looker = threading.Thread(target=looks)
        looker.start()
        begun.wait()
        ran = []
        for position in sheet.positions():
            ran.append(position)
            sheet.add(position, position, None)
        sheet.end()
        over.set()
        looker.join()
        tally = ChunkProgress(300)
        back: list[int] = []
        for report in told:
            assert not tally.over, "nothing comes after the end"
            if isinstance(report, Done):
                assert not any(map(tally.has, report.places)), "reported twice"
                assert list(report.places) == report.values
                tally.report(report.places)
            elif isinstance(report, GaveBack):
                back += tally.cut(report.kept)
        assert tally.over
        assert sorted([*ran, *back]) == list(range(300))


# --- of a single item -----------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [None, ItemOutcome(attempts=2)], ids=["plain", "odd"])
def test_a_single_item_is_reported_when_it_is_done(outcome: ItemOutcome | None) -> None:
    told: list[Report] = []
    sheet = sheet_with(1, told, target_s=0.0)
    (position,) = taken(sheet, 1)
    assert not sheet.look(), "it has no neighbours that wait"
    sheet.hold()
    sheet.add(position, "value", outcome)
    assert sheet.over
    sheet.flush()
    sheet.end()
    (done,) = told
    assert isinstance(done, Done)
    assert (done.chunk, list(done.places), done.worker) == (7, [0], "w")
    assert (done.values, done.odd) == (
        (["value"], {}) if outcome is None else ([None], {0: outcome})
    )
    assert done.busy_s >= 0


def test_a_single_item_that_may_not_begin_is_given_back() -> None:
    told: list[Report] = []
    sheet = sheet_with(1, told)
    assert list(sheet.positions(lambda: True)) == []
    sheet.end()
    assert told == [GaveBack(7, 0)]
