# this_file: tests/limits/test_rules.py
from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import rows

from opero.errors import OperoUsageError
from opero.limits.gcra import NEVER, SECOND, Gcra, Rule, check_period, gcra_for
from opero.limits.limiter_state import LimiterState
from opero.limits.windows import (
    LARGEST_WINDOW,
    CombinedLimit,
    CostWindow,
    SlidingWindow,
    SpendCap,
    StepWindow,
    new_cells,
    part_of,
    rule_for,
)
from opero.utils.units import Rate, parse_windows

pytestmark = [pytest.mark.internal, pytest.mark.timeout(120)]

COUNTS = st.one_of(
    st.integers(1, 60).map(float),
    st.sampled_from([0.1, 0.5, 0.9, 1.5, 2.5, 3.7, 99.9, 100.9, 250.25]),
    st.floats(0.05, 150).map(lambda count: round(count, 3)),
)
PERIODS = st.sampled_from([0.05, 1.0, 7.0, 60.0])


def most_in_a_window(starts: Sequence[int], period: int) -> int:
    """Count by brute force: the fullest half-open window begins with a start."""
    return max((sum(s <= t < s + period for t in starts) for s in starts), default=0)


def allowed(count: float, burst: int) -> int:
    return math.floor(count + burst) if burst else math.ceil(count)


class Worst:
    """A caller that always asks, now and then late, and that takes breaks."""

    def __init__(self, rule: Rule, start: int = 0) -> None:
        self.rule = rule
        self.state = rule.new_state()
        self.now = start
        self.starts: list[int] = []

    def go_on(self, pause: int, late: int) -> None:
        self.now += pause
        wait = self.rule.take(self.state, self.now)
        if wait:
            self.now += wait + late
            assert self.rule.take(self.state, self.now) == 0
        self.starts.append(self.now)


@given(
    count=COUNTS,
    period=PERIODS,
    burst=st.integers(0, 4),
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=20, max_size=150),
    start=st.integers(-(10**9), 10**16),
)
def test_no_window_of_a_spaced_rate_is_overfull(count, period, burst, steps, start):
    rule = rule_for(Rate(count, period), burst, smooth=True)
    caller = Worst(rule, start)
    for pause, late in steps:
        # Pauses and delays up to two intervals, most of them none at all.
        pause, late = (max(0, rule.interval * (x - 20) // 10) for x in (pause, late))
        caller.go_on(pause, late)
    assert most_in_a_window(caller.starts, round(period * SECOND)) <= allowed(count, burst)


@given(
    count=COUNTS,
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=20, max_size=150),
    start=st.integers(-(10**9), 10**16),
)
def test_no_window_of_a_quota_is_overfull(count, steps, start):
    rule = rule_for(Rate(count, 3600), 1, smooth=None)
    caller = Worst(rule, start)
    for pause, late in steps:
        pause, late = (max(0, rule.period * (x - 30) // 10) for x in (pause, late))
        caller.go_on(pause, late)
    assert most_in_a_window(caller.starts, 3600 * SECOND) <= math.ceil(count)


@given(
    count=COUNTS, burst=st.integers(1, 4), late=st.lists(st.floats(0, 1), min_size=50, max_size=50)
)
def test_a_waiter_that_wakes_late_within_the_tolerance_loses_nothing(count, burst, late):
    rule = rule_for(Rate(count, 1), burst, smooth=True)
    caller = Worst(rule)
    for share in late:
        caller.go_on(0, int(rule.tolerance * share))
    assert caller.starts[-1] <= (len(late) - 1) * rule.interval


@pytest.mark.parametrize("count", [1, 3, 10, 100, 250.9, 1000, 9999.5, 10_000])
def test_the_spacing_gives_at_least_99_percent_of_the_rate(count):
    rule = rule_for(Rate(count, 1), 1, smooth=True)
    assert 0.99 <= SECOND / rule.interval / count <= 1


@pytest.mark.parametrize(
    ("text", "per_hour"), [("2.5/hour", 2.5), ("0.5/hour", 0.5), ("7/hour", 7)]
)
def test_a_quota_that_is_always_asked_for_gives_its_rate(text, per_hour):
    caller = Worst(rule_for(parse_windows(text)[0].rate, 1, None))
    for _ in range(100):
        caller.go_on(0, 0)
    hours = caller.starts[-1] / 3600 / SECOND
    assert hours <= len(caller.starts) / per_hour


def test_a_quota_lets_all_of_it_start_at_once_and_then_none():
    rule = rule_for(parse_windows("1000/day")[0].rate, 1, None)
    state = rule.new_state()
    assert [rule.take(state, 5) for _ in range(1000)] == [0] * 1000
    assert rule.take(state, 5) == 86400 * SECOND
    assert rule.take(state, 4 + 86400 * SECOND) == 1
    assert rule.take(state, 5 + 86400 * SECOND) == 0


@pytest.mark.parametrize(
    ("text", "smooth", "rule"),
    [
        ("10/s", None, Gcra(SECOND, SECOND // 10, SECOND // 10)),
        ("3/s", None, Gcra(SECOND, 333_333_334, 333_333_334)),
        ("100/minute", None, Gcra(60 * SECOND, 600_000_000, 600_000_000)),
        ("2.5/s", None, Gcra(SECOND, 400_000_000, 200_000_000)),
        ("60/hour", None, SlidingWindow(3600 * SECOND, 60)),
        ("60/hour", True, Gcra(3600 * SECOND, 60 * SECOND, 60 * SECOND)),
        ("10/s", False, SlidingWindow(SECOND, 10)),
        ("2.5/hour", None, SlidingWindow(72 * 60 * SECOND, 3)),
    ],
)
def test_the_rule_follows_from_rate_and_period(text, smooth, rule):
    assert rule_for(parse_windows(text)[0].rate, 1, smooth) == rule


def test_strict_spacing_lets_nothing_catch_up():
    rule = rule_for(Rate(10, 1), 0, None)
    state = rule.new_state()
    assert rule.take(state, 0) == 0
    assert rule.take(state, 0) == SECOND // 10
    assert rule.take(state, SECOND) == 0
    assert rule.take(state, SECOND) == SECOND // 10


def test_a_spaced_call_starts_at_its_nanosecond_and_not_before():
    rule = rule_for(Rate(10, 1), 1, None)
    state = rule.new_state()
    assert [rule.take(state, 0) for _ in range(2)] == [0, 0]
    assert rule.take(state, SECOND // 10 - 1) == 1
    assert rule.take(state, SECOND // 10) == 0


def test_a_large_rate_that_is_not_whole_keeps_its_tolerance():
    rule = rule_for(Rate(999.9, 1), 1, None)
    assert rule.tolerance == SECOND // 999 + 1


def test_a_rate_that_was_missed_is_not_made_up_for():
    rule = rule_for(Rate(100, 1), 1, None)
    state = rule.new_state()
    rule.take(state, 0)
    late = SECOND * 8 // 10
    assert [bool(rule.take(state, late)) for _ in range(4)] == [False, False, True, True]


RULES = [
    Gcra(SECOND, SECOND // 10, SECOND // 10),
    Gcra(SECOND, SECOND // 10, 0),
    SlidingWindow(SECOND, 1),
    SlidingWindow(SECOND, 7),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_refusal_changes_nothing(rule):
    state = rule.new_state()
    while not rule.take(state, 0):
        pass
    before = list(state)
    assert rule.take(state, 0) == rule.wait_for(state, 0) > 0
    assert state == before


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_can_be_made_again_from_its_signature(rule):
    assert part_of(rule.signature) == rule


@pytest.mark.parametrize(
    "signature",
    [(1, 1, 1, 0), (2, 1, 1, 0), (2, 1, LARGEST_WINDOW, 0), (4, 1, 1, 0), (5, 1, 0, 0)],
)
def test_the_smallest_and_the_largest_numbers_of_a_signature_are_a_rule(signature):
    part = part_of(signature)
    assert part is not None
    assert part.signature == signature


@rows(
    "signature",
    [
        (0, 1, 1, 1), (3, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, -1), (2, 0, 1, 0), (2, 5, 0, 0),
        (2, 5, LARGEST_WINDOW + 1, 0), (4, 0, 1, 0), (4, 1, 0, 0), (5, 0, 0, 0), (9, 1, 1, 1), (),
    ],
)  # fmt: skip
def test_nonsense_is_no_signature(signature):
    assert part_of(signature) is None


def together() -> Rule:
    return CombinedLimit((Gcra(1000, 256, 128), SlidingWindow(1280, 3), SpendCap(5)))


@rows(
    ("make", "needs", "gap"),
    [
        (lambda: Gcra(1000, 256, 128), (256, 130, 256), 0),
        (lambda: SlidingWindow(1280, 3), (0, 10, 1280), 426),
        (lambda: CostWindow(12800, 5), (0, 103, 13200), 128),
        (lambda: SpendCap(5), (0, NEVER, 0), 0),
        (together, (256, 10, 1280), 426),
    ],
)
def test_a_rule_says_what_a_waiter_needs_and_how_far_apart_calls_are_after_a_pause(
    make, needs, gap
):
    rule = make()
    assert (rule.spacing, rule.late, rule.longest_wait) == needs
    assert isinstance(rule.late, int)
    assert rule.before_pause(rule.new_state(), 10_000, 10_000) == gap


class Interrupted(list[int]):
    """Words whose writer is killed after so many stores."""

    left = 10**9

    def __setitem__(self, place, word):
        if not self.left:
            raise SystemExit
        self.left -= 1
        super().__setitem__(place, word)


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(
    killed=st.lists(st.integers(0, 4), max_size=40),
    pauses=st.lists(st.integers(0, 12), max_size=40),
)
def test_a_kill_between_two_stores_neither_lifts_the_limit_nor_stops_it(rule, killed, pauses):
    state = Interrupted(rule.new_state())
    now, starts = 0, []
    for stores, pause in zip(killed, pauses, strict=False):
        now += pause * SECOND // 50
        state.left = stores
        try:
            if not rule.take(state, now):
                starts.append(now)
        except SystemExit:
            pass
        state.left = 10**9
        assert rule.wait_for(state, now) <= rule.period
    assert most_in_a_window(starts, rule.period) <= 11


def test_a_quota_too_large_to_count_is_refused():
    with pytest.raises(OperoUsageError, match="smooth=True"):
        rule_for(Rate(LARGEST_WINDOW + 1, 86400), 1, None)
    assert isinstance(rule_for(Rate(LARGEST_WINDOW + 1, 86400), 1, True), Gcra)


@rows(("rate", "burst"), [(Rate(1e-12, 1), 1), (Rate(1, 1000 * 86400), 20), (Rate(1, 1 << 62), 0)])
def test_a_rate_too_slow_for_a_clock_is_refused(rate, burst):
    fix = r"too slow for a clock: name a shorter period or a larger number\.$"
    with pytest.raises(OperoUsageError, match=fix):
        gcra_for(rate, burst)


@rows(
    ("period", "burst", "nanoseconds"),
    [(1e-10, 0, 1), (1e-9, 0, 1), (60, 0, 60 * SECOND)]
    # The longest that a clock has room for.
    + [((1 << 60) // (burst + 1) / SECOND, burst, (1 << 60) // (burst + 1)) for burst in (0, 1)],
)
def test_a_period_is_whole_nanoseconds(period, burst, nanoseconds):
    assert check_period(Rate(1, period), burst) == nanoseconds


# --- slots ----------------------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_slot_given_back_at_once_was_never_taken(rule, time):
    slot, other = LimiterState(rule, time), LimiterState(rule, time)
    for _ in range(15):
        time.now += SECOND // 20
        wait, mark = slot.take_marked()
        if not wait:
            assert slot.give_back(mark)
        assert slot.wait_for() == other.wait_for()
        assert slot.take() == other.take()


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=str)
def test_a_slot_is_kept_when_another_call_has_started_since(rule, time):
    slot = LimiterState(rule, time)
    _, mark = slot.take_marked()
    slot.take()
    before = slot.wait_for()
    assert not slot.give_back(mark)
    assert slot.wait_for() == before


@given(steps=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=120))
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_giving_back_never_lets_one_too_many_into_a_window(rule, steps):
    time = Time()
    slot = LimiterState(rule, time)
    starts, marks = [], []
    for pause, returned in steps:
        time.now += pause * SECOND // 100
        if returned and marks:
            at, mark = marks.pop()
            if slot.give_back(mark):
                starts.remove(at)
        wait, mark = slot.take_marked()
        if not wait:
            starts.append(time.now)
            marks.append((time.now, mark))
    most = (
        rule.capacity if isinstance(rule, SlidingWindow) else 10 + rule.tolerance // rule.interval
    )
    assert most_in_a_window(starts, rule.period) <= most


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_damaged_state_is_repaired_within_one_period(rule):
    state = rule.new_state()
    for place in range(len(state)):
        state[place] = 1 << 61
    rule.repair(state, 5 * SECOND)
    assert rule.wait_for(state, 5 * SECOND) <= rule.longest_wait


def test_a_damaged_quota_keeps_its_starts_in_order_and_takes_none_for_later_than_now():
    state = [999, 7, 50, 10, 500]
    SlidingWindow(100, 3).repair(state, 60)
    assert state == [110, 0, 10, 50, 60]


def test_a_damaged_window_of_cost_keeps_what_was_spent_and_goes_back_to_now():
    rule = CostWindow(10, 100)
    state = [20, 999, *([0] * rule.places)]
    for part, spent in ((20, 5), (19, -3), (15, 7)):
        state[2 + part % rule.places] = spent
    rule.repair(state, 18)
    expected = [18, 12, *([0] * rule.places)]
    for part, spent in ((18, 5), (13, 7)):
        expected[2 + part % rule.places] = spent
    assert state == expected


def test_a_cost_counts_until_the_last_moment_of_its_part_has_left_the_window():
    rule = CostWindow(10, 100)
    state = rule.new_state()
    assert rule.take(state, 0, 100) == 0
    assert [rule.used(state, now) for now in (0, 10, 11)] == [100, 100, 0]


def test_the_least_cost_of_a_window_is_one_unit_and_the_shortest_one_a_nanosecond():
    assert CostWindow.of(Rate(1e-9, 1e-10)) == CostWindow(period=1, capacity=1)


@pytest.mark.parametrize("counts", [False, True])
def test_a_step_that_has_the_number_of_the_counted_calls_is_a_step_like_any_other(counts):
    window = StepWindow(2, 2)
    cells = new_cells(window.size)
    window.add(cells, 0.5, 3, 1)
    if counts:
        window.add(cells, 2.5, 1, 0)
    assert window.sums(cells, 2.5) == (counts, 0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_counts_are_forgotten_when_the_window_is_over_or_the_clock_has_gone_back(steps):
    window = StepWindow(steps, steps)
    assert window.size == 3 + 2 * steps
    for later in range(-4, 9):
        cells = new_cells(window.size)
        window.add(cells, 10.5, 3, 1)
        assert window.sums(cells, 10.5 + later) == ((3, 1) if 0 <= later < steps else (0, 0))


def test_a_spaced_limit_is_idle_from_the_moment_of_its_next_slot():
    rule = Gcra(SECOND, 10, 5)
    assert not rule.is_idle([100], 99)
    assert rule.is_idle([100], 100)


def test_a_spaced_limit_is_repaired_to_the_latest_time_that_a_start_leaves():
    rule = Gcra(SECOND, 10, 5)
    state = [1 << 61]
    rule.repair(state, 100)
    assert state == [115]
    rule.repair(state, 101)
    assert state == [115]


def test_a_spaced_limit_needs_no_gap_after_a_pause():
    rule = Gcra(SECOND, 10, 5)
    state = rule.new_state()
    assert rule.before_pause(state, 100, 50) == 0
    assert [rule.take(state, 99), rule.take(state, 100), rule.take(state, 100)] == [1, 0, 10]


def test_a_spaced_limit_describes_itself_in_seconds():
    assert str(Gcra(60 * SECOND, 600_000_000, 0)) == "one call each 0.6 s"


@pytest.mark.parametrize(("count", "whole"), [(100.5, True), (99.5, False)])
def test_a_large_rate_counts_whole_calls_only(count, whole):
    rule = gcra_for(Rate(count, 1), 1)
    exact = -(-SECOND * 2 // round(2 * count))
    assert rule.interval == (SECOND // 100 if whole else exact)
