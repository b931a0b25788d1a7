# this_file: tests/limits/test_limit_pause.py
from __future__ import annotations

import itertools

import pytest

from opero.limits.gcra import PAUSE_CELLS, SECOND, Gcra, LimitPause, Rule, gap_after
from opero.limits.limiter_state import LimiterState
from opero.limits.windows import UNIT, CombinedLimit, CostWindow, SlidingWindow

pytestmark = pytest.mark.internal


@pytest.fixture
def pause() -> LimitPause:
    return LimitPause([0] * PAUSE_CELLS)


def test_there_is_no_pause_at_first(pause):
    assert (pause.on, pause.left(5), pause.wait_for(5)) == (False, 0, 0)


def test_a_pause_only_ever_becomes_longer(pause):
    assert pause.begin(100, 10)
    assert not pause.begin(90, 10)
    assert pause.left(40) == 60
    assert pause.begin(110, 10)
    assert pause.left(40) == pause.wait_for(40) == 70


def test_calls_come_out_of_a_pause_one_by_one_until_none_waits(pause):
    gap = SECOND // 5
    pause.begin(SECOND, gap)
    assert pause.wait_for(SECOND) == 0
    pause.started(SECOND)
    assert pause.left(SECOND) == 0
    assert pause.wait_for(SECOND) == gap
    pause.started(SECOND + gap)
    pause.started(SECOND + 10 * gap)
    assert not pause.on


def test_a_pause_that_ends_when_another_does_changes_nothing(pause):
    assert pause.begin(100, 10)
    assert not pause.begin(100, 20)


def test_a_pause_is_kept_in_the_cells_that_it_is_given():
    cells = [0] * PAUSE_CELLS
    LimitPause(cells).begin(100, 10)
    assert LimitPause(cells).left(40) == 60


def test_a_pause_that_was_half_ended_is_over():
    pause = LimitPause([0, 100, 10])
    assert (pause.on, pause.left(5), pause.wait_for(5)) == (False, 0, 0)


def test_another_pause_lets_no_call_come_closer_to_the_one_before(pause):
    pause.begin(100, 50)
    pause.started(100)
    assert pause.begin(120, 50)
    assert pause.wait_for(100) == 50


@pytest.mark.parametrize("gap", [SECOND // 50, SECOND // 5])
def test_calls_stay_apart_until_a_slot_was_open_for_longer_than_a_gap(pause, gap):
    longest = max(gap, SECOND // 20)
    pause.begin(100, gap)
    pause.started(100 + longest)
    assert pause.on
    pause.started(pause.wait_for(0) + longest + 1)
    assert not pause.on


def test_what_a_call_costs_counts_during_the_way_out_of_a_pause():
    time = Time()
    slot = LimiterState(CombinedLimit((CostWindow(SECOND, 10 * UNIT),)), time)
    slot.pause(SECOND)
    time.now = SECOND
    assert slot.take_marked(7 * UNIT)[0] == 0
    time.now += SECOND // 2
    assert slot.take_marked(4 * UNIT)[0] > 0
    assert slot.take_marked(3 * UNIT)[0] == 0


def test_calls_without_spacing_come_out_of_a_pause_ten_in_its_time_or_evenly():
    assert gap_after(115, even=1000) == 11
    assert gap_after(115, even=7) == 7
    assert gap_after(5, even=1000) == 1


# --- slots ----------------------------------------------------------------------------------------


class Time:
    now = 0

    def __call__(self) -> int:
        return self.now


RULES = [Gcra(SECOND, SECOND // 10, SECOND // 2), SlidingWindow(3600 * SECOND, 50)]


def starts_by(slot: LimiterState, time: Time, end: int, step: int = SECOND // 100) -> list[int]:
    """Ask all the time and return when calls started."""
    found = []
    while time.now < end:
        if not slot.take():
            found.append(time.now)
        else:
            time.now += step
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_starts_during_a_pause_and_no_stampede_follows(rule: Rule):
    time = Time()
    slot = LimiterState(rule, time)
    assert slot.take() == 0
    assert slot.pause(2 * SECOND)
    assert not slot.pause(SECOND)
    assert slot.wait_for() == 2 * SECOND
    starts = starts_by(slot, time, 5 * SECOND)
    assert starts[0] == 2 * SECOND
    gaps = {later - one for one, later in itertools.pairwise(starts)}
    assert min(gaps) >= SECOND // 10


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_slot_that_was_paused_is_as_quick_as_before_once_no_call_waits(rule: Rule):
    time = Time()
    slot = LimiterState(rule, time)
    slot.pause(SECOND)
    time.now = 100 * SECOND
    assert sum(not slot.take() for _ in range(100)) == (
        50 if isinstance(rule, SlidingWindow) else 6
    )
    assert slot._take == rule.take


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_pause_is_ended_by_hand(rule: Rule):
    time = Time()
    slot = LimiterState(rule, time)
    slot.take()
    slot.pause(3600 * SECOND)
    slot.resume()
    assert slot.paused() == 0
    time.now += SECOND // 10
    assert slot.take() == 0


def test_resuming_lifts_no_limit():
    time = Time()
    slot = LimiterState(Gcra(SECOND, SECOND, 0), time)
    slot.take()
    slot.pause(SECOND)
    slot.resume()
    assert slot.take() == SECOND


def test_a_slot_taken_after_a_pause_can_be_given_back():
    time = Time()
    slot = LimiterState(SlidingWindow(SECOND, 1), time)
    slot.pause(SECOND)
    wait, _ = slot.take_marked()
    assert wait == SECOND
    time.now = SECOND
    wait, mark = slot.take_marked()
    assert wait == 0
    assert slot.give_back(mark)
