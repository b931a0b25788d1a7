# this_file: src/opero/concurrency/executors/process/pool.py
"""Assign chunks to worker processes, collect their results, and replace those that die.

One thread, no locks: a connection to each worker, and one place where all of them are waited for. A message goes to a
worker only if it is idle, or if all that it has not answered fits into the pipe, so neither ever waits for the other
to read.
"""

from __future__ import annotations

import functools
import os
import pickle
import time
import warnings
from collections import deque
from contextlib import AbstractContextManager
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from opero.concurrency.executors.base import GaveBack, Lost
from opero.concurrency.executors.process import protocol
from opero.concurrency.executors.process.handle import (
    PendingChunk,
    WorkerHandle,
    assign,
    judge_all,
)
from opero.concurrency.executors.process.job_spec import JobSpec
from opero.concurrency.executors.process.pickling import decode_error
from opero.concurrency.executors.process.protocol import (
    PAGE,
    BufferPool,
    buffer_size,
    shared_file,
)
from opero.concurrency.executors.process.start import (
    ForkServer,
    choose_method,
    forget_server,
    modules_to_preload,
    shared_server,
)
from opero.concurrency.executors.process.worker import worker_main
from opero.errors import OperoError, WorkerStartError
from opero.limits.shared import share_all

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapJob, Report, Why
    from opero.concurrency.executors.process.protocol import Frame
    from opero.concurrency.executors.process.start import StartMethod

__all__ = ["ProcessEngine", "ProcessPool"]

_FAILED_STARTS: Final = 5
"""So many workers in a row that died before they were ready, and no other is started."""
_CHECK: Final = 0.1
"""Seconds between two checks of the memory of workers, or for calls that a deadline ends."""
_PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


# --- the pool -------------------------------------------------------------------------------------


class ProcessPool:
    """Workers for one job; `twat_mp.MultiPool` makes, enters and leaves it as it does pathos' pools.

    Args:
        nodes: Most workers at once; they begin when there is something to do.
        job: What they do.
        method: How they begin.

    Attributes:
        graceful: Whether workers may finish their items when the pool is left.
        timeout: Seconds that leaving may take.
    """

    def __init__(self, nodes: int, *, job: MapJob, method: StartMethod) -> None:
        self.nodes: int = nodes
        self.graceful: bool = False
        self.timeout: float = 1.0
        self._job = job
        self._method: StartMethod = method
        self._spec = JobSpec.of(job)
        self._message = b""
        self._forked: ForkServer | None = None
        self._workers: set[WorkerHandle] = set()
        self._sources: dict[Any, WorkerHandle | None] = {}
        self._waiting: deque[PendingChunk] = deque()
        self._reports: list[Report] = []
        self._failed_starts = self._without_item = 0
        self._closed = False
        self._size = buffer_size(nodes)
        self._fd, self._memory = shared_file("pool", 2 * nodes * self._size, PAGE)
        if len(self._memory) == PAGE:
            self._size = 0
        self._items = BufferPool(self._memory, 0, self._size, 2 * nodes)
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._sources[self._woken] = None

    # --- workers ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Prepare for the first worker.

        Raises:
            ShippingError: The job cannot be sent to another process.
        """
        if self._method == "fork":
            share_all()
            self._spec.register_classes()
            return
        # The fresh interpreter begins while the job is pickled.
        self._server()
        blob = self._spec.pickled()
        try:
            folder: str | None = os.getcwd()  # noqa: PTH109 - pathlib would not be faster
        except OSError:
            # It was removed.
            folder = None
        self._message = pickle.dumps((blob, folder, dict(os.environ)), 5)

    def _server(self) -> ForkServer:
        if self._method != "fork":
            modules = (
                modules_to_preload(self._spec.functions) if self._method == "forkserver" else {}
            )
            return shared_server(worker_main, modules)
        if self._forked is None:
            spec = self._spec
            self._forked = ForkServer(functools.partial(worker_main, spec=spec), fork=True)
        return self._forked

    def _begin(self, count: int) -> None:
        """Begin workers; the job is sent when all of them are on their way."""
        new: list[WorkerHandle] = []
        for _ in range(count):
            server = None
            try:
                server = self._server()
                worker = WorkerHandle(server, self._fd, self._size, fresh=self._method == "spawn")
            except BrokenPipeError:
                if server is None:
                    raise
                self._forget(server)
                self._count_failed_start(server.said(), None)
                continue
            except OSError as error:
                if not self._workers:
                    self._count_failed_start(f"{type(error).__name__}: {error}", None)
                    continue
                # No process or descriptor is left: those that are there do.
                self.nodes = len(self._workers)
                break
            self._workers.add(worker)
            self._sources |= {worker.conn: worker, worker.sentinel: worker}
            new.append(worker)
        if self._message:
            for worker in new:
                worker.send(self._message)

    def _forget(self, server: ForkServer) -> None:
        """Begin other workers from another server: this one has ended."""
        forget_server(server)
        if self._forked is server:
            self._forked = None
            server.close()

    def _dispatch(self) -> None:
        assign(self._waiting, self._workers, self._job.in_flight)
        coming = sum(not worker.up for worker in self._workers)
        wanted = min(len(self._waiting) - coming, self.nodes - len(self._workers))
        if wanted > 0:
            self._begin(wanted)

    # --- the engine's methods ---------------------------------------------------------------------

    def submit(self, chunk: Chunk) -> None:
        """Encode a chunk and send it to an idle worker, or keep it until there is one."""
        buffer = self._items.take()
        frame = (protocol.CHUNK, chunk.id, *protocol.encode_chunk(chunk, buffer))
        if buffer is not None and not buffer.used:
            self._items.give_back(buffer)
            buffer = None
        message = pickle.dumps(frame, 5)
        suspect = chunk.attempt > 0
        self._waiting.append(
            PendingChunk(chunk.id, len(chunk), message, buffer=buffer, suspect=suspect)
        )
        self._dispatch()

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what workers have reported; wait for it if there is nothing yet.

        Raises:
            WorkerStartError: Workers die before they are ready.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._reports:
            left = None if end is None else max(0.0, end - time.monotonic())
            if self._turn(left) or left == 0:
                break
        reports, self._reports = self._reports, []
        return reports

    def _turn(self, left: float | None) -> bool:
        """Wait once, for so many seconds at most, and handle what has come; return whether it was a `wake`."""
        woken = False
        soonest = self._check(time.monotonic())
        limits = [seconds for seconds in (left, soonest) if seconds is not None]
        for source in wait(list(self._sources), min(limits, default=None)):
            worker = self._sources.get(source)
            if source == self._woken:
                woken = bool(os.read(self._woken, 4096))
            elif worker is None:
                continue
            elif source is worker.conn:
                if (frame := worker.receive()) is not None:
                    self._handle(worker, frame)
                else:
                    del self._sources[source]
            elif worker.ended():
                del self._sources[source]
            if worker is not None and (worker.gone or (worker.orphaned and worker.closed)):
                self._remove(worker)
        self._dispatch()
        return woken

    def kill(self, number: int, why: Why) -> bool:
        """End the worker that has this chunk."""
        for pending in self._waiting:
            if pending.number == number:
                self._waiting.remove(pending)
                self._items.give_back(pending.buffer)
                self._reports.append(Lost(number, None, why))
                return True
        for worker in self._workers:
            if number in worker.pending:
                worker.kill(why)
                return True
        return False

    def wake(self) -> None:
        """Let `poll` return."""
        try:
            os.write(self._waker, b"w")
        except OSError:
            # It is full, which wakes as well; or closed.
            pass

    # --- time and memory --------------------------------------------------------------------------

    def _check(self, now: float) -> float | None:
        """Kill what takes too long or too much; return the seconds until the next check, None for no need of one."""
        job = self._job
        checks: list[float] = []
        for worker in self._workers:
            if not worker.pending or worker.why or worker.closed:
                continue
            if job.item_timeout is not None:
                checks.append(self._check_time(worker, now, job.item_timeout))
            if job.memory_limit is not None:
                if _resident(worker.pid) > job.memory_limit:
                    worker.kill("memory")
                checks.append(_CHECK)
            if not job.pipeline.awaits:
                late = protocol.SLOW_CHUNK * job.target_s
                for pending in worker.pending.values():
                    if pending.progress.open > 1:
                        if now - pending.since >= late:
                            pending.since = now
                            worker.ask()
                        checks.append(pending.since + late - now)
        return min(checks, default=None)

    def _check_time(self, worker: WorkerHandle, now: float, limit: float) -> float:
        due, by_deadline = worker.status.due
        if due and due <= now:
            worker.judged = due
            worker.kill("deadline" if by_deadline else "timeout")
        if due:
            return max(due - now, 0.001)
        # A call that begins later cannot be late before a whole limit has passed, but a deadline may end it sooner.
        bounded = self._job.deadline is not None or self._job.options.deadline is not None
        return min(limit, _CHECK) if bounded else limit

    # --- messages ---------------------------------------------------------------------------------

    def _handle(self, worker: WorkerHandle, frame: Frame) -> None:
        kind = frame[0]
        if kind == protocol.UP:
            worker.up, worker.pid = True, frame[1]
            self._failed_starts = 0
        elif kind == protocol.FAILED:
            worker.failure = frame[1]
        elif kind == protocol.RETIRES:
            worker.retires = True
        elif kind == protocol.LOG:
            _handle_log(*frame[1:])
        elif (pending := worker.pending.get(frame[1])) is not None:
            if kind == protocol.GAVE_BACK:
                pending.progress.cut(frame[2])
                self._reports.append(GaveBack(pending.number, frame[2]))
            else:
                done = worker.decode(frame[2:], pending)
                pending.progress.report(done.places)
                # While something is done, a new worker is worth a try.
                self._without_item = self._failed_starts = 0
                self._reports.append(done)
            if pending.progress.over:
                del worker.pending[pending.number]
                self._items.give_back(pending.buffer)

    def _remove(self, worker: WorkerHandle) -> None:
        """Report what a dead worker leaves, once."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        for frame in worker.rest():
            self._handle(worker, frame)
        self._sources.pop(worker.conn, None)
        self._sources.pop(worker.sentinel, None)
        said = worker.said
        worker.close()
        if worker.orphaned:
            self._forget(worker.server)
        if worker.failure is not None:
            raise WorkerStartError(worker.failure, worker.exitcode)
        if not worker.up:
            self._count_failed_start(said or worker.server.said(), worker.exitcode)
            return
        self._reports += self._judge(worker)
        for pending in worker.pending.values():
            self._items.give_back(pending.buffer)

    def _judge(self, worker: WorkerHandle) -> list[Lost]:
        if not worker.pending:
            return []
        if worker.why in ("timeout", "deadline") and worker.status.due[0] != worker.judged:
            # The late call ended just before the kill; whatever came next is not to blame.
            return [Lost(number, None, "stopped") for number in worker.pending]
        started = [(pending, worker.last_started(pending)) for pending in worker.pending.values()]
        self._without_item = (
            0 if any(last is not None for _, last in started) else self._without_item + 1
        )
        return judge_all(
            started,
            why=worker.why or "crash",
            desperate=self._without_item >= _FAILED_STARTS,
            several=self._job.in_flight > 1,
            pid=worker.pid,
            exitcode=worker.exitcode,
        )

    def _count_failed_start(self, said: str, exitcode: int | None) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS:
            raise WorkerStartError(said, exitcode)

    # --- what MultiPool asks of a pool ------------------------------------------------------------

    def map(self, *_: Any) -> NoReturn:
        """Refuse: `MultiPool` puts a `map` of its own over this one, but the scheduler sends chunks."""
        raise NotImplementedError("a pool of workers takes chunks: submit() and poll()")

    def close(self) -> None:
        """Take no more chunks, and let workers end once they have finished their items."""
        self._waiting.clear()
        if self.graceful:
            for worker in self._workers:
                worker.status.stop()

    def terminate(self) -> None:
        """Do not wait for anything."""
        self.graceful = False
        self.close()

    def join(self) -> None:
        """Wait for the end of all items if `graceful`, as long as may be; then end all workers."""
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + self.timeout
        try:
            while self.graceful and any(worker.pending for worker in self._workers):
                if (left := end - time.monotonic()) <= 0:
                    break
                self._wait(left)
        finally:
            self._end(max(end, time.monotonic() + 0.05))

    def _wait(self, left: float) -> None:
        try:
            self._turn(left)
        except WorkerStartError:
            pass
        self._reports.clear()

    def _end(self, end: float) -> None:
        self.nodes = 0
        for worker in self._workers:
            worker.kill("stopped")
        try:
            while self._workers and (left := end - time.monotonic()) > 0:
                self._wait(left)
        finally:
            for worker in self._workers:
                worker.close()
            self._workers.clear()
            if self._forked is not None:
                self._forked.close()
            self._items.close()
            self._memory.close()
            for fd in (self._fd, self._woken, self._waker):
                os.close(fd)
            self._waker = self._woken = -1

    def clear(self) -> None:
        """Do nothing: nothing is left."""


def _handle_log(fields: dict[str, Any], error: Any) -> None:
    """Let the program's logger of the same name handle a worker's record."""
    import logging

    record = logging.makeLogRecord(fields)
    if error is not None:
        raised = decode_error(error)
        record.exc_info = (type(raised), raised, raised.__traceback__)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process really uses; 0 where that is not known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_SIZE
    except (OSError, ValueError, IndexError):
        return 0


# --- the engine -----------------------------------------------------------------------------------


class ProcessEngine:
    """Worker processes: a dead one costs the item that it was on, and an item that takes too long its worker.

    Args:
        workers: Most processes at once.
        method: How they begin; None for what the program has set, else a fork server.
    """

    name = "process"

    def __init__(self, workers: int, *, method: StartMethod | None = None) -> None:
        self.workers = workers
        self._method: StartMethod | None = method
        self._block: AbstractContextManager[Any] | None = None
        self._pool: ProcessPool | None = None
        self._entered = self._closed = False

    def slots(self) -> int:
        """Return how many chunks it wants to hold: one at work and one at hand for each worker."""
        return 2 * self.workers

    def open(self, job: MapJob) -> None:
        """Prepare for workers; they begin when there are chunks."""
        pool = ProcessPool(self.workers, job=job, method=choose_method(self._method))
        try:
            pool.open()
        except BaseException:
            pool.terminate()
            pool.join()
            raise
        self._pool = pool

    def submit(self, chunk: Chunk) -> None:
        """Take a chunk."""
        self._opened().submit(chunk)

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what was reported."""
        pool = self._opened()
        if not self._entered:
            self._entered = True
            # The processes are at work by now, while twat-mp is imported.
            self._block = _multi_pool(pool)
            if self._block is not None:
                self._block.__enter__()
        return pool.poll(timeout)

    def kill(self, chunk_id: int, why: Why) -> bool:
        """Kill the process that has a chunk."""
        return self._opened().kill(chunk_id, why)

    def wake(self) -> None:
        """Let `poll` return."""
        pool = self._pool
        if pool is not None:
            pool.wake()

    def close(self, *, graceful: bool, timeout: float) -> None:
        """End all processes."""
        block, self._block = self._block, None
        pool = self._pool
        if pool is None or self._closed:
            return
        self._closed = True
        pool.graceful, pool.timeout = graceful, timeout
        if block is None:
            pool.close()
            pool.join()
        else:
            # With any other argument MultiPool only logs more.
            block.__exit__(None, None, None)

    def _opened(self) -> ProcessPool:
        if self._pool is None or self._closed:
            raise OperoError("the engine is not open")
        return self._pool


def _multi_pool(pool: ProcessPool) -> AbstractContextManager[Any] | None:
    """Return twat-mp's block around a pool; leaving it closes the pool and waits for its end.

    None where twat-mp cannot be imported: what it stands on needs a folder for temporary files.
    """
    try:
        with warnings.catch_warnings():
            # What these packages say about the Python they meet is not about the user's code.
            warnings.simplefilter("ignore")
            from twat_mp import MultiPool
    except Exception:  # noqa: BLE001 - whatever a package raises while it is imported
        return None
    pool_class: Any = functools.partial(_same, pool)
    # `debug` off: switched on by an environment variable it would look for names that a function has not.
    block: AbstractContextManager[Any] = MultiPool(
        pool_class=pool_class, nodes=pool.nodes, debug=False
    )
    return block


def _same(pool: ProcessPool, nodes: int) -> ProcessPool:
    return pool
