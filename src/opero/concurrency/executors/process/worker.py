# this_file: src/opero/concurrency/executors/process/worker.py
"""Run items in a worker process: take a chunk, run its items, report, take the next.

The user's code has the main thread and the only one, so it may fork, start processes and map again. What is done while
an item takes long is reported by a signal handler in that thread, when the pool asks for it.
"""

from __future__ import annotations

import functools
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, cast

from opero.concurrency.executors.base import ItemOutcome, Parked
from opero.concurrency.executors.process import protocol
from opero.concurrency.executors.process.protocol import DUE, ITEM, PLAIN, SLOW_CHUNK, STOP
from opero.concurrency.executors.process.session import WorkerSession
from opero.concurrency.executors.process.start import Channel
from opero.core.deadline import run_until
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from asyncio import Future, Task, TimerHandle

    from opero.concurrency.executors.process.job_spec import JobSpec
    from opero.concurrency.executors.process.session import RunningChunk
    from opero.concurrency.item_runner import Result


FLUSH: Final = 0.02
"""Seconds after which what is done is sent, so that little is lost with a worker."""
_QUICK: Final = 0.001
"""Seconds that a block of items takes at least, if it is not of the largest size."""
_LARGEST: Final = 1024
"""Most items of a block."""
_SOON: Final = 0.002
"""Seconds after which what is done is sent, though the next item may take long."""
_BEATS: Final = 4
"""Signs of life within the time that a call may take."""


def worker_main(conn_fd: int, own_fd: int, pool_fd: int, spec: JobSpec | None = None) -> None:
    """Be a worker until the pool closes the connection.

    Args:
        conn_fd: Descriptor of the connection to the pool.
        own_fd: Of the file with the status page and the buffers for results.
        pool_fd: Of the file with the buffers for items of all workers.
        spec: The job, if this process has inherited it.
    """
    signal.signal(signal.SIGINT, _nothing)
    with (
        socket.socket(fileno=conn_fd) as sock,
        suppress(ConnectionError, EOFError),
    ):  # the map is over
        session = WorkerSession(Channel(sock), own_fd, pool_fd)
        if session.prepare(spec):
            _run_all(session)


def _nothing(*_: object) -> None:
    """Handle a Ctrl-C: the map decides what becomes of its workers."""


def _run_all(session: WorkerSession) -> None:
    """Run chunks under the deadline that holds where the map was called."""
    job = session.job
    serve = _WorkerLoop(session).run if job.pipeline.awaits else functools.partial(_serve, session)
    if job.deadline is None:
        serve()
    else:
        run_until(job.deadline, serve)


# --- one after the other --------------------------------------------------------------------------


def _serve(session: WorkerSession) -> None:
    """Run chunks until there are no more, or this worker has done its share."""
    while not session.retires():
        try:
            chunk = session.receive()
        except (EOFError, OSError):
            return
        if session.most is not None:
            chunk.cut(session.most - session.tasks)
        session.begin(chunk)
        session.chunk = chunk
        _run(session, chunk)
        session.chunk = None
        session.tasks += chunk.reported + len(chunk.values)
        session.end(chunk)


def _run(session: WorkerSession, chunk: RunningChunk) -> None:
    """Run the items of a chunk, one after the other; the clock is read after each block of them."""
    page, run, values, append = session.page, session.runner.run, chunk.values, chunk.values.append
    call, fast_path = session.runner.direct or cast("Any", (None, None))
    entries, now, count = enumerate(chunk.entries), perf_counter, session.job.pipeline.stats.add
    plain = not chunk.parked and tuple not in set(map(type, chunk.entries))
    item: Any = None
    block, largest, due, position = 1, _LARGEST, chunk.flushed + FLUSH, -1
    while position + 1 < chunk.kept:
        began, first = now(), position + 1
        failed: BaseException | None = None
        # What an item is at stands on the page before it is opened, because that may be fatal already.
        if call is not None and plain and not (switch.on or fast_path.closed):
            # The same as `run` does, without its call.
            try:
                for position, item in islice(entries, block):
                    page[ITEM] = position
                    append(call(item))
            except BaseException as error:  # noqa: BLE001 - it belongs to the item
                failed = error
            count(calls=position + 1 - first)
            if failed is not None:
                result: Result = None, ItemOutcome(error=failed)
                if isinstance(failed, Exception):
                    # The stages decide what comes next.
                    result = run(item, None, failed)
                # A frame that names an error which passes through it is a reference cycle.
                failed = None
                _add(session, chunk, position, result)
            elif values and type(values[-1]) not in PLAIN:
                # Encoded before the next item begins, which may be slow: `_answer` sends what is encoded alone.
                largest = 1
                session.chunk = None
                session.encode(chunk)
                session.chunk = chunk
        else:
            for position, item in islice(entries, block):
                page[ITEM] = position
                _add(
                    session, chunk, position, _run_entry(session, item, chunk.parked.get(position))
                )
                if session.full or session.asked:
                    break
        ended = now()
        if ended >= due or session.full or session.asked:
            session.chunk, session.asked = None, False
            if not chunk.over:
                session.flush(chunk)
            session.chunk = chunk
            if page[STOP]:
                chunk.cut(position + 1)
            due = now() + FLUSH
        block = min(4 * block, largest) if ended - began < _QUICK else max(1, block // 8)


def _run_entry(session: WorkerSession, entry: Any, parked: Parked | None) -> Result:
    """Open an item and run it."""
    try:
        item = protocol.decode_value(entry, session.copy)
    except Exception as error:  # noqa: BLE001 - whatever its class raises then
        return None, protocol.unreadable(error, "item")
    return session.runner.run(item, parked)


def _add(session: WorkerSession, chunk: RunningChunk, position: int, result: Result) -> None:
    """Note what became of an item; what fills the buffer is not interrupted."""
    session.chunk = None
    session.add(chunk, position, *result)
    session.chunk = chunk


# --- several at once ------------------------------------------------------------------------------


class _WorkerLoop:
    """Runs coroutine functions, all on one loop, so that clients and pools live on between chunks.

    While slow items of one chunk are at work, the next chunk goes on beside them. A call that takes too long is
    cancelled by its pipeline. One that blocks the loop cannot be: the status page says by when the loop must have
    turned, and the pool kills a worker whose loop has not.

    Args:
        session: The connection to the pool.
    """

    def __init__(self, session: WorkerSession) -> None:
        self._session = session
        self._in_flight = session.job.in_flight
        self._limit = session.job.item_timeout
        self._chunks: list[RunningChunk] = []
        self._tasks: set[Task[None]] = set()
        self._beating: TimerHandle | None = None
        self._ended = False

    def run(self) -> None:
        """Run chunks until there are no more, or the worker has done its share."""
        import asyncio

        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        from asyncio import get_running_loop

        self._loop = get_running_loop()
        self._over: Future[None] = self._loop.create_future()
        self._loop.add_reader(self._session.conn.fileno(), self._guarded(self._readable))
        try:
            await self._over
        finally:
            self._loop.remove_reader(self._session.conn.fileno())
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
            chunk = self._session.receive()
        except (EOFError, OSError):
            self._ended = True
            self._loop.remove_reader(self._session.conn.fileno())
        else:
            self._chunks.append(chunk)
            late = SLOW_CHUNK * self._session.job.target_s
            self._loop.call_later(late, self._guarded(self._give_back, chunk))
        self._fill()

    def _fill(self) -> None:
        """Begin as many items as may be; end what is over."""
        while len(self._tasks) < self._in_flight and (found := self._next()) is not None:
            if not self._tasks:
                self._beat()
            task = self._loop.create_task(self._pull(*found))
            self._tasks.add(task)
            task.add_done_callback(self._pulled)
        if not self._tasks and (self._ended or self._session.stopping):
            for chunk in list(self._chunks):
                chunk.cut(chunk.next)
                self._finish(chunk)
            if not self._over.done():
                self._over.set_result(None)

    def _next(self) -> tuple[RunningChunk, int] | None:
        """Return an item to begin, of the oldest chunk that has one."""
        if self._session.stopping:
            return None
        for chunk in self._chunks:
            if chunk.next < chunk.kept:
                self._session.tasks += 1
                chunk.next += 1
                return chunk, chunk.next - 1
        return None

    def _give_back(self, chunk: RunningChunk) -> None:
        """Give back what has not begun of a chunk that takes long."""
        if chunk in self._chunks and chunk.next < chunk.kept:
            chunk.cut(chunk.next)
            if chunk.over:
                self._finish(chunk)
            else:
                self._session.flush(chunk)

    def _finish(self, chunk: RunningChunk) -> None:
        self._chunks.remove(chunk)
        if chunk.soon is not None:
            chunk.soon.cancel()
        self._session.end(chunk)

    # --- items ------------------------------------------------------------------------------------

    async def _pull(self, chunk: RunningChunk, position: int) -> None:
        """Run an item, and others after it as long as there are some."""
        found: tuple[RunningChunk, int] | None = (chunk, position)
        while found is not None:
            chunk, position = found
            self._session.note(chunk, position)
            try:
                item = protocol.decode_value(chunk.entries[position], self._session.copy)
            except Exception as error:  # noqa: BLE001 - whatever its class raises when it is unpickled
                self._add(chunk, position, None, protocol.unreadable(error, "item"))
            else:
                value, outcome = await self._session.runner.run_async(
                    item, chunk.parked.get(position)
                )
                del item
                self._add(chunk, position, value, outcome)
            found = self._next()

    def _pulled(self, task: Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._fail(ConnectionError("the task of an item was cancelled"))
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
        self._session.add(chunk, position, value, outcome)
        if chunk.over:
            self._finish(chunk)
        elif self._session.full:
            self._session.flush(chunk)
        elif chunk.soon is None:
            chunk.soon = self._loop.call_later(_SOON, self._guarded(self._report, chunk))

    def _report(self, chunk: RunningChunk) -> None:
        chunk.soon = None
        self._session.flush(chunk)

    # --- signs of life ----------------------------------------------------------------------------

    def _beat(self) -> None:
        """Note by when the loop must have turned; repeat that as long as it does."""
        if self._limit is None:
            return
        pause = self._limit / _BEATS
        # One pause later than the limit, so that no call is taken for late before it is.
        self._session.page[DUE] = int((time.monotonic() + self._limit + pause) * 1e9)
        self._beating = self._loop.call_later(pause, self._beat)

    def _rest(self) -> None:
        """Note that no call is under way."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
            self._session.page[DUE] = 0
