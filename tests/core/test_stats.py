# this_file: tests/core/test_stats.py
"""Counters of a decorated function."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from opero import opero
from opero.core.function import FastCounter, Stats
from opero.testing import fake_clock, flaky

pytestmark = pytest.mark.internal


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count: int, work: object) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_tally_counts_its_calls() -> None:
    tally = FastCounter()
    for _ in range(3):
        tally.count()
    assert tally.value == 3


def test_looking_at_a_tally_does_not_count() -> None:
    tally = FastCounter()
    assert (tally.value, tally.value) == (0, 0)


def test_a_tally_loses_nothing_between_threads(busy_switching: None) -> None:
    tally = FastCounter()
    in_threads(4, lambda: [tally.count() for _ in range(5000)])
    assert tally.value == 20_000


def test_stats_lose_nothing_between_threads(busy_switching: None) -> None:
    stats = Stats()
    in_threads(4, lambda: [stats.add(failures=1, slept=0.5) for _ in range(2000)])
    assert (stats.failures, stats.slept) == (8000, 4000.0)


def test_new_stats_say_that_there_is_nothing_yet() -> None:
    assert repr(Stats()) == "<Stats nothing yet>"


def test_large_counts_are_written_out() -> None:
    stats = Stats()
    stats.add(failures=1_234_567, slept=1.23456)
    assert repr(stats) == "<Stats failures=1234567 slept=1.235>"


def test_every_counter_has_a_name_in_the_dict() -> None:
    assert list(Stats().as_dict().items()) == [
        ("calls", 0),
        ("failures", 0),
        ("retries", 0),
        ("fallbacks", 0),
        ("gave_up", 0),
        ("hits", 0),
        ("misses", 0),
        ("shared", 0),
        ("stale", 0),
        ("slept", 0),
        ("waited", 0),
    ]


def test_a_call_that_gives_up_shows_in_all_its_counters() -> None:
    @opero(cache=False, retries=1, jitter=False, arg_fallback="x")
    def fail(x: object) -> None:
        raise ConnectionError

    with fake_clock(), pytest.raises(ConnectionError):
        fail([1, 2])
    counted = {name: value for name, value in fail.stats.as_dict().items() if value}
    assert counted == {
        "calls": 4,
        "failures": 4,
        "retries": 1,
        "fallbacks": 2,
        "gave_up": 1,
        "slept": 0.1,
    }


def test_reset_sets_everything_to_zero() -> None:
    fetch = opero(min_delay=0)(flaky("ok", failures=1))
    fetch()
    fetch()
    fetch.stats.reset()
    assert not any(fetch.stats.as_dict().values())


def test_counting_goes_on_after_a_reset() -> None:
    @opero
    def double(x: int) -> int:
        return 2 * x

    double(1)
    double(1)
    double.stats.reset()
    double(1)
    double(2)
    assert (double.stats.hits, double.stats.misses, double.stats.calls) == (1, 1, 1)


def test_functions_made_with_other_options_count_together() -> None:
    @opero(cache=False)
    def one() -> int:
        return 1

    one()
    one.with_options(retries=0)()
    assert one.stats.calls == 2
