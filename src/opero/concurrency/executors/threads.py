# this_file: src/opero/concurrency/executors/threads.py
"""Threads: each takes a chunk from one queue and puts its reports into another."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from opero.concurrency.engine import Caps, GaveBack
from opero.concurrency.pool import ThreadCrew
from opero.concurrency.rounds import Rounds
from opero.concurrency.sheet import sheet_of
from opero.concurrency.work import Work

if TYPE_CHECKING:
    from opero.concurrency.engine import Chunk, Job, Report, Why

__all__ = ["Threads"]


class Threads:
    """The engine of `mode="thread"`, and of a synchronous function in `mode="async"`.

    A coroutine function gets an event loop in each thread.

    Args:
        workers: Threads.
        context: Context of which each item gets a copy.
    """

    name = "thread"
    caps = Caps()

    def __init__(self, workers: int, context: Context) -> None:
        self._workers = workers
        self._context = context
        self._inbox: SimpleQueue[Chunk | None] = SimpleQueue()
        self._outbox: SimpleQueue[Report | None] = SimpleQueue()
        self._rounds = Rounds()
        self._stopped = False
        self._left = 0
        self._lock = threading.Lock()
        self._all_gone = threading.Event()
        self._crew: ThreadCrew | None = None
        self._begin: Callable[[], ThreadCrew] | None = None
        self._numbers = itertools.count()

    def slots(self) -> int:
        """Each thread has a chunk at work and one at hand."""
        return 2 * self._workers

    def open(self, job: Job) -> None:
        """Get ready; threads start when somebody waits for them, so that the first finds its chunk waiting."""
        serve = self._serve_loop if job.pipeline.awaits else self._serve
        self._begin = functools.partial(
            ThreadCrew, self._workers, lambda: serve(job, f"thread-{next(self._numbers)}")
        )

    def submit(self, chunk: Chunk) -> None:
        """Put a chunk into the queue."""
        self._rounds.expect(chunk)
        self._inbox.put(chunk)

    def poll(self, timeout: float | None) -> list[Report]:
        """Take what the threads have reported."""
        begin, self._begin = self._begin, None
        if begin is not None:
            self._left = self._workers
            self._crew = begin()
        self._rounds.make()
        reports: list[Report] = []
        wait = self._rounds.wait(timeout)
        with contextlib.suppress(Empty):
            first = self._outbox.get_nowait() if wait == 0 else self._outbox.get(timeout=wait)
            while first is not None:
                reports.append(first)
                first = self._outbox.get_nowait()
        return reports

    def kill(self, chunk_id: int, why: Why) -> bool:
        """Threads cannot be killed."""
        return False

    def wake(self) -> None:
        """End a wait for reports."""
        self._outbox.put(None)

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Let the threads return; one that is in the middle of an item is left behind when time is up."""
        crew, self._crew, self._begin = self._crew, None, None
        self._stopped = True
        for _ in range(self._workers):
            # Also for those of a crew whose beginning was interrupted.
            self._inbox.put(None)
        if crew is None:
            return
        if self._all_gone.wait(timeout if graceful else min(timeout, 0.01)):
            crew.close()
        else:
            crew.abandon()

    # --- in a thread ---------------------------------------------------------------------------------

    def _serve(self, job: Job, name: str) -> None:
        work = Work(job, context=self._context)
        try:
            while (chunk := self._next()) is not None:
                sheet = sheet_of(chunk, job, name, self._outbox.put)
                with self._rounds.over(sheet):
                    work.chunk(chunk, sheet, stopped=self._is_stopped)
        finally:
            self._leave()

    def _serve_loop(self, job: Job, name: str) -> None:
        import asyncio

        work = Work(job)
        try:
            with asyncio.Runner() as runner:
                while (chunk := self._next()) is not None:
                    sheet = sheet_of(chunk, job, name, self._outbox.put)
                    with self._rounds.over(sheet):
                        running = work.achunk(chunk, sheet, stopped=self._is_stopped)
                        runner.run(running, context=self._context.copy())
        finally:
            self._leave()

    def _is_stopped(self) -> bool:
        return self._stopped

    def _next(self) -> Chunk | None:
        chunk = self._inbox.get()
        if chunk is not None and self._stopped:
            self._outbox.put(GaveBack(chunk.id, 0))
            return None
        return chunk

    def _leave(self) -> None:
        with self._lock:
            self._left -= 1
            gone = self._left == 0
        if gone:
            self._all_gone.set()
