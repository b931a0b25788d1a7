# this_file: benchmarks/map_limits.py
"""One rate limit for all worker processes: how exact it is, and what it costs."""

from __future__ import annotations

import time
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.map_engines import Engine

_RATE = 50
_CALLS = 250
_ROUNDS = 500
_MANY = 100


def stamp(_: int) -> float:
    return time.monotonic()


def rate(engine: Engine) -> float:
    """Percent by which the calls of 4 worker processes miss the rate they were asked for."""
    from opero import operomap

    starts = sorted(
        operomap(mode="process", workers=4, cache=False, rate_limit=_RATE)(stamp)(range(_CALLS))
    )
    # The first calls meet workers that are still being started, and may be made up for.
    first = starts[10]
    found = (len(starts) - 11) / (starts[-1] - first)
    return abs(found - _RATE) / _RATE * 100


def cost(engine: Engine) -> float:
    """Nanoseconds of taking a slot that lies in a file for several processes, the median of many rounds."""
    from opero import RateLimiter

    limiter = RateLimiter(10_000_000)
    limiter.share()
    for _ in range(1_000):
        limiter.acquire()
    rounds = []
    for _ in range(_ROUNDS):
        began = perf_counter()
        for _ in range(_MANY):
            limiter.acquire()
        rounds.append((perf_counter() - began) / _MANY * 1e9)
    return median(rounds)
