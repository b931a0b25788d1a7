# this_file: tests/composition/test_stress.py
"""Threads, two event loops, failures, deadlines and cancellations at once: no permit is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from typing import Any

import pytest

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, RetryBudget, deadline, opero
from opero.errors import CircuitOpenError, OperoError

IN_FLIGHT, RATE, PROBES = 3, 1500, 2
EXPECTED = (OperoError, ConnectionError)


class Backend:
    """Counts the calls in it, and fails now and then."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.inside = self.most = 0
        self.starts: list[float] = []

    def enter(self) -> tuple[float, bool]:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.starts.append(time.monotonic())
            return self._random.uniform(0, 0.002), self._random.random() < 0.3

    def leave(self) -> None:
        with self._lock:
            self.inside -= 1


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("way", ["stages", "fast path"])
def test_no_permit_is_lost_or_doubled(seed: int, way: str) -> None:
    by_stages = way == "stages"
    backend = Backend(seed)
    limit = ConcurrencyLimit(IN_FLIGHT)
    limiter = RateLimiter(f"{RATE}/s")
    breaker = CircuitBreaker(
        fail_max=4, reset_timeout=0.004, backoff=1, half_open_max=PROBES, jitter=0
    )
    budget = RetryBudget(ratio=0.2, minimum=20, window=60)
    options: dict[str, Any] = {
        "cache": False,
        "retries": 1,
        "min_delay": 0,
        "concurrency": limit,
        "rate_limit": limiter,
        "circuit_breaker": breaker,
    }
    if by_stages:
        # Deadlines of others close the fast path too.
        options["retry_budget"] = budget
        bounded = 0.3
    else:
        options["deadline"] = 5
        bounded = 0.0

    @opero(**options)
    def call() -> None:
        pause, fails = backend.enter()
        try:
            time.sleep(pause)
            if fails:
                raise ConnectionError
        finally:
            backend.leave()

    @opero(**options, timeout=0.05)
    async def acall() -> None:
        pause, fails = backend.enter()
        try:
            await asyncio.sleep(pause)
            if fails:
                raise ConnectionError
        finally:
            backend.leave()

    def in_thread(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(150):
            bound = deadline(chance.uniform(0, 0.02))
            with (
                contextlib.suppress(*EXPECTED),
                bound if chance.random() < bounded else limitless(),
            ):
                call()

    async def one(chance: random.Random) -> None:
        bound = deadline(chance.uniform(0, 0.02))
        with contextlib.suppress(*EXPECTED), bound if chance.random() < bounded else limitless():
            await acall()

    async def in_loop(number: int) -> None:
        chance = random.Random(f"{seed} loop {number}")
        for _ in range(15):
            tasks = [asyncio.create_task(one(chance)) for _ in range(15)]
            for task in tasks:
                if chance.random() < 0.4:
                    await asyncio.sleep(chance.uniform(0, 0.001))
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    threads = [threading.Thread(target=in_thread, args=(n,), daemon=True) for n in range(4)]
    threads += [
        threading.Thread(target=asyncio.run, args=(in_loop(n),), daemon=True) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"

    assert len(backend.starts) > 100
    assert backend.inside == 0
    assert backend.most <= IN_FLIGHT, "a permit was doubled"
    assert (limit.in_flight, limit.waiting) == (0, 0), "a permit was lost"
    assert breaker.stats.probes == 0, "a probe was lost"
    assert not limiter.threads_waiting, "a thread still waits in line"
    assert not limiter.loops_waiting
    assert budget.retries <= 20 + 0.2 * budget.calls
    assert len(backend.starts) == call.stats.calls + acall.stats.calls

    # All that was taken is there again.
    for _ in range(IN_FLIGHT):
        assert limit.try_acquire()
    assert not limit.try_acquire()
    breaker.force_open()
    breaker.reset()
    breaker.open()
    permits = []
    while len(permits) < PROBES:
        with contextlib.suppress(CircuitOpenError):
            permits.append(breaker.acquire())
        time.sleep(0.001)
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    time.sleep(2 / RATE)
    assert limiter.try_acquire(), "a slot was lost"


@contextlib.contextmanager
def limitless() -> Any:
    yield


def test_no_result_is_computed_twice_at_once_and_no_caller_is_forgotten() -> None:
    lock, chance = threading.Lock(), random.Random(1)
    inside = most = served = 0

    def enter() -> float:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            return chance.choice([0, 0, 0.0005])

    def leave() -> None:
        nonlocal inside
        with lock:
            inside -= 1

    # What is stored expires at once, so that all callers of the key wait for one of them time and again.
    @opero(retries=0, cache_ttl=0.0001)
    async def acall() -> str:
        try:
            await asyncio.sleep(enter())
        finally:
            leave()
        if chance.random() < 0.2:
            raise ConnectionError
        return "result"

    async def one() -> None:
        nonlocal served
        while True:
            with contextlib.suppress(ConnectionError):
                assert await acall() == "result"
            served += 1
            await asyncio.sleep(0)

    async def in_loop(seed: int) -> None:
        draw = random.Random(seed)
        tasks = [asyncio.create_task(one()) for _ in range(8)]
        for _ in range(200):
            for _ in range(draw.randrange(4)):
                await asyncio.sleep(0)
            victims = draw.sample(tasks, draw.randrange(1, 8))
            for victim in victims:  # a leader, and then, perhaps, who has just taken over
                victim.cancel()
                if draw.random() < 0.7:
                    await asyncio.sleep(0)
            await asyncio.wait(victims)
            assert all(victim.cancelled() or not victim.exception() for victim in victims)
            tasks = [task for task in tasks if task not in victims]
            tasks += [asyncio.create_task(one()) for _ in victims]
        with contextlib.suppress(ConnectionError):
            await acall()  # would wait for ever where a flight has lost its leader
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    threads = [
        threading.Thread(target=asyncio.run, args=(in_loop(n),), daemon=True) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a caller waits for ever"
    assert (inside, most) == (0, 1)
    assert served
