# this_file: tests/concurrency/test_dedupe.py
"""Computed results reach the store and the waiters, also when the map ends meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from opero import operomap


class Stuck:
    """A store that takes its time to store."""

    blocking = True

    def __init__(self) -> None:
        self.storing = threading.Event()
        self.goes_on = threading.Event()

    def get(self, key: str) -> Any:
        return None

    def set(self, key: str, value: Any, ttl: float | None) -> None:
        self.storing.set()
        self.goes_on.wait(20)

    def delete(self, key: str) -> bool:
        return False

    def clear(self) -> int:
        return 0


def test_waiter_takes_over_when_the_map_is_cancelled_while_it_stores() -> None:
    store, calls = Stuck(), []

    @operomap(cache_backend=store, mode="async", retries=0)
    async def f(x: int) -> int:
        calls.append(x)
        return x

    async def main() -> int:
        mapping = asyncio.ensure_future(f([1]))
        while not store.storing.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(f.one(1))
        await asyncio.sleep(0.05)
        assert calls == [1]
        mapping.cancel()
        store.goes_on.set()
        await asyncio.gather(mapping, return_exceptions=True)
        return await asyncio.wait_for(waiting, 20)

    assert asyncio.run(main()) == 1
    assert calls == [1, 1]
