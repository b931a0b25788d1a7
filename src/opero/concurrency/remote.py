# this_file: src/opero/concurrency/remote.py
"""What runs in the workers of somebody else's executor: the one function that crosses the wire.

Everything it gets and gives is bytes, so that an executor need not know how to pickle anything, and a scheduler that
looks at tasks finds nothing to import but this.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from opero.caching.flight import Flight, board, unboard
from opero.concurrency.engine import Chunk, Done, GaveBack, Job, Report
from opero.concurrency.executors.process import protocol
from opero.concurrency.executors.process.job_spec import JobSpec
from opero.concurrency.sheet import Sheet, sheet_of
from opero.concurrency.work import Work
from opero.errors import OperoError
from opero.events import event_bus

if TYPE_CHECKING:
    from opero.events import Event

__all__ = ["PROTOCOL", "call", "open_reports"]

PROTOCOL: Final = 3
"""What map and worker must agree on; raised with every change of what the bytes mean."""

_KEPT: Final = 8
"""Jobs that a worker remembers."""

Packed = tuple[bytes | None, int]
"""The body of results; or None, and the position from which on a chunk is given back."""


class _Site:
    """A job in this process: its pipeline, and what has happened that the map was not told yet."""

    def __init__(self, blob: bytes) -> None:
        self.events: list[Event] = []
        shipment = JobSpec.open(blob)
        self.job: Job = shipment.job(None, self.events.append)
        # In the map's own process everybody hears of everything already.
        self._heard = shipment.listens == "bus" and shipment.program != os.getpid()
        self.work = Work(self.job)
        # A worker may have several threads.
        self.lock = threading.Lock()

    def run(self, payload: bytes) -> list[Packed]:
        """Run a chunk."""
        with ExitStack() as stack:
            if self._heard:
                stack.callback(event_bus.subscribe(self.events.append).cancel)
            if self.job.leads:
                stack.callback(unboard, board(Flight(None)))
            return self._run(payload)

    def _run(self, payload: bytes) -> list[Packed]:
        entries, _, encoded = pickle.loads(payload)  # noqa: S301 - from the map
        parked = protocol.decode_parked(encoded)
        reports: list[Report] = []
        chunk = Chunk(id=0, idx=(), items=entries)
        sheet = sheet_of(chunk, self.job, "executor", reports.append)
        if self.job.pipeline.awaits:
            from opero.utils import run_async

            run_async(self._achunk(entries, parked, sheet))
        else:
            self._chunk(entries, parked, sheet)
        return [self._packed(report) for report in reports]

    def _chunk(self, entries: list[Any], parked: dict[int, Any], sheet: Sheet) -> None:
        for position in sheet.positions():
            try:
                item = protocol.decode_value(entries[position], None)
            except Exception as error:  # noqa: BLE001 - whatever its class raises when it is unpickled
                sheet.add(position, None, protocol.unreadable(error, "item"))
            else:
                sheet.add(position, *self.work.one(item, parked.get(position)))
        sheet.end()

    async def _achunk(self, entries: list[Any], parked: dict[int, Any], sheet: Sheet) -> None:
        for position in sheet.positions():
            try:
                item = protocol.decode_value(entries[position], None)
            except Exception as error:  # noqa: BLE001 - as above
                sheet.add(position, None, protocol.unreadable(error, "item"))
            else:
                sheet.add(position, *await self.work.aone(item, parked.get(position)))
        sheet.end()

    def _packed(self, report: Report) -> Packed:
        if isinstance(report, GaveBack):
            return None, report.kept
        if not isinstance(report, Done):
            raise TypeError(report)
        with self.lock:
            stats = self.job.pipeline.stats
            counted = {name: amount for name, amount in stats.as_dict().items() if amount}
            stats.reset()
            events, self.events[:] = self.events[:], []
        report.values[:] = [protocol.encode_value(v, "result", None) for v in report.values]
        for outcome in report.odd.values():
            outcome.value = protocol.encode_value(outcome.value, "result", None)
        return pickle.dumps(protocol.encode_done(report, counted, events), 5), 0


_sites: OrderedDict[str, _Site] = OrderedDict()
_lock = threading.Lock()


def call(protocol: int, number: str, blob: bytes, payload: bytes) -> bytes:
    """Run a chunk of a job.

    Args:
        protocol: What the map speaks.
        number: The job's own name, under which it is remembered here.
        blob: The job, pickled.
        payload: Items, packed.

    Raises:
        OperoError: The map is of another version of opero.
    """
    if protocol != PROTOCOL:
        raise OperoError(
            f"the map speaks protocol {protocol} and this worker {PROTOCOL}: install the same version of opero"
        )
    with _lock:
        site = _sites.pop(number, None) or _Site(blob)
        _sites[number] = site
        while len(_sites) > _KEPT:
            _sites.popitem(last=False)
    return pickle.dumps(site.run(payload), 5)


def open_reports(chunk: int, data: bytes) -> Sequence[Report]:
    """Return what `call` has returned as an engine's reports."""
    reports: list[Report] = []
    for body, kept in pickle.loads(data):  # noqa: S301 - from our own `call`
        if body is None:
            reports.append(GaveBack(chunk, kept))
        else:
            reports.append(protocol.decode_done(chunk, pickle.loads(body)))  # noqa: S301 - as above
    return reports
