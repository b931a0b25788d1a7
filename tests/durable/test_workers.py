# this_file: tests/durable/test_workers.py
"""Threads for synchronous workflows."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from opero.durable.engine import WorkerThreads

pytestmark = pytest.mark.internal


def test_a_job_acquired_while_another_takes_the_last_thread_waits_for_it() -> None:
    threads = WorkerThreads(2)
    started: SimpleQueue[int] = SimpleQueue()
    ends = [threading.Event() for _ in range(3)]

    def job(number: int) -> None:
        started.put(number)
        ends[number].wait(30)
        threads.release()

    assert threads.reserve()
    assert threads.reserve()
    assert not threads.reserve()
    threads.reserve(always=True)
    for number in range(3):
        threads.run(lambda number=number: job(number))  # type: ignore[misc]  # mypy knows no defaults of lambdas
    assert {started.get(timeout=30), started.get(timeout=30)} == {0, 1}
    assert started.empty()
    assert threads.free == -1
    ends[0].set()
    assert started.get(timeout=30) == 2
    for end in ends:
        end.set()
    threads.close()
