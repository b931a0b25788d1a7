# this_file: tests/concurrency/executors/test_threads.py
"""Threads: when they begin, and that none stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest

from opero.concurrency.executors.base import Chunk, Done, MapJob
from opero.concurrency.executors.in_process import ThreadExecutor
from opero.core.function import FunctionInfo
from opero.core.options import Options
from opero.core.pipeline import Pipeline

pytestmark = pytest.mark.internal


def job_of(fn: Callable[..., Any]) -> MapJob:
    options = Options.of("test", cache=False, retries=0)
    return MapJob(function=fn, pipeline=Pipeline(FunctionInfo(fn), options))


@pytest.fixture
def begun() -> Iterator[Callable[[], int]]:
    """How many threads there are more than before; none may stay."""
    before = {*threading.enumerate()}  # some of which may end meanwhile
    yield lambda: len({*threading.enumerate()} - before)
    end = time.monotonic() + 100
    while {*threading.enumerate()} - before:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.005)


def test_no_thread_starts_before_the_map_waits(begun: Callable[[], int]) -> None:
    executor = ThreadExecutor(3, copy_context())
    executor.open(job_of(abs))
    executor.submit(Chunk(1, [0], [-1]))
    assert begun() == 0
    (done,) = executor.poll(10)
    assert isinstance(done, Done)
    assert done.values == [1]
    assert begun() == 1, "no more threads than items"
    executor.close(graceful=True, timeout=5)


def test_a_map_that_is_over_before_it_waits_starts_no_thread(begun: Callable[[], int]) -> None:
    executor = ThreadExecutor(3, copy_context())
    executor.open(job_of(abs))
    executor.submit(Chunk(1, [0], [-1]))
    executor.close(graceful=False, timeout=5)
    assert begun() == 0


def test_threads_end_also_if_their_start_is_interrupted(
    begun: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("opero-thread"):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    executor = ThreadExecutor(3, copy_context())
    executor.open(job_of(abs))
    executor.submit(Chunk(1, [0], [None]))
    with pytest.raises(KeyboardInterrupt):
        executor.poll(10)
    executor.close(graceful=False, timeout=5)


def test_idle_threads_help_with_the_chunk_of_another(begun: Callable[[], int]) -> None:
    together = threading.Barrier(2, timeout=10)
    executor = ThreadExecutor(2, copy_context())
    executor.open(job_of(lambda _: together.wait()))
    executor.submit(Chunk(1, range(4), [0] * 4))
    executor.submit(Chunk(2, [4], [0]))
    executor.submit(Chunk(3, [5], [0]))
    done = 0
    while done < 6:
        for report in executor.poll(10):
            assert isinstance(report, Done)
            assert not report.odd, "each item needs another one at the same time"
            done += len(report.values)
    executor.close(graceful=True, timeout=5)


def test_finished_items_are_reported_while_a_slow_one_runs() -> None:
    goes_on = threading.Event()
    executor = ThreadExecutor(1, copy_context())
    executor.open(job_of(lambda x: x and goes_on.wait(10)))
    executor.submit(Chunk(1, range(3), [0, 1, 0]))
    (done,) = executor.poll(10) or executor.poll(10)
    assert isinstance(done, Done)
    assert list(done.places) == [0]
    goes_on.set()
    (done,) = executor.poll(10)
    assert isinstance(done, Done)
    assert list(done.places) == [1, 2]
    executor.close(graceful=True, timeout=5)
