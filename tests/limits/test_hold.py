# this_file: tests/limits/test_hold.py
from __future__ import annotations

import itertools

import pytest

from opero.limits.gcra import LimitPause, PAUSE_CELLS
from opero.limits.gcra import Gcra, Rule, SECOND
from opero.limits.windows import SlidingWindow
from opero.limits.state.local import LocalState


@pytest.fixture
def hold() -> LimitPause:
    return LimitPause([0] * PAUSE_CELLS)


def test_there_is_no_pause_at_first(hold):
    assert (hold.on, hold.left(5), hold.wait(5)) == (False, 0, 0)


def test_a_pause_only_ever_becomes_longer(hold):
    assert hold.begin(100, 10)
    assert not hold.begin(90, 10)
    assert hold.left(40) == 60
    assert hold.begin(110, 10)
    assert hold.left(40) == hold.wait(40) == 70


def test_calls_come_out_of_a_pause_one_by_one_until_nobody_waits(hold):
    gap = SECOND // 5
    hold.begin(SECOND, gap)
    assert hold.wait(SECOND) == 0
    hold.started(SECOND)
    assert hold.left(SECOND) == 0
    assert hold.wait(SECOND) == gap
    hold.started(SECOND + gap)
    hold.started(SECOND + 10 * gap)
    assert not hold.on


@pytest.mark.parametrize("by", [-100, 500])
def test_a_pause_is_carried_over_to_another_clock(hold, by):
    hold.begin(1000, 10)
    hold.move(by)
    assert hold.left(940 + by) == 60


def test_a_pause_that_is_carried_over_to_time_zero_is_still_one(hold):
    hold.begin(100, 10)
    hold.move(-100)
    assert hold.on


# --- slots ----------------------------------------------------------------------------------------


class Time:
    now = 0

    def __call__(self) -> int:
        return self.now


RULES = [Gcra(SECOND, SECOND // 10, SECOND // 2), SlidingWindow(3600 * SECOND, 50)]


def starts_by(slot: LocalState, time: Time, end: int, step: int = SECOND // 100) -> list[int]:
    """Ask all the time and return when calls started."""
    found = []
    while time.now < end:
        if not slot.take():
            found.append(time.now)
        else:
            time.now += step
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_starts_during_a_pause_and_nobody_stampedes_after_it(rule: Rule):
    time = Time()
    slot = LocalState(rule, time)
    assert slot.take() == 0
    assert slot.pause(2 * SECOND)
    assert not slot.pause(SECOND)
    assert slot.look() == 2 * SECOND
    starts = starts_by(slot, time, 5 * SECOND)
    assert starts[0] == 2 * SECOND
    gaps = {later - one for one, later in itertools.pairwise(starts)}
    assert min(gaps) >= SECOND // 10


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_slot_that_was_paused_is_as_quick_as_before_once_nobody_waits(rule: Rule):
    time = Time()
    slot = LocalState(rule, time)
    slot.pause(SECOND)
    time.now = 100 * SECOND
    assert sum(not slot.take() for _ in range(100)) == (50 if isinstance(rule, SlidingWindow) else 6)
    assert slot._take == rule.take


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_pause_is_ended_by_hand(rule: Rule):
    time = Time()
    slot = LocalState(rule, time)
    slot.take()
    slot.pause(3600 * SECOND)
    slot.resume()
    assert slot.paused() == 0
    time.now += SECOND // 10
    assert slot.take() == 0


def test_resuming_lifts_no_limit():
    time = Time()
    slot = LocalState(Gcra(SECOND, SECOND, 0), time)
    slot.take()
    slot.pause(SECOND)
    slot.resume()
    assert slot.take() == SECOND


def test_a_slot_taken_after_a_pause_can_be_given_back():
    time = Time()
    slot = LocalState(SlidingWindow(SECOND, 1), time)
    slot.pause(SECOND)
    wait, _ = slot.take_marked()
    assert wait == SECOND
    time.now = SECOND
    wait, mark = slot.take_marked()
    assert wait == 0
    assert slot.give_back(mark)
