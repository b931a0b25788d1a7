# this_file: tests/concurrency/test_scheduler.py
"""The scheduler's invariants, with an executor that reports at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency.executors.base import (
    Chunk,
    Done,
    ItemOutcome,
    Lost,
    Parked,
    Report,
)
from opero.concurrency.scheduler import HEAVIEST, ChunkSize, ErrorPolicy, Scheduler

pytestmark = [pytest.mark.internal, pytest.mark.timeout(120)]

POISON = "poison"


class RandomExecutor:
    """An executor without workers.

    It finishes items in any order, cuts chunks, gives them back, loses and parks them at random.
    """

    def __init__(self, rng: random.Random, *, names_culprit: bool) -> None:
        self.rng = rng
        self.names_culprit = names_culprit
        self.held: dict[int, tuple[Chunk, set[int]]] = {}
        self.ran: dict[int, int] = {}
        self.parked: set[int] = set()

    def submit(self, chunk: Chunk) -> None:
        assert chunk.items, "an empty chunk"
        assert len(chunk.idx) == len(chunk.items)
        self.held[chunk.id] = (chunk, set(range(len(chunk.items))))

    def poll(self) -> list[Report]:
        chunk_id = self.rng.choice(list(self.held))
        chunk, left = self.held[chunk_id]
        report = self._report(chunk, sorted(left))
        if report is not None:
            left -= set(report.places)
        if not left:
            del self.held[chunk_id]
        return [] if report is None else [report]

    def _report(self, chunk: Chunk, left: list[int]) -> Report | None:
        poisoned = [n for n in left if chunk.items[n] == POISON]
        fine = [n for n in left if chunk.items[n] != POISON]
        mood = self.rng.random()
        if poisoned and mood < 0.5:
            culprit = poisoned[0] if self.names_culprit else None
            # No item of a worker with several chunks can be blamed.
            alone = chunk.attempt > 0 or self.rng.random() < 0.5
            blamed = culprit if alone else None
            return Lost(chunk.id, left, blamed, "crash", 1, -9, only_chunk=alone)
        if mood < 0.65:
            # The last items had not begun.
            return Lost(chunk.id, left[self.rng.randint(0, len(left)) :], None, "slow")
        if mood < 0.7:
            # The machine it runs on goes down, for no fault of any item.
            return Lost(chunk.id, left, None, "stopped")
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
        return Done(chunk.id, places, values, odd, 0.0)


def charge(item: Any, parked: Parked | None, lost: Lost, now: float) -> ItemOutcome:
    assert item == POISON, "another item is blamed"
    assert (lost.why, now >= 0) == ("crash", True)
    attempts = parked.attempts if parked else 1
    if attempts < 2:
        return ItemOutcome(retry_in=0.5, parked=Parked(attempts=attempts + 1))
    return ItemOutcome(error=RuntimeError("lost"), attempts=attempts)


kinds = st.sampled_from(["fine", "fine", "fine", "fails", "parks", POISON])


def scheduler_of(
    *,
    ordered: bool,
    raises: bool = False,
    most: float | None = None,
    size: ChunkSize | None = None,
) -> Scheduler:
    return Scheduler(
        size=size or ChunkSize(target_s=0.03),
        ordered=ordered,
        errors=ErrorPolicy(raises=raises, max_errors=most),
        recover=charge,
    )


@given(
    st.lists(kinds, max_size=60),
    st.booleans(),
    st.booleans(),
    st.integers(1, 6),
    st.integers(0, 2**32).map(random.Random),
)
def test_every_index_ends_exactly_once_within_the_window(
    items: list[str], ordered: bool, names_culprit: bool, slots: int, rng: random.Random
) -> None:
    size = ChunkSize(target_s=0.03)
    scheduler = scheduler_of(ordered=ordered, size=size)
    executor = RandomExecutor(rng, names_culprit=names_culprit)
    handed: list[int] = []
    failed: list[int] = []
    source, now = list(items), 0.0
    for _ in range(20_000):
        room = scheduler.room(slots)
        assert room <= slots * size.size, "I2"
        pulled, source = source[:room], source[room:]
        scheduler.ended = not source
        idx = scheduler.admit(len(pulled))
        scheduler.enqueue(idx, pulled)
        while (chunk := scheduler.next_chunk(slots, now)) is not None:
            executor.submit(chunk)
        assert len(executor.held) == scheduler.in_flight <= slots
        progressed = False
        while (batch := scheduler.hand_out()) is not None:
            progressed = True
            handed += batch.idx
            failed += [batch.idx[n] for n, o in batch.odd.items() if o.error is not None]
        if scheduler.done and not progressed:
            break
        if progressed:
            continue
        if executor.held:
            now += 0.01
            for batch in scheduler.take(executor.poll(), now):
                scheduler.finish(batch)
        else:
            due = scheduler.next_due()
            assert due is not None, "I1: it would wait for ever"
            now = max(now, due)
    assert sorted(handed) == list(range(len(items))), "I3"
    twice = [n for n, times in executor.ran.items() if times > 1 + (n in executor.parked)]
    assert not twice, "what was reported ran again"
    if ordered:
        assert handed == sorted(handed)
    bad = [n for n, item in enumerate(items) if item in ("fails", POISON)]
    assert sorted(failed) == bad, "I4: `charge` refuses innocents"
    assert scheduler.open == 0


def run_chunk(scheduler: Scheduler, slots: int = 1) -> Chunk:
    chunk = scheduler.next_chunk(slots, 0.0)
    assert chunk is not None
    return chunk


def feed(scheduler: Scheduler, items: list[Any]) -> None:
    scheduler.enqueue(scheduler.admit(len(items)), items)


def lost(chunk: Chunk, *places: int, **given: Any) -> Lost:
    return Lost(chunk.id, places or range(len(chunk.items)), None, "crash", **given)


def done(chunk: Chunk, odd: dict[int, ItemOutcome] | None = None) -> Done:
    return Done(chunk.id, range(len(chunk.items)), list(chunk.items), odd or {}, 0.0)


def test_a_chunk_lost_without_culprit_is_halved_until_one_item_stands_alone() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 8
    feed(scheduler, ["fine"] * 5 + [POISON] + ["fine"] * 2)
    sizes: list[tuple[int, int]] = []
    batches: list[Any] = []
    while True:
        chunk = scheduler.next_chunk(1, 0.0)
        if chunk is None:
            break
        sizes.append((len(chunk.items), chunk.attempt))
        report: Report = lost(chunk) if POISON in chunk.items else done(chunk)
        batches += scheduler.take([report], 0.0)
    assert sizes == [(8, 0), (4, 1), (4, 1), (2, 2), (1, 3), (1, 3), (2, 2)]
    assert scheduler.next_due() == 0.5, "the culprit alone is tried again"
    assert sum(len(batch) for batch in batches) == 7


def test_a_known_culprit_costs_no_other_item_anything() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 4
    feed(scheduler, ["a", "b", POISON, "d"])
    chunk = run_chunk(scheduler)
    partial = Done(chunk.id, range(1), ["a"], {}, 0.0)
    (first,) = scheduler.take([partial, Lost(chunk.id, range(1, 4), 2, "crash")], 0.0)
    assert first.items == ["a"]
    others = [run_chunk(scheduler, slots=3) for _ in range(2)]
    assert [(other.items, other.attempt) for other in others] == [(["b"], 0), (["d"], 0)]


def test_reports_of_a_chunk_that_is_gone_are_ignored() -> None:
    scheduler = scheduler_of(ordered=False)
    feed(scheduler, ["a"])
    chunk = run_chunk(scheduler)
    scheduler.take([Lost(chunk.id, [0], None, "slow")], 0.0)
    assert scheduler.take([done(chunk)], 0.0) == []
    (batch,) = scheduler.take([done(chunk), done(run_chunk(scheduler))], 0.0)
    assert batch.items == ["a"]


def test_a_failed_item_ends_the_map_where_errors_are_raised() -> None:
    scheduler = scheduler_of(ordered=False, raises=True)
    feed(scheduler, ["a", "b"])
    chunk = run_chunk(scheduler)
    for batch in scheduler.take([done(chunk, {0: ItemOutcome(error=KeyError("x"))})], 0.0):
        scheduler.finish(batch)
    assert scheduler.failed
    assert scheduler.failed[0] == 0
    assert scheduler.next_chunk(1, 0.0) is None
    assert scheduler.room(1) == 0
    assert scheduler.done


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_ends_the_map_in_any_case(kind: type[BaseException]) -> None:
    scheduler = scheduler_of(ordered=False)
    feed(scheduler, ["a"])
    for batch in scheduler.take([done(run_chunk(scheduler), {0: ItemOutcome(error=kind())})], 0.0):
        scheduler.finish(batch)
    assert scheduler.failed
    assert type(scheduler.failed[1]) is kind


def test_too_many_failures_stop_the_map_and_keep_what_is_done() -> None:
    scheduler = scheduler_of(ordered=True, most=1)
    scheduler._size.size = 2
    feed(scheduler, ["a", "b", "c", "d", "e"])
    first, second = run_chunk(scheduler, 2), run_chunk(scheduler, 2)
    for batch in scheduler.take([done(second, {0: ItemOutcome(error=KeyError())})], 0.0):
        scheduler.finish(batch)
    assert scheduler.stopped
    assert scheduler.next_chunk(2, 0.0) is None
    assert not scheduler.done, "what is at work goes on to its end"
    assert scheduler.hand_out() is None
    for batch in scheduler.take([done(first)], 0.0):
        scheduler.finish(batch)
    handed = [batch.idx[0] for batch in iter(scheduler.hand_out, None)]
    assert handed == [0, 2]
    assert scheduler.done


@pytest.mark.parametrize("pause", [5.0, 0.0])
def test_items_that_pause_leave_their_place_to_others(pause: float) -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size = ChunkSize(target_s=0.03, fixed=1)
    feed(scheduler, ["a", "b"])
    assert scheduler.room(2) == 0
    chunk = run_chunk(scheduler)
    parked = ItemOutcome(retry_in=pause, parked=Parked(attempts=2))
    assert scheduler.take([done(chunk, {0: parked})], 10.0)[0].items == []
    assert scheduler.room(2) == 1
    assert scheduler.next_due() == 10.0 + pause
    assert run_chunk(scheduler).items == ["b"]


def test_the_tail_is_shared_out() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 31
    feed(scheduler, list("abcdefgh"))
    scheduler.ended = True
    assert [len(run_chunk(scheduler, 4).items) for _ in range(4)] == [2, 2, 1, 1]


def test_before_the_end_chunks_stay_whole() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 4
    feed(scheduler, list(range(16)))
    assert [len(run_chunk(scheduler, 4).items) for _ in range(4)] == [4, 4, 4, 4]
    scheduler.take([done(scheduler._out[0])], 0.0)
    scheduler._size.size = 4
    feed(scheduler, list(range(4)))
    assert len(run_chunk(scheduler, 4).items) == 4


def test_slow_input_goes_to_all_workers_without_items() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 4
    feed(scheduler, list(range(4)))
    assert [len(run_chunk(scheduler, 4).items) for _ in range(4)] == [1, 1, 1, 1]


def test_a_chunk_counts_by_the_part_of_a_worker_that_it_keeps_busy() -> None:
    scheduler = Scheduler(
        size=ChunkSize(target_s=0.03, least=4),
        ordered=False,
        errors=ErrorPolicy(raises=False),
        recover=charge,
    )
    feed(scheduler, list(range(24)))
    first, _ = run_chunk(scheduler, 2), run_chunk(scheduler, 2)
    assert scheduler.next_chunk(2, 0.0) is None
    scheduler.take([Done(first.id, [0, 1, 3], [0, 1, 3], {}, 10.0)], 0.0)
    assert len(run_chunk(scheduler, 2).items) == 4
    assert scheduler.next_chunk(2, 0.0) is None


def test_what_comes_back_of_a_slow_chunk_is_shared_out_whatever_size_is_wanted() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size = ChunkSize(target_s=0.03, fixed=9)
    feed(scheduler, list(range(20)))
    chunk = run_chunk(scheduler, 4)
    scheduler.take([Lost(chunk.id, range(1, 9), None, "slow")], 0.0)
    assert scheduler.in_flight == 1, "its first item is at work still"
    parts = [run_chunk(scheduler, 4) for _ in range(3)]
    assert [(part.items, part.attempt) for part in parts] == [([1, 2], 0), ([3, 4], 0), ([5], 0)]
    scheduler.take([Done(chunk.id, range(1), [0], {}, 0.0)], 0.0)
    assert scheduler.in_flight == 3


def test_items_that_died_with_others_are_tried_again_alone_before_one_is_blamed() -> None:
    scheduler = scheduler_of(ordered=False, size=ChunkSize(target_s=0.03, fixed=2))
    feed(scheduler, [POISON, POISON])
    chunk = run_chunk(scheduler)
    assert scheduler.take([lost(chunk, only_chunk=False)], 0.0) == []
    again = run_chunk(scheduler, slots=4)
    assert (again.items, again.attempt) == ([POISON, POISON], 1), "whole, however many are idle"
    assert scheduler.next_due() is None
    scheduler.take([lost(again, 0), lost(again, 1)], 0.0)
    assert scheduler.next_due() == 0.5


def test_only_neighbours_are_sent_together() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 4
    scheduler.admit(6)
    scheduler.enqueue(range(1), ["a"])
    scheduler.enqueue(range(1, 2), ["b"])
    scheduler.enqueue(range(4, 5), ["e"])
    scheduler.enqueue(range(5, 6), ["f"])
    chunks = [run_chunk(scheduler, 2) for _ in range(2)]
    assert [(list(c.idx), c.items) for c in chunks] == [([0, 1], ["a", "b"]), ([4, 5], ["e", "f"])]


def test_items_that_wait_for_other_callers_leave_their_place_to_a_thousand_others() -> None:
    scheduler = scheduler_of(ordered=False, size=ChunkSize(target_s=0.03, fixed=1))
    feed(scheduler, ["a"] * 1002)
    assert [scheduler.room(2, waiting) for waiting in (0, 1000, 1001, 1002)] == [0] * 4
    assert [scheduler.room(4, waiting) for waiting in (998, 999, 1000, 1002)] == [0, 1, 2, 2]


def test_a_result_that_comes_with_its_attempts_takes_its_place() -> None:
    scheduler = scheduler_of(ordered=False)
    feed(scheduler, ["a"])
    odd = {0: ItemOutcome(value="A", attempts=2)}
    (batch,) = scheduler.take([done(run_chunk(scheduler), odd)], 0.0)
    assert (batch.values, batch.odd) == (["A"], odd)


def test_after_a_slow_chunk_sizes_start_again() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 8
    feed(scheduler, list(range(8)))
    chunk = run_chunk(scheduler)
    scheduler.take([Lost(chunk.id, range(1, 8), None, "slow")], 0.0)
    assert scheduler._size.size == 1


def test_finished_items_hold_their_places_until_they_are_handed_out() -> None:
    scheduler = scheduler_of(ordered=False, size=ChunkSize(target_s=0.03, fixed=1))
    feed(scheduler, list("abc"))
    for chunk in [run_chunk(scheduler, 3) for _ in range(3)]:
        for batch in scheduler.take([done(chunk)], 0.0):
            scheduler.finish(batch)
    rooms = [scheduler.room(3)]
    while scheduler.hand_out() is not None:
        rooms.append(scheduler.room(3))
    assert rooms == [0, 1, 2, 3]


def test_a_stopped_map_hands_out_what_is_done_behind_a_gap() -> None:
    scheduler = scheduler_of(ordered=True, size=ChunkSize(target_s=0.03, fixed=1))
    feed(scheduler, list("abcde"))
    first, second, third, fourth = (run_chunk(scheduler, 4) for _ in range(4))
    pauses = {0: ItemOutcome(retry_in=5.0, parked=Parked(attempts=2))}
    for batch in scheduler.take([done(second), done(fourth), done(first, pauses)], 0.0):
        scheduler.finish(batch)
    assert scheduler.hand_out() is None, "the first one may still come"
    assert scheduler.next_due() == 5.0
    scheduler.stop("enough")
    assert scheduler.next_due() is None
    assert scheduler.hand_out() is None, "the third one is at work"
    for batch in scheduler.take([done(third)], 0.0):
        scheduler.finish(batch)
    handed = [(list(each.idx), each.items, each.values) for each in iter(scheduler.hand_out, None)]
    assert handed == [([1], ["b"], ["b"]), ([2], ["c"], ["c"]), ([3], ["d"], ["d"])]
    assert scheduler.done


def test_items_whose_pause_is_over_go_together_soonest_first_up_to_the_size() -> None:
    scheduler = scheduler_of(ordered=False, size=ChunkSize(target_s=0.03, fixed=2))
    feed(scheduler, list("abcd"))
    for pauses in ((3.0, 1.0), (2.0, 9.0)):
        odd = {n: ItemOutcome(retry_in=s, parked=Parked(slept=s)) for n, s in enumerate(pauses)}
        scheduler.take([done(run_chunk(scheduler), odd)], 0.0)
    assert scheduler.next_chunk(1, 0.999) is None
    first, second = (scheduler.next_chunk(2, 3.0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.items, second.items) == (["b", "c"], ["a"])
    assert [parked.slept for parked in (first.parked or {}).values()] == [1.0, 2.0]
    assert (scheduler.next_chunk(3, 8.9), scheduler.next_due()) == (None, 9.0)


def test_each_failure_is_counted_once() -> None:
    scheduler = scheduler_of(ordered=False, size=ChunkSize(target_s=0.03, fixed=3))
    feed(scheduler, list("abcdefghijkl"))
    counted = []
    retried, failed = ItemOutcome(value="A", attempts=2), ItemOutcome(error=KeyError())
    for odd in ({}, {}, {0: retried, 1: failed, 2: failed}, {}):
        for batch in scheduler.take([done(run_chunk(scheduler), odd)], 0.0):
            scheduler.finish(batch)
        counted.append((scheduler.errors.finished, scheduler.errors.failed))
    assert counted == [(3, 0), (6, 0), (9, 2), (12, 2)]


def test_an_error_that_stop_on_names_stops_the_map() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler.errors.stop_on = OSError
    feed(scheduler, ["a"])
    odd = {0: ItemOutcome(error=TimeoutError())}
    for batch in scheduler.take([done(run_chunk(scheduler), odd)], 0.0):
        scheduler.finish(batch)
    assert scheduler.stopped == "an item failed with TimeoutError, and stop_on ends the map there"


def test_what_single_items_took_sets_the_next_size_together() -> None:
    scheduler = scheduler_of(ordered=False)
    feed(scheduler, list("ab"))
    chunks = [run_chunk(scheduler, 2) for _ in range(2)]
    reports = [
        Done(c.id, range(1), c.items, {}, s) for c, s in zip(chunks, (0.02, 0.01), strict=True)
    ]
    scheduler.take(reports, 0.0)
    assert scheduler._size.size == 2


def test_what_the_items_of_a_chunk_took_and_weighed_sets_the_next_size() -> None:
    scheduler = scheduler_of(ordered=False)
    scheduler._size.size = 2
    feed(scheduler, list("abcd"))
    first, second = run_chunk(scheduler, 2), run_chunk(scheduler, 2)
    scheduler.take([Done(first.id, range(2), ["a", "b"], {}, 0.006)], 0.0)
    assert scheduler._size.size == 8, "four times as many, towards the ten that take the target"
    scheduler.take([Done(second.id, range(2), ["c", "d"], {}, 0.0, weight=HEAVIEST)], 0.0)
    assert scheduler._size.size == 2, "as many as are not too heavy together"


# --- failed items ---------------------------------------------------------------------------------


def test_without_a_bound_all_items_may_fail() -> None:
    assert ErrorPolicy().count(1000, failed=1000) is None


def test_max_errors_as_a_number_ends_the_map_when_it_is_reached() -> None:
    policy = ErrorPolicy(max_errors=3)
    assert policy.count(100, failed=2) is None
    assert policy.count(1, failed=1) == "3 items failed, and max_errors=3 ends the map there"


def test_max_errors_as_a_share_counts_from_twenty_finished_items_on() -> None:
    policy = ErrorPolicy(max_errors=0.5)
    assert policy.count(19, failed=19) is None
    assert policy.count(1, failed=0) == "19 of 20 items failed, more than max_errors=0.5 allows"


def test_max_errors_as_a_share_that_is_just_reached_is_allowed() -> None:
    policy = ErrorPolicy(max_errors=0.5)
    assert policy.count(20, failed=10) is None
    assert policy.count(1, failed=1) is not None


def test_stop_on_stops_with_a_text_that_can_be_counted() -> None:
    policy = ErrorPolicy(stop_on=(OSError, KeyError))
    assert policy.stops(ValueError("x")) is None
    text = "an item failed with TimeoutError, and stop_on ends the map there"
    assert (
        policy.stops(TimeoutError("1.123456789 s")) == policy.stops(TimeoutError("2.3 s")) == text
    )


def test_stop_on_looks_into_exception_groups() -> None:
    policy = ErrorPolicy(stop_on=(OSError, KeyError))
    inner = ExceptionGroup("inner", [KeyError("x")])
    assert policy.stops(ExceptionGroup("g", [ValueError()])) is None
    text = "an item failed with KeyError, and stop_on ends the map there"
    assert (
        policy.stops(ExceptionGroup("g", [ValueError(), inner])) == policy.stops(KeyError()) == text
    )


def test_what_is_no_exception_ends_every_map() -> None:
    assert ErrorPolicy(raises=False).ends(KeyboardInterrupt())
    assert not ErrorPolicy(raises=False).ends(ValueError())
