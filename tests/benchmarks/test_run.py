# this_file: tests/benchmarks/test_run.py
"""Smoke test: the command line as a user starts it (a few seconds; the figures are not judged)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import results

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"


def test_a_quick_run_of_one_row_writes_the_page_and_the_figures(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, RUN, "--quick", "--rows", "retry-sync", "--output", tmp_path],
        check=True,
        capture_output=True,
        timeout=25,
    )

    (found,) = results.load(tmp_path / "results")
    assert list(found["rows"]) == ["retry-sync"]
    assert found["rows"]["retry-sync"]["candidates"]["opero"]["status"] == "ok"
    assert found["rows"]["retry-sync"]["candidates"]["tenacity"]["status"] == "ok"
    assert found["accuracy"] == []
    assert "retry only, success, sync" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
