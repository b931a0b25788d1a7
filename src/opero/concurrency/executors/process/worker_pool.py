# this_file: src/opero/concurrency/executors/process/worker_pool.py
"""Assign chunks to worker processes, collect their results, and replace those that die.

One thread, no locks: a connection to each worker, and one place where all of them are waited for. A message goes to a
worker only if it is idle, or if all that it has not answered fits into the pipe, so neither ever waits for the other
to read.
"""

from __future__ import annotations

import math
import os
import pickle
import select
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Lost
from opero.concurrency.executors.encoding import SharedBuffer, copy_span, decode_done, encode_chunk
from opero.concurrency.executors.pickling import JobSpec
from opero.concurrency.executors.process.session import DUE, FAILED, LOG, SLOW_CHUNK, STOP, UP
from opero.concurrency.executors.process.start import (
    KILLED,
    PAGE,
    ForkServer,
    choose_method,
    forget_server,
    shared_file,
    shared_server,
)
from opero.concurrency.executors.process.worker import worker_main
from opero.concurrency.executors.process.worker_handle import PIPE, PendingChunk, WorkerHandle
from opero.errors import WorkerStartError
from opero.limits.shared import share_all

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapJob, Report, Why
    from opero.concurrency.executors.process.start import StartMethod


_BUFFER: Final = 16 << 20
"""Bytes of a chunk's buffer: what has no room there goes through the pipe."""
_MOST: Final = 512 << 20
"""Bytes of all buffers of a map; those that are never used take no memory."""
_FAILED_STARTS: Final = 5
"""So many workers in a row that died before they were ready, and no other is started."""
_APART: Final = 10.0
"""Seconds after one of them that others which were killed from outside do not count: a shortage may pass."""
_PAUSE: Final = 0.01
"""Seconds without a new worker after such a kill."""
_CHECK: Final = 0.1
"""Seconds between two checks of the memory of workers, or for calls that a deadline ends."""
_PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class ProcessEngine:
    """Worker processes: a dead one costs the item that it was on, and an item that takes too long its worker.

    Args:
        workers: Most processes at once; they begin when there is something to do.
        method: How they begin; None for what the program has set, else a fork server.
    """

    def __init__(self, workers: int, *, method: StartMethod | None = None) -> None:
        self.workers = workers
        self.slots: int = 2 * workers
        self._most = workers
        self._asked: StartMethod | None = method
        self._message = b""
        self._modules: dict[str, str] = {}
        self._forked: ForkServer | None = None
        self._workers: set[WorkerHandle] = set()
        self._sources: dict[int, WorkerHandle | None] = {}
        self._waiting: deque[PendingChunk] = deque()
        self._reports: list[Report] = []
        self._failed_starts = 0
        self._failed_at = -math.inf
        self._without_item = 0
        self._block: AbstractContextManager[Any] | None = None
        self._timeout = 0.0
        self._waker = -1
        self._open = self._halted = False

    # --- beginning --------------------------------------------------------------------------------

    def open(self, job: MapJob) -> None:
        """Prepare for workers; they begin when there are chunks.

        Raises:
            ShippingError: The job cannot be sent to another process.
        """
        self._job = job
        self._method = choose_method(self._asked)
        self._spec = JobSpec.of(job)
        size = min(_BUFFER, _MOST // self.slots // PAGE * PAGE)
        self._fd, self._memory = shared_file("pool", self.slots * size)
        self._copy = partial(copy_span, self._memory)
        starts = range(0, len(self._memory) - PAGE, size)
        self._free = [SharedBuffer(self._memory, start, size) for start in starts]
        try:
            self._woken, self._waker = os.pipe()
        except OSError:
            os.close(self._fd)
            raise
        os.set_blocking(self._waker, False)
        self._sources[self._woken] = None
        self._open = True
        if self._method == "fork":
            share_all()
            self._spec.register_classes()
            return
        blob = self._spec.pickled('start_method="fork" or mode="thread"')
        if self._method == "forkserver":
            self._modules = modules_to_preload(job.function, job.worker_init)
        try:
            folder: str | None = os.getcwd()  # noqa: PTH109 - pathlib would not be faster
        except OSError:
            # It was removed.
            folder = None
        self._message = pickle.dumps((blob, folder, dict(os.environ)), 5)

    def _begin(self, count: int) -> list[WorkerHandle]:
        """Begin workers and return them; the job is sent when all of them are on their way."""
        new: list[WorkerHandle] = []
        while len(new) < count:
            server: ForkServer | None = None
            try:
                if self._method != "fork":
                    server = shared_server(self._modules)
                elif (server := self._forked) is None:
                    server = self._forked = ForkServer(partial(worker_main, spec=self._spec))
                worker = WorkerHandle(server, self._fd, fresh=self._method == "spawn")
            except ConnectionError:
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
                self._most = len(self._workers)
                break
            self._workers.add(worker)
            self._sources |= {worker.conn.fileno(): worker, worker.sentinel: worker}
            new.append(worker)
        if self._message:
            for worker in new:
                with suppress(OSError):  # it is dead, which its sentinel shows
                    worker.conn.send(self._message)
        return new

    def _forget(self, server: ForkServer) -> None:
        """Begin other workers from another server: this one has ended."""
        forget_server(server)
        if self._forked is server:
            self._forked = None
            server.close()

    def _count_failed_start(self, said: str, exitcode: int | None) -> None:
        # The exit code of one that has died with its server is not known.
        killed = exitcode in KILLED or (exitcode is None and not said)
        now = time.monotonic()
        if killed:
            time.sleep(_PAUSE)
            if now - self._failed_at < _APART:
                return
        self._failed_at = now
        self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS:
            raise WorkerStartError(said, exitcode)

    # --- chunks and reports -----------------------------------------------------------------------

    def submit(self, chunk: Chunk) -> None:
        """Encode a chunk and send it to an idle worker, or keep it until there is one."""
        buffers, self._free[-1:] = self._free[-1:], []
        for buffer in buffers:
            buffer.used = 0
        content = encode_chunk(chunk, *buffers)
        places = [(buffer.start, buffer.size, buffer.used) for buffer in buffers]
        message = pickle.dumps((chunk.id, places, *content), 5)
        count, suspect = len(chunk.items), chunk.attempt > 0
        pending = PendingChunk(
            chunk.id, message, range(count), count, buffers, suspect, size=len(message)
        )
        self._waiting.append(pending)
        if self._halted:
            self.halt()
        self._dispatch()

    def _dispatch(self) -> None:
        """Send waiting chunks to workers that have room, the emptiest first; begin workers for the rest.

        A chunk that must be alone waits for a worker that has nothing else; the emptiest is given nothing more
        meanwhile.
        """
        if not self._waiting:
            return
        up = [one for one in self._workers if one.up]
        ready = [one for one in up if not (one.retires or one.closed or one.why)]
        for pending in list(self._waiting):
            able = [worker for worker in ready if worker.has_room(pending, self._job.in_flight)]
            if able:
                self._waiting.remove(pending)
                min(able, key=_load).take(pending)
            elif not pending.suspect:
                break
            elif ready:
                ready.remove(min(ready, key=_load))
        coming = sum([not (one.up or one.pending) for one in self._workers])
        wanted = min(len(self._waiting) - coming, self._most - len(self._workers))
        if wanted > 0:
            for worker in self._begin(wanted):
                # If no other one is ready, none would take it sooner, and this one need not ask for it.
                if self._waiting and not up and self._waiting[0].size < PIPE:
                    worker.take(self._waiting.popleft())

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what workers have reported; wait for it if there is nothing yet.

        Raises:
            WorkerStartError: Workers die before they are ready.
        """
        if self._block is None:
            # The processes are at work by now, while twat-mp is imported.
            self._block = _multi_pool(self._end, self.workers)
            if self._method == "forkserver":
                # With what that has imported: the server has nothing to do now.
                self._modules = modules_to_preload(self._job.function, self._job.worker_init)
                with suppress(OSError, WorkerStartError):  # the next worker says so
                    shared_server(self._modules)
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
        limits = [seconds for seconds in (left, self._check()) if seconds is not None]
        milliseconds = math.ceil(min(limits) * 1e3) if limits else None
        poller = select.poll()
        for source in self._sources:
            poller.register(source, select.POLLIN)
        for source, _ in poller.poll(milliseconds):
            worker = self._sources.get(source)
            if worker is None:
                woken = woken or (source == self._woken and bool(os.read(self._woken, 4096)))
                continue
            if worker.ended() if source == worker.sentinel else not self._receive(worker):
                del self._sources[source]
            if worker.gone or (worker.orphaned and worker.closed):
                self._remove(worker)
        self._dispatch()
        return woken

    def _receive(self, worker: WorkerHandle) -> bool:
        """Handle a message; return whether there was one before the end of the connection."""
        try:
            kind, *content = pickle.loads(worker.conn.receive()[0])  # noqa: S301 - from our own worker
        except (EOFError, OSError):
            worker.closed = True
            return False
        if kind == UP:
            worker.up = True
            self._failed_starts = 0
        elif kind == FAILED:
            worker.failure = content[0]
        elif kind == LOG:
            _handle_log(*content)
        else:
            self._take_results(worker, *content)
        return True

    def _take_results(
        self, worker: WorkerHandle, number: int, kept: int, retires: bool, *content: Any
    ) -> None:
        worker.retires |= retires
        pending = worker.pending.get(number)
        if pending is None:
            # It was over already.
            return
        done = decode_done(number, content, self._copy)
        if done.values:
            left, places = pending.left, done.places
            pending.left = () if len(left) == len(places) else set(left).difference(places)
            worker.open -= len(places)
            # While something is done, a new worker is worth a try.
            self._without_item = self._failed_starts = 0
            self._reports.append(done)
            if done.odd and any(map(self._job.ends, done.odd.values())):
                self.halt()
        if kept < pending.kept:
            free = pending.cut(kept)
            worker.open -= len(free)
            self._reports.append(Lost(number, free, None, "slow"))
        if not pending.left:
            del worker.pending[number]
            self._free += pending.buffers

    def halt(self) -> None:
        """Let workers begin no other item; give back what they were not sent."""
        self._halted = True
        for worker in self._workers:
            worker.page[STOP] = 1
        while self._waiting:
            pending = self._waiting.popleft()
            self._reports.append(Lost(pending.number, range(pending.kept), None, "stopped"))
            self._free += pending.buffers

    def wake(self) -> None:
        """Let `poll` return."""
        # A pipe that is full wakes as well; closed, there is no reader to wake.
        with suppress(OSError):
            os.write(self._waker, b"w")

    # --- time and memory --------------------------------------------------------------------------

    def _check(self) -> float | None:
        """Kill what takes too long or too much; return the seconds until the next check, None for no need of one."""
        job, now = self._job, time.monotonic()
        checks: list[float] = []
        for worker in self._workers:
            if not (worker.up and worker.pending) or worker.why or worker.closed:
                continue
            if job.item_timeout is not None:
                checks.append(self._check_time(worker, now, job.item_timeout))
            if job.memory_limit is not None:
                if _uses_more(worker.pid, job.memory_limit):
                    worker.kill("memory")
                checks.append(_CHECK)
            if not job.pipeline.awaits:
                late = SLOW_CHUNK * job.target_s
                for pending in worker.pending.values():
                    if len(pending.left) > 1:
                        if now - pending.since >= late:
                            pending.since = now
                            worker.ask()
                        checks.append(pending.since + late - now)
        return min(checks, default=None)

    def _check_time(self, worker: WorkerHandle, now: float, limit: float) -> float:
        due = worker.page[DUE]
        if due:
            left = abs(due) / 1e9 - now
            if left <= 0:
                worker.judged = due
                worker.kill("deadline" if due < 0 else "timeout")
            return max(left, 0.001)
        # A call that begins later cannot be late before a whole limit has passed, but a deadline may end it sooner.
        bounded = self._job.deadline is not None or self._job.pipeline.options.deadline is not None
        return min(limit, _CHECK) if bounded else limit

    # --- what a dead worker leaves ----------------------------------------------------------------

    def _remove(self, worker: WorkerHandle) -> None:
        """Report what a dead worker leaves, once."""
        if worker not in self._workers:
            return
        while not worker.closed and worker.conn.peek() is not None:
            self._receive(worker)
        self._workers.remove(worker)
        self._sources.pop(worker.conn.fileno(), None)
        self._sources.pop(worker.sentinel, None)
        failed = not worker.up and worker.why is None
        said = worker.said if failed else ""
        self._reports += self._judge(worker)
        worker.close()
        for pending in worker.pending.values():
            self._free += pending.buffers
        if worker.orphaned:
            self._forget(worker.server)
        if worker.failure is not None:
            raise WorkerStartError(worker.failure, worker.exitcode)
        if failed:
            self._count_failed_start(said or worker.server.said(), worker.exitcode)

    def _judge(self, worker: WorkerHandle) -> list[Lost]:
        """Decide what becomes of the chunks of a dead worker: which item is to blame, if any."""
        under_way = worker.pending.values() if worker.up else ()
        started = {pending: worker.last_started(pending) for pending in under_way}
        if worker.why in ("timeout", "deadline") and worker.page[DUE] != worker.judged:
            # The late call ended just before the kill; whatever came next is not to blame.
            started = {}
        elif started:
            idle = all(last < 0 for last in started.values())
            self._without_item = self._without_item + 1 if idle else 0
        found: list[Lost] = []
        for pending in worker.pending.values():
            left, last = sorted(pending.left), started.get(pending, -1)
            # Of several that are under way at once, all that were not reported are suspects.
            several = self._job.in_flight > 1
            suspects = [n for n in left if (n <= last if several else n == last)]
            if not suspects and started and self._without_item >= _FAILED_STARTS:
                # Several workers in a row have died without beginning an item, so it must be the chunk.
                suspects = [*left[:1]]
            culprit = suspects[0] if len(suspects) == 1 else None
            why: Why = (worker.why or "crash") if suspects else "stopped"
            found.append(Lost(pending.number, left, culprit, why, worker.pid, worker.exitcode))
        if sum(lost.why != "stopped" for lost in found) > 1:
            # It died of one of several chunks, and no item of them is blamed.
            found = [lost._replace(culprit=None, only_chunk=False) for lost in found]
        return found

    # --- the end ----------------------------------------------------------------------------------

    def close(self, *, graceful: bool, timeout: float) -> None:
        """End all processes; the scheduler of a map that ends gracefully has had each of its items back."""
        self._timeout = 0.0 if graceful else max(timeout, 0.05)
        if self._block is not None:
            # With any other argument MultiPool only logs more.
            self._block.__exit__(None, None, None)
        self._end()

    def _end(self) -> None:
        """Kill all workers, and wait until they have ended if the map was cut short."""
        if not self._open:
            return
        self._open = False
        self._most = 0
        self._waiting.clear()
        end = time.monotonic() + self._timeout
        try:
            for worker in self._workers:
                worker.kill("stopped")
            while self._workers and (left := end - time.monotonic()) > 0:
                # At the end of the interpreter, nothing can be imported for a message any more.
                with suppress(WorkerStartError, ImportError):
                    self._turn(left)
                self._reports.clear()
        finally:
            for worker in self._workers:
                worker.close()
            self._workers.clear()
            self._sources.clear()
            if self._forked is not None:
                self._forked.close()
            self._memory.close()
            for fd in (self._fd, self._woken, self._waker):
                os.close(fd)
            self._waker = -1


_load: Final = attrgetter("open")


def _handle_log(data: bytes) -> None:
    """Let the program's logger of the same name handle a worker's record."""
    import logging

    record = logging.makeLogRecord(pickle.loads(data))  # noqa: S301 - from our own worker
    raised: Any = record.exc_info
    if raised is not None:
        error = pickle.loads(raised)  # noqa: S301 - as above
        record.exc_info = (type(error), error, error.__traceback__)
    # Names of levels are the program's.
    record.levelname = logging.getLevelName(record.levelno)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _uses_more(pid: int, limit: int) -> bool:
    """Return whether a process itself uses more bytes of memory than that; False where it is not known.

    Pages that it shares do not count: a fork has all of its program's.
    """
    from pathlib import Path  # a seventh of what the first map of a program imports

    process = Path(f"/proc/{pid}")
    try:
        if int((process / "statm").read_bytes().split()[1]) * _PAGE_SIZE <= limit:
            return False
        # This takes the kernel longer, as it looks at each page.
        lines = (process / "smaps_rollup").read_bytes().splitlines()
        private = sum(int(line.split()[1]) for line in lines if line.startswith(b"Private_"))
    except (OSError, ValueError, IndexError):
        return False
    return private * 1024 > limit


# --- what the fork server imports before it forks -------------------------------------------------


_STANDARD_LIBRARY: Final = os.__file__.removesuffix("os.py")


def modules_to_preload(*functions: Any) -> dict[str, str]:
    """Return the installed modules that functions and their modules refer to, with their files.

    Modules of the program itself are left to the workers, which import them afresh for each map.
    """
    # Beside them, what workers import themselves where the program has it.
    names = {"cloudpickle", "logging"} & sys.modules.keys()
    for function in functions:
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        for value in [*getattr(function, "__globals__", vars(module) if module else {}).values()]:
            name = (
                value.__name__ if type(value) is type(sys) else getattr(value, "__module__", None)
            )
            if isinstance(name, str):
                names |= {name, name.partition(".")[0]}
    found: dict[str, str] = {}
    # A module stands behind what it imports. Last ones first, so that none is imported before the one that it is a part
    # of: `_asyncio` before `asyncio` leaves that without its current task.
    for name in [name for name in reversed(list(sys.modules)) if name in names]:
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        packaged = "site-packages" in file or "dist-packages" in file
        if (packaged or file.startswith(_STANDARD_LIBRARY)) and not name.startswith("opero"):
            found[name] = file
    return found


# --- twat-mp --------------------------------------------------------------------------------------


_imported: Final[list[Any]] = []
"""twat-mp's `MultiPool`, once it is imported."""


def _import_multi_pool() -> None:
    with suppress(Exception), warnings.catch_warnings():
        # What these packages say about the Python they meet is not about the user's code.
        warnings.simplefilter("ignore")
        from twat_mp import MultiPool

        _imported.append(MultiPool)


def _multi_pool(end: Callable[[], None], workers: int) -> AbstractContextManager[Any]:
    """Return twat-mp's block around the workers, entered; leaving it ends them.

    It is an empty one where twat-mp cannot be imported: what it stands on needs a folder for temporary files.
    """
    if not _imported:
        # In a thread: a Ctrl-C comes to the main one, and an import may swallow it, by a bare `except` or a dying
        # reference.
        importer = threading.Thread(target=_import_multi_pool, daemon=True)
        with suppress(RuntimeError):  # none begins any more when the interpreter ends
            importer.start()
            importer.join()
    if not _imported:
        return nullcontext()
    # A pool that is entered and left as pathos' pools are; the scheduler sends chunks, so nothing is mapped by it.
    pool_class: Any = partial(
        SimpleNamespace, map=None, join=end, close=end, terminate=end, clear=end
    )
    # `debug` off: switched on by an environment variable it would look for names that a function has not.
    block: AbstractContextManager[Any] = _imported[0](
        pool_class=pool_class, nodes=workers, debug=False
    )
    block.__enter__()
    return block
