# this_file: tests/concurrency/test_driver.py
"""The driver's invariants, with an engine that does whatever it likes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency.chunks import ChunkProgress, ChunkSize
from opero.concurrency.executors.base import (
    Chunk,
    Done,
    GaveBack,
    ItemOutcome,
    Lost,
    Parked,
    Report,
)
from opero.concurrency.scheduler import ErrorPolicy, Scheduler

POISON = "poison"


class Moody:
    """An engine in a test's hand.

    It finishes items in any order, cuts chunks, gives them back, loses and parks them as chance has it.
    """

    def __init__(self, rng: random.Random, *, names_culprit: bool) -> None:
        self.rng = rng
        self.names_culprit = names_culprit
        self.held: dict[int, tuple[Chunk, ChunkProgress]] = {}
        self.ran: dict[int, int] = {}
        self.parked: set[int] = set()

    def submit(self, chunk: Chunk) -> None:
        assert chunk.items, "an empty chunk"
        assert len(chunk.idx) == len(chunk.items)
        self.held[chunk.id] = (chunk, ChunkProgress(len(chunk)))

    def poll(self) -> list[Report]:
        chunk_id = self.rng.choice(list(self.held))
        chunk, tally = self.held[chunk_id]
        report = self._report(chunk, tally)
        if isinstance(report, Done):
            tally.report(report.places)
        elif isinstance(report, GaveBack):
            tally.cut(report.kept)
        elif report is not None:
            tally.cut(0)
        if tally.over:
            del self.held[chunk_id]
        return [] if report is None else [report]

    def _report(self, chunk: Chunk, tally: ChunkProgress) -> Report | None:
        left = list(tally.left())
        poisoned = [n for n in left if chunk.items[n] == POISON]
        fine = [n for n in left if chunk.items[n] != POISON]
        mood = self.rng.random()
        if poisoned and mood < 0.5:
            culprit = poisoned[0] if self.names_culprit else None
            # Of what shares its worker with other chunks, nobody can be blamed.
            alone = chunk.attempt > 0 or self.rng.random() < 0.5
            return Lost(chunk.id, culprit if alone else None, "crash", 1, -9, alone=alone)
        if mood < 0.65:
            # Whatever is done from there on was not begun.
            last = max((n for n in range(tally.kept) if tally.has(n)), default=-1)
            return GaveBack(chunk.id, self.rng.randint(last + 1, tally.kept))
        if mood < 0.7:
            # The machine it runs on goes down, for no fault of any item.
            return Lost(chunk.id, None, "stopped")
        if not fine:
            return None
        places: Sequence[int] = sorted(self.rng.sample(fine, self.rng.randint(1, len(fine))))
        if places[-1] - places[0] == len(places) - 1:
            places = range(places[0], places[-1] + 1)
        return self._done(chunk, places)

    def _done(self, chunk: Chunk, places: Sequence[int]) -> Done:
        values: list[Any] = []
        odd: dict[int, ItemOutcome] = {}
        for n, place in enumerate(places):
            index = chunk.idx[place]
            self.ran[index] = self.ran.get(index, 0) + 1
            item = chunk.items[place]
            if item == "fails":
                odd[n] = ItemOutcome(error=ValueError(index))
                values.append(None)
            elif item == "parks" and index not in self.parked:
                self.parked.add(index)
                odd[n] = ItemOutcome(retry_in=self.rng.random(), parked=Parked(attempts=2))
                values.append(None)
            else:
                if index in self.parked:
                    assert chunk.parked
                    assert chunk.parked[place].attempts == 2
                values.append(index)
        return Done(chunk.id, places, values, odd, 0.0, "w")


def charge(item: Any, parked: Parked | None, lost: Lost, now: float) -> ItemOutcome:
    assert item == POISON, "an innocent is blamed"
    attempts = parked.attempts if parked else 1
    if attempts < 2:
        return ItemOutcome(retry_in=0.5, parked=Parked(attempts=attempts + 1))
    return ItemOutcome(error=RuntimeError("lost"), attempts=attempts)


kinds = st.sampled_from(["fine", "fine", "fine", "fails", "parks", POISON])


def driver_of(*, ordered: bool, raises: bool = False, most: float | None = None) -> Scheduler:
    return Scheduler(
        size=ChunkSize(target_s=0.03),
        ordered=ordered,
        raises=raises,
        budget=ErrorPolicy(most),
        recover=charge,
    )


@given(
    st.lists(kinds, max_size=60),
    st.booleans(),
    st.booleans(),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_every_index_ends_exactly_once_within_the_window(
    items: list[str], ordered: bool, names_culprit: bool, slots: int, rng: random.Random
) -> None:
    driver = driver_of(ordered=ordered)
    engine = Moody(rng, names_culprit=names_culprit)
    handed: list[int] = []
    failed: list[int] = []
    source, now = list(items), 0.0
    for _ in range(20_000):
        room = driver.room(slots)
        assert room <= driver.window(slots), "I2"
        pulled, source = source[:room], source[room:]
        driver.ended = not source
        idx = driver.admit(len(pulled))
        driver.enqueue(idx, pulled)
        while (chunk := driver.next_chunk(slots, now)) is not None:
            engine.submit(chunk)
        assert len(engine.held) == driver.in_flight <= slots
        progressed = False
        while (batch := driver.hand_out()) is not None:
            progressed = True
            handed += batch.idx
            failed += [batch.idx[n] for n, o in batch.odd.items() if o.error is not None]
        if driver.done and not progressed:
            break
        if progressed:
            continue
        if engine.held:
            now += 0.01
            for batch in driver.take(engine.poll(), now):
                driver.finish(batch)
        else:
            due = driver.next_due()
            assert due is not None, "I1: it would wait for ever"
            now = max(now, due)
    assert sorted(handed) == list(range(len(items))), "I3"
    twice = [n for n, times in engine.ran.items() if times > 1 + (n in engine.parked)]
    assert not twice, "what was reported ran again"
    if ordered:
        assert handed == sorted(handed)
    bad = [n for n, item in enumerate(items) if item in ("fails", POISON)]
    assert sorted(failed) == bad, "I4: `charge` refuses innocents"
    assert driver.open == 0


def run_chunk(driver: Scheduler, slots: int = 1) -> Chunk:
    chunk = driver.next_chunk(slots, 0.0)
    assert chunk is not None
    return chunk


def feed(driver: Scheduler, items: list[Any]) -> None:
    driver.enqueue(driver.admit(len(items)), items)


def done(chunk: Chunk, odd: dict[int, ItemOutcome] | None = None) -> Done:
    return Done(chunk.id, range(len(chunk)), list(chunk.items), odd or {}, 0.0, "w")


def test_a_chunk_lost_without_culprit_is_halved_until_one_item_stands_alone() -> None:
    driver = driver_of(ordered=False)
    driver._size.size = 8
    feed(driver, ["fine"] * 5 + [POISON] + ["fine"] * 2)
    sizes: list[int] = []
    batches: list[Any] = []
    while True:
        chunk = driver.next_chunk(1, 0.0)
        if chunk is None:
            break
        sizes.append(len(chunk))
        report: Report = Lost(chunk.id, None, "crash") if POISON in chunk.items else done(chunk)
        batches += driver.take([report], 0.0)
    assert sizes == [8, 4, 4, 2, 1, 1, 2]
    assert driver.next_due() == 0.5, "the culprit alone is tried again"
    assert sum(len(batch) for batch in batches) == 7


def test_a_known_culprit_costs_nobody_else_anything() -> None:
    driver = driver_of(ordered=False)
    driver._size.size = 4
    feed(driver, ["a", "b", POISON, "d"])
    chunk = run_chunk(driver)
    partial = Done(chunk.id, range(1), ["a"], {}, 0.0, "w")
    (first,) = driver.take([partial, Lost(chunk.id, 2, "crash")], 0.0)
    assert first.items == ["a"]
    assert [run_chunk(driver, slots=3).items for _ in range(2)] == [["b"], ["d"]]


def test_reports_of_a_chunk_that_is_gone_are_ignored() -> None:
    driver = driver_of(ordered=False)
    feed(driver, ["a"])
    chunk = run_chunk(driver)
    driver.take([GaveBack(chunk.id, 0)], 0.0)
    assert driver.take([done(chunk)], 0.0) == []


def test_a_failed_item_ends_the_map_where_errors_are_raised() -> None:
    driver = driver_of(ordered=False, raises=True)
    feed(driver, ["a", "b"])
    chunk = run_chunk(driver)
    for batch in driver.take([done(chunk, {0: ItemOutcome(error=KeyError("x"))})], 0.0):
        driver.finish(batch)
    assert driver.failed
    assert (driver.failed.index, driver.failed.item) == (0, "a")
    assert driver.next_chunk(1, 0.0) is None
    assert driver.room(1) == 0
    assert driver.done


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_ends_the_map_in_any_case(kind: type[BaseException]) -> None:
    driver = driver_of(ordered=False)
    feed(driver, ["a"])
    for batch in driver.take([done(run_chunk(driver), {0: ItemOutcome(error=kind())})], 0.0):
        driver.finish(batch)
    assert driver.failed
    assert type(driver.failed.error) is kind


def test_too_many_failures_stop_the_map_and_keep_what_is_done() -> None:
    driver = driver_of(ordered=True, most=1)
    driver._size.size = 2
    feed(driver, ["a", "b", "c", "d", "e"])
    first, second = run_chunk(driver, 2), run_chunk(driver, 2)
    for batch in driver.take([done(second, {0: ItemOutcome(error=KeyError())})], 0.0):
        driver.finish(batch)
    assert driver.stopped
    assert driver.next_chunk(2, 0.0) is None
    assert not driver.done, "what is at work goes on to its end"
    assert driver.hand_out() is None
    for batch in driver.take([done(first)], 0.0):
        driver.finish(batch)
    handed = [batch.idx[0] for batch in iter(driver.hand_out, None)]
    assert handed == [0, 2]
    assert driver.done


def test_items_that_pause_leave_their_place_to_others() -> None:
    driver = driver_of(ordered=False)
    driver._size = ChunkSize(target_s=0.03, fixed=1)
    feed(driver, ["a", "b"])
    assert driver.room(2) == 0
    chunk = run_chunk(driver)
    parked = ItemOutcome(retry_in=5.0, parked=Parked(attempts=2))
    assert driver.take([done(chunk, {0: parked})], 10.0)[0].items == []
    assert driver.room(2) == 1
    assert driver.next_due() == 15.0
    assert run_chunk(driver).items == ["b"]


def test_the_tail_is_shared_out() -> None:
    driver = driver_of(ordered=False)
    driver._size.size = 31
    feed(driver, list("abcdefgh"))
    driver.ended = True
    assert [len(run_chunk(driver, 4)) for _ in range(4)] == [2, 2, 1, 1]


def test_before_the_end_chunks_stay_whole() -> None:
    driver = driver_of(ordered=False)
    driver._size.size = 4
    feed(driver, list(range(16)))
    assert [len(run_chunk(driver, 4)) for _ in range(4)] == [4, 4, 4, 4]
    driver.take([done(driver._out[0].chunk)], 0.0)
    driver._size.size = 4
    feed(driver, list(range(4)))
    assert len(run_chunk(driver, 4)) == 4


def test_slow_input_goes_to_all_who_have_nothing() -> None:
    driver = driver_of(ordered=False)
    driver._size.size = 4
    feed(driver, list(range(4)))
    assert [len(run_chunk(driver, 4)) for _ in range(4)] == [1, 1, 1, 1]


def test_a_chunk_counts_by_the_part_of_a_worker_that_it_keeps_busy() -> None:
    driver = Scheduler(
        size=ChunkSize(target_s=0.03, least=4),
        ordered=False,
        raises=False,
        budget=ErrorPolicy(None),
        recover=charge,
        in_flight=4,
    )
    feed(driver, list(range(24)))
    first, _ = run_chunk(driver, 2), run_chunk(driver, 2)
    assert driver.next_chunk(2, 0.0) is None
    driver.take([Done(first.id, [0, 1, 3], [0, 1, 3], {}, 10.0, "w")], 0.0)
    assert len(run_chunk(driver, 2)) == 4
    assert driver.next_chunk(2, 0.0) is None


def test_what_comes_back_of_a_slow_chunk_is_shared_out_whatever_size_is_wanted() -> None:
    driver = driver_of(ordered=False)
    driver._size = ChunkSize(target_s=0.03, fixed=9)
    feed(driver, list(range(20)))
    chunk = run_chunk(driver, 4)
    driver.take([GaveBack(chunk.id, 1)], 0.0)
    assert driver.in_flight == 1, "its first item is at work still"
    assert [run_chunk(driver, 4).items for _ in range(3)] == [[1, 2], [3, 4], [5]]
    driver.take([Done(chunk.id, range(1), [0], {}, 0.0, "w")], 0.0)
    assert driver.in_flight == 3


def test_items_that_died_with_others_are_tried_again_alone_before_one_is_blamed() -> None:
    driver = driver_of(ordered=False)
    feed(driver, [POISON])
    chunk = run_chunk(driver)
    assert driver.take([Lost(chunk.id, None, "crash", alone=False)], 0.0) == []
    again = run_chunk(driver)
    assert (again.items, again.attempt) == ([POISON], 1)
    driver.take([Lost(again.id, None, "crash")], 0.0)
    assert driver.next_due() == 0.5
