# this_file: src/opero/concurrency/executors/inline.py
"""Run each item where the map was called, without workers, so that a debugger sees one stack."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

from opero.concurrency.executors.local import LocalChunk, LocalChunks
from opero.concurrency.item_runner import ItemRunner

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapJob, Report

__all__ = ["AsyncInlineExecutor", "InlineExecutor"]


class _Inline:
    name = "sequential"

    def __init__(self) -> None:
        self._waiting: deque[LocalChunk] = deque()
        self._reports: list[Report] = []
        self._chunks = LocalChunks(self._reports.append)

    def slots(self) -> int:
        """Return 1: one item at a time."""
        return 1

    def open(self, job: MapJob) -> None:
        """Prepare."""
        self._runner = ItemRunner(job)

    def submit(self, chunk: Chunk) -> None:
        """Keep a chunk for the next `poll`."""
        self._waiting.append(self._chunks.add(chunk))

    def _take_reports(self) -> list[Report]:
        reports = self._reports[:]
        self._reports.clear()
        return reports


class InlineExecutor(_Inline):
    """The executor of `sequential=True`."""

    def __init__(self) -> None:
        super().__init__()
        self._woken = threading.Event()

    def poll(self, timeout: float | None) -> list[Report]:
        """Run what was submitted."""
        while self._waiting:
            self._runner.run_chunk(self._waiting.popleft(), self._chunks, self.name)
        if not self._reports and timeout != 0 and self._woken.wait(timeout):
            self._woken.clear()
        # No name for them here: a traceback of an item leads to this frame, and would be a reference cycle.
        return self._take_reports()

    def wake(self) -> None:
        """End a wait for what other callers compute."""
        self._woken.set()

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Forget what was not run."""
        self._waiting.clear()


class AsyncInlineExecutor(_Inline):
    """The same for coroutine functions."""

    def __init__(self) -> None:
        super().__init__()
        self._woken = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def poll(self, wait: float | None) -> list[Report]:
        """Run what was submitted."""
        while self._waiting:
            await self._runner.run_chunk_async(self._waiting.popleft(), self._chunks, self.name)
        if wait == 0:
            await asyncio.sleep(0)
        elif not self._reports:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._woken.wait()
            self._woken.clear()
        return self._take_reports()  # as above

    def wake(self) -> None:
        """End a wait for input, or for what other callers compute; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:  # the loop is closed, so no wait is left
            return

    async def close(self, *, graceful: bool, grace: float) -> None:
        """Forget what was not run."""
        self._waiting.clear()
