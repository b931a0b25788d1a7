# this_file: tests/concurrency/test_progress.py
"""The progress bar: right totals at a terminal, and no output anywhere else."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from opero import operomap
from opero.concurrency.report import make_bar

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


def until_shown(terminal: Terminal, text: str) -> None:
    end = time.monotonic() + 60
    while text not in terminal.getvalue():
        assert time.monotonic() < end, terminal.getvalue()
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [True, "rich"])
def test_a_bar_moves_while_the_input_is_slow(
    monkeypatch: pytest.MonkeyPatch, kind: bool | str
) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr("opero.concurrency.report._IDLE", 0.01)

    def items() -> Iterator[int]:
        yield 1
        until_shown(terminal, "waiting: input" if kind == "rich" else "waiting=input")

    operomap(mode="thread", cache=False, progress=kind)(abs)(items())  # type: ignore[call-overload]


def test_a_bar_says_that_all_items_pause_before_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setattr("opero.concurrency.report._IDLE", 0.01)
    token = threading.Event()

    @operomap(mode="thread", cache=False, retries=1, min_delay=700, max_delay=700, stop_token=token)
    def failing(x: int) -> None:
        raise OSError(x)

    stop = threading.Thread(
        target=lambda: (until_shown(terminal, "waiting=retry: next in 12 min"), token.set())
    )
    stop.start()
    failing.map(range(3))
    stop.join()


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
