# this_file: src/opero/concurrency/executors/futures.py
"""Any `concurrent.futures.Executor`: the standard library's, and those that clusters offer."""

from __future__ import annotations

import contextlib
import pickle
import uuid
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.concurrency import remote
from opero.concurrency.engine import Caps, Chunk, Lost, Report
from opero.concurrency.executors.process import protocol
from opero.concurrency.executors.process.job_spec import JobSpec
from opero.concurrency.rounds import Rounds
from opero.concurrency.sheet import sheet_of
from opero.concurrency.work import Work
from opero.errors import MapError

if TYPE_CHECKING:
    from opero.concurrency.engine import Job, Why

__all__ = ["Futures"]


class _Ended(NamedTuple):
    number: int
    future: Future[Any]


class Futures:
    """The engine of `executor=`. The executor is the user's: it is neither started nor shut down here.

    In a `ThreadPoolExecutor` items run as they do in threads of our own. To any other one chunks go as bytes, to
    `opero.concurrency.remote.call`.

    Args:
        executor: The executor.
        workers: Chunks that it runs at the same time.
        context: Context of which each item in a thread gets a copy.
    """

    name = "executor"

    def __init__(self, executor: Executor, workers: int, context: Context) -> None:
        self._executor = executor
        self._workers = workers
        self._context = context
        self._here = isinstance(executor, ThreadPoolExecutor)
        self.caps = Caps(remote=not self._here)
        self._outbox: SimpleQueue[_Ended | Report | None] = SimpleQueue()
        self._flying: dict[int, Future[Any]] = {}
        self._rounds = Rounds()
        self._stopped = False

    def slots(self) -> int:
        """Each worker has a chunk at work and one at hand."""
        return 2 * self._workers

    def open(self, job: Job) -> None:
        """Get ready.

        Raises:
            ShippingError: The job cannot be pickled.
        """
        self._job = job
        self._number = uuid.uuid4().hex
        self._blob = b"" if self._here else JobSpec.of(job).pickled()
        self._work = Work(job, context=self._context)

    def submit(self, chunk: Chunk) -> None:
        """Hand a chunk to the executor.

        Raises:
            MapError: It takes none any more.
        """
        future: Future[Any]
        if self._here:
            self._rounds.expect(chunk)
        try:
            if self._here:
                run = self._run_loop if self._job.pipeline.awaits else self._run
                future = self._executor.submit(run, chunk)
            else:
                payload = pickle.dumps(protocol.encode_chunk(chunk), 5)
                future = self._executor.submit(
                    remote.call, remote.PROTOCOL, self._number, self._blob, payload
                )
        except Exception as error:
            raise self._broken(error) from error
        self._flying[chunk.id] = future
        future.add_done_callback(lambda ended: self._outbox.put(_Ended(chunk.id, ended)))

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what was reported.

        Raises:
            MapError: The executor is broken.
        """
        self._rounds.make()
        reports: list[Report] = []
        wait = self._rounds.wait(timeout)
        with contextlib.suppress(Empty):
            news = self._outbox.get_nowait() if wait == 0 else self._outbox.get(timeout=wait)
            while news is not None:
                reports += self._ended(news) if isinstance(news, _Ended) else [news]
                news = self._outbox.get_nowait()
        return reports

    def _ended(self, ended: _Ended) -> list[Report]:
        number, future = ended
        self._flying.pop(number, None)
        error = None if future.cancelled() else future.exception()
        if isinstance(error, BrokenExecutor):
            raise self._broken(error) from error
        if error is not None or future.cancelled():
            # What the function raises comes back as outcomes: this is the executor's own failure.
            return [Lost(number, None, "crash", said="" if error is None else repr(error))]
        data = future.result()
        return [] if data is None else list(remote.open_reports(number, data))

    def _broken(self, error: BaseException) -> MapError:
        return MapError(f"the executor takes no more items ({type(error).__name__}: {error})")

    def kill(self, chunk_id: int, why: Why) -> bool:
        """Executors cannot be asked to stop what runs."""
        return False

    def wake(self) -> None:
        """End a wait for reports."""
        self._outbox.put(None)

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Take back what has not begun; the executor lives on."""
        self._stopped = True
        flying, self._flying = self._flying, {}
        for future in flying.values():
            future.cancel()

    # --- in a thread of a ThreadPoolExecutor ------------------------------------------------------

    def _run(self, chunk: Chunk) -> None:
        sheet = sheet_of(chunk, self._job, self.name, self._outbox.put)
        with self._rounds.over(sheet):
            self._work.chunk(chunk, sheet, stopped=lambda: self._stopped)

    def _run_loop(self, chunk: Chunk) -> None:
        from opero.utils import run_async

        sheet = sheet_of(chunk, self._job, self.name, self._outbox.put)
        with self._rounds.over(sheet):
            running = self._work.achunk(chunk, sheet, stopped=lambda: self._stopped)
            self._context.copy().run(run_async, running)
