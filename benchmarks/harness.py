# this_file: benchmarks/harness.py
"""Interleaved timing of small calls, and the statistics that the report is made of.

One process, one round after another: in every round each contender runs once, in shuffled order,
so that a slow moment of the machine hits neighbours alike. Ratios are taken per round and their
median is reported, which cancels what both sides of a round had in common.
"""

from __future__ import annotations

import gc
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise, repeat
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

_WARM_UP = 16

# Users have bytecode on disk after the first start, whatever this environment says.
USERS_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}

Timer = Callable[[int], float]
"""Makes so many calls and returns the seconds they took."""

_SYNC_LOOP = """
def timed(f, items, clock):
    start = clock()
    for i in items:
        {call}
    return clock() - start
"""

_ASYNC_LOOP = """
async def timed(f, items, clock):
    start = clock()
    for i in items:
        await {call}
    return clock() - start
"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run invests.

    Attributes:
        rounds: Rounds over all contenders of a row.
        round_seconds: Length of one contender's turn, in seconds.
        process_rounds: Rounds of measurements that start a fresh interpreter.
        accuracy_seconds: How long each rate limiter is watched, in seconds.
        map_rounds: Rounds of maps, each turn in a fresh interpreter.
    """

    rounds: int = 63
    round_seconds: float = 0.01
    process_rounds: int = 9
    accuracy_seconds: float = 3.0
    map_rounds: int = 5


QUICK = Effort(rounds=9, round_seconds=0.003, process_rounds=3, accuracy_seconds=1.6, map_rounds=3)


def timing_loop(call: str, *, is_async: bool) -> Callable[[Any, Any, Callable[[], float]], Any]:
    """Compile the loop around `call`, as `timeit` does, so that nothing else sits on the clock.

    Args:
        call: Source of one call; `f` is the contender and `i` the current item.
        is_async: Whether the call is awaited.

    Returns:
        `timed(f, items, clock)`, a coroutine function if `is_async`; it yields the elapsed seconds.
    """
    source = (_ASYNC_LOOP if is_async else _SYNC_LOOP).format(call=call)
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102 - the template above and the suite's own calls
    loop: Callable[[Any, Any, Callable[[], float]], Any] = namespace["timed"]
    return loop


def make_timer(
    function: Callable[..., Any],
    call: str,
    *,
    distinct: bool = False,
    run: Callable[[Any], float] | None = None,
) -> Timer:
    """A timer of `call` on `function`.

    Args:
        function: What the name `f` in `call` stands for.
        call: Source of one call.
        distinct: Whether `i` counts on from call to call, so that no argument comes twice.
        run: Drives a coroutine to its result; makes this an asynchronous timer.
    """
    loop = timing_loop(call, is_async=run is not None)
    position = 0

    def timer(count: int) -> float:
        nonlocal position
        items = range(position, position + count) if distinct else repeat(None, count)
        position += count
        elapsed = loop(function, items, perf_counter)
        return elapsed if run is None else run(elapsed)

    return timer


def calibrated_count(timer: Timer, seconds: float) -> int:
    """The number of calls that fill about `seconds`; the trial calls warm the contender up."""
    timer(_WARM_UP)  # a first call that imports something must not pass for the usual one
    count = 1
    while (elapsed := timer(count)) < seconds / 4:
        count *= 4
    return max(1, round(count * seconds / elapsed))


def interleaved(
    timers: Mapping[str, Timer], *, rounds: int, round_seconds: float, random: Random
) -> dict[str, list[float]]:
    """Nanoseconds per call of every contender, one figure per round.

    Args:
        timers: The contenders by name.
        rounds: How often each takes its turn.
        round_seconds: Length of a turn, in seconds.
        random: Shuffles the order of every round.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    with _collector_paused():
        counts = {name: calibrated_count(timer, round_seconds) for name, timer in timers.items()}
        order = list(timers)
        for _ in range(rounds):
            random.shuffle(order)
            for name in order:
                samples[name].append(timers[name](counts[name]) / counts[name] * 1e9)
            gc.collect()
    return samples


@contextmanager
def _collector_paused() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def paired_ratio(subject: Sequence[float], peer: Sequence[float]) -> float:
    """Median over the rounds of `subject / peer`, each taken within its round.

    Example:
        >>> paired_ratio([10.0, 30.0, 12.0], [20.0, 60.0, 20.0])
        0.5
    """
    return median(mine / theirs for mine, theirs in zip(subject, peer, strict=True))


def worst_window(times: Sequence[float], period: float) -> int:
    """The most events in any half-open window `[t, t + period)` of the ascending `times`.

    Some worst window starts at an event, so only those are looked at.

    Example:
        >>> worst_window([0.0, 0.5, 1.0, 1.25], 1.0)
        3
    """
    return max(
        (bisect_left(times, start + period) - index for index, start in enumerate(times)),
        default=0,
    )


def longest_stall(times: Sequence[float]) -> float:
    """The longest gap between two neighbours of the ascending `times`, in their unit."""
    return max((later - sooner for sooner, later in pairwise(times)), default=0.0)


def rate_between(times: Sequence[float], start: float, stop: float) -> float:
    """Events per unit of time from `start` to `stop`, parts of an interval counted as parts.

    Counting whole events misjudges ten a second by ten percent; interpolating the running count
    between neighbours judges an even stream exactly.

    Example:
        >>> rate_between([0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4], 1.0, 2.0)
        2.5
    """
    return (_running_count(times, stop) - _running_count(times, start)) / (stop - start)


def _running_count(times: Sequence[float], moment: float) -> float:
    index = bisect_right(times, moment)
    if index == 0 or index == len(times):
        return float(index)
    before, after = times[index - 1], times[index]
    return index + (moment - before) / (after - before)


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the top-level modules that are not installed."""
    return [module for module in modules if find_spec(module) is None]


def significant(value: float, digits: int = 4) -> float:
    """`value` rounded to so many significant digits, which is all that a clock is worth."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
