# this_file: src/opero/concurrency/worker.py
"""What a worker process does: get ready, take a chunk, run its items, report, take the next.

The user's code has the main thread, and may fork, start processes and map again: the one thread beside it goes away for
that.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from opero.caching.single_flight import Flight, become_leader
from opero.concurrency import bodies
from opero.concurrency.clerk import Clerk
from opero.concurrency.executors.base import Chunk, Done, GaveBack, MapJob, Report
from opero.concurrency.memory import limit_memory
from opero.concurrency.outbox import Outbox
from opero.concurrency.page import Page
from opero.concurrency.parcel import PLAIN, Parcel
from opero.concurrency.progress import hide_bars
from opero.concurrency.remote_error import traceback_of
from opero.concurrency.segment import Intake
from opero.concurrency.sheet import Sheet, sheet_of
from opero.concurrency.shipment import Shipment
from opero.concurrency.slate import Slate
from opero.concurrency.wire import Frame, Reader, send_frame
from opero.concurrency.work import Work
from opero.core.deadline import run_until
from opero.events import Event, event_bus
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.concurrency.executors.base import ItemOutcome
    from opero.concurrency.segment import Load
    from opero.concurrency.worker_loop import WorkerLoop

__all__ = ["CHUNK", "DONE", "FAILED", "GAVE_BACK", "JOB", "KEPT", "RETIRES", "UP", "work"]

JOB: Final = b"j"
"""To a worker: the job, pickled; empty if it was inherited."""
CHUNK: Final = b"c"
"""To a worker: items."""
UP: Final = b"u"
"""From a worker: it is ready; the number is its process id."""
FAILED: Final = b"f"
"""From a worker: it cannot begin; the body says why."""
DONE: Final = b"d"
"""From a worker: results of a chunk."""
GAVE_BACK: Final = b"g"
"""From a worker: it will do nothing of a chunk from some position on, which is the body (`KEPT`)."""
KEPT: Final = struct.Struct("<Q")
RETIRES: Final = b"r"
"""From a worker: it takes no other chunk and will end."""

_KEPT: Final = 1 << 24
"""Bytes of a block that a worker keeps for the next array."""
FLUSH: Final = 0.002
"""Seconds after which what is finished is sent, so that little is lost with a worker."""


def work(sock: socket.socket, slate: int, shipment: Shipment | None = None) -> None:
    """Be a worker until the map closes the socket.

    Args:
        sock: Socket to the map.
        slate: Descriptor of the slate.
        shipment: The job, if this process has inherited it.
    """
    worker = _Worker(sock, Slate(slate))
    try:
        if worker.prepare(shipment):
            worker.run()
    except ConnectionError:
        # The map is over, and nobody wants to hear of it.
        pass


class _Worker:
    def __init__(self, sock: socket.socket, slate: Slate) -> None:
        self.slate = slate
        self.tasks = 0
        self._sock = sock
        self._reader = Reader(sock)
        self._intake = Intake(_copier())
        self._outbox = Outbox(slate)
        self._events: list[Event] = []
        self._name = f"process {os.getpid()}"
        self._turn = self._noted = 0
        self._sealed: Sheet | None = None
        self._job: MapJob
        self._most: int | None = None
        self._work: Work
        self._loop: WorkerLoop | None = None
        self._clerk = Clerk(self._send)

    # --- getting ready ----------------------------------------------------------------------------

    def prepare(self, shipment: Shipment | None) -> bool:
        """Take the job and tell the map whether that went well."""
        stderr = self.slate.divert(2)
        try:
            try:
                self._take(shipment)
            finally:
                _flush()
                self.slate.restore(2, stderr)
        except EOFError:
            return False
        except BaseException as error:  # noqa: BLE001 - also a `sys.exit()` in an imported module
            send_frame(self._sock, Frame(FAILED, os.getpid(), traceback_of(error).encode()))
            return False
        send_frame(self._sock, Frame(UP, os.getpid()))
        return True

    def _take(self, shipment: Shipment | None) -> None:
        if shipment is None:
            shipment = Shipment.open(self._receive().body)
        else:
            _forget_listeners()
        _reseed()
        hide_bars()
        ambient.set_disabled(shipment.disabled)
        job = self._job = shipment.job(self.slate, self._events.append)
        if job.leads:
            become_leader(Flight(None))
        if job.memory_limit is not None:
            limit_memory(job.memory_limit)
        if job.worker_init is not None:
            job.worker_init()
        self._most = job.max_tasks_per_worker
        self._work = Work(job, job.pipeline)
        if job.pipeline.awaits:
            from opero.concurrency.worker_loop import WorkerLoop

            self._loop = WorkerLoop(
                self._work,
                self.slate,
                in_flight=job.in_flight,
                limit=job.item_timeout,
                desk=self,
            )

    def _receive(self) -> Frame:
        while True:
            for frame in self._reader.receive():
                return frame

    def receive(self) -> list[Page]:
        """Return the chunks that have come."""
        return [self._open(frame) for frame in self._reader.receive()]

    # --- work -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Be at work, under the deadline that holds where the map was called."""
        try:
            if self._job.deadline is None:
                self.serve()
            else:
                run_until(self._job.deadline, self.serve)
        finally:
            self._clerk.rest()
            if self._loop is not None:
                self._loop.close()

    def serve(self) -> None:
        """Run chunks until the map has no more, or this worker has done its share."""
        if self._loop is not None:
            self._loop.serve(self._sock)
            return
        while not self.retires():
            try:
                frame = self._receive()
            except (EOFError, OSError):
                return
            self._run(self._open(frame))
            self.leave()

    def leave(self) -> None:
        """Let nothing that was printed wait for the next chunk."""
        _flush()

    def _open(self, frame: Frame) -> Page:
        parcel = Parcel(frame.body, frame.fd, self._intake)
        parked = bodies.open_parked(parcel.more) or {}
        chunk = Chunk(id=frame.number, idx=(), items=parcel.entries)
        sheet = sheet_of(chunk, self._job, self._name, self._tell, flush_s=FLUSH)
        self._turn += 1
        stopped = self.slate.is_stopped if self._most is None else self._stopped
        return Page(parcel, parked, sheet, self._turn, stopped)

    def _run(self, page: Page) -> None:
        parcel, parked, sheet = page.parcel, page.parked, page.sheet
        self._sealed = sheet
        self.slate.begin_chunk(page.turn)
        if len(parcel.entries) > 1:
            self._clerk.watch(sheet)
        begin, one, add, outbox = self.slate.begin_item, self._work.one, sheet.add, self._outbox
        entries, plain, counts = parcel.entries, parcel.plain, self._most is not None
        for position in page.positions:
            # Noted before it is opened, because that may be fatal already.
            begin(position)
            if counts:
                self.tasks += 1
            if plain:
                item = entries[position]
            else:
                try:
                    item = parcel.open(position)
                except Exception as error:  # noqa: BLE001 - whatever its class raises then
                    sheet.add(position, None, bodies.unopened(error, "item"))
                    continue
            value, outcome = one(item, parked.get(position) if parked else None)
            # Nothing of it may be there while the next item runs, which then gets its memory.
            del item
            if outcome is not None or type(value) not in PLAIN:
                sheet.hold()
                value = outbox.seal(value, outcome)
                add(position, value, outcome)
                if outbox.full:
                    sheet.flush()
            else:
                add(position, value, None)
        self._clerk.leave()
        sheet.end()

    def count(self) -> None:
        """Count an item that is about to begin."""
        self.tasks += 1

    def note(self, turn: int, position: int) -> None:
        """Note that an item of one of several chunks begins."""
        if turn != self._noted:
            self._noted = turn
            self.slate.begin_chunk(turn)
        self.slate.begin_item(position)

    def seal(self, page: Page, value: Any, outcome: ItemOutcome | None) -> Any:
        """Make a result of one of several chunks ready to travel."""
        if outcome is None and type(value) in PLAIN:
            return value
        if page.sheet is not self._sealed:
            # A segment travels with the results of one chunk.
            if self._sealed is not None:
                self._sealed.flush()
            self._sealed = page.sheet
        return self._outbox.seal(value, outcome)

    def retires(self) -> bool:
        """Tell whether this worker has done its share."""
        return self._most is not None and self.tasks >= self._most

    def _stopped(self) -> bool:
        return bool(self.slate.is_stopped()) or self.retires()

    def _tell(self, report: Report) -> None:
        """Report in the worker's own thread, where counters and events stand still."""
        if isinstance(report, Done):
            self._send(report, self._stats(), self._take_events())
        else:
            self._send(report)

    def _send(
        self, report: Report, stats: dict[str, float] | None = None, events: Sequence[Event] = ()
    ) -> None:
        if self.retires():
            # Said first, so that the map sends nothing more when it hears that the chunk is over.
            send_frame(self._sock, Frame(RETIRES))
        if isinstance(report, Done):
            load: Load | tuple[()] = ()
            fd = None
            if self._sealed is not None and self._sealed.number == report.chunk:
                load, fd = self._outbox.ship()
            body = bodies.pack_done(report, stats or {}, events, load, sealed=True)
            send_frame(self._sock, Frame(DONE, report.chunk, body, fd))
        elif isinstance(report, GaveBack):
            send_frame(self._sock, Frame(GAVE_BACK, report.chunk, KEPT.pack(report.kept)))

    def _stats(self) -> dict[str, float]:
        stats = self._job.pipeline.stats
        counted = {name: amount for name, amount in stats.as_dict().items() if amount}
        stats.reset()
        return counted

    def _take_events(self) -> list[Event]:
        events, self._events[:] = self._events[:], []
        return events


def _copier() -> Callable[[memoryview], memoryview]:
    """Return what makes private copies, in memory that is not given back to the system after each."""
    ready = False

    def copy(buffer: memoryview) -> memoryview:
        nonlocal ready
        if not ready:
            ready = True
            try:
                # The allocator keeps blocks up to the size of the largest that was freed, and twice as much in all
                # (mallopt(3), M_MMAP_THRESHOLD); these bytes are never touched.
                bytes(_KEPT)
            except MemoryError:
                pass
        return memoryview(bytearray(buffer))

    return copy


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110 - a stream may be None, closed or broken
            pass


def _forget_listeners() -> None:
    """Listeners of the process that was forked hear of events there."""
    for subscription in event_bus.subscriptions:
        subscription.cancel()


def _reseed() -> None:
    """Give this process random numbers of its own; `random` does so by itself after a fork."""
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
