# this_file: tests/benchmarks/test_durable.py
"""The rows about durable workflows: a quick turn of opero alone, and how failing contenders are shown."""

from __future__ import annotations

from random import Random

import pytest
from benchmarks.durable import rows
from benchmarks.harness import QUICK


@pytest.mark.parametrize("name", ["durable-sync-steps", "durable-replay-gather"])
def test_a_quick_turn_has_figures_of_opero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_REQUIRES", {**rows._REQUIRES, rows.DBOS: "no_such_module"})
    found = rows.measure(name, QUICK, Random(0))
    assert found["candidates"]["opero"]["status"] == "ok"
    assert len(found["candidates"]["opero"]["samples"]) == QUICK.process_rounds
    if rows.DBOS in found["candidates"]:
        assert found["candidates"][rows.DBOS] == {"status": "not installed", "samples": []}


def test_a_contender_that_cannot_do_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows.Row(
        "impossible", "no_such_job", ("opero",), None, {"limit": 1, "of": "absolute"}, (1, 1)
    )
    monkeypatch.setitem(rows.ROWS, "impossible", row)
    cell = rows.measure("impossible", QUICK, Random(0))["candidates"]["opero"]
    assert cell["samples"] == []
    assert cell["status"].startswith("failed: AttributeError")
