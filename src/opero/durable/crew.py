# this_file: src/opero/durable/crew.py
"""The threads of an engine: some for synchronous workflows, which are used again, and one with an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any, Final

from opero.durable.run import Unwind
from opero.durable.scope import task_factory
from opero.errors import JournalError, NonDeterminismError

__all__ = ["Crew", "LoopThread"]

Job = Callable[[], object]


class Crew:
    """Threads for synchronous workflows: as many as run at once, never more than `size`.

    Args:
        size: Most jobs at once.
    """

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._taken = 0
        self._idle = 0
        self._threads: list[threading.Thread] = []

    @property
    def room(self) -> int:
        """How many more jobs there is room for."""
        return self.size - self._taken

    def take(self, *, always: bool = False) -> bool:
        """Take room for one job if there is some; with `always`, for one that is known to fit."""
        with self._lock:
            if self._taken >= self.size and not always:
                return False
            self._taken += 1
            return True

    def give(self) -> None:
        """Give it back."""
        with self._lock:
            self._taken -= 1

    def run(self, job: Job) -> None:
        """Run a job for which room was taken, in a thread that is idle or a new one."""
        with self._lock:
            # A thread that has done its job, but has not said so yet, takes the next one too.
            if self._idle > 0 or len(self._threads) >= self.size:
                self._idle -= 1
                self._jobs.put(job)
                return
            name = f"opero-workflow-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._work, args=(job,), name=name, daemon=True)
            self._threads.append(thread)
        thread.start()

    def _work(self, job: Job | None) -> None:
        while job is not None:
            # What one workflow leaves in context variables is none of the next one's business.
            contextvars.Context().run(job)
            with self._lock:
                self._idle += 1
            job = self._jobs.get()

    def close(self) -> None:
        """End the threads; none of them has a job any more."""
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()


class LoopThread:
    """A thread with an event loop, whose tasks have scopes; it is there from the first coroutine on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine there."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_task_factory(task_factory)
                self._loop.set_exception_handler(_complain)
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="opero-workflows", daemon=True
                )
                self._thread.start()
        asyncio.run_coroutine_threadsafe(coro, self._loop)

    def close(self) -> None:
        """End it; nothing runs there any more."""
        loop, thread = self._loop, self._thread
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Say nothing of what ended because its workflow is put aside: its state tells why, or a warning."""
    if not isinstance(context.get("exception"), Unwind | NonDeterminismError | JournalError):
        loop.default_exception_handler(context)
