# this_file: tests/concurrency/executors/test_threads.py
"""Threads: when they begin, and that none stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest

from opero.concurrency import pool
from opero.concurrency.executors.base import Chunk, Done, MapJob
from opero.concurrency.executors.threads import ThreadExecutor
from opero.core.function import describe_function
from opero.core.options import Options
from opero.core.pipeline import Pipeline


def job_of(fn: Callable[..., Any]) -> MapJob:
    options = Options.of("test", cache=False, retries=0)
    return MapJob(function=fn, options=options, pipeline=Pipeline(describe_function(fn), options))


@pytest.fixture
def begun() -> Iterator[Callable[[], int]]:
    """How many threads there are more than before; none may stay."""
    before = {*threading.enumerate()}  # some of which may end meanwhile
    yield lambda: len({*threading.enumerate()} - before)
    end = time.monotonic() + 10
    while {*threading.enumerate()} - before:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.005)


def test_none_begins_before_somebody_waits(begun: Callable[[], int]) -> None:
    engine = ThreadExecutor(3, copy_context())
    engine.open(job_of(abs))
    engine.submit(Chunk(1, [0], [-1]))
    assert begun() == 0
    (done,) = engine.poll(10)
    assert isinstance(done, Done)
    assert done.values == [1]
    assert begun() >= 3
    engine.close(graceful=True, timeout=5)


def test_a_map_that_is_over_before_it_began_has_none(begun: Callable[[], int]) -> None:
    engine = ThreadExecutor(3, copy_context())
    engine.open(job_of(abs))
    engine.submit(Chunk(1, [0], [-1]))
    engine.close(graceful=False, timeout=5)
    assert begun() == 0


def test_the_first_works_while_others_begin(
    begun: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    worked = threading.Event()
    plain = pool.thread_pool()

    class Slow(plain):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert worked.wait(10)

    monkeypatch.setattr(pool, "thread_pool", lambda: Slow)
    engine = ThreadExecutor(3, copy_context())
    engine.open(job_of(lambda _: worked.set()))
    engine.submit(Chunk(1, [0], [None]))
    (done,) = engine.poll(10)
    assert isinstance(done, Done)
    engine.close(graceful=True, timeout=5)


def test_those_that_have_begun_end_also_if_the_beginning_is_interrupted(
    begun: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pool.thread_pool()
    made = []

    class Interrupted(plain):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(pool, "thread_pool", lambda: Interrupted)
    worked = threading.Event()
    engine = ThreadExecutor(3, copy_context())
    engine.open(job_of(lambda _: worked.set()))
    engine.submit(Chunk(1, [0], [None]))
    with pytest.raises(KeyboardInterrupt):
        engine.poll(10)
    assert worked.wait(10)
    engine.close(graceful=False, timeout=5)
    # Once our own functions have returned, nothing keeps pathos' threads.
    (one,) = made
    one.close()
    one.join()
