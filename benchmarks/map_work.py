# this_file: benchmarks/map_work.py
"""The functions that are mapped, and their items: in a module, so that every library can ship them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

WORKERS = 2
THREADS = 16
COROUTINES = 200
BAD = 3
"""The item, of 8, that goes wrong."""


def trivial(x: int) -> int:
    return x + 1


async def trivial_async(x: int) -> int:
    return x + 1


def nap(_: int) -> None:
    time.sleep(0.02)


async def nap_async(_: int) -> None:
    import asyncio

    await asyncio.sleep(0.01)


def compute(_: int) -> int:
    """20 ms of processor time, however often the process is interrupted."""
    end, total = time.thread_time() + 0.02, 0
    while time.thread_time() < end:
        total += sum(range(200))
    return total


def skewed(x: int) -> None:
    """0.2 ms, but 250 ms for the last 8 of 2,000."""
    time.sleep(0.0002 if x < 1992 else 0.25)


def double(array: Any) -> Any:
    return array * 2.0


def arrays(count: int) -> list[Any]:
    """Arrays of 1 MB, each with content of its own."""
    import numpy as np

    return [np.full(131_072, float(n)) for n in range(count)]


def crash(x: int) -> int:
    if x == BAD:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return x


def hang(x: int) -> int:
    if x == BAD:
        time.sleep(600)
    time.sleep(0.02)
    return x


def wait_long(path: str) -> None:
    """Show that it has begun, and stay."""
    Path(path).touch()
    time.sleep(600)
