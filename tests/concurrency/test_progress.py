# this_file: tests/concurrency/test_progress.py
"""The progress bar: right totals at a terminal, and no output anywhere else."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import pytest

from opero import operomap
from opero.concurrency.progress import make_bar

pytestmark = pytest.mark.internal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test itself, because pytest renews `sys.stderr` after its fixtures."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_without_a_terminal_there_is_not_a_byte_and_no_tqdm() -> None:
    script = """if True:
        import sys
        from opero import operomap
        operomap(mode="thread", cache=False)(abs)(range(100))
        print("tqdm.auto" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("kind", [True, "rich"])
def test_totals_count_items_hits_and_failures(
    monkeypatch: pytest.MonkeyPatch, kind: bool | str
) -> None:
    terminal = at_terminal(monkeypatch)

    @operomap(mode="thread", progress=kind, on_error="skip", retries=0, chunksize=7)  # type: ignore[call-overload]
    def fetch(x: int) -> float:
        return 1 / x

    fetch(range(1, 50))
    fetch(range(100))
    shown = terminal.getvalue()
    assert "100/100" in shown
    assert "fetch" in shown
    assert ("49 cached" if kind == "rich" else "cached=49") in shown
    assert "failed" in shown


def test_a_bar_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    operomap(mode="thread", progress=False, cache=False)(abs)(range(5))
    assert terminal.getvalue() == ""


def test_there_is_no_bar_on_a_closed_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert make_bar("f", 5) is None


def test_several_maps_draw_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    fetch = operomap(mode="thread", cache=False)(abs)
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(range(200)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [list(range(200))] * 4
    assert terminal.getvalue().count("200/200") >= 4
