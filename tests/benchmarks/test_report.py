# this_file: tests/benchmarks/test_report.py
"""The page says met or missed as the figures say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from benchmarks import results
from benchmarks.harness import Effort
from benchmarks.report import accuracy_verdict, render, verdict

if TYPE_CHECKING:
    from pathlib import Path


def _row(opero: list[float], peer: list[float], bar: results.Bar | None) -> results.RowResult:
    return {
        "title": "a path",
        "unit": "ns",
        "peer": "peer",
        "bar": bar,
        "candidates": {
            "opero": {"status": "ok", "samples": opero},
            "peer": {"status": "ok" if peer else "not installed", "samples": peer},
        },
    }


def _watch(sustained: float, window: int, rate: int = 1000) -> results.AccuracyResult:
    return {
        "limiter": "opero",
        "mode": "sync, 1 thread",
        "rate": rate,
        "status": "ok",
        "admitted": 3000,
        "sustained": sustained,
        "window": window,
        "stall": 0.002,
        "cpu": 0.02,
    }


def _results(row: results.RowResult) -> results.Results:
    found: results.Results = {
        "meta": results.describe(Effort()),
        "rows": {"row": row},
        "accuracy": [_watch(0.999, 1001)],
    }
    return found


@pytest.mark.parametrize(
    ("opero", "met"),
    [([120.0, 120.0], True), ([120.4, 120.4], True), ([121.0, 121.0], False)],
)
def test_a_relative_bar_is_held_against_the_ratio_as_printed(opero: list[float], met: bool) -> None:
    judged = verdict(_row(opero, [100.0, 100.0], results.at_most_times(1.2)))

    assert judged is not None
    assert judged[1] is met


@pytest.mark.parametrize(("opero", "met"), [(1500.0, True), (1501.0, False)])
def test_an_absolute_bar_needs_no_peer(opero: float, met: bool) -> None:
    assert verdict(_row([opero], [], results.at_most(1500))) == (opero, met)


@pytest.mark.parametrize(("quick", "slow"), [("peer", "other"), ("other", "peer")])
def test_of_several_peers_the_fastest_counts(quick: str, slow: str) -> None:
    row = _row([100.0], [1.0], results.at_most_times(1.0))
    row["peer"] = "peer or other"
    row["candidates"][quick] = {"status": "ok", "samples": [80.0]}
    row["candidates"][slow] = {"status": "ok", "samples": [200.0]}
    assert verdict(row) == (1.25, False)
    row["candidates"][quick] = {"status": "not installed", "samples": []}
    assert verdict(row) == (0.5, True)


@pytest.mark.parametrize(
    ("opero", "peer", "bar"),
    [
        ([1.0], [1.0], None),
        ([1.0], [], results.at_most_times(1.0)),
        ([], [1.0], results.at_most_times(1.0)),
    ],
    ids=["no bar", "no peer", "no opero"],
)
def test_without_figures_there_is_no_verdict(
    opero: list[float], peer: list[float], bar: results.Bar | None
) -> None:
    assert verdict(_row(opero, peer, bar)) is None


@pytest.mark.parametrize(
    ("watches", "met"),
    [
        ([_watch(0.99, 1001), _watch(1.0, 1000)], True),
        ([_watch(0.98, 1000), _watch(1.0, 1000)], False),
        ([_watch(1.02, 1000)], False),
        ([_watch(1.0, 1002)], False),
        ([_watch(0.95, 9_500, rate=10_000)], True),
        ([_watch(0.94, 9_400, rate=10_000)], False),
    ],
    ids=["exact", "one mode too slow", "too fast", "a crowded window", "fast", "fast but slow"],
)
def test_a_limiter_is_judged_by_its_worst_mode(
    watches: list[results.AccuracyResult], met: bool
) -> None:
    assert accuracy_verdict(watches)[1] is met


def test_the_page_names_what_is_missed_and_what_is_not_installed() -> None:
    page = render([_results(_row([150.0, 160.0], [100.0, 100.0], results.at_most_times(1.2)))])

    assert "| a path | ≤ 1.2 × peer | **1.55 × missed** |" in page
    assert "| peer | 100 ns · 100 ns · 1.55 |" in page
    assert "| limiter accuracy, 1000/s | 99–100 %, ≤ N+1 | 99.9–99.9 %, N+1 met |" in page
    assert "not installed" in render([_results(_row([1.0], [], None))])


def test_saved_results_are_loaded_unchanged(tmp_path: Path) -> None:
    found = _results(_row([150.0, 160.0], [100.0, 100.0], None))

    path = results.save(found, tmp_path)

    assert results.load(tmp_path) == [found]
    assert '"samples": [150.0, 160.0]' in path.read_text(encoding="utf-8")
