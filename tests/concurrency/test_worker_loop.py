# this_file: tests/concurrency/test_worker_loop.py
"""Coroutines in worker processes: one loop for all chunks, several items at once, and what a death costs then."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from opero import operomap
from opero.concurrency.executors.base import Done, ItemOutcome, Lost
from opero.errors import CallTimeoutError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.concurrency.conftest import Maps

pytestmark = pytest.mark.internal

both = pytest.mark.parametrize("maps", ["fork", "forkserver"], indirect=True)


@both
def test_items_are_in_flight_together_and_come_back_in_their_places(maps: Maps) -> None:
    async def fetch(x: int) -> tuple[int, int]:
        started.append(x)
        await asyncio.sleep(0.01 * (10 - x))
        return x, len(started)

    started: list[int] = []
    found = maps(fetch, range(10), chunk=10, workers=1, in_flight=10).items
    assert found == [(x, 10) for x in range(10)]


def test_no_more_are_in_flight_than_may_be(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        nonlocal under_way
        under_way += 1
        most = under_way
        await asyncio.sleep(0.002)
        under_way -= 1
        return most

    under_way = 0
    assert max(maps(fetch, range(20), chunk=20, workers=1, in_flight=3).items) == 3


def test_the_loop_lives_on_between_chunks(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        loops.add(asyncio.get_running_loop())
        return len(loops)

    loops: set[Any] = set()
    assert maps(fetch, range(6), chunk=2, workers=1).items == [1] * 6


def test_retries_are_awaited_on_the_loop(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        tried.append(x)
        if tried.count(x) < 3:
            raise OSError(x)
        return x

    tried: list[int] = []
    found = maps(fetch, [1, 2], chunk=2, workers=1, in_flight=2, retries=2, min_delay=0.001).items
    assert [(one.value, one.attempts) for one in found] == [(1, 3), (2, 3)]


def test_a_call_that_takes_too_long_is_cancelled_and_costs_itself(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        await asyncio.sleep(30 if x == 2 else 0)
        return x

    ran = maps(fetch, range(4), chunk=4, workers=1, in_flight=4, timeout=2, item_timeout=2)
    assert [x for x in ran.items if not isinstance(x, ItemOutcome)] == [0, 1, 3]
    assert isinstance(ran.items[2].error, CallTimeoutError)
    assert all(isinstance(report, Done) for report in ran.reports), "no worker died"


def test_one_that_holds_up_the_loop_costs_its_worker(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        if x == 1:
            time.sleep(30)  # noqa: ASYNC251 - that is the fault
        return x

    ran = maps(fetch, range(3), chunk=1, workers=1, timeout=2, item_timeout=2)
    assert isinstance(ran.items[1], Lost)
    assert ran.items[1].why == "timeout"
    assert [ran.items[0], ran.items[2]] == [0, 2]


def test_a_loop_that_turns_lives_longer_than_its_limit(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        for _ in range(2):
            await asyncio.sleep(0.02)
        return os.getpid()

    pids = maps(fetch, range(120), chunk=120, workers=1, in_flight=2, timeout=2, item_timeout=2)
    assert len(set(pids.items)) == 1


def test_of_several_under_way_none_is_blamed_without_proof(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        await asyncio.sleep(0.01)
        if x == 2:
            os._exit(7)
        return x

    ran = maps(fetch, range(4), chunk=4, workers=1, in_flight=4)
    lost = next(report for report in ran.reports if isinstance(report, Lost))
    assert lost.culprit is None


def test_a_worker_is_replaced_after_its_share(maps: Maps) -> None:
    async def fetch(x: int) -> int:
        return os.getpid()

    ran = maps(fetch, range(9), chunk=4, workers=1, in_flight=4, max_tasks_per_worker=3)
    assert [ran.items.count(pid) for pid in dict.fromkeys(ran.items)] == [3, 3, 3]


def test_an_item_that_cannot_be_opened_costs_itself(maps: Maps) -> None:
    class Broken:
        def __reduce__(self) -> Any:
            return int, ("no number",)

    async def fetch(x: Any) -> Any:
        return x

    ran = maps(fetch, [1, Broken(), 3], chunk=3, workers=1, in_flight=3)
    assert [ran.items[0], ran.items[2]] == [1, 3]
    assert "no number" in str(ran.items[1].error)


def test_slow_items_keep_no_place_of_others(tmp_path: Path) -> None:
    gate = tmp_path / "open"

    @operomap(mode="async_process", workers=1, retries=0, cache=False)
    async def fetch(x: int) -> int:
        if x in (0, 1, 2, 40):
            while not gate.exists():  # noqa: ASYNC110 - the gate is for all processes
                await asyncio.sleep(0.005)
            return x
        # Only twenty-eight at once get past it, which with the slow ones are all.
        async with asyncio.timeout(30):
            await barrier.wait()
        if x >= 100:
            gate.touch()
        return x

    barrier = asyncio.Barrier(28)
    assert asyncio.run(fetch(range(4 + 4 * 28))) == list(range(4 + 4 * 28))


def test_a_worker_that_dies_of_one_of_several_chunks_is_no_fault_of_the_others(
    tmp_path: Path,
) -> None:
    died = tmp_path / "died"

    @operomap(mode="async_process", workers=1, chunksize=4, retries=0, cache=False)
    async def fetch(x: int) -> int:
        begun.append(x)
        if x == 13:
            while len(begun) < 32 and not died.exists():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.005)
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not died.exists():
            await asyncio.sleep(30)
        return x

    begun: list[int] = []
    result = asyncio.run(fetch.map(range(40)))
    assert [failure.index for failure in result.failures] == [13]
    assert result.values == [x for x in range(40) if x != 13]
    assert fetch.stats.failures == 1


@pytest.mark.parametrize("large", [{1}, {1, 3}])
def test_large_results_of_one_chunk_do_not_travel_with_those_of_another(large: set[int]) -> None:
    @operomap(mode="async_process", workers=1, chunksize=3, retries=0, cache=False)
    async def fetch(x: int) -> Any:
        if x == 5:
            await asyncio.sleep(0.02)
        async with asyncio.timeout(30):
            await barrier.wait()
        if x in (2, 5):
            # Both chunks are under way for a while.
            await asyncio.sleep(0.02)
        return np.full(40_000, x) if x in large else x

    # Past it, the first result is reported at once; the next is not, when one of the other chunk is.
    barrier = asyncio.Barrier(6)
    found = asyncio.run(fetch(range(6)))
    assert [int(np.max(one)) for one in found] == list(range(6))
    assert [np.size(one) for one in found] == [40_000 if x in large else 1 for x in range(6)]
