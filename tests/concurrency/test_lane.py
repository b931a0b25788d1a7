# this_file: tests/concurrency/test_lane.py
from __future__ import annotations

from collections import deque

import pytest

from opero.concurrency.backlog import deal
from opero.concurrency.chunks import ChunkProgress
from opero.concurrency.lane import Held, Lane, verdict, verdicts
from opero.concurrency.slate import Slate


@pytest.mark.parametrize(
    ("done", "begun", "barren", "several", "expected"),
    [
        ([], 0, False, False, (0, "crash")),
        ([0, 1], 5, False, False, (5, "crash")),
        ([0, 1], 2, False, False, (2, "crash")),
        # It had finished and reported what it began: nobody is to blame.
        ([0, 1, 2], 2, False, False, (None, "stopped")),
        ([], None, False, False, (None, "stopped")),
        # Worker after worker dies of the chunk itself.
        ([], None, True, False, (0, "crash")),
        # Of several at once all that began and were not reported are suspects.
        ([0, 2], 3, False, True, (None, "crash")),
        ([0, 1, 3], 3, False, True, (2, "crash")),
        ([0, 1], 1, False, True, (None, "stopped")),
    ],
)
def test_who_is_to_blame(
    done: list[int],
    begun: int | None,
    barren: bool,
    several: bool,
    expected: tuple[int | None, str],
) -> None:
    held = Held(7, b"", ChunkProgress(8))
    held.tally.report(done)
    lost = verdict(held, begun, why="crash", barren=barren, several=several)
    assert (lost.chunk, lost.culprit, lost.why) == (7, *expected)


def held(number: int, *, turn: int, done: list[int], alone: bool = False) -> Held:
    one = Held(number, b"", ChunkProgress(4), alone=alone, turn=turn)
    one.tally.report(done)
    return one


@pytest.mark.parametrize(
    ("first", "second", "begun", "expected"),
    [
        # Items of both are under way: nobody knows.
        ([0], [], (3, 1), [(None, "crash", False), (None, "crash", False)]),
        # The other one has not begun.
        ([0, 1, 2], [], (3, None), [(3, "crash", True), (None, "stopped", True)]),
        # The other one is done with what it began.
        ([0, 1, 2, 3], [0], (3, 1), [(None, "stopped", True), (1, "crash", True)]),
    ],
)
def test_of_several_chunks_only_one_that_was_alone_is_blamed(
    first: list[int],
    second: list[int],
    begun: tuple[int | None, int | None],
    expected: list[tuple[int | None, str, bool]],
) -> None:
    chunks = [held(7, turn=1, done=first), held(8, turn=2, done=second)]
    found = verdicts(
        zip(chunks, begun, strict=True), why="crash", barren=False, several=True, exitcode=-9
    )
    assert [(lost.culprit, lost.why, lost.alone) for lost in found] == expected


class Bare(Lane):
    """A lane without a process."""

    def __init__(self, *taken: Held) -> None:
        self.up, self.retires, self.closed, self.why = True, False, False, None
        self.held = {one.number: one for one in taken}

    def take(self, held: Held) -> None:
        self.held[held.number] = held


def dealt(waiting: deque[Held], *lanes: Bare, in_flight: int = 4) -> list[set[int]]:
    list(deal(waiting, lanes, in_flight))
    return [set(lane.held) for lane in lanes]


def test_the_emptiest_lane_is_given_the_next_chunk() -> None:
    busy = Bare(held(1, turn=1, done=[0]))
    idler = Bare(held(2, turn=1, done=[0, 1]))
    waiting = deque([held(3, turn=0, done=[])])
    assert dealt(waiting, busy, idler) == [{1}, {2, 3}]
    assert not waiting


def test_a_lane_without_a_free_place_is_given_nothing() -> None:
    waiting = deque([held(3, turn=0, done=[])])
    assert dealt(waiting, Bare(held(1, turn=1, done=[]))) == [{1}]
    assert dealt(waiting, Bare(held(1, turn=1, done=[0, 1])), in_flight=1) == [{1}]
    assert len(waiting) == 1


def test_a_suspect_is_alone_in_its_lane() -> None:
    suspect = held(3, turn=0, done=[], alone=True)
    waiting = deque([suspect, held(4, turn=0, done=[]), held(5, turn=0, done=[])])
    lanes = Bare(held(1, turn=1, done=[0])), Bare(held(2, turn=1, done=[0, 1]))
    assert dealt(waiting, *lanes) == [{1, 4}, {2}], "the emptiest waits for the suspect"
    assert [one.number for one in waiting] == [3, 5]
    lanes[1].held.clear()
    assert dealt(waiting, *lanes) == [{1, 4}, {3}], "and takes nothing beside it"


def test_chunks_begin_in_their_turn() -> None:
    lane = Bare()
    lane.slate = Slate()
    lane.slate.begin_chunk(2)
    lane.slate.begin_item(1)
    chunks = [held(n, turn=n, done=[]) for n in (1, 2, 3)]
    assert [lane.begun(one) for one in chunks] == [3, 1, None]
    lane.slate.close()
