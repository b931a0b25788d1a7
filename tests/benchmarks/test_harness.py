# this_file: tests/benchmarks/test_harness.py
"""The statistics are right and the clock sees what it should; no figure itself is judged."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from random import Random
from typing import Any

import pytest
from benchmarks.harness import (
    calibrated_count,
    interleaved,
    longest_stall,
    make_timer,
    missing,
    paired_ratio,
    rate_between,
    significant,
    worst_window,
)
from hypothesis import given
from hypothesis import strategies as st

moments = st.lists(st.integers(0, 60), max_size=40).map(sorted)
durations = st.floats(1.0, 1e6)


@given(times=moments, period=st.integers(1, 30))
def test_worst_window_equals_the_brute_force_over_every_start(
    times: list[int], period: int
) -> None:
    brute = max(
        sum(start <= moment < start + period for moment in times) for start in range(-30, 61)
    )

    assert worst_window(times, period) == brute


def test_a_window_is_half_open() -> None:
    assert worst_window([0.0, 1.0, 2.0], 1.0) == 1
    assert worst_window([0.0, 0.875, 1.0], 1.0) == 2


@given(times=moments.filter(lambda times: len(times) > 1))
def test_no_gap_is_longer_than_the_longest_stall(times: list[int]) -> None:
    gaps = [times[index + 1] - times[index] for index in range(len(times) - 1)]

    assert longest_stall(times) == max(gaps)


@pytest.mark.parametrize("times", [[], [3.0]], ids=["none", "one"])
def test_fewer_than_two_events_do_not_stall(times: list[float]) -> None:
    assert longest_stall(times) == 0.0


@given(
    rate=st.integers(1, 500),
    start=st.floats(0.0, 2.0),
    length=st.floats(0.5, 2.0),
)
def test_an_even_stream_has_its_rate_wherever_one_looks(
    rate: int, start: float, length: float
) -> None:
    times = [index / rate for index in range(5 * rate + 1)]

    assert rate_between(times, start, start + length) == pytest.approx(rate, rel=1e-6)


def test_a_stream_that_ends_early_is_counted_to_its_end() -> None:
    assert rate_between([0.0, 1.0, 2.0, 3.0], 1.0, 5.0) == 0.5


@given(
    rounds=st.lists(st.tuples(durations, st.floats(0.5, 2.0)), min_size=1, max_size=30),
    ratio=st.floats(0.1, 10.0),
)
def test_a_ratio_ignores_whatever_slows_both_sides_of_a_round(
    rounds: list[tuple[float, float]], ratio: float
) -> None:
    peer = [duration * slowness for duration, slowness in rounds]
    subject = [duration * ratio * slowness for duration, slowness in rounds]

    assert paired_ratio(subject, peer) == pytest.approx(ratio)


def test_rounds_without_a_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(123456.0, 123500.0), (0.00123456, 0.001235), (0.0, 0.0), (-98765.0, -98760.0)],
)
def test_figures_keep_four_significant_digits(value: float, rounded: float) -> None:
    assert significant(value) == pytest.approx(rounded, rel=1e-12)


def test_every_contender_takes_one_turn_per_round_and_the_order_changes() -> None:
    turns: list[str] = []

    def contender(name: str) -> Any:
        def timer(count: int) -> float:
            turns.append(name)
            return count * 1e-3

        return timer

    samples = interleaved(
        {name: contender(name) for name in "abc"}, rounds=20, round_seconds=0.01, random=Random(1)
    )

    rounds = [tuple(turns[-60:][index : index + 3]) for index in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(figures) for name, figures in samples.items()} == {"a": 20, "b": 20, "c": 20}
    assert samples["a"][0] == pytest.approx(1e6)


def test_the_collector_runs_again_after_a_contender_broke() -> None:
    def breaks(_count: int) -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleaved({"broken": breaks}, rounds=1, round_seconds=0.01, random=Random(1))

    assert gc.isenabled()


def test_the_count_fills_the_turn() -> None:
    assert calibrated_count(lambda count: count * 2e-6, 0.01) == pytest.approx(5000, rel=0.01)


def test_a_slow_first_call_does_not_shorten_the_turn() -> None:
    slow = [10.0]

    assert calibrated_count(
        lambda count: count * 2e-6 + (slow.pop() if slow else 0.0), 0.01
    ) == pytest.approx(5000, rel=0.01)


def test_a_distinct_row_never_passes_an_argument_twice() -> None:
    seen: Counter[int] = Counter()
    timer = make_timer(lambda i: seen.update([i]), "f(i)", distinct=True)

    timer(3)
    timer(4)

    assert seen == Counter(range(7))


def test_an_asynchronous_call_is_awaited() -> None:
    awaited: list[int] = []

    async def contender(value: int) -> None:
        awaited.append(value)

    with asyncio.Runner() as runner:
        make_timer(contender, "f(1)", run=runner.run)(3)

    assert awaited == [1, 1, 1]


def test_only_modules_that_are_not_there_are_missing() -> None:
    assert missing(["asyncio", "no_such_module"]) == ["no_such_module"]
