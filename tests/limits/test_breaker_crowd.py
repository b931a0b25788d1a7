# this_file: tests/limits/test_breaker_crowd.py
"""The circuit breaker among threads, event loops and cancellations."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from opero import CircuitBreaker, CircuitState
from opero.errors import CircuitOpenError
from opero.events import CircuitChanged
from opero.testing import capture_events

CLOSED = CircuitState.CLOSED
REFUSED = ConnectionRefusedError("refused")


def in_threads(count: int, work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Crowd:
    """Calls of all kinds through one breaker, with a count of probes that are really under way."""

    def __init__(self, most: int) -> None:
        self.breaker = CircuitBreaker(
            fail_max=2, half_open_max=most, reset_timeout=0.002, max_reset_timeout=0.004
        )
        self.lock = threading.Lock()
        self.probing: dict[int, int] = {}
        self.at_once = 0
        self.closings = 0
        self.breaker.subscribe(self.received)

    def received(self, event: CircuitChanged) -> None:
        self.closings += event.new_state == CLOSED

    def note(self, permit: Any, step: int) -> None:
        if permit.probe:
            with self.lock:
                now = self.probing.get(permit.generation, 0) + step
                self.probing[permit.generation] = now
                self.at_once = max(self.at_once, now)

    async def task(self, loops: int, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(loops):
            try:
                permit = self.breaker.acquire()
            except CircuitOpenError:
                await asyncio.sleep(0.001)
                continue
            self.note(permit, 1)
            try:
                await asyncio.sleep(dice.choice([0, 0, 0.001]))
                fails = dice.random() < 0.5
            except asyncio.CancelledError:
                self.note(permit, -1)
                permit.release()
                raise
            self.note(permit, -1)
            (permit.failure(REFUSED) if fails else permit.success())

    async def run_tasks(self, seed: int) -> None:
        tasks = [asyncio.create_task(self.task(60, seed + n)) for n in range(20)]
        for task in tasks[::3]:
            await asyncio.sleep(0.003)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run_calls(self) -> None:
        dice = random.Random()
        for _ in range(300):
            try:
                permit = self.breaker.acquire()
            except CircuitOpenError:
                time.sleep(0.0002)
                continue
            self.note(permit, 1)
            fails = dice.random() < 0.5
            self.note(permit, -1)
            (permit.failure(REFUSED) if fails else permit.success())


@pytest.mark.parametrize("most", [1, 2])
def test_permits_are_neither_lost_nor_doubled_by_threads_loops_and_cancellations(most: int) -> None:
    crowd = Crowd(most)
    loops = [
        threading.Thread(target=lambda seed=seed: asyncio.run(crowd.run_tasks(seed)))
        for seed in (0, 1000)
    ]
    for thread in loops:
        thread.start()
    in_threads(4, crowd.run_calls)
    for thread in loops:
        thread.join()
    assert 0 < crowd.at_once <= most
    assert crowd.closings > 1
    assert crowd.breaker.stats.probes == 0
    assert not any(crowd.probing.values())


def test_of_fifty_threads_at_once_one_is_the_probe() -> None:
    breaker = CircuitBreaker(reset_timeout=0)
    breaker.open()
    admitted: list[Any] = []
    gate = threading.Barrier(50)

    def call() -> None:
        gate.wait()
        try:
            admitted.append(breaker.acquire())
        except CircuitOpenError:
            pass

    in_threads(50, call)
    assert len(admitted) == 1


def test_concurrent_failures_open_it_once() -> None:
    breaker = CircuitBreaker(fail_max=3)
    permits = [breaker.acquire() for _ in range(40)]
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait()
        while permits:
            try:
                permit = permits.pop()
            except IndexError:
                return
            permit.failure(REFUSED)

    with capture_events(CircuitChanged) as events:
        in_threads(8, work)
    assert [e.new_state for e in events if isinstance(e, CircuitChanged)] == ["open"]
    assert breaker.stats.opened == 1


def test_events_of_many_threads_tell_one_story() -> None:
    reported: list[CircuitChanged] = []
    breaker = CircuitBreaker(on_change=reported.append)

    def turn() -> None:
        for _ in range(100):
            breaker.force_open()
            breaker.close()

    in_threads(4, turn)
    states = [(e.old_state, e.new_state) for e in reported]
    assert all(one[1] == next_[0] for one, next_ in itertools.pairwise(states))
    assert states[0][0] == states[-1][1] == "closed"
