# this_file: src/opero/concurrency/executors/process/session.py
"""Connect a worker process to its pool: take the job, receive chunks, send results, events and log records.

A message is a pickled tuple of a kind and its content.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done, ItemOutcome, MapJob, Parked, worker_process
from opero.concurrency.executors.encoding import (
    PLAIN,
    SharedBuffer,
    copy_span,
    dumps_with_errors,
    encode_done,
    encode_value,
    traceback_of,
)
from opero.concurrency.executors.pickling import JobSpec, dumps, loaded_module
from opero.concurrency.executors.process.start import PAGE, Channel, flush_output
from opero.concurrency.item_runner import ItemRunner
from opero.core.deadline import current_deadline
from opero.events import event_bus
from opero.utils import ambient

if TYPE_CHECKING:
    import logging

    from opero.concurrency.executors.encoding import Span
    from opero.events import Event


Frame = tuple[Any, ...]
"""A message from a worker: its kind, then its content. To a worker go only the job and chunks: id and what
`encode_chunk` returns."""

UP: Final = "up"
"""It is ready."""
FAILED: Final = "failed"
"""It cannot begin; the traceback."""
DONE: Final = "done"
"""Id of a chunk, the position from which on it does nothing of it, whether it takes no other chunk and ends, and what
`encode_done` returns."""
LOG: Final = "log"
"""A log record as a dictionary, with its error pickled for `exc_info`."""

ASK: Final = getattr(signal, "SIGURG", None)
"""Asks a worker that is busy with an item to send what is done. A process that does not handle it ignores it."""
SLOW_CHUNK: Final = 5
"""A chunk that takes so many times its target gives back what has not begun."""

_KEPT: Final = 16 << 20


# --- the page -------------------------------------------------------------------------------------
#
# Words that say what a worker does; the pool reads them after its death. A message could not say it, because the last
# one before a crash is the one that is not sent. Each word is stored whole, and by one side only, but for STOP.

STARTED, DUE, STOP = range(3)
"""Up to which item it has begun, counted over all its chunks; when the call under way must have returned
(`time.monotonic` in ns, negative where a deadline says so, 0 if none is under way); whether it begins no other item."""


def note_calls(page: memoryview[int], fn: Callable[..., Any], limit: float) -> Callable[..., Any]:
    """Return a function that notes when each call begins and by when it must end."""
    now = time.monotonic

    def call(*args: Any, **kwargs: Any) -> Any:
        due, end_of_all = now() + limit, current_deadline()
        page[DUE] = (
            int(due * 1e9) if end_of_all is None or due < end_of_all else -int(end_of_all * 1e9)
        )
        try:
            return fn(*args, **kwargs)
        finally:
            page[DUE] = 0

    return functools.update_wrapper(call, fn, updated=())


# --- a chunk ---------------------------------------------------------------------------------------


class RunningChunk:
    """A chunk in a worker: what came, and what has become of it.

    Attributes:
        number: Its id.
        entries: Items, as encoded.
        plain: Whether all of them are plain, so that no one has to be decoded.
        parked: What items bring from earlier attempts.
        base: Items of the chunks that this worker was given before.
        buffer: Takes large parts of the results; None if there is none.
        kept: Position from which on this worker does nothing.
        next: Position of the next item; unused where one is done after the other.
        values: What is done and not reported, in the order in which it was done.
        places: Their positions; None where these are in order.
        encoded: How many of them are encoded; what comes behind stands as the function returned it.
        opaque: Whether some of them were anything but plain.
        odd: Outcomes that are more than a plain value, by position in the chunk.
        reported: Items reported.
        flushed: When that was.
        known: What the pool knows of this worker: `kept`, and whether it takes no other chunk.
        soon: Whether a task is about to send what is done, where several items are under way.
    """

    def __init__(
        self,
        number: int,
        entries: Sequence[Any],
        parked: dict[int, Parked],
        base: int,
        buffer: SharedBuffer | None,
        *,
        ordered: bool,
    ) -> None:
        self.number: int = number
        self.entries: list[Any] = [*entries]
        self.plain: bool = type(entries) is list
        self.parked: dict[int, Parked] = parked
        self.base: int = base
        self.buffer: SharedBuffer | None = buffer
        self.kept: int = len(entries)
        self.next: int = 0
        self.values: list[Any] = []
        self.places: list[int] | None = None if ordered else []
        self.encoded: int = 0
        self.opaque: bool = False
        self.odd: dict[int, ItemOutcome] = {}
        self.reported: int = 0
        self.flushed: float = perf_counter()
        self.known: tuple[int, bool] = (self.kept, False)
        self.soon: bool = False

    @property
    def over(self) -> bool:
        """Whether every item is done that this worker keeps."""
        return self.reported + len(self.values) >= self.kept

    def cut(self, kept: int) -> None:
        """Do nothing from a position on."""
        self.kept = min(kept, self.kept)
        # A loop over the entries ends there, too.
        del self.entries[self.kept :]

    def done(self) -> Done:
        """Return what is done and not reported; it counts as reported then."""
        values = self.values
        if self.over and self.encoded == len(values):
            self.values = []
        else:
            # In place: a value that is being added while this interrupts it is not lost.
            values = values[: self.encoded]
            del self.values[: self.encoded]
        self.encoded = 0
        count, now = len(values), perf_counter()
        places: Sequence[int] = range(self.reported, self.reported + count)
        if self.places is not None:
            places, self.places = self.places, []
        odd: dict[int, ItemOutcome] = {}
        if self.odd:
            odd = {n: self.odd.pop(p) for n, p in enumerate(places) if p in self.odd}
        self.reported += count
        weight = 0 if self.buffer is None else self.buffer.used
        done = Done(self.number, places, values, odd, now - self.flushed, None, weight)
        self.flushed = now
        return done


class WorkerSession:
    """The connection to the pool, and what the loops over items share.

    Args:
        conn: The connection.
        own_fd: As for `worker_main`.
        pool_fd: As there.

    Attributes:
        conn: As above.
        page: The words that say what this worker does.
        tasks: Items begun.
        most: Items after which the worker ends; None for no such limit.
        job: What is done with each item.
        runner: Does it.
        copy: Copies large parts of items out of the shared buffers.
        chunk: The chunk under way, while a signal may interrupt the work on it.
        asked: Whether the pool has asked for what is done when that could not be sent.
    """

    def __init__(self, conn: Channel, own_fd: int, pool_fd: int) -> None:
        import mmap

        self.conn = conn
        self._own_fd = own_fd
        # As the connection: not for programs that the user's code starts.
        os.set_inheritable(own_fd, False)
        self.page: memoryview[int] = memoryview(mmap.mmap(own_fd, PAGE)).cast("q")
        self._memory = mmap.mmap(pool_fd, 0)
        os.close(pool_fd)
        self.copy: Callable[[Span], Any] = functools.partial(copy_span, self._memory)
        self._events: list[Event] = []
        self._given = self.tasks = 0
        self.job: MapJob
        self.most: int | None = None
        self.runner: ItemRunner
        self.chunk: RunningChunk | None = None
        self._sending = threading.Lock()
        self.asked: bool = False

    # --- getting ready ----------------------------------------------------------------------------

    def prepare(self, spec: JobSpec | None) -> bool:
        """Take the job and report whether that went well."""
        start, before = os.lseek(self._own_fd, 0, os.SEEK_END), os.dup(2)
        # What it writes to stderr until it is ready stands where the pool can read it after its death.
        os.dup2(self._own_fd, 2)
        try:
            try:
                self._take_job(spec)
            finally:
                flush_output()
                os.dup2(before, 2)
                os.close(before)
                if said := os.pread(self._own_fd, 1 << 20, start):
                    os.write(2, said)
                os.ftruncate(self._own_fd, start)
        except (EOFError, ConnectionError):
            return False
        except BaseException as error:  # noqa: BLE001 - also a `sys.exit()` in an imported module
            self.send(FAILED, traceback_of(error))
            return False
        self.send(UP)
        return True

    def _take_job(self, spec: JobSpec | None) -> None:
        inherited = _data_size()
        if spec is None:
            spec = JobSpec.open_in_worker(*pickle.loads(self.conn.receive()[0]))  # noqa: S301 - from the pool
        else:
            # Listeners of the process that was forked get the events there.
            for subscription in event_bus.subscriptions:
                subscription.cancel()
        numpy_random: Any = loaded_module("numpy.random")
        if numpy_random is not None:
            # Random numbers of its own; `random` does so by itself after a fork.
            numpy_random.seed()
        worker_process.append(True)
        ambient.adopted_scripts[:] = [spec.script] if spec.script else []
        ambient.set_disabled(spec.disabled)
        if spec.levels is not None:
            _forward_logs(spec.levels, self.send)
        job = self.job = spec.job(functools.partial(note_calls, self.page), self._events.append)
        if spec.stops:
            job = self.job = job._replace(stopped=lambda: bool(self.page[STOP]))
        if job.leads:
            from opero.caching.single_flight import Flight, become_leader

            become_leader(Flight(None))
        if job.memory_limit is not None:
            _limit_memory(inherited + job.memory_limit)
        if job.worker_init is not None:
            job.worker_init()
        self.most = job.max_tasks_per_worker
        self.runner = ItemRunner(job)
        if ASK is not None:
            signal.signal(ASK, self._answer)
            # C libraries go on with the calls that it interrupts.
            signal.siginterrupt(ASK, False)

    # --- messages ---------------------------------------------------------------------------------

    def send(self, *frame: Any) -> None:
        """Send a message, from any thread."""
        data = pickle.dumps(frame, 5)
        with self._sending:
            self.conn.send(data)

    def receive(self) -> RunningChunk:
        """Wait for a chunk.

        Raises:
            EOFError: There are no more.
        """
        number, places, entries, parked = pickle.loads(self.conn.receive()[0])  # noqa: S301 - from the pool
        if not self._given and type(entries) is tuple:
            _keep_freed_memory()
        base = self._given
        self._given += len(entries)
        known = pickle.loads(parked) if parked else {}  # noqa: S301 - from the pool
        buffer = SharedBuffer(self._memory, *places[0]) if places else None
        return RunningChunk(number, entries, known, base, buffer, ordered=self.job.in_flight == 1)

    def flush(self, chunk: RunningChunk, *, interrupts: bool = False) -> None:
        """Send what is done of a chunk, and from where on it is given back.

        Args:
            chunk: The chunk.
            interrupts: Whether an item is under way: counters and events are consistent between items only.
        """
        if chunk.over:
            # Nothing that was printed waits for the next chunk.
            flush_output()
        running, self.chunk = self.chunk, None
        if not interrupts:
            self.encode(chunk)
        known = chunk.kept, self.retires()
        if chunk.values or chunk.known != known:
            chunk.known, done, plain = known, chunk.done(), not chunk.opaque
            chunk.opaque = False
            stats: dict[str, float] = {}
            events: list[Event] = []
            if not interrupts:
                stats = self.job.pipeline.stats.take()
                events, self._events[:] = self._events[:], []
            content = encode_done(done, stats, events, plain=plain)
            self.send(DONE, chunk.number, *known, *content)
        self.chunk = running

    def _answer(self, *_: object) -> None:
        """Send what is done of a chunk whose present item takes long, and give back what has not begun.

        This interrupts the user's code: nothing here takes a lock or waits, and nothing of the user's is pickled.
        """
        chunk = self.chunk
        if chunk is None or not self._sending.acquire(blocking=False):
            self.asked = True
            return
        self._sending.release()
        chunk.cut(chunk.reported + len(chunk.values) + 1)
        if PLAIN.issuperset(map(type, chunk.values[chunk.encoded :])):
            chunk.encoded = len(chunk.values)
        with suppress(OSError):  # the map is over
            self.flush(chunk, interrupts=True)

    # --- results ----------------------------------------------------------------------------------

    def add(
        self, chunk: RunningChunk, position: int, value: Any, outcome: ItemOutcome | None
    ) -> None:
        """Note what became of an item; this is not interrupted."""
        running, self.chunk = self.chunk, None
        if outcome is not None:
            value, outcome.value = outcome.value, None
            chunk.odd[position] = outcome
            if self.job.ends(outcome):
                self.page[STOP] = 1
                chunk.cut(max(chunk.next, position + 1))
        if chunk.places is not None:
            chunk.places.append(position)
        chunk.values.append(value)
        self.encode(chunk)
        self.chunk = running

    def encode(self, chunk: RunningChunk) -> None:
        """Encode the results that stand as the function returned them."""
        running, self.chunk = self.chunk, None
        values, begin = chunk.values, chunk.encoded
        new = values[begin:] if begin else values
        if not PLAIN.issuperset(map(type, new)):
            chunk.opaque = True
            values[begin:] = [encode_value(value, "result", chunk.buffer) for value in new]
        chunk.encoded = len(values)
        self.chunk = running

    def retires(self) -> bool:
        """Return whether this worker has done its share."""
        return self.most is not None and self.tasks >= self.most


# --- the process ----------------------------------------------------------------------------------


def _keep_freed_memory() -> None:
    """Let the allocator keep large blocks that are freed: copies of the next items then go to pages that are there.

    It keeps blocks up to the size of the largest that was freed (mallopt(3), M_MMAP_THRESHOLD); these bytes are never
    touched.
    """
    with suppress(MemoryError):
        bytes(_KEPT)


def _data_size() -> int:
    """Return the bytes that the kernel counts as data of this process, 0 where they are not known."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - pathlib is not loaded for it
            return int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _limit_memory(most: int) -> None:
    """Let the kernel refuse this process more than so many bytes of data: a `MemoryError` where it asks for more.

    Address space that is reserved but never used does not count, as `RLIMIT_AS` would have it.
    """
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


# --- log records ----------------------------------------------------------------------------------


def _forward_logs(levels: dict[str, int], send: Callable[..., object]) -> None:
    """Let loggers have the levels that they have in the program, and send their records there."""
    import logging

    process = os.getpid()

    class Forward(logging.Handler):
        """Sends records to the program, whose loggers handle them."""

        def emit(self, record: logging.LogRecord) -> None:
            if os.getpid() != process:
                # A process that the user's code has forked shares the connection, and must not use it.
                return
            fields, info = dict(vars(record)), record.exc_info
            error = dumps_with_errors(info[1]) if info else None
            fields |= {"msg": record.getMessage(), "args": None, "exc_info": error}
            if info and not record.exc_text:
                fields["exc_text"] = logging.Formatter().formatException(info)
            try:
                pickle.loads(data := dumps(fields))  # noqa: S301 - made here
            except Exception:  # noqa: BLE001 - whatever a class raises
                plain = {name: v if type(v) in PLAIN else repr(v) for name, v in fields.items()}
                data = dumps(plain)
            with suppress(OSError):  # the map is over
                send(LOG, data)

    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            # What becomes of a record, the program's logger decides.
            logger.handlers[:] = []
            logger.propagate = True
    logging.root.handlers[:] = [Forward()]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
