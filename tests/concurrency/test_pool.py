# this_file: tests/concurrency/test_pool.py
"""The map without cache and retries: a decorator and an executor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opero.concurrency import MapResult, get_parallel_executor, get_parallel_map_decorator
from opero.errors import OperoUsageError


def double(x: int, *, plus: int = 0) -> int:
    return 2 * x + plus


async def adouble(x: int, *, plus: int = 0) -> int:
    return 2 * x + plus


@pytest.mark.parametrize("mode", ["thread", "process", "async", "async_process"])
def test_the_executor_runs_any_function_in_every_mode(mode: Any) -> None:
    run = get_parallel_executor(mode=mode, workers=2)
    assert run(double, range(5), plus=1) == [1, 3, 5, 7, 9]

    async def main() -> list[int]:
        return [*await run(adouble, range(3)), *[x async for x in run.stream(adouble, [9])]]

    assert asyncio.run(main()) == [0, 2, 4, 18]


def test_it_streams_and_reports_as_the_decorator_does() -> None:
    run = get_parallel_executor(mode="thread")
    assert list(run.stream(double, iter([1, 2]))) == [2, 4]
    result = run.map(lambda x: 1 / x, [1, 0])
    assert isinstance(result, MapResult)
    assert [failure.index for failure in result.failures] == [1]


def test_nothing_but_the_map_is_switched_on() -> None:
    mapped = get_parallel_map_decorator(mode="thread", workers=3)(double)
    assert (mapped.options.cache, mapped.options.retries) == (False, 0)
    assert mapped([1, 1]) == [2, 2]
    assert mapped.stats.calls == 2
    assert "3 threads" in str(mapped.explain())


@pytest.mark.parametrize("make", [get_parallel_map_decorator, get_parallel_executor])
def test_options_of_other_stages_are_refused(make: Any) -> None:
    with pytest.raises(OperoUsageError, match="has no option 'retries'"):
        make(retries=3)
    assert make(timeout=5)


def test_repr_of_an_executor_names_its_options() -> None:
    assert repr(get_parallel_executor(workers=2)) == "<ParallelExecutor workers=2>"
    assert repr(get_parallel_executor()) == "<ParallelExecutor with defaults>"


@pytest.mark.parametrize("make", [get_parallel_map_decorator, get_parallel_executor])
def test_mode_workers_ordered_and_progress_may_be_given_by_position(make: Any) -> None:
    made = make("thread", 2, False, False)
    options = made.options if make is get_parallel_executor else made(double).options
    assert (options.mode, options.workers, options.ordered, options.progress) == (
        "thread",
        2,
        False,
        False,
    )
    with pytest.raises(OperoUsageError, match="twice"):
        make("thread", mode="process")
    with pytest.raises(OperoUsageError, match="by position"):
        make("thread", 2, True, True, 5)


def test_the_helpers_are_where_the_package_says() -> None:
    from opero.concurrency import pool

    assert pool.get_parallel_executor is get_parallel_executor
    assert pool.get_parallel_map_decorator is get_parallel_map_decorator
