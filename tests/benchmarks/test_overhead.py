# this_file: tests/benchmarks/test_overhead.py
"""A row reports every contender: the figures, that it is not installed, or what broke."""

from __future__ import annotations

import functools
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks import overhead, results
from benchmarks.bodies import identity
from benchmarks.candidates import Candidate, bare
from benchmarks.harness import Effort
from tests.tables import rows

if TYPE_CHECKING:
    from benchmarks.candidates import Function
    from benchmarks.results import Cell

EFFORT = Effort(rounds=2, round_seconds=1e-4)


def _breaks(_function: Function) -> Function:
    message = "no longer takes functions"
    raise TypeError(message)


def _calls_twice(function: Function) -> Function:
    def wrapper(x: Any) -> Any:
        function(x)
        return function(x)

    return wrapper


def _cell(candidate: Candidate, executions: int = 1) -> Cell:
    row = overhead.Row("row", "a row", "f(1)", identity, (candidate,), executions=executions)
    return overhead.measure(row, EFFORT, Random(1))["candidates"][candidate.name]


def test_a_contender_has_one_figure_per_round() -> None:
    cell = _cell(Candidate("direct", (), bare))

    assert cell["status"] == "ok"
    assert len(cell["samples"]) == 2


def test_a_missing_library_is_not_an_error() -> None:
    cell = _cell(Candidate("peer", ("no_such_module",), _breaks))

    assert cell == {"status": "not installed", "samples": []}


def test_a_library_that_breaks_costs_its_own_cell_only() -> None:
    cell = _cell(Candidate("peer", (), _breaks))

    assert cell == {"status": "failed: TypeError: no longer takes functions", "samples": []}


@pytest.mark.parametrize(
    ("build", "executions"),
    [(_calls_twice, 1), (_calls_twice, 0), (functools.lru_cache, 1)],
    ids=["too often", "a hit that misses", "a call that hits"],
)
def test_a_contender_that_does_other_work_than_the_row_says_gets_no_figure(
    build: Any, executions: int
) -> None:
    cell = _cell(Candidate("peer", (), build), executions)

    assert cell["status"].startswith("failed: AssertionError: the body ran")
    assert cell["samples"] == []


def test_names_of_rows_are_unique() -> None:
    names = [row.name for row in overhead.ROWS]

    assert len(names) == len(set(names))


@rows("row", overhead.ROWS)
def test_a_row_knows_its_subject_and_the_peer_it_is_held_against(row: overhead.Row) -> None:
    names = {candidate.name for candidate in row.candidates}

    assert "opero" in names
    assert set(results.peers_of(row.peer)) <= set(names)
