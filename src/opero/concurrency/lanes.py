# this_file: src/opero/concurrency/lanes.py
"""A pool of lanes: chunks go to whichever is idle, and a dead lane is replaced.

One thread, no locks: sockets that do not block, and one place where they are waited for.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NoReturn

from opero.concurrency import bodies, nursery, worker
from opero.concurrency.arena import Arena
from opero.concurrency.backlog import deal
from opero.concurrency.chunks import ChunkProgress
from opero.concurrency.executors.base import GaveBack, Lost
from opero.concurrency.lane import Held, Lane, verdicts
from opero.concurrency.memory import resident
from opero.concurrency.nurse import Nurse, own_socket
from opero.concurrency.parcel import Parcel
from opero.concurrency.segment import CAN_PASS, Intake, Supply
from opero.concurrency.shipment import Shipment
from opero.concurrency.start import StartMethod, choose_start, settle
from opero.errors import WorkerStartError
from opero.limits.shareable import publish_all

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapJob, Report, Why
    from opero.concurrency.wire import Frame

__all__ = ["LanePool"]

_STILLBORN: Final = 5
"""So many workers in a row that died before they were ready, and no other is tried."""
_MEMORY_LOOK: Final = 0.1
"""Seconds between two looks at the memory of workers."""
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class LanePool:
    """Lanes for one job; `twat_mp.MultiPool` makes, enters and leaves it as it does pathos' pools.

    Args:
        nodes: Most lanes at once; they begin when there is something to do.
        job: What they do.
        method: How they begin; None for what is safe now.

    Attributes:
        graceful: Whether lanes may finish their items when the pool is left.
        patience: Seconds that leaving may take.
    """

    def __init__(self, nodes: int, *, job: MapJob, method: StartMethod | None = None) -> None:
        self.nodes = nodes
        self.graceful = False
        self.patience = 1.0
        self._job = job
        self._method: StartMethod | None = method
        self._pickled: bytes | None = None
        self._shipment = Shipment.of(job)
        self._nurse: Nurse | None = None
        self._lanes: dict[int, Lane] = {}
        self._backlog: deque[Held] = deque()
        self._supply, self._arena = Supply(2 * nodes), Arena()
        self._reports: list[Report] = []
        self._begun = self._stillborn = self._barren = 0
        self._closed = False
        self._woken, self._waker = own_socket()
        self._waker.setblocking(False)
        # Unlike epoll it is no descriptor that a fork would share.
        self._selector = getattr(selectors, "PollSelector", selectors.DefaultSelector)()
        self._selector.register(self._woken, _READ, None)

    # --- nursery and lanes ------------------------------------------------------------------------

    def open(self) -> None:
        """Begin the nursery.

        Raises:
            ShippingError: The job cannot be sent to another process.
        """
        method = self._method or choose_start(settle())[0]
        if method == "fork":
            publish_all()
            self._shipment.introduce()
        self._nurse = Nurse(method, self._shipment)
        self._selector.register(self._nurse.sock, _READ, self._nurse)
        if method != "fork" and self._pickled is None:
            # While the fresh interpreter begins.
            self._pickled = self._shipment.pickled()

    def _begin_lane(self) -> None:
        if self._nurse is None:
            self.open()
        nurse = self._nurse
        if nurse is None:
            return
        self._begun += 1
        try:
            job = None if nurse.inherits else self._pickled
            lane = Lane(self._begun, nurse, job, Intake(self._arena.copy))
        except OSError:
            self._nursery_died(nurse)
            return
        self._lanes[lane.number] = lane
        self._selector.register(lane.sock, _READ, lane)
        self._watch(lane)
        self._watch(nurse)

    def _watch(self, one: Lane | Nurse) -> None:
        """Wait for room to write exactly while there is something to be written."""
        wanted = _READ | _WRITE if one.pending else _READ
        key = self._selector.get_map().get(one.sock)
        if key is not None and key.events != wanted:
            self._selector.modify(one.sock, wanted, one)

    def _dispatch(self) -> None:
        for lane in deal(self._backlog, self._lanes.values(), self._job.in_flight):
            self._watch(lane)
        coming = sum(not lane.up for lane in self._lanes.values())
        for _ in range(min(len(self._backlog) - coming, self.nodes - len(self._lanes))):
            self._begin_lane()

    # --- the engine's verbs -----------------------------------------------------------------------

    def submit(self, chunk: Chunk) -> None:
        """Pack a chunk and send it to an idle lane, or keep it until there is one."""
        segment = self._supply.take() if CAN_PASS else None
        body = bodies.pack_chunk(chunk, segment)
        alone = chunk.attempt > 0
        self._backlog.append(Held(chunk.id, body, ChunkProgress(len(chunk)), segment, alone))
        self._dispatch()

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what lanes have reported; wait for it if there is nothing yet.

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
        """Wait once, for so many seconds at most, and handle what has come; tell whether it was a `wake`."""
        woken = False
        soonest = self._look_after(time.monotonic())
        waits = [seconds for seconds in (left, soonest) if seconds is not None]
        for key, mask in self._selector.select(min(waits, default=None)):
            if key.data is None:
                woken = bool(self._woken.recv(4096))
            elif isinstance(key.data, Nurse):
                self._hear_nurse(key.data, mask)
            else:
                self._hear_lane(key.data, mask)
        self._dispatch()
        return woken

    def kill(self, number: int, why: Why) -> bool:
        """End the worker that has this chunk."""
        for held in self._backlog:
            if held.number == number:
                self._backlog.remove(held)
                self._supply.drop(held.segment)
                self._reports.append(Lost(number, None, why))
                return True
        for lane in self._lanes.values():
            if number in lane.held:
                lane.kill(why)
                self._watch(lane.nurse)
                return True
        return False

    def wake(self) -> None:
        """Let `poll` return."""
        try:
            self._waker.send(b"w")
        except OSError:
            # It is full, which wakes as well; or closed.
            pass

    # --- time and memory --------------------------------------------------------------------------

    def _look_after(self, now: float) -> float | None:
        """Kill what takes too long or too much; return the seconds until the next look, None for no need of one."""
        limit, most = self._job.item_timeout, self._job.memory_limit
        if limit is None and most is None:
            return None
        looks = []
        for lane in self._lanes.values():
            if not lane.held or lane.why or lane.closed:
                continue
            if limit is not None:
                began = lane.slate.call_began
                # Who is in no call now cannot be late before a whole limit from now.
                left = limit if not began else began / 1e9 + limit - now
                if left <= 0:
                    lane.judged = began
                    lane.kill("timeout")
                looks.append(max(left, 0.001))
            if most is not None:
                if resident(lane.pid) > most:
                    lane.kill("memory")
                looks.append(_MEMORY_LOOK)
            self._watch(lane.nurse)
        return min(looks, default=None)

    # --- what they say ----------------------------------------------------------------------------

    def _hear_nurse(self, nurse: Nurse, mask: int) -> None:
        try:
            if mask & _WRITE:
                nurse.flush()
            while True:
                for frame in nurse.receive():
                    self._from_nurse(frame)
        except BlockingIOError:
            self._watch(nurse)
        except (EOFError, OSError):
            self._nursery_died(nurse)

    def _from_nurse(self, frame: Frame) -> None:
        lane = self._lanes.get(frame.number)
        if lane is None or frame.kind == nursery.READY:
            return
        pid, code = nursery.END.unpack(frame.body)
        lane.pid = pid
        if frame.kind == nursery.GONE:
            lane.exitcode = code
            self._bury(lane)

    def _nursery_died(self, nurse: Nurse) -> None:
        """Go on without it: its lanes live until they are done, and the next lane gets another nursery."""
        if self._nurse is nurse:
            self._nurse = None
        if nurse.sock in self._selector.get_map():
            self._selector.unregister(nurse.sock)
        said = nurse.said()
        nurse.close(0.0)
        self._count_stillborn(said, None)
        for lane in list(self._lanes.values()):
            if lane.nurse is nurse and (not lane.up or lane.closed):
                self._bury(lane)

    def _hear_lane(self, lane: Lane, mask: int) -> None:
        if lane.number not in self._lanes:
            return
        if mask & _WRITE:
            try:
                lane.flush()
            except OSError:
                pass
            self._watch(lane)
        if mask & ~_WRITE:
            self._drain(lane)
            if lane.closed:
                self._selector.unregister(lane.sock)
                if self._nurse is not lane.nurse:
                    self._bury(lane)

    def _drain(self, lane: Lane) -> None:
        for frame in lane.frames():
            self._from_lane(lane, frame)

    def _from_lane(self, lane: Lane, frame: Frame) -> None:
        if frame.kind == worker.UP:
            lane.up, lane.pid = True, frame.number
            self._stillborn = 0
        elif frame.kind == worker.FAILED:
            lane.failure = bytes(frame.body).decode(errors="replace")
        elif frame.kind == worker.RETIRES:
            lane.retires = True
        elif (held := lane.held.get(frame.number)) is not None:
            if frame.kind == worker.GAVE_BACK:
                (kept,) = worker.KEPT.unpack(frame.body)
                held.tally.cut(kept)
                self._reports.append(GaveBack(held.number, kept))
            else:
                parcel = Parcel(frame.body, frame.fd, lane.intake)
                done = bodies.open_done(parcel, frame.number, weight=held.weight)
                if parcel.kept:
                    lane.slate.empty_one()
                held.tally.report(done.places)
                # While something is done, a new worker is worth a try.
                self._barren = self._stillborn = 0
                self._reports.append(done)
            if held.tally.over:
                del lane.held[held.number]
                self._supply.give_back(held.segment)

    def _bury(self, lane: Lane) -> None:
        """Report what a dead lane leaves behind, once."""
        if self._lanes.pop(lane.number, None) is None:
            return
        if not lane.closed:
            self._drain(lane)
        if lane.sock in self._selector.get_map():
            self._selector.unregister(lane.sock)
        lane.gone = True
        said = lane.slate.said
        lane.close()
        if lane.failure is not None:
            raise WorkerStartError(lane.failure, lane.exitcode)
        if not lane.up:
            self._count_stillborn(said, lane.exitcode)
            return
        self._reports += self._judge(lane)
        for held in lane.held.values():
            self._supply.drop(held.segment)

    def _judge(self, lane: Lane) -> list[Lost]:
        if not lane.held:
            return []
        if lane.why == "timeout" and lane.slate.call_began != lane.judged:
            # The late call ended just before the kill; whatever came next is innocent.
            return [Lost(number, None, "stopped") for number in lane.held]
        begun = [(held, lane.begun(held)) for held in lane.held.values()]
        self._barren = 0 if any(last is not None for _, last in begun) else self._barren + 1
        return verdicts(
            begun,
            why=lane.why or "crash",
            barren=self._barren >= _STILLBORN,
            several=self._job.in_flight > 1,
            pid=lane.pid,
            exitcode=lane.exitcode,
        )

    def _count_stillborn(self, said: str, exitcode: int | None) -> None:
        self._stillborn += 1
        if self._stillborn >= _STILLBORN:
            raise WorkerStartError(said, exitcode)

    # --- what MultiPool asks of a pool ------------------------------------------------------------

    def map(self, *_: Any) -> NoReturn:
        """Refuse: `MultiPool` puts a `map` of its own over this one, but the driver sends chunks."""
        raise NotImplementedError("lanes take chunks: submit() and poll()")

    def close(self) -> None:
        """Take no more chunks, and ask lanes to end once they have finished what they are at."""
        self._backlog.clear()
        if self.graceful:
            for lane in self._lanes.values():
                lane.stop()

    def terminate(self) -> None:
        """Do not wait for anything."""
        self.graceful = False
        self.close()

    def join(self) -> None:
        """Wait for the end of all lanes, as long as may be; then kill them."""
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + self.patience
        try:
            # Who is at nothing has nothing to finish, and goes with the nursery.
            if self.graceful and any(lane.held for lane in self._lanes.values()):
                self._wait(end)
        finally:
            self._end(max(0.0, end - time.monotonic()))

    def _wait(self, end: float) -> None:
        while self._lanes and (left := end - time.monotonic()) > 0:
            try:
                self._turn(left)
            except WorkerStartError:
                pass
            self._reports.clear()

    def _end(self, timeout: float) -> None:
        nurses = {lane.nurse for lane in self._lanes.values()}
        for lane in self._lanes.values():
            if lane.nurse is not self._nurse:
                lane.kill(None)
            lane.close()
        if self._nurse is not None:
            nurses.add(self._nurse)
        for nurse in nurses:
            nurse.close(timeout)
        self._supply.close()
        self._lanes.clear()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def clear(self) -> None:
        """Do nothing: nothing is left."""
