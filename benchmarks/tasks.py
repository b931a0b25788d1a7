# this_file: benchmarks/tasks.py
"""What a task costs more than its function, and a parallel of many jobs beside what the standard library offers."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks import bodies
from benchmarks.candidates import Candidate, Function
from benchmarks.harness import significant
from benchmarks.overhead import Row
from benchmarks.results import at_most_times

if TYPE_CHECKING:
    from random import Random

    from benchmarks.harness import Effort
    from benchmarks.results import RowResult

JOBS = 50_000
LIMIT = 100
_ROOT = Path(__file__).resolve().parents[1]

Work = Callable[[], Awaitable[list[int]]]


# --- one task -------------------------------------------------------------------------------------


def opero_task(function: Function) -> Function:
    from opero.tasks import Task

    return Task(function, 1).run


def asyncio_task(function: Function) -> Function:
    async def run() -> Any:
        return await asyncio.create_task(function(1))

    return run


def await_it(function: Function) -> Function:
    async def run() -> Any:
        return await function(1)

    return run


def to_thread(function: Function) -> Function:
    async def run() -> Any:
        return await asyncio.to_thread(function, 1)

    return run


TASKS = (
    Row(
        "task-async",
        "a task, nobody listens, a coroutine function",
        "f()",
        bodies.identity_async,
        (
            Candidate("await", (), await_it),
            Candidate("opero", ("opero",), opero_task),
            Candidate("asyncio.create_task", (), asyncio_task),
        ),
        peer="asyncio.create_task",
        bar=at_most_times(1.0),
        is_async=True,
    ),
    Row(
        "task-thread",
        "a task, nobody listens, a plain function",
        "f()",
        bodies.identity,
        (
            Candidate("opero", ("opero",), opero_task),
            Candidate("asyncio.to_thread", (), to_thread),
        ),
        peer="asyncio.to_thread",
        is_async=True,
        in_threads=True,
    ),
)


# --- many jobs ------------------------------------------------------------------------------------


async def _job(number: int) -> int:
    await asyncio.sleep(0)
    return number


async def opero_parallel() -> list[int]:
    from opero.tasks import Parallel, Task

    results: list[int] = await Parallel((Task(_job, n) for n in range(JOBS)), limit=LIMIT).run()
    return results


async def task_group() -> list[int]:
    slots = asyncio.Semaphore(LIMIT)

    async def one(number: int) -> int:
        async with slots:
            return await _job(number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(JOBS)]
    return [task.result() for task in tasks]


async def gather() -> list[int]:
    slots = asyncio.Semaphore(LIMIT)

    async def one(number: int) -> int:
        async with slots:
            return await _job(number)

    return list(await asyncio.gather(*(one(number) for number in range(JOBS))))


WAYS: Mapping[str, Work] = {
    "opero": opero_parallel,
    "TaskGroup + Semaphore": task_group,
    "gather + Semaphore": gather,
}

ROWS = ("parallel-time", "parallel-memory")


def measure(name: str, effort: Effort, random: Random) -> RowResult:
    """Measure one of the rows of many jobs."""
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    if name == "parallel-memory":
        samples = {way: [peak_in_a_fresh_interpreter(way)] for way in WAYS}
    else:
        for _ in range(effort.process_rounds):
            for way in random.sample(list(WAYS), len(WAYS)):
                samples[way].append(significant(seconds_of(WAYS[way]) * 1e3))
    memory = name == "parallel-memory"
    what = "peak memory" if memory else "time"
    return {
        "title": f"{JOBS:,} jobs, {LIMIT} at once, {what}",
        "unit": "B" if memory else "ms",
        "peer": "TaskGroup + Semaphore",
        "bar": at_most_times(1.0),
        "candidates": {way: {"status": "ok", "samples": found} for way, found in samples.items()},
    }


def seconds_of(work: Work) -> float:
    """Run all jobs once and return how long it took."""
    gc.collect()
    began = perf_counter()
    results = asyncio.run(work())  # type: ignore[arg-type]  # coroutine functions, every one
    seconds = perf_counter() - began
    assert results == list(range(JOBS))
    return seconds


def peak_in_a_fresh_interpreter(way: str) -> float:
    """Return the most bytes that Python had allocated at once while the jobs ran."""
    command = [sys.executable, "-m", "benchmarks.tasks", way]
    done = subprocess.run(  # noqa: S603 - this very module
        command, cwd=_ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _main(way: str) -> None:
    seconds_of(WAYS[way])  # what is imported and made once is no matter of the jobs
    gc.collect()
    tracemalloc.start()
    seconds_of(WAYS[way])
    print(tracemalloc.get_traced_memory()[1])


if __name__ == "__main__":
    _main(*sys.argv[1:])
