# this_file: src/opero/concurrency/executors/process/worker.py
"""Run items in a worker process: take a chunk, run its items, report, take the next.

The user's code has the main thread and the only one, so it may fork, start processes and map again. What is done while
an item takes long is reported by a signal handler in that thread, when the pool asks for it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from contextlib import suppress
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, cast

from opero.concurrency.executors.base import ItemOutcome, MapJob, Parked
from opero.concurrency.executors.encoding import PLAIN, decode_value
from opero.concurrency.executors.pickling import JobSpec
from opero.concurrency.executors.process.session import (
    DUE,
    SLOW_CHUNK,
    STARTED,
    STOP,
    WorkerSession,
)
from opero.concurrency.executors.process.start import Channel
from opero.concurrency.item_runner import ItemRunner
from opero.core.deadline import run_until
from opero.core.function import FunctionInfo
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from asyncio import Semaphore, TaskGroup

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
        own_fd: Of the file with the status page.
        pool_fd: Of the file with the buffers of all chunks.
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


def warm_up() -> None:
    """Do what a worker does with a job, so that the memory which that touches is this process' own."""
    with suppress(Exception):  # a worker that needs it meets the same error and reports it
        pipeline = Pipeline(FunctionInfo(_nothing), Options.of("operomap", cache=False))
        data = pickle.dumps(JobSpec.of(MapJob(_nothing, pipeline)), 5)
        spec: JobSpec = pickle.loads(data)  # noqa: S301 - made here
        ItemRunner(spec.job(None, _nothing)).run(None, None)


def _run_all(session: WorkerSession) -> None:
    """Run chunks under the deadline that holds where the map was called."""
    job = session.job
    serve = _serve_coroutines if job.pipeline.awaits else _serve
    if job.deadline is None:
        serve(session)
    else:
        run_until(job.deadline, serve, session)


# --- one after the other --------------------------------------------------------------------------


def _serve(session: WorkerSession) -> None:
    """Run chunks until there are no more, or this worker has done its share."""
    process = os.getpid()
    while not session.retires():
        try:
            chunk = session.receive()
        except (EOFError, OSError):
            return
        if session.most is not None:
            chunk.cut(session.most - session.tasks)
        session.chunk = chunk
        _run(session, chunk)
        if os.getpid() != process:
            # An item has forked, and this is the child: what it returns is nobody's.
            return
        session.chunk = None
        session.tasks += chunk.reported + len(chunk.values)
        session.flush(chunk)


def _run(session: WorkerSession, chunk: RunningChunk) -> None:
    """Run the items of a chunk, one after the other; the clock is read after each block of them."""
    page, run, values, append = session.page, session.runner.run, chunk.values, chunk.values.append
    call, fast_path = session.runner.direct or cast("Any", (None, None))
    started = base = chunk.base
    entries, now = enumerate(chunk.entries, base + 1), perf_counter
    plain = chunk.plain and not chunk.parked
    item: Any = None
    block, largest, due = 1, _LARGEST, chunk.flushed + FLUSH
    while started - base < chunk.kept:
        began, first = now(), started
        failed: BaseException | None = None
        # What an item is at stands on the page before it is opened, because that may be fatal already.
        if call is not None and plain and not (switch.on or fast_path.closed):
            # The same as `run` does, without its call.
            try:
                for started, item in islice(entries, block):
                    page[STARTED] = started
                    append(call(item))
            except BaseException as error:  # noqa: BLE001 - it belongs to the item
                failed = error
            session.job.pipeline.stats.add(calls=started - first)
            if failed is not None:
                result: Result = None, ItemOutcome(error=failed)
                if isinstance(failed, Exception):
                    # The stages decide what comes next.
                    result = run(item, None, failed)
                # A frame that names an error which passes through it is a reference cycle.
                failed = None
                session.add(chunk, started - base - 1, *result)
            elif values and type(values[-1]) not in PLAIN:
                # Encoded before the next item begins, which may be slow: `_answer` sends what is encoded alone.
                largest = 1
                session.encode(chunk)
        else:
            for started, item in islice(entries, block):
                page[STARTED] = started
                position = started - base - 1
                parked = chunk.parked.get(position)
                session.add(chunk, position, *_run_entry(session, item, parked))
                if session.asked:
                    break
        if page[STOP]:
            # The first item, which was on its way, counts as one at work.
            chunk.cut(started - base)
        ended = now()
        if ended >= due or session.asked:
            session.asked = False
            if not chunk.over:
                session.flush(chunk)
            due = now() + FLUSH
        block = min(4 * block, largest) if ended - began < _QUICK else max(1, block // 8)


def _run_entry(session: WorkerSession, entry: Any, parked: Parked | None) -> Result:
    """Open an item and run it."""
    item, failed = decode_value(entry, "item", session.copy)
    return session.runner.run(item, parked) if failed is None else (None, failed)


# --- several at once ------------------------------------------------------------------------------


def _serve_coroutines(session: WorkerSession) -> None:
    import asyncio

    try:
        asyncio.run(_serve_loop(session))
    except* ConnectionError:  # the map is over
        pass


async def _serve_loop(session: WorkerSession) -> None:
    """Run chunks of a coroutine function on one loop, so that clients and pools live on between chunks.

    While slow items of one chunk are at work, the next chunk goes on beside them. A call that takes too long is
    cancelled by its pipeline. One that blocks the loop cannot be: the status page says by when the loop must have
    turned, and the pool kills a worker whose loop has not.
    """
    import asyncio

    job, slots = session.job, asyncio.Semaphore(session.job.in_flight)
    beating = asyncio.create_task(_beat(session, job.item_timeout))
    async with asyncio.TaskGroup() as group:
        while not session.retires() and (chunk := await _next_chunk(session)) is not None:
            late = asyncio.get_running_loop().time() + SLOW_CHUNK * job.target_s
            while chunk.next < chunk.kept:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(late):
                        await slots.acquire()
                    if (position := _begin_next(session, chunk)) is not None:
                        group.create_task(_run_coroutines(session, group, slots, chunk, position))
                        continue
                    slots.release()
                if chunk.next < chunk.kept:
                    # What has not begun is given back.
                    chunk.cut(chunk.next)
                    session.flush(chunk)
    beating.cancel()


async def _next_chunk(session: WorkerSession) -> RunningChunk | None:
    """Wait for a chunk; return None if there are no more."""
    import asyncio

    loop, fd, came = asyncio.get_running_loop(), session.conn.fileno(), asyncio.Event()
    loop.add_reader(fd, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(fd)
    try:
        return session.receive()
    except (EOFError, OSError):
        return None


def _begin_next(session: WorkerSession, chunk: RunningChunk) -> int | None:
    """Return the position of an item to begin, None if none of the chunk may; the first one was on its way."""
    stopped = chunk.next and session.page[STOP]
    if stopped or session.retires() or chunk.next >= chunk.kept:
        return None
    session.tasks += 1
    chunk.next += 1
    # What it is at stands on the page before the item is opened, because that may be fatal already.
    session.page[STARTED] = chunk.base + chunk.next
    return chunk.next - 1


async def _run_coroutines(
    session: WorkerSession,
    group: TaskGroup,
    slots: Semaphore,
    chunk: RunningChunk,
    position: int | None,
) -> None:
    """Run an item of a chunk, and others after it as long as there are some; let what is done be sent soon."""
    import asyncio

    while position is not None:
        item, failed = decode_value(chunk.entries[position], "item", session.copy)
        result: Result = None, failed
        if failed is None:
            try:
                result = await session.runner.run_async(item, chunk.parked.get(position))
            except asyncio.CancelledError as error:
                # A group of tasks takes no notice of it.
                raise ConnectionError("the task of an item was cancelled") from error
            del item
        session.add(chunk, position, *result)
        del result
        if chunk.over:
            session.flush(chunk)
        elif not chunk.soon:
            chunk.soon = True
            group.create_task(_send_soon(session, chunk))
        position = _begin_next(session, chunk)
    slots.release()


async def _send_soon(session: WorkerSession, chunk: RunningChunk) -> None:
    import asyncio

    await asyncio.sleep(_SOON)
    chunk.soon = False
    session.flush(chunk)


async def _beat(session: WorkerSession, limit: float | None) -> None:
    """Note by when the loop must have turned; repeat that as long as it does."""
    import asyncio

    while limit is not None:
        pause = limit / _BEATS
        # One pause later than the limit, so that no call is taken for late before it is.
        session.page[DUE] = int((time.monotonic() + limit + pause) * 1e9)
        await asyncio.sleep(pause)
