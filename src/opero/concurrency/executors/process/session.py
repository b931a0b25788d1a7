# this_file: src/opero/concurrency/executors/process/session.py
"""Connect a worker process to its pool: take the job, receive chunks, send results, events and log records."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.caching.single_flight import Flight, become_leader
from opero.concurrency.executors.base import Done, ItemOutcome, MapJob
from opero.concurrency.executors.process import protocol
from opero.concurrency.executors.process.job_spec import JobSpec, loaded_module
from opero.concurrency.executors.process.pickling import dumps, encode_error, traceback_of
from opero.concurrency.executors.process.protocol import (
    ASK,
    ITEM,
    PAGE,
    PLAIN,
    BufferPool,
    StartOutput,
    WorkerStatus,
    keep_freed_memory,
)
from opero.concurrency.executors.process.start import close_in_child
from opero.concurrency.item_runner import ItemRunner
from opero.concurrency.progress import hide_bars
from opero.events import event_bus
from opero.utils import ambient

if TYPE_CHECKING:
    import asyncio
    import logging

    from opero.concurrency.executors.base import Parked
    from opero.concurrency.executors.process.protocol import SharedBuffer, Span
    from opero.events import Event

__all__ = ["RunningChunk", "WorkerSession"]

_FULL: Final = 2 << 20
"""Bytes of large results that are sent at once, so that they stay in the processor's cache."""
_WAIT: Final = 0.02
"""Longest wait for a buffer before a result goes through the pipe."""


class RunningChunk:
    """A chunk in a worker: what came, and what has become of it.

    Attributes:
        number: Its id.
        entries: Items, as encoded.
        read: Copies large parts of them.
        parked: What items bring from earlier attempts.
        turn: How many chunks this worker has had, with this one.
        kept: Position from which on this worker does nothing.
        next: Position of the next item; unused where one is done after the other.
        values: What is done and not reported, encoded, in the order in which it was done.
        places: Their positions; None where these are in order.
        odd: Outcomes of these that are more than a plain value, by position in the chunk.
        reported: Items reported.
    """

    __slots__ = (
        "entries", "flushed", "kept", "next", "number", "odd", "parked", "places", "read",
        "reported", "soon", "turn", "values",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        entries: list[Any],
        read: Callable[[Span], Any] | None,
        parked: dict[int, Parked],
        turn: int,
        *,
        ordered: bool,
    ) -> None:
        self.number: int = number
        self.entries: list[Any] = entries
        self.read: Callable[[Span], Any] | None = read
        self.parked: dict[int, Parked] = parked
        self.turn: int = turn
        self.kept: int = len(entries)
        self.next: int = 0
        self.values: list[Any] = []
        self.places: list[int] | None = None if ordered else []
        self.odd: dict[int, ItemOutcome] = {}
        self.reported: int = 0
        self.flushed: float = perf_counter()
        self.soon: asyncio.TimerHandle | None = None

    @property
    def over(self) -> bool:
        """Whether every item is done that this worker keeps."""
        return self.reported + len(self.values) >= self.kept

    def take(self) -> int | None:
        """Return the position of the next item, None if none is left."""
        if self.next >= self.kept:
            return None
        self.next += 1
        return self.next - 1

    def done(self, worker: str) -> Done | None:
        """Return what is done and not reported, None for nothing; it counts as reported then."""
        if not self.values:
            return None
        # In place: a value that is being added while this interrupts it is not lost.
        values, self.values[:] = self.values[:], []
        count, now = len(values), perf_counter()
        places: Sequence[int] = range(self.reported, self.reported + count)
        if self.places is not None:
            ranks = sorted(range(count), key=self.places.__getitem__)
            places, values = [self.places[rank] for rank in ranks], [values[rank] for rank in ranks]
            self.places = []
        odd: dict[int, ItemOutcome] = {}
        if self.odd:
            odd = {n: self.odd.pop(place) for n, place in enumerate(places) if place in self.odd}
        self.reported += count
        done = Done(self.number, places, values, odd, now - self.flushed, worker)
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
        status: The status page.
        tasks: Items begun.
        most: Items after which the worker ends; None for no such limit.
        job: What is done with each item.
        runner: Does it.
        chunk: The chunk under way, while a signal may interrupt the work on it.
        asked: Whether the pool has asked for what is done when that could not be sent.
    """

    def __init__(self, conn: Connection[Any, Any], own_fd: int, pool_fd: int) -> None:
        import mmap

        self.conn = conn
        close_in_child(conn)
        self._own_fd = own_fd
        own = mmap.mmap(own_fd, 0)
        self.status: WorkerStatus = WorkerStatus(own)
        self._results = BufferPool(own, PAGE, (len(own) - PAGE) // 2, 2)
        items = mmap.mmap(pool_fd, 0)
        os.close(pool_fd)
        self._items_memory = items
        self._items: BufferPool | None = None
        self._buffer: SharedBuffer | None = None
        self._filled_by: RunningChunk | None = None
        self._sent: deque[tuple[int, SharedBuffer]] = deque()
        self._shipped = 0
        self._events: list[Event] = []
        self._name = f"process {os.getpid()}"
        self._turn = self._noted = self.tasks = 0
        self.job: MapJob
        self.most: int | None = None
        self.runner: ItemRunner
        self.chunk: RunningChunk | None = None
        self._sending = threading.Lock()
        self.asked: bool = False

    # --- getting ready ----------------------------------------------------------------------------

    def prepare(self, spec: JobSpec | None) -> bool:
        """Take the job and report whether that went well."""
        output = StartOutput(self._own_fd)
        try:
            try:
                self._take_job(spec)
            finally:
                _flush()
                output.close()
        except (EOFError, ConnectionError):
            return False
        except BaseException as error:  # noqa: BLE001 - also a `sys.exit()` in an imported module
            self.send(protocol.FAILED, traceback_of(error))
            return False
        self.send(protocol.UP, os.getpid())
        return True

    def _take_job(self, spec: JobSpec | None) -> None:
        if spec is None:
            spec = JobSpec.open_in_worker(*pickle.loads(self.conn.recv_bytes()))  # noqa: S301 - from the pool
        else:
            _cancel_subscriptions()
        _reseed()
        hide_bars()
        ambient.set_disabled(spec.disabled)
        if spec.loggers is not None:
            _forward_logs(spec.loggers, self._log)
        job = self.job = spec.job(self.status, self._events.append)
        if job.leads:
            become_leader(Flight(None))
        if job.memory_limit is not None:
            _limit_memory(job.memory_limit)
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
        """Send a message."""
        data = pickle.dumps(frame, 5)
        with self._sending:
            self.conn.send_bytes(data)

    def receive(self) -> RunningChunk:
        """Wait for a chunk.

        Raises:
            EOFError: There are no more.
        """
        _, number, entries, index, parked = pickle.loads(self.conn.recv_bytes())  # noqa: S301 - from the pool
        read = None
        if index is not None:
            if self._items is None:
                keep_freed_memory()
                memory, size = self._items_memory, self.status.buffer_size
                self._items = BufferPool(memory, 0, size, len(memory) // size)
            read = self._items.reader(index)
        self._turn += 1
        return RunningChunk(
            number,
            entries,
            read,
            protocol.decode_parked(parked),
            self._turn,
            ordered=self.job.in_flight == 1,
        )

    def flush(self, chunk: RunningChunk, *, facts: bool = True) -> None:
        """Send what is done of a chunk.

        Args:
            chunk: The chunk.
            facts: Whether counters and events go with it; they are consistent between items only.
        """
        done = chunk.done(self._name)
        if done is None:
            return
        index = None
        if self._buffer is not None and self._filled_by is chunk:
            index = self._ship()
        stats, events = (self._stats(), self._take_events()) if facts else (None, ())
        self.send(protocol.DONE, chunk.number, *protocol.encode_done(done, stats, events, index))

    def end(self, chunk: RunningChunk) -> None:
        """Send the last results of a chunk, and what is given back of it."""
        if self.retires():
            # First, so that the pool sends nothing more when it sees that the chunk is over.
            self.send(protocol.RETIRES)
        self.flush(chunk)
        if chunk.kept < len(chunk.entries):
            self.send(protocol.GAVE_BACK, chunk.number, chunk.kept)
        # Nothing that was printed waits for the next chunk.
        _flush()

    def _answer(self, *_: object) -> None:
        """Send what is done of a chunk whose present item takes long, and give back what has not begun.

        This interrupts the user's code: nothing here takes a lock or waits.
        """
        chunk = self.chunk
        if chunk is None or not self._sending.acquire(blocking=False):
            self.asked = True
            return
        self._sending.release()
        present = chunk.reported + len(chunk.values)
        try:
            self.flush(chunk, facts=False)
            if present + 1 < chunk.kept:
                chunk.kept = present + 1
                self.send(protocol.GAVE_BACK, chunk.number, chunk.kept)
        except OSError:
            # The map is over.
            pass

    # --- results ----------------------------------------------------------------------------------

    def encode(self, chunk: RunningChunk, value: Any, outcome: ItemOutcome | None) -> Any:
        """Return what stands for a result in its message; that of an outcome is put there."""
        result = value if outcome is None else outcome.value
        if type(result) in PLAIN:
            return value
        if self._filled_by is not chunk:
            # A buffer goes with the results of one chunk.
            if self._buffer is not None and self._filled_by is not None and self._buffer.used:
                self.flush(self._filled_by)
            self._filled_by = chunk
        if self._buffer is None:
            self._buffer = self._take_buffer()
        encoded = protocol.encode_value(result, "result", self._buffer)
        if outcome is None:
            return encoded
        outcome.value = encoded
        return None

    def add(
        self, chunk: RunningChunk, position: int, value: Any, outcome: ItemOutcome | None
    ) -> None:
        """Note what became of an item of several that are under way."""
        value = self.encode(chunk, value, outcome)
        if outcome is not None:
            chunk.odd[position] = outcome
        if chunk.places is not None:
            chunk.places.append(position)
        chunk.values.append(value)

    def _take_buffer(self) -> SharedBuffer | None:
        self._collect()
        if self._sent and len(self._sent) == len(self._results.buffers):
            end = perf_counter() + _WAIT
            while perf_counter() < end and len(self._sent) == len(self._results.buffers):
                time.sleep(0.0002)
                self._collect()
        return self._results.take()

    def _collect(self) -> None:
        """Take back the buffers that the pool has copied."""
        copies = self.status.copies
        while self._sent and self._sent[0][0] <= copies:
            self._results.give_back(self._sent.popleft()[1])

    def _ship(self) -> int | None:
        """Return the index of the buffer that goes with a message."""
        buffer = self._buffer
        if buffer is None or not buffer.used:
            return None
        self._buffer = None
        self._shipped += 1
        self._sent.append((self._shipped, buffer))
        return buffer.index

    @property
    def full(self) -> bool:
        """Whether the results in the buffer had better be sent."""
        return self._buffer is not None and self._buffer.used >= _FULL

    def _stats(self) -> dict[str, float]:
        stats = self.job.pipeline.stats
        counted = {name: amount for name, amount in stats.as_dict().items() if amount}
        stats.reset()
        return counted

    def _take_events(self) -> list[Event]:
        events, self._events[:] = self._events[:], []
        return events

    def _log(self, record: dict[str, Any], error: BaseException | None) -> None:
        """Send a log record, from any thread."""
        self.send(protocol.LOG, _picklable(record), None if error is None else encode_error(error))

    def note(self, chunk: RunningChunk, position: int) -> None:
        """Note that an item of one of several chunks begins."""
        if chunk.turn != self._noted:
            self._noted = chunk.turn
            self.status.begin_chunk(chunk.turn)
        self.status.words[ITEM] = position

    def retires(self) -> bool:
        """Return whether this worker has done its share."""
        return self.most is not None and self.tasks >= self.most

    @property
    def stopping(self) -> bool:
        """Whether this worker begins no other item."""
        return bool(self.retires() or self.status.stopped)


# --- the process ----------------------------------------------------------------------------------


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110 - a stream may be None, closed or broken
            pass


def _cancel_subscriptions() -> None:
    """Cancel the subscriptions of the process that was forked: its listeners get the events there."""
    for subscription in event_bus.subscriptions:
        subscription.cancel()


def _reseed() -> None:
    """Give this process random numbers of its own; `random` does so by itself after a fork."""
    numpy_random: Any = loaded_module("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


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


def _forward_logs(
    levels: dict[str, tuple[int, bool, bool]],
    send: Callable[[dict[str, Any], BaseException | None], None],
) -> None:
    """Let loggers have the levels that they have in the program, and send their records there."""
    import logging

    process = os.getpid()

    class Forward(logging.Handler):
        """Sends records to the program, whose loggers handle them."""

        def emit(self, record: logging.LogRecord) -> None:
            if os.getpid() != process:
                # A process that the user's code has forked shares the connection, and must not use it.
                return
            fields = dict(vars(record))
            info = fields.pop("exc_info", None)
            fields |= {"msg": record.getMessage(), "args": None, "exc_info": None}
            if info and not record.exc_text:
                fields["exc_text"] = logging.Formatter().formatException(info)
            try:
                send(fields, info[1] if info else None)
            except OSError:
                # The map is over.
                pass

    forward = Forward()
    root = logging.getLogger()
    for logger in [root, *root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            logger.handlers[:] = []
    root.handlers[:] = [forward]
    for name, (level, propagate, disabled) in levels.items():
        logger = logging.getLogger(name) if name else root
        logger.setLevel(level)
        logger.disabled = disabled
        if not propagate:
            logger.propagate = False
            logger.handlers[:] = [forward]


def _picklable(fields: dict[str, Any]) -> dict[str, Any]:
    try:
        pickle.loads(dumps(fields))  # noqa: S301 - made here
    except Exception:  # noqa: BLE001 - whatever a class raises
        return {name: v if type(v) in PLAIN else repr(v) for name, v in fields.items()}
    return fields
