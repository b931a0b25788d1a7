# this_file: tests/examples/badday/test_ledger.py
"""The quota and the books, on a clock made of numbers."""

from __future__ import annotations

from badday.ledger import Ledger, SlidingWindow
from badday.script import Quota, parse_script
from hypothesis import given
from hypothesis import strategies as st

# multiples of 1/64 s: exact in floating point, so that window borders can be hit on the spot
ticks = st.lists(st.integers(0, 64 * 8), min_size=1, max_size=60).map(
    lambda marks: sorted(mark / 64 for mark in marks)
)


def fullest(times: list[float], period: float) -> int:
    """Count by brute force: the most times within [start, start + period) for any start."""
    return max((sum(start <= t < start + period for t in times) for start in times), default=0)


@given(times=ticks, limit=st.integers(1, 8), period=st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_a_window_admits_its_limit_and_never_more(
    times: list[float], limit: int, period: float
) -> None:
    window = SlidingWindow(Quota(limit, period))
    admitted = [now for now in times if window.admit(now) == 0]
    assert fullest(admitted, period) == min(limit, fullest(times, period))
    assert window.rejected == len(times) - len(admitted)


@given(times=ticks, limit=st.integers(1, 8), period=st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_the_worst_window_is_the_fullest_one_of_all_arrivals(
    times: list[float], limit: int, period: float
) -> None:
    window = SlidingWindow(Quota(limit, period))
    for now in times:
        window.admit(now)
    assert window.worst == fullest(times, period)


@given(times=ticks, limit=st.integers(1, 4))
def test_a_rejected_call_is_accepted_after_the_requested_pause(
    times: list[float], limit: int
) -> None:
    window = SlidingWindow(Quota(limit, 1.0))
    for now in times:
        wait = window.admit(now)
        if wait:
            assert window.admit(now + wait) == 0
            return


def test_remaining_and_reset_describe_the_quota() -> None:
    window = SlidingWindow(Quota(3, 1.0))
    for now in (0.0, 0.25):
        window.admit(now)
    assert window.remaining == 1
    assert window.empty_in == 1.0
    window.admit(1.125)
    assert window.remaining == 1
    window.admit(1.25)
    assert window.remaining == 1


def test_the_first_matching_route_plays_the_call() -> None:
    ledger = Ledger(parse_script("/chat model=a 503\n/chat 200"), now=0.0)
    plays = [ledger.play("/chat", {"model": model}, 0.0) for model in "ab"]
    assert [play.answer.status for play in plays if play] == [503, 200]


def test_per_keeps_the_count_of_each_value_apart() -> None:
    ledger = Ledger(parse_script("/items per=id 503 200"), now=0.0)
    plays = [ledger.play("/items", {"id": name}, 0.0) for name in "abab"]
    assert [(play.nth, play.answer.status) for play in plays if play] == [
        (1, 503),
        (1, 503),
        (2, 200),
        (2, 200),
    ]


def test_a_call_refused_by_the_quota_does_not_use_up_an_answer() -> None:
    ledger = Ledger(parse_script("/x quota=1/1s 500 200"), now=0.0)
    plays = [ledger.play("/x", {}, now) for now in (0.0, 0.5, 1.0)]
    assert [(play.nth, play.answer.status) for play in plays if play] == [
        (1, 500),
        (0, 429),
        (2, 200),
    ]


def test_the_report_counts_calls_outcomes_and_quota() -> None:
    ledger = Ledger(parse_script("/x quota=2/1s 200\n/y hang"), now=10.0)
    for now in (10.0, 10.1, 10.2):
        ledger.play("/x", {}, now)
    ledger.play("/y", {}, 11.0)
    ledger.play("/z", {}, 11.0)
    report = ledger.report(12.5)
    assert report["seconds"] == 2.5
    assert report["calls"] == 4
    assert report["unrouted"] == 1
    assert report["routes"]["/y"] == {"calls": 1, "outcomes": {"hang": 1}}
    assert report["routes"]["/x"] == {
        "calls": 3,
        "outcomes": {"200": 2, "429": 1},
        "quota": {"limit": 2, "period": 1.0, "worst_window": 3, "rejected": 1},
    }


def test_the_log_has_the_second_of_each_call() -> None:
    ledger = Ledger(parse_script("/items per=id 503 200"), now=5.0)
    ledger.play("/items", {"id": "a"}, 5.25)
    (entry,) = ledger.log
    assert (entry.at, entry.route, entry.split, entry.outcome) == (0.25, "/items", "a", "503")


def test_in_an_outage_every_call_fails_and_the_script_waits() -> None:
    ledger = Ledger(parse_script("/x outage=1-2.5s 200 201"), now=10.0)
    plays = [ledger.play("/x", {}, now) for now in (10.0, 11.0, 12.4, 12.5)]
    assert [(play.nth, play.answer.status) for play in plays if play] == [
        (1, 200),
        (0, 503),
        (0, 503),
        (2, 201),
    ]
