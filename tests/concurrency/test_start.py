# this_file: tests/concurrency/test_start.py
"""How worker processes come to be, and when threads of libraries are no reason against a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from opero.concurrency import start
from opero.concurrency.start import Surroundings, choose_start

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.parametrize(
    ("around", "method"),
    [
        (Surroundings("linux", 1, loop_runs=False), "fork"),
        (Surroundings("linux", 1, loop_runs=True), "forkserver"),
        (Surroundings("linux", 2, loop_runs=False), "forkserver"),
        (Surroundings("linux", None, loop_runs=False), "forkserver"),
        (Surroundings("darwin", 1, loop_runs=False), "forkserver"),
        (Surroundings("win32", 1, loop_runs=False), "spawn"),
    ],
)
def test_a_fork_needs_one_thread_and_no_loop(around: Surroundings, method: str) -> None:
    assert choose_start(around)[0] == method


def said_by(program: str, **variables: str) -> str:
    """Run a program, which must not complain of anything."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(start.__file__).parents[2]), **variables},
    )
    assert not done.stderr, done.stderr
    return done.stdout


@linux
def test_threads_of_numpy_end_at_a_fork_and_serve_the_workers() -> None:
    program = """
        import os
        import numpy as np
        from opero import operomap
        from opero.concurrency.start import look_around, settle

        a = np.random.rand(300, 300)
        a @ a
        before = look_around().threads
        if before > 1:
            assert settle().threads == 1
            a @ a  # which begins them again
            assert look_around().threads == before

        @operomap(mode="process", workers=2, cache=False, progress=False)
        def product(n):
            # A fork knows what the program has made; a fresh interpreter would not.
            return float((a @ a)[n, n])

        expected = (a @ a).diagonal()
        assert np.allclose(product(range(20)), expected[:20])
        assert look_around().threads in (1, before)
        print("good")
    """
    assert said_by(program, OPENBLAS_NUM_THREADS="2") == "good\n"


@linux
def test_other_threads_stay_and_nothing_is_forked_for_long() -> None:
    program = """
        import ctypes, os
        import numpy
        from opero.concurrency.start import choose_start, settle

        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
        forks = []
        os.register_at_fork(before=lambda: forks.append(1))
        for _ in range(3):
            assert choose_start(settle())[0] == "forkserver"
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print(len(forks))
    """
    assert said_by(program) == "1\n"


@linux
def test_beside_threads_of_python_nothing_is_tried() -> None:
    program = """
        import os, threading
        import numpy
        from opero.concurrency.start import choose_start, settle

        os.register_at_fork(before=lambda: print("forked"))
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        print(choose_start(settle())[0])
    """
    assert said_by(program) == "forkserver\n"


@linux
def test_without_numpy_nothing_is_tried() -> None:
    program = """
        import ctypes, os
        from opero.concurrency.start import choose_start, settle

        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
        os.register_at_fork(before=lambda: print("forked"))
        print(choose_start(settle())[0])
    """
    assert said_by(program) == "forkserver\n"
