# this_file: src/opero/concurrency/executors/inline.py
"""No workers at all: each item runs where the map was called, so that a debugger sees one stack."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING

from opero.concurrency.engine import Caps
from opero.concurrency.sheet import sheet_of
from opero.concurrency.work import Work

if TYPE_CHECKING:
    from opero.concurrency.engine import Chunk, Job, Report, Why

__all__ = ["AsyncInline", "Inline"]


class Inline:
    """The engine of `sequential=True`."""

    name = "sequential"
    caps = Caps()

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self._news = threading.Event()

    def slots(self) -> int:
        """One item at a time."""
        return 1

    def open(self, job: Job) -> None:
        """Get ready."""
        self._job = job
        self._work = Work(job)

    def submit(self, chunk: Chunk) -> None:
        """Keep a chunk for the next `poll`."""
        self._chunks.append(chunk)

    def poll(self, timeout: float | None) -> list[Report]:
        """Run what was submitted."""
        reports: list[Report] = []
        while self._chunks:
            chunk = self._chunks.popleft()
            self._work.chunk(chunk, sheet_of(chunk, self._job, self.name, reports.append))
        if not reports and timeout != 0 and self._news.wait(timeout):
            self._news.clear()
        return reports

    def kill(self, chunk_id: int, why: Why) -> bool:
        """Nothing runs while somebody could ask."""
        return False

    def wake(self) -> None:
        """End a wait, for what others compute."""
        self._news.set()

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Forget what was not run."""
        self._chunks.clear()


class AsyncInline:
    """The same for coroutine functions."""

    name = "sequential"
    caps = Caps()

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self._news = asyncio.Event()

    def slots(self) -> int:
        """One item at a time."""
        return 1

    def open(self, job: Job) -> None:
        """Get ready."""
        self._job = job
        self._work = Work(job)
        self._loop = asyncio.get_running_loop()

    def submit(self, chunk: Chunk) -> None:
        """Keep a chunk for the next `poll`."""
        self._chunks.append(chunk)

    async def poll(self, wait: float | None) -> list[Report]:
        """Run what was submitted."""
        reports: list[Report] = []
        while self._chunks:
            chunk = self._chunks.popleft()
            await self._work.achunk(chunk, sheet_of(chunk, self._job, self.name, reports.append))
        if wait == 0:
            await asyncio.sleep(0)
        elif not reports:
            try:
                async with asyncio.timeout(wait):
                    await self._news.wait()
            except TimeoutError:
                return reports
            self._news.clear()
        return reports

    def wake(self) -> None:
        """End a wait, for what others compute or for input; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop is closed, so nobody waits
            return

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Forget what was not run."""
        self._chunks.clear()
