# this_file: tests/concurrency/test_terminal.py
"""Progress bars as a person sees them: programs on a pseudo-terminal, and what is on its screen in the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

import fcntl
import pty
import struct
import termios

SRC = Path(__file__).resolve().parents[2] / "src"
ROWS, COLUMNS = 30, 110

Screen = Callable[[str, str], list[str]]


@pytest.fixture(params=["True", '"rich"'], ids=["tqdm", "rich"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    def run(text: str, progress: str) -> list[str]:
        """Run a program to its end; return the lines that are on the screen then."""
        script = tmp_path / "program.py"
        script.write_text(f"PROGRESS = {progress}\n" + textwrap.dedent(text))
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        shown = pyte.Screen(COLUMNS, ROWS)
        emulator = pyte.ByteStream(shown)
        places = os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")])
        away = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        kept = {name: value for name, value in os.environ.items() if name not in away}
        with subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env={**kept, "PYTHONPATH": places, "TERM": "xterm-256color"},
        ) as process:
            os.close(theirs)
            try:
                while said := os.read(ours, 65_536):
                    emulator.feed(said)
            except OSError:
                # The other end is closed.
                pass
            finally:
                os.close(ours)
        lines = [line.rstrip() for line in shown.display]
        assert process.returncode == 0, lines
        while lines and not lines[-1]:
            lines.pop()
        return lines

    return run


def test_maps_at_once_have_a_line_each(screen: Screen, kind: str) -> None:
    text = """
    import threading, time
    from opero import operomap

    def job(name, items, mode, pause):
        def work(x):
            time.sleep(pause)
            if x % 10 == 9:
                raise ValueError(x)
            return x

        work.__name__ = work.__qualname__ = name
        mapped = operomap(mode=mode, workers=2, progress=PROGRESS, retries=0, on_error="skip")(work)
        mapped(list(range(items // 2)))
        mapped(list(range(items)))

    jobs = [
        ("alpha", 60, "thread", 0.001),
        ("beta", 100, "thread", 0.004),
        ("gamma", 40, "process", 0.004),
        ("delta", 80, "thread", 0.008),
    ]
    threads = [threading.Thread(target=job, args=args) for args in jobs]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print("over")
    """
    lines = screen(text, kind)
    assert lines.pop() == "over"
    assert len(lines) == 8, "\n".join(lines)
    for name, items in [("alpha", 60), ("beta", 100), ("gamma", 40), ("delta", 80)]:
        of_it = [line for line in lines if name in line]
        assert len(of_it) == 2, "\n".join(lines)
        first, second = of_it
        assert re.search(rf"\b{items // 2}/{items // 2}\b", first), first
        assert re.search(rf"\b{items}/{items}\b", second), second
        cached, failed = items // 2 - items // 20, items // 10
        assert counts_in(second) == {"cached": cached, "failed": failed}
        assert "item/s" in second


def counts_in(line: str) -> dict[str, int]:
    """Return the counts that a bar shows, in either library's manner."""
    found = re.findall(r"(failed|cached|resumed)=(\d+)|(\d+) (failed|cached|resumed)", line)
    return {a or d: int(b or c) for a, b, c, d in found}


def test_what_a_program_prints_in_between_stays_whole(screen: Screen, kind: str) -> None:
    text = """
    from opero import operomap
    double = operomap(mode="thread", cache=False, progress=PROGRESS)(lambda x: 2 * x)
    for n in range(3):
        double(range(10))
        print(f"round {n} is over")
    """
    lines = screen(text, kind)
    assert len(lines) == 6
    assert lines[1::2] == [f"round {n} is over" for n in range(3)]
    assert all("10/10" in line for line in lines[::2])


def test_a_map_that_fails_leaves_the_others_their_lines(screen: Screen, kind: str) -> None:
    text = """
    import threading, time
    from opero import operomap

    begun = threading.Event()

    @operomap(mode="thread", workers=1, cache=False, retries=0, progress=PROGRESS, chunksize=1)
    def broken(x):
        begun.wait(10)
        if x == 5:
            raise ValueError
        return x

    @operomap(mode="thread", workers=1, cache=False, progress=PROGRESS, chunksize=1)
    def whole(x):
        begun.set()
        time.sleep(0.02)

    def fails():
        try:
            broken(range(50))
        except ValueError:
            pass

    threads = [threading.Thread(target=fails), threading.Thread(target=whole, args=(range(30),))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    """
    lines = screen(text, kind)
    assert len(lines) == 2
    assert "broken" in lines[0]
    assert "/50" in lines[0]
    assert "50/50" not in lines[0]
    assert "whole" in lines[1]
    assert "30/30" in lines[1]


def test_maps_in_workers_of_a_map_draw_nothing(screen: Screen, kind: str) -> None:
    text = """
    from opero import operomap

    @operomap(mode="thread", workers=2, cache=False, progress=PROGRESS)
    def inner(x):
        return -x

    @operomap(mode="process", workers=2, cache=False, progress=PROGRESS)
    def outer(n):
        return inner(range(n))

    print(outer([1, 2, 3]))
    """
    bar, said = screen(text, kind)
    assert "outer" in bar
    assert "3/3" in bar
    assert said == "[[0], [0, -1], [0, -1, -2]]"


def test_a_bar_of_text_starts_no_thread(screen: Screen) -> None:
    text = """
    import threading
    from opero import operomap

    @operomap(mode="process", workers=2, cache=False, start_method="fork")
    def double(x):
        return 2 * x

    print(double([1]), threading.active_count())
    """
    bar, said = screen(text, "True")
    assert "1/1" in bar
    assert said == "[2] 1"
