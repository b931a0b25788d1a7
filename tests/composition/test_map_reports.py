# this_file: tests/composition/test_map_reports.py
"""What a map reports: times, tracebacks, what it took from an earlier run."""

from __future__ import annotations

import io
import sys
import time
import traceback
from pathlib import Path

import pytest

from opero import operomap


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_result_has_the_time_it_took_and_the_work_it_was(mode: str) -> None:
    @operomap(mode=mode, workers=2, cache=False)  # type: ignore[call-overload]
    def work(x: int) -> int:
        time.sleep(0.05)
        return x

    began = time.perf_counter()
    result = work.map(range(8))
    assert 0.2 <= result.seconds <= time.perf_counter() - began
    assert 0.4 <= result.busy <= 2 * result.seconds
    assert "8 of 8 done, in" in repr(result)


def test_hits_cost_no_work() -> None:
    work = operomap(mode="thread")(abs)
    work([1, 2])
    result = work.map([1, 2])
    assert (result.hits, result.busy) == (2, 0)


def test_sequentially_the_stack_leads_from_the_caller_into_the_function() -> None:
    @operomap(sequential=True, cache=False, retries=0)
    def work(x: int) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError) as caught:
        work([1, 0])
    frames = [(frame.name, Path(frame.filename).name) for frame in traceback.extract_tb(caught.tb)]
    here = Path(__file__).name
    assert frames[0] == (
        "test_sequentially_the_stack_leads_from_the_caller_into_the_function",
        here,
    )
    assert frames[-1] == ("work", here)


def test_the_progress_bar_shows_what_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = operomap(mode="thread", cache=False, checkpoint=tmp_path / "run.db")(abs)
    work(range(7))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert work(range(9)) == list(range(9))
    assert "resumed=7" in terminal.getvalue()
    assert "9/9" in terminal.getvalue()
