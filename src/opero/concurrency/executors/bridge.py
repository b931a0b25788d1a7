# this_file: src/opero/concurrency/executors/bridge.py
"""An engine that blocks, for an event loop: its waits go to a thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opero.concurrency.engine import Caps, Chunk, Engine, Job, Report

__all__ = ["Bridge"]


class Bridge:
    """An engine whose `poll` and `close` may be awaited.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiter: ThreadPoolExecutor | None = None
        self.name: str = engine.name
        self.caps: Caps = engine.caps

    def slots(self) -> int:
        """As the engine says."""
        return self._engine.slots()

    def open(self, job: Job) -> None:
        """Open the engine."""
        self._engine.open(job)
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="opero-map")

    def submit(self, chunk: Chunk) -> None:
        """Hand a chunk on; that never blocks."""
        self._engine.submit(chunk)

    async def poll(self, wait: float | None) -> list[Report]:
        """Wait for reports in a thread; a cancelled wait ends the thread's wait too."""
        if wait == 0:
            await asyncio.sleep(0)
            return self._engine.poll(0)
        loop = asyncio.get_running_loop()
        polling = loop.run_in_executor(self._waiter, self._engine.poll, wait)
        try:
            return await asyncio.shield(polling)
        except asyncio.CancelledError:
            self._engine.wake()
            await asyncio.wait({polling})
            raise

    def wake(self) -> None:
        """End a wait for reports."""
        self._engine.wake()

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Close the engine in the thread, so that the loop goes on meanwhile."""
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(
            waiter, lambda: self._engine.close(graceful=graceful, timeout=grace)
        )
        try:
            await asyncio.shield(closing)
        finally:
            waiter.shutdown(wait=False)
