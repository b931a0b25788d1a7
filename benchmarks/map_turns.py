# this_file: benchmarks/map_turns.py
"""What one contender does in its turn: the figures of maps."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import map_work as w
from benchmarks.map_engines import Engine

__all__ = ["Turn", "ahead", "growth", "once", "skew", "stream", "whole"]

_MANY = 1_000_000
_SLOW = 20_000

Turn = Callable[[Engine], float]
"""Returns its figure."""


def once(function: Callable[..., Any], make: Callable[[], Sequence[Any]]) -> Turn:
    """Milliseconds of a map, in whose block the same map ran before."""

    def turn(engine: Engine) -> float:
        items = make()
        with engine.block() as collect:
            # What is imported, begun or compiled once is not what is asked for here.
            collect(function, items[: max(8, len(items) // 100)])
            return _timed(lambda: collect(function, items), len(items))

    return turn


def whole(function: Callable[..., Any], make: Callable[[], Sequence[Any]]) -> Turn:
    """Milliseconds of a map, its pool's beginning and end included, where imports are done."""

    def turn(engine: Engine) -> float:
        items = make()
        _in_new_pool(engine, function, items[:8])
        return _timed(lambda: _in_new_pool(engine, function, items), len(items))

    return turn


def _in_new_pool(
    engine: Engine, function: Callable[..., Any], items: Sequence[Any]
) -> Sequence[Any]:
    with engine.block() as collect:
        found: Sequence[Any] = collect(function, items)
    return found


def _timed(run: Callable[[], Sequence[Any]], expected: int) -> float:
    gc.collect()
    began = perf_counter()
    found = run()
    seconds = perf_counter() - began
    assert len(found) == expected
    return seconds * 1e3


def skew(engine: Engine) -> float:
    """How long it takes against a perfect share, in percent; the share is asked of the clock."""
    items = range(2_000)
    with engine.block() as collect:
        collect(w.trivial, range(8))
        milliseconds = _timed(lambda: collect(w.skewed, items), len(items))
    ideal = (1992 * _nap_ms() + 8 * 250) / w.WORKERS
    return 100 * milliseconds / ideal


def _nap_ms() -> float:
    """What a sleep of 0.2 ms takes here."""
    began = perf_counter()
    for _ in range(500):
        time.sleep(0.0002)
    return (perf_counter() - began) * 2


def stream(engine: Engine) -> float:
    """Milliseconds of a stream over a generator, consumed as fast as it comes, where imports are done."""
    with engine.block() as begin:
        for _ in begin(w.trivial, (n for n in range(1_000))):
            pass
        began = perf_counter()
        count = sum(1 for _ in begin(w.trivial, (n for n in range(_MANY))))
        seconds = perf_counter() - began
    assert count == _MANY
    return seconds * 1e3


def growth(engine: Engine) -> float:
    """Megabytes by which this process grows over a stream, at its peak."""
    with engine.block() as begin:
        for _ in begin(w.trivial, (n for n in range(1_000))):
            pass
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        for _ in begin(w.trivial, (n for n in range(_MANY))):
            pass
        return _peak() - before


def _peak() -> float:
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) / 1024


def ahead(engine: Engine) -> float:
    """Items read ahead when a slow consumer has taken 50."""
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for n in range(_SLOW):
            read += 1
            yield n

    with engine.block() as begin:
        found = begin(w.trivial, source())
        for _ in range(50):
            next(found)
            time.sleep(0.005)
        ahead = read - 50
        # A pool may wait for all that was read.
        threading.Timer(1, _end, [ahead]).start()
        return ahead


def _end(figure: float) -> None:
    print(json.dumps(figure), flush=True)
    os._exit(0)
