# this_file: src/opero/concurrency/start.py
"""How worker processes come to be: forked from here only where that is safe.

A fork copies one thread and all locks. Where another thread holds one (logging, an allocator, a driver of a GPU), the
copy waits for it for ever; Python 3.12 and later warn of it. So a map forks its own process only if there is one
thread, no event loop that runs, and a system whose libraries allow it. Else workers begin in a fresh interpreter, which
imports what they need and never runs `__main__` again: scripts without a guard and notebooks work.

numpy comes with a library that keeps threads, and ends them before each fork to begin them anew when it is asked next
(OpenBLAS, `pthread_atfork(blas_thread_shutdown, …)`). A child that is killed at once shows whether those were all.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Literal, NamedTuple

from opero.concurrency.clerk import clerks

__all__ = ["Surroundings", "choose_start", "look_around", "settle"]

StartMethod = Literal["fork", "forkserver", "spawn"]
"""A fork of this process, a fork of a fresh interpreter, or a fresh interpreter for each worker."""


class Surroundings(NamedTuple):
    """What matters for the choice.

    Attributes:
        platform: As `sys.platform`.
        threads: Threads of this process, those of C libraries too; None if nobody can tell.
        loop_runs: Whether an event loop runs in this thread.
    """

    platform: str
    threads: int | None
    loop_runs: bool


def choose_start(around: Surroundings) -> tuple[StartMethod, str]:
    """Choose the way to start workers, and say why.

    Example:
        >>> choose_start(Surroundings("linux", threads=1, loop_runs=False))
        ('fork', 'one thread')
        >>> choose_start(Surroundings("linux", threads=4, loop_runs=False))
        ('forkserver', '4 threads')
    """
    if around.platform == "win32":
        return "spawn", "Windows has no fork"
    if around.platform != "linux":
        return "forkserver", f"system libraries of {around.platform} do not survive a fork"
    if around.threads != 1:
        return "forkserver", f"{around.threads or 'an unknown number of'} threads"
    if around.loop_runs:
        return "forkserver", "an event loop runs, and a fork would share its selector"
    return "fork", "one thread"


def look_around() -> Surroundings:
    """Tell how things are in this process and thread now."""
    threads: int | None = None
    try:
        # Python's own count does not know the threads of C libraries.
        threads = len(os.listdir("/proc/self/task")) - clerks()  # noqa: PTH208 - a path object would be slower
    except OSError:
        pass
    asyncio = sys.modules.get("asyncio")
    loop_runs = asyncio is not None and asyncio._get_running_loop() is not None  # noqa: SLF001 - asks without raising
    return Surroundings(sys.platform, threads, loop_runs)


# --- threads that end at a fork -------------------------------------------------------------------

_in_vain: list[Surroundings] = []
"""How things were when threads stayed; that is not tried again."""


def settle() -> Surroundings:
    """Tell how things are once the threads have ended that end at a fork anyway."""
    around = look_around()
    if _in_vain or "numpy" not in sys.modules or not _may_settle(around):
        return around
    _fork_in_vain()
    around = look_around()
    if around.threads != 1:
        _in_vain.append(around)
    return around


def _may_settle(around: Surroundings) -> bool:
    if around.platform != "linux" or around.loop_runs or (around.threads or 1) == 1:
        return False
    # Threads of Python's own stay, those too that `threading` does not know.
    return len(sys._current_frames()) - clerks() == 1  # noqa: SLF001 - nothing else knows them all


def _fork_in_vain() -> None:
    with warnings.catch_warnings():
        # Python 3.12 and later warn where there are threads still, but this child takes no step.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
        if not pid:
            os._exit(0)
    os.kill(pid, signal.SIGKILL)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        # The program ignores SIGCHLD.
        pass
