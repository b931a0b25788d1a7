# this_file: tests/limits/test_combined.py
"""Several windows at once, and windows of cost: the pure rules against plain counting."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.errors import OperoUsageError
from opero.limits.gcra import SECOND, Gcra, Rule
from opero.limits.limiter_state import LimiterState
from opero.limits.windows import (
    SPENT,
    UNIT,
    CombinedLimit,
    CostWindow,
    SlidingWindow,
    SpendCap,
    as_units,
    combined,
    part_of,
)
from opero.utils.units import Rate, RateWindow, parse_windows

pytestmark = pytest.mark.internal


def rule_of_text(text: str, **options: object) -> Rule:
    return combined(parse_windows(text), **{"burst": 1, "smooth": None} | options)


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("10/s", [RateWindow(Rate(10, 1), "calls")]),
        (5, [RateWindow(Rate(5, 1), "calls")]),
        ("10/s & 500/minute", [RateWindow(Rate(10, 1)), RateWindow(Rate(500, 60))]),
        (
            "10 per 2 s&500 requests per minute",
            [RateWindow(Rate(10, 2)), RateWindow(Rate(500, 60))],
        ),
        (
            "500 calls/minute & 30000 tokens/minute",
            [RateWindow(Rate(500, 60)), RateWindow(Rate(30000, 60), "tokens")],
        ),
        ("2.5 $/day", [RateWindow(Rate(2.5, 86400), "$")]),
    ],
)
def test_a_rate_may_name_several_windows_and_what_they_count(text, windows):
    assert list(parse_windows(text)) == windows


@pytest.mark.parametrize("text", ["10/s &", "& 10/s", "10/s & fast", "tokens/s", "10 tokens", ""])
def test_what_is_no_list_of_rates_is_refused_with_the_fix(text):
    with pytest.raises(OperoUsageError, match="is no rate"):
        parse_windows(text)


def test_a_number_without_a_word_counts_cost_where_there_is_one():
    assert [w.weighted for w in parse_windows("10/s & 5 calls/s", weighted=True)] == [True, False]


# --- several windows ------------------------------------------------------------------------------


def test_of_several_windows_only_the_shortest_is_spaced():
    rule = rule_of_text("500/minute & 10/s & 1000/day")
    assert isinstance(rule, CombinedLimit)
    assert [type(part) for part in rule.parts] == [SlidingWindow, Gcra, SlidingWindow]
    quick = rule_of_text("100/s & 50/minute")
    assert isinstance(quick, CombinedLimit)
    assert [type(part) for part in quick.parts] == [Gcra, SlidingWindow]
    smooth = rule_of_text("500/minute & 10/s", smooth=True)
    assert isinstance(smooth, CombinedLimit)
    assert {type(part) for part in smooth.parts} == {Gcra}


def test_a_single_window_stays_the_quick_rule_that_it_was():
    assert isinstance(rule_of_text("10/s"), Gcra)


def most(starts: list[tuple[int, int]], period: int) -> int:
    """The fullest half-open window of the period, by brute force."""
    return max((sum(c for t, c in starts if s <= t < s + period) for s, _ in starts), default=0)


@given(
    steps=st.lists(st.integers(0, 30), min_size=30, max_size=200),
    late=st.integers(0, 5),
)
def test_every_window_keeps_its_own_promise(steps, late):
    rule = rule_of_text("10/s & 25/5s & 40/minute")
    state, now, starts = rule.new_state(), 0, []
    for step in steps:
        now += step * SECOND // 50
        wait = rule.take(state, now)
        if wait:
            now += wait + late
            wait = rule.take(state, now)
        assert wait == 0
        starts.append((now, 1))
    assert most(starts, SECOND) <= 11
    assert most(starts, 5 * SECOND) <= 26
    assert most(starts, 60 * SECOND) <= 41


def test_no_window_loses_a_slot_because_another_refuses():
    rule = rule_of_text("2/s & 3/minute", burst=0)
    state, now = rule.new_state(), 0
    for _ in range(3):
        assert rule.take(state, now) == 0
        now += SECOND
    before = copy.deepcopy(state)
    for _ in range(100):
        assert rule.take(state, now) > 0
    assert state == before
    assert rule.take(state, 60 * SECOND) == 0


def test_a_slot_of_several_windows_is_given_back_to_all_of_them():
    rule = rule_of_text("2/s & 3/minute", burst=0)
    slot, other = LimiterState(rule, lambda: 0), LimiterState(rule, lambda: 0)
    _, mark = slot.take_marked()
    assert slot.give_back(mark)
    assert [slot.take() for _ in range(5)] == [other.take() for _ in range(5)]


# --- windows of cost ------------------------------------------------------------------------------

COSTS = st.one_of(st.integers(0, 100), st.floats(0, 100).map(lambda cost: round(cost, 4)))


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 300), COSTS, st.integers(0, 3)), min_size=5, max_size=120
    ),
    period=st.sampled_from([1, 60, 86400]),
    start=st.integers(-(10**9), 10**16),
)
def test_no_window_of_cost_is_overfull_and_no_wait_is_longer_than_one(steps, period, start):
    window = CostWindow.of(Rate(100, period))
    state, now, spent = window.new_state(), start, []
    for pause, cost, late in steps:
        now += pause * period * SECOND // 1000
        units = as_units(cost, "cost")
        wait = window.wait_for(state, now, units)
        assert 0 <= wait <= window.period + window.grain
        now += wait
        assert window.wait_for(state, now, units) == 0
        now += late
        window.settle(state, now, now, units)
        spent.append((now, units))
    assert most(spent, window.period) <= window.capacity


def test_a_window_of_cost_reaches_its_rate():
    window = CostWindow.of(Rate(1000, 60))
    state, now, spent = window.new_state(), 0, 0
    while now < 3600 * SECOND:
        now += window.wait_for(state, now, 7 * UNIT)
        window.settle(state, now, now, 7 * UNIT)
        spent += 7
    assert spent >= 0.98 * 1000 * 60


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 200), st.integers(1, 40), st.integers(0, 60)), max_size=80
    )
)
def test_settled_costs_are_those_of_a_plain_list(steps):
    """A model: what was spent, when; refunds at the start, debts at the time of settling."""
    window = CostWindow(100 * SECOND, 100 * UNIT)
    state, now = window.new_state(), 0
    entries: list[tuple[int, int]] = []
    for pause, cost, real in steps:
        now += pause * SECOND // 10
        window.settle(state, now, now, cost * UNIT)
        at = now
        now += pause * SECOND // 20
        change = (real - cost) * UNIT
        window.settle(state, now, at, change)
        entries += [(at, min(cost, real) * UNIT), (now, max(0, change))]
        used = window.used(state, now)
        exact = sum(c for t, c in entries if t > now - window.period)
        wide = sum(c for t, c in entries if t > now - window.period - 2 * window.grain)
        assert exact <= used <= wide


def test_a_refund_for_what_has_left_the_window_is_none():
    window = CostWindow(SECOND, 10 * UNIT)
    state = window.new_state()
    window.settle(state, 0, 0, 10 * UNIT)
    window.settle(state, 5 * SECOND, 5 * SECOND, UNIT)
    window.settle(state, 5 * SECOND, 0, -10 * UNIT)
    assert window.used(state, 5 * SECOND) == UNIT


def test_a_debt_larger_than_the_window_is_over_after_one_period():
    window = CostWindow(128 * SECOND, 10 * UNIT)
    state = window.new_state()
    window.settle(state, 0, 0, 50 * UNIT)
    wait = window.wait_for(state, 0, UNIT)
    assert 128 * SECOND <= wait <= 129 * SECOND
    assert window.wait_for(state, wait, 10 * UNIT) == 0


@pytest.mark.parametrize(
    "amount", [-1, True, "5", None, float("nan"), float("inf"), 1e30, 2_305_843_009_213]
)
def test_what_is_no_amount_is_refused(amount):
    with pytest.raises(OperoUsageError, match=r"cost=.* must be a number, 0 or more"):
        as_units(amount, "cost")


def test_however_little_a_call_costs_it_is_something():
    assert [as_units(cost, "cost") for cost in (0, 1e-9, 1e-6, 2.5)] == [0, 1, 1, 2_500_000]


def test_a_limit_too_large_to_be_counted_is_refused():
    with pytest.raises(OperoUsageError, match="larger units"):
        CostWindow.of(Rate(1e13, 1))


def test_a_cap_lets_through_what_is_left_and_nothing_more():
    cap = SpendCap(10 * UNIT)
    state = cap.new_state()
    cap.settle(state, 0, 0, 8 * UNIT)
    assert cap.wait_for(state, 0, 2 * UNIT) == 0
    assert cap.wait_for(state, 10**18, 2 * UNIT + 1) == SPENT
    cap.settle(state, 0, 0, -9 * UNIT)
    assert cap.is_idle(state, 0)


# --- signatures and damage ------------------------------------------------------------------------

LIMITS = [
    rule_of_text("10/s & 30/minute"),
    rule_of_text("10 calls/s & 30 tokens/minute"),
    rule_of_text("10 calls/s & 30 tokens/minute", cap=100 * UNIT),
]


@pytest.mark.parametrize("rule", LIMITS, ids=str)
def test_each_part_is_made_again_from_its_signature(rule):
    numbers = rule.signature
    found = [part_of(numbers[place : place + 4]) for place in range(0, len(numbers), 4)]
    assert found == list(rule.parts)


@pytest.mark.parametrize("rule", LIMITS, ids=str)
def test_no_damage_lifts_or_holds_up_a_limit_for_longer_than_a_period_once_repaired(rule):
    for part in range(len(rule.parts)):
        for place in range(len(rule.new_state()[part])):
            for number in (-1, 1 << 61):
                state = rule.new_state()
                rule.take(state, 0, UNIT)
                state[part][place] = number
                rule.repair(state, 10 * SECOND)
                wait = rule.wait_for(state, 10 * SECOND, UNIT)
                assert wait <= rule.longest_wait or wait == SPENT or number > 0


def test_the_sum_of_a_window_of_cost_is_repaired():
    window = CostWindow(100 * SECOND, 100 * UNIT)
    state = window.new_state()
    window.settle(state, SECOND, SECOND, 30 * UNIT)
    state[1] = 7
    window.repair(state, 2 * SECOND)
    assert window.used(state, 2 * SECOND) == 30 * UNIT
    # A clock that went back takes nothing for later than now.
    window.repair(state, 0)
    assert window.used(state, 0) == 30 * UNIT
    assert window.wait_for(state, 0, 71 * UNIT) <= 101 * SECOND


@pytest.mark.parametrize(
    ("rule", "cost", "after"),
    [
        (rule_of_text("10/s"), UNIT, SECOND),
        (rule_of_text("10/hour"), UNIT, 3600 * SECOND),
        (rule_of_text("10/s & 30/minute"), UNIT, 60 * SECOND),
        (rule_of_text("30 tokens/minute"), UNIT, 61 * SECOND),
        (rule_of_text("30 tokens/minute", cap=UNIT), UNIT, None),
    ],
    ids=str,
)
def test_a_limit_is_idle_once_nothing_counts_any_more(rule, cost, after):
    state = rule.new_state()
    assert rule.is_idle(state, 0)
    rule.take(state, 0, cost) if isinstance(rule, CombinedLimit) else rule.take(state, 0)
    assert not rule.is_idle(state, 0)
    assert rule.is_idle(state, 10**15) is (after is not None)
    if after is not None:
        assert rule.is_idle(state, after)


def test_a_cap_that_is_spent_is_spent_to_the_last_unit():
    cap = SpendCap(10)
    state = cap.new_state()
    assert cap.signature == (5, 10, 0, 0)
    assert cap.take(state, 0, 7) == 0
    assert state == [7]
    assert cap.take(state, 0, 4) == cap.wait_for(state, 0, 4) == SPENT
    assert cap.take(state, 0, 3) == 0
    assert state == [10]
    # What costs nothing is let through.
    assert cap.take(state, 0) == cap.wait_for(state, 0) == 0
    assert cap.take(state, 0, 1) == SPENT


def test_rules_describe_themselves():
    parts = (
        SlidingWindow(SECOND * 3600, 3),
        CostWindow(SECOND * 60, 2500 * UNIT),
        SpendCap(UNIT // 2),
    )
    assert str(CombinedLimit(parts)) == "3 calls in 1 h and 2,500 in 60 s and 0.5 in all"
