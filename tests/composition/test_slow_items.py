# this_file: tests/composition/test_slow_items.py
"""A slow item delays no other: neither finished ones of its chunk, nor those behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opero import operomap

SLOW = 3
"""The item that waits until all others have arrived."""

MODES = [
    pytest.param((awaits, mode), id=f"{'async def' if awaits else 'def'}-{mode}")
    for awaits, mode in (
        (False, "thread"),
        (False, "executor"),
        (False, "process"),
        (True, "async"),
        (True, "thread"),
        (True, "executor"),
        (True, "process"),
        (True, "async_process"),
    )
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Other tests leave idle threads in this process, with which opero would not fork it.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        yield


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "open"


class Way:
    """One way to run a map whose slow items wait for a gate, which is a file that every process sees."""

    def __init__(self, awaits: bool, mode: str, gate: Path) -> None:
        self.awaits = awaits
        self.mode = mode
        self.gate = gate
        self.executor: ThreadPoolExecutor | None = None

    def of(self, body: Callable[[int], Any], slow: frozenset[int], **options: Any) -> Any:
        gate = self.gate
        given: dict[str, Any] = {"ordered": False, "cache": False, "retries": 0, "workers": 3}
        if self.mode == "executor":
            self.executor = given["executor"] = ThreadPoolExecutor(3)
        else:
            given["mode"] = self.mode
        given |= options

        def check(end: float) -> bool:
            assert time.monotonic() < end, "the others did not arrive while this one was at work"
            return gate.exists()

        if not self.awaits:

            def run(x: int) -> Any:
                end = time.monotonic() + 100
                while x in slow and not check(end):
                    time.sleep(0.005)
                return body(x)

            return operomap(**given)(run)

        async def arun(x: int) -> Any:
            end = time.monotonic() + 100
            while x in slow and not check(end):  # noqa: ASYNC110 - another process opens it
                await asyncio.sleep(0.005)
            return body(x)

        return operomap(**given)(arun)

    def first(self, count: int, fn: Any, items: Any) -> tuple[list[Any], list[Any]]:
        """Return so many results, and those that come when the gate is open then."""
        if not self.awaits:
            found = list(self._taken(count, fn.stream(items)))
        else:
            found = asyncio.run(self._ataken(count, fn.stream(items)))
        return found[:count], found[count:]

    def _taken(self, count: int, stream: Any) -> Iterator[Any]:
        for n, value in enumerate(stream, 1):
            yield value
            if n == count:
                self.gate.touch()

    async def _ataken(self, count: int, stream: Any) -> list[Any]:
        found: list[Any] = []
        async for value in stream:
            found.append(value)
            if len(found) == count:
                self.gate.touch()
        return found


@pytest.fixture(params=MODES)
def way(request: pytest.FixtureRequest, gate: Path) -> Iterator[Way]:
    way = Way(*request.param, gate)
    yield way
    if way.executor is not None:
        way.executor.shutdown()


def test_all_others_arrive_while_a_slow_item_is_at_work(way: Way) -> None:
    others = [x for x in range(16) if x != SLOW]
    fn = way.of(lambda x: x, frozenset([SLOW]), chunksize=8)
    found, last = way.first(15, fn, range(16))
    assert sorted(found) == others
    assert last == [SLOW]


def test_so_they_do_where_chunks_have_grown(way: Way) -> None:
    fn = way.of(lambda x: x, frozenset([3_000]))
    found, last = way.first(3_999, fn, range(4_000))
    assert len(set(found)) == 3_999
    assert last == [3_000]


def test_each_item_is_run_once(way: Way, tmp_path: Path) -> None:
    def run(x: int) -> int:
        with (tmp_path / str(x)).open("a") as file:
            file.write("x")
        return x

    fn = way.of(run, frozenset([0, 9]), chunksize=16)
    found, last = way.first(14, fn, range(16))
    assert sorted([*found, *last]) == list(range(16))
    assert [len((tmp_path / str(x)).read_text()) for x in range(16)] == [1] * 16


def test_large_results_arrive_whole_in_early_reports(way: Way) -> None:
    fn = way.of(lambda x: np.full(40_000, x), frozenset([5]), chunksize=8)
    found, last = way.first(15, fn, range(16))
    assert sorted(int(array[0]) for array in found) == [x for x in range(16) if x != 5]
    assert all((array == array[0]).all() for array in [*found, *last])


def test_counters_are_exact_with_early_reports(way: Way) -> None:
    def run(x: int) -> int:
        if x % 4 == 1:
            raise ValueError(x)
        return x

    fn = way.of(run, frozenset([SLOW]), chunksize=8, on_error="skip")
    found, last = way.first(11, fn, range(16))
    assert sorted([*found, *last]) == [x for x in range(16) if x % 4 != 1]
    assert (fn.stats.calls, fn.stats.failures) == (16, 4)


@pytest.mark.parametrize("way", [(False, "process"), (True, "process")], indirect=True)
def test_the_death_of_a_worker_whose_chunk_was_cut_costs_its_item_alone(
    way: Way, tmp_path: Path
) -> None:
    def run(x: int) -> int:
        with (tmp_path / str(x)).open("a") as file:
            file.write("x")
        if x == SLOW and (tmp_path / str(x)).read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    fn = way.of(run, frozenset([SLOW]), chunksize=8, retries=1, min_delay=0)
    found, last = way.first(15, fn, range(16))
    assert sorted(found) == [x for x in range(16) if x != SLOW]
    assert last == [SLOW]
    assert [len((tmp_path / str(x)).read_text()) for x in range(16)] == [1, 1, 1, 2, *[1] * 12]


@pytest.mark.parametrize("way", [(True, "async_process")], indirect=True)
def test_slow_coroutines_keep_no_worker_from_the_next_chunks(way: Way) -> None:
    slow = frozenset(range(31))
    found, last = way.first(300, way.of(lambda x: x, slow, workers=1), range(331))
    assert sorted(found) == list(range(31, 331))
    assert sorted(last) == sorted(slow)
