# this_file: tests/benchmarks/test_maps.py
"""The rows of maps are whole, and a turn says what it found (the figures are not judged)."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import maps
from benchmarks.harness import QUICK
from benchmarks.report import render
from benchmarks.results import Cell, Results, RowResult, describe, load, save
from tests.tables import rows


@rows("name", maps.ROWS)
def test_a_row_holds_opero_against_one_of_its_contenders(name: str) -> None:
    row = maps.ROWS[name]
    names = [engine.name for engine in row.engines]
    assert names[0] == "opero"
    assert len(set(names)) == len(names)
    assert row.peer is None or row.peer in names
    assert (row.bar is not None and row.bar["of"] == "peer") == (row.peer is not None)


def test_a_turn_has_a_figure() -> None:
    cell: Cell = {"status": "ok", "samples": []}
    assert maps._turn("map-crash", "opero", cell) == ""
    assert len(cell["samples"]) == 1


def test_a_candidate_that_loses_good_items_has_no_figure_but_a_note() -> None:
    cell: Cell = {"status": "ok", "samples": []}
    assert maps._turn("map-crash", "concurrent.futures", cell).startswith("keeps ")
    assert cell["samples"] == []


@pytest.mark.parametrize(("opero", "listed"), [(20.0, True), (5.0, False)])
def test_the_page_says_where_another_is_first_and_why(opero: float, listed: bool) -> None:
    row: RowResult = {
        "title": "a map",
        "unit": "ms",
        "peer": None,
        "bar": None,
        "candidates": {
            "opero": {"status": "ok", "samples": [opero]},
            "other": {"status": "ok", "samples": [10.0]},
        },
        "note": "it is older",
    }
    page: Results = {"meta": describe(QUICK), "rows": {"map": row}, "accuracy": []}
    line = "| a map | other | 2.00 × | it is older |"
    assert (line in render([page])) == listed


def test_rows_can_replace_those_in_the_results(tmp_path: Path) -> None:
    row: RowResult = {"title": "", "unit": "ms", "peer": None, "bar": None, "candidates": {}}
    page: Results = {"meta": describe(QUICK), "rows": {"a": row, "b": row}, "accuracy": []}
    save(page, tmp_path)
    save({**page, "rows": {"b": {**row, "title": "new"}}}, tmp_path, into=True)
    (found,) = load(tmp_path)
    assert [(name, one["title"]) for name, one in found["rows"].items()] == [
        ("a", ""),
        ("b", "new"),
    ]
