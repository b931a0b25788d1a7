# this_file: benchmarks/accuracy.py
"""How well rate limiters keep their word: the rate reached, the worst window, the longest stall.

An admission is stamped right after the limiter let its caller through, because that is when the
call would reach the server. A thread that is scheduled late is stamped late, for every limiter
alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import TYPE_CHECKING

from benchmarks.harness import (
    Effort,
    longest_stall,
    missing,
    rate_between,
    significant,
    worst_window,
)

if TYPE_CHECKING:
    from benchmarks.results import AccuracyResult

RATES = (10, 100, 1000, 10_000)
QUICK_RATES = (100, 10_000)
TASKS = 50
THREADS = 8
SYNC, THREADED, ASYNC = "sync, 1 thread", f"sync, {THREADS} threads", f"async, {TASKS} tasks"

Acquire = Callable[[], object]
Wait = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class LimiterCandidate:
    """A limiter under watch.

    Attributes:
        name: As it stands in the table.
        requires: Top-level modules that must be installed.
        sync: Makes, for a rate per second, a callable that blocks until its turn; None if the
            limiter is for event loops only.
        wait: Makes, for a rate per second, a callable whose awaitable ends when it is its turn.
    """

    name: str
    requires: tuple[str, ...]
    sync: Callable[[int], Acquire] | None
    wait: Callable[[int], Wait]


def _opero_sync(rate: int) -> Acquire:
    from opero import RateLimiter

    return RateLimiter(rate).acquire


def _opero_async(rate: int) -> Wait:
    from opero import RateLimiter

    return RateLimiter(rate).wait


def _nopanic(burst: int | None) -> tuple[Callable[[int], Acquire], Callable[[int], Wait]]:
    def sync(rate: int) -> Acquire:
        import nopanic

        def let_through() -> None:
            return None

        return nopanic.rate_limit(rate, burst=burst)(let_through)

    def wait(rate: int) -> Wait:
        import nopanic

        async def let_through() -> None:
            return None

        return nopanic.rate_limit(rate, burst=burst)(let_through)

    return sync, wait


def _asynciolimiter(rate: int) -> Wait:
    from asynciolimiter import Limiter

    return Limiter(rate).wait


def _aiolimiter(rate: int) -> Wait:
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(rate, 1).acquire


def _pyrate_sync(rate: int) -> Acquire:
    from pyrate_limiter import Duration, Limiter, Rate

    return Limiter(Rate(rate, Duration.SECOND)).try_acquire


def _pyrate_async(rate: int) -> Wait:
    from pyrate_limiter import Duration, Limiter, Rate

    return Limiter(Rate(rate, Duration.SECOND)).try_acquire_async


LIMITERS = (
    LimiterCandidate("opero", ("opero",), _opero_sync, _opero_async),
    LimiterCandidate("nopanic", ("nopanic",), *_nopanic(None)),
    LimiterCandidate("nopanic, burst=1", ("nopanic",), *_nopanic(1)),
    LimiterCandidate("pyrate-limiter", ("pyrate_limiter",), _pyrate_sync, _pyrate_async),
    LimiterCandidate("asynciolimiter", ("asynciolimiter",), None, _asynciolimiter),
    LimiterCandidate("aiolimiter", ("aiolimiter",), None, _aiolimiter),
)


def measure(
    effort: Effort, rates: Iterable[int] = RATES, limiters: Iterable[LimiterCandidate] = LIMITERS
) -> Iterator[AccuracyResult]:
    """Watch every limiter at every rate in every mode it has, one after another."""
    limiters = tuple(limiters)
    for rate in rates:
        for limiter in limiters:
            for mode in (SYNC, THREADED, ASYNC):
                if mode == ASYNC or limiter.sync is not None:
                    yield _watch(limiter, mode, rate, effort.accuracy_seconds)


def _watch(limiter: LimiterCandidate, mode: str, rate: int, seconds: float) -> AccuracyResult:
    result: AccuracyResult = {
        "limiter": limiter.name,
        "mode": mode,
        "rate": rate,
        "status": "ok",
        "admitted": 0,
        "sustained": 0.0,
        "window": 0,
        "stall": 0.0,
        "cpu": 0.0,
    }
    if missing(limiter.requires):
        result["status"] = "not installed"
        return result
    wall, cpu = perf_counter(), process_time()
    try:
        times = sorted(_admissions(limiter, mode, rate, seconds))
    except Exception as error:  # noqa: BLE001 - an error is shown in its own cell
        result["status"] = f"failed: {type(error).__name__}: {error}"
        return result
    result["cpu"] = significant((process_time() - cpu) / (perf_counter() - wall), 2)
    # An observation ends with the first admission after its time is up, never within a stall.
    first = times[0]
    result["admitted"] = len(times)
    result["sustained"] = significant(rate_between(times, first + 1, first + seconds) / rate)
    result["window"] = worst_window(times, 1.0)
    result["stall"] = significant(longest_stall(times))
    return result


def _admissions(limiter: LimiterCandidate, mode: str, rate: int, seconds: float) -> list[float]:
    if mode == ASYNC:
        return asyncio.run(_admissions_of_tasks(limiter.wait, rate, seconds))
    assert limiter.sync is not None
    acquire = limiter.sync(rate)
    stop = perf_counter() + seconds
    if mode == SYNC:
        return _admissions_of_thread(acquire, stop)
    with ThreadPoolExecutor(THREADS) as pool:
        watches = [pool.submit(_admissions_of_thread, acquire, stop) for _ in range(THREADS)]
        return [moment for watch in watches for moment in watch.result()]


def _admissions_of_thread(acquire: Acquire, stop: float) -> list[float]:
    times: list[float] = []
    while not times or times[-1] < stop:
        acquire()
        times.append(perf_counter())
    return times


async def _admissions_of_tasks(
    make: Callable[[int], Wait], rate: int, seconds: float
) -> list[float]:
    wait = make(rate)
    stop = perf_counter() + seconds
    times: list[float] = []

    async def caller() -> None:
        while not times or times[-1] < stop:
            await wait()
            times.append(perf_counter())

    tasks = [asyncio.create_task(caller()) for _ in range(TASKS)]
    # The first caller to end has met the end of the watch, or an error of the limiter.
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for task in done:
        task.result()
    return times
