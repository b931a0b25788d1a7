# this_file: src/opero/concurrency/executors/threads.py
"""Run items in threads: each takes chunks from one queue and puts its reports into another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextvars import Context
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

from opero.concurrency.executors.local import LocalChunk, LocalChunks
from opero.concurrency.item_runner import ItemRunner

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapJob, Report

__all__ = ["ThreadExecutor"]


class ThreadExecutor:
    """The executor of `mode="thread"`, and of a synchronous function in `mode="async"`.

    A coroutine function gets an event loop in each thread. The threads are daemons: they never keep the interpreter
    alive.

    Args:
        workers: Most threads.
        context: Context of which each item gets a copy.
    """

    name = "thread"

    def __init__(self, workers: int, context: Context) -> None:
        self.workers = workers
        self._context = context
        self._waiting: SimpleQueue[LocalChunk | None] = SimpleQueue()
        self._reported: SimpleQueue[Report | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._chunks = LocalChunks(self._reported.put)
        self._items = 0
        self._stopped = False
        self._take: Callable[[], LocalChunk | None] = self._waiting.get

    def slots(self) -> int:
        """Return room for a chunk at work and one at hand for each thread."""
        return 2 * self.workers

    def open(self, job: MapJob) -> None:
        """Prepare; threads start with the first `poll`, so that each finds its chunk waiting."""
        self._job = job
        self._chunks.flush_s = job.target_s

    def submit(self, chunk: Chunk) -> None:
        """Put a chunk into the queue."""
        self._items += len(chunk.items)
        self._waiting.put(self._chunks.add(chunk))

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what the threads have reported."""
        self._start_workers()
        reports: list[Report] = []
        wait = self._chunks.patience(timeout)
        with contextlib.suppress(Empty):
            first = self._reported.get_nowait() if wait == 0 else self._reported.get(timeout=wait)
            while first is not None:
                reports.append(first)
                first = self._reported.get_nowait()
        return reports

    def _start_workers(self) -> None:
        """Start a thread for each item so far, up to the number of workers."""
        serve = self._serve_async if self._job.pipeline.awaits else self._serve
        while len(self._threads) < min(self.workers, self._items):
            name = f"thread-{len(self._threads)}"
            thread = threading.Thread(target=serve, args=(name,), name=f"opero-{name}", daemon=True)
            # Noted first: a start that is interrupted may have made it already.
            self._threads.append(thread)
            thread.start()

    def wake(self) -> None:
        """End a wait for reports."""
        self._reported.put(None)

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Let the threads return; one that is in the middle of an item is left behind when time is up."""
        threads, self._threads = self._threads, []
        self._stopped = True
        self._chunks.close()
        for _ in threads:
            self._waiting.put(None)
        end = monotonic() + (timeout if graceful else min(timeout, 0.01))
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - monotonic()))

    # --- in a thread ---------------------------------------------------------------------------------

    def _serve(self, name: str) -> None:
        runner = ItemRunner(self._job, context=self._context)
        while (local := self._next()) is not None:
            runner.run_chunk(local, self._chunks, name)

    def _serve_async(self, name: str) -> None:
        import asyncio

        runner = ItemRunner(self._job)
        with asyncio.Runner() as loop:
            while (local := self._next()) is not None:
                running = runner.run_chunk_async(local, self._chunks, name)
                loop.run(running, context=self._context.copy())

    def _next(self) -> LocalChunk | None:
        """Wait for a chunk that has items left; return None at the end of the map."""
        while (local := self._take()) is not None and not self._stopped:
            if len(local.todo) > 1:
                # The next free thread helps with it.
                self._waiting.put(local)
            if local.todo:
                return local
        return None
