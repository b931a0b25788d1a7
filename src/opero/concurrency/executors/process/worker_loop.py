# this_file: src/opero/concurrency/executors/process/worker_loop.py
"""Run coroutines of several chunks at once on the event loop of a worker process."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.process import protocol

if TYPE_CHECKING:
    from opero.concurrency.executors.base import ItemOutcome
    from opero.concurrency.executors.process.worker import RunningChunk, Worker
    from opero.concurrency.item_runner import ItemRunner

__all__ = ["WorkerLoop"]

_SOON: Final = 0.002
"""Seconds after which what is done is sent, though the next item may take long."""
_BEATS: Final = 4
"""Signs of life within the time that a call may take."""


class WorkerLoop:
    """Runs coroutine functions, all on one loop, so that clients and pools live on between chunks.

    While slow items of one chunk are at work, the next chunk goes on beside them. A call that takes too long is
    cancelled by its pipeline. One that blocks the loop cannot be: the status page says by when the loop must have
    turned, and the pool kills a worker whose loop has not.

    Args:
        worker: The worker.
        runner: Runs an item.
        in_flight: Most items at once.
        limit: Longest time of a call in seconds, None for no limit.
        late: Seconds after which a chunk gives back what has not begun.
    """

    def __init__(
        self,
        worker: Worker,
        runner: ItemRunner,
        *,
        in_flight: int,
        limit: float | None,
        late: float,
    ) -> None:
        self._worker = worker
        self._runner = runner
        self._in_flight = in_flight
        self._limit = limit
        self._late = late
        self._chunks: list[RunningChunk] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating: asyncio.TimerHandle | None = None
        self._ended = False

    def run(self) -> None:
        """Run chunks until there are no more, or the worker has done its share."""
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._worker.conn.fileno(), self._guarded(self._readable))
        try:
            await self._over
        finally:
            self._loop.remove_reader(self._worker.conn.fileno())
            self._rest()

    def _guarded(self, step: Callable[..., object], *args: Any) -> Callable[[], None]:
        """Return a callback whose error ends the worker, as it would outside of a loop."""

        @functools.wraps(step)
        def run() -> None:
            try:
                step(*args)
            except BaseException as error:  # noqa: BLE001 - `_serve` raises it
                self._fail(error)

        return run

    def _fail(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    # --- chunks -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            chunk = self._worker.receive()
        except (EOFError, OSError):
            self._ended = True
            self._loop.remove_reader(self._worker.conn.fileno())
        else:
            self._chunks.append(chunk)
            self._loop.call_later(self._late, self._guarded(self._give_back, chunk))
        self._fill()

    def _fill(self) -> None:
        """Begin as many items as may be; end what is over."""
        while len(self._tasks) < self._in_flight and (found := self._next()) is not None:
            if not self._tasks:
                self._beat()
            task = self._loop.create_task(self._pull(*found))
            self._tasks.add(task)
            task.add_done_callback(self._pulled)
        if not self._tasks and (self._ended or self._worker.stopping):
            for chunk in list(self._chunks):
                chunk.kept = chunk.next
                self._finish(chunk)
            if not self._over.done():
                self._over.set_result(None)

    def _next(self) -> tuple[RunningChunk, int] | None:
        """Return an item to begin, of the oldest chunk that has one."""
        if self._worker.stopping:
            return None
        for chunk in self._chunks:
            if (position := chunk.take()) is not None:
                self._worker.tasks += 1
                return chunk, position
        return None

    def _give_back(self, chunk: RunningChunk) -> None:
        """Give back what has not begun of a chunk that takes long."""
        if chunk in self._chunks and chunk.next < chunk.kept:
            chunk.kept = chunk.next
            if chunk.over:
                self._finish(chunk)
            else:
                self._worker.flush(chunk)
                self._worker.send(protocol.GAVE_BACK, chunk.number, chunk.kept)
                del chunk.entries[chunk.kept :]

    def _finish(self, chunk: RunningChunk) -> None:
        self._chunks.remove(chunk)
        if chunk.soon is not None:
            chunk.soon.cancel()
        self._worker.end(chunk)

    # --- items ------------------------------------------------------------------------------------

    async def _pull(self, chunk: RunningChunk, position: int) -> None:
        """Run an item, and others after it as long as there are some."""
        found: tuple[RunningChunk, int] | None = (chunk, position)
        while found is not None:
            chunk, position = found
            self._worker.note(chunk, position)
            try:
                item = protocol.decode_value(chunk.entries[position], chunk.read)
            except Exception as error:  # noqa: BLE001 - whatever its class raises when it is unpickled
                self._add(chunk, position, None, protocol.unreadable(error, "item"))
            else:
                value, outcome = await self._runner.run_async(item, chunk.parked.get(position))
                del item
                self._add(chunk, position, value, outcome)
            found = self._next()

    def _pulled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._fail(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self._fail(error)
        else:
            if not self._tasks:
                self._rest()
            self._guarded(self._fill)()

    def _add(
        self, chunk: RunningChunk, position: int, value: Any, outcome: ItemOutcome | None
    ) -> None:
        """Note what became of an item, and let it be sent soon."""
        self._worker.add(chunk, position, value, outcome)
        if chunk.over:
            self._finish(chunk)
        elif self._worker.full:
            self._worker.flush(chunk)
        elif chunk.soon is None:
            chunk.soon = self._loop.call_later(_SOON, self._guarded(self._report, chunk))

    def _report(self, chunk: RunningChunk) -> None:
        chunk.soon = None
        self._worker.flush(chunk)

    # --- signs of life ----------------------------------------------------------------------------

    def _beat(self) -> None:
        """Note by when the loop must have turned; repeat that as long as it does."""
        if self._limit is None:
            return
        pause = self._limit / _BEATS
        # One pause later than the limit, so that no call is taken for late before it is.
        self._worker.status.begin_call(time.monotonic() + self._limit + pause)
        self._beating = self._loop.call_later(pause, self._beat)

    def _rest(self) -> None:
        """Note that no call is under way."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
            self._worker.status.end_call()
