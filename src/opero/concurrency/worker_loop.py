# this_file: src/opero/concurrency/worker_loop.py
"""The event loop of a worker process: coroutines of a chunk, several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency import bodies

if TYPE_CHECKING:
    from opero.concurrency.engine import Outcome, Parked
    from opero.concurrency.parcel import Parcel
    from opero.concurrency.slate import Slate
    from opero.concurrency.work import Sheet, Work

__all__ = ["WorkerLoop"]

Seal = Callable[[Any, "Outcome | None"], Any]

_SOON: Final = 0.002
"""Seconds after which what is finished is reported, though the next item is not."""
_BEATS: Final = 4
"""Signs of life within the time that a call may take."""


class WorkerLoop:
    """Runs the chunks of a coroutine function, all on one loop, so that clients and pools live on between them.

    A call that takes too long is cancelled by its pipeline. One that holds up the loop cannot be; as long as the loop
    turns it says so on the slate, and the map kills a worker that has been silent for the time of a call.

    Args:
        work: Runs an item.
        slate: Where the signs of life go.
        in_flight: Most items at once.
        limit: Longest time of a call in seconds, None for no limit.
    """

    def __init__(self, work: Work, slate: Slate, *, in_flight: int, limit: float | None) -> None:
        self._work = work
        self._slate = slate
        self._in_flight = in_flight
        self._limit = limit
        self._runner = asyncio.Runner()

    def run(
        self,
        parcel: Parcel,
        parked: dict[int, Parked],
        sheet: Sheet,
        begin: Callable[[int], bool],
        seal: Seal,
    ) -> None:
        """Run a chunk.

        Args:
            parcel: Its items.
            parked: What some of them bring from earlier attempts.
            sheet: Takes what becomes of them.
            begin: Notes that an item begins; False if none may any more.
            seal: Makes a result ready for the sheet.
        """
        self._runner.run(self._run(parcel, parked, sheet, begin, seal))

    async def _run(
        self,
        parcel: Parcel,
        parked: dict[int, Parked],
        sheet: Sheet,
        begin: Callable[[int], bool],
        seal: Seal,
    ) -> None:
        page = _Page(parcel, parked, sheet, begin, seal)
        with self._alive():
            pullers = min(self._in_flight, page.length)
            if pullers == 1:
                await self._pull(page)
            else:
                async with asyncio.TaskGroup() as group:
                    for _ in range(pullers):
                        group.create_task(self._pull(page))
        page.finish()

    async def _pull(self, page: _Page) -> None:
        while (position := page.next()) is not None:
            try:
                item = page.open(position)
            except Exception as error:  # noqa: BLE001 - whatever its class raises when it is unpickled
                page.done(position, (None, bodies.unopened(error, "item")))
                continue
            page.done(position, await self._work.aone(item, page.parked.get(position)))

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Give signs of life as long as the loop turns."""
        if self._limit is None:
            yield
            return
        loop, pause = asyncio.get_running_loop(), self._limit / _BEATS
        timer: asyncio.TimerHandle | None = None

        def beat() -> None:
            nonlocal timer
            # Dated ahead, so that no call is taken for late before it is.
            self._slate.begin_call(time.monotonic_ns() + int(pause * 1e9))
            timer = loop.call_later(pause, beat)

        beat()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._slate.end_call()

    def close(self) -> None:
        """End the loop."""
        self._runner.close()


class _Page:
    """The items of a chunk, begun in order and finished in any; they are reported in order."""

    def __init__(
        self,
        parcel: Parcel,
        parked: dict[int, Parked],
        sheet: Sheet,
        begin: Callable[[int], bool],
        seal: Seal,
    ) -> None:
        self.parked = parked
        self.length = len(parcel.entries)
        self._parcel = parcel
        self._sheet = sheet
        self._begin = begin
        self._seal = seal
        self._begun = self._told = 0
        self._given_back = False
        self._early: dict[int, tuple[Any, Outcome | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def next(self) -> int | None:
        """Return the position of the next item, None if none shall begin."""
        position = self._begun
        if self._given_back or position == self.length or not self._begin(position):
            return None
        self._begun += 1
        return position

    def open(self, position: int) -> Any:
        """Return an item."""
        entry = self._parcel.entries[position]
        return entry if self._parcel.plain else self._parcel.open(position)

    def done(self, position: int, told: tuple[Any, Outcome | None]) -> None:
        """Take what became of an item, and report it once all before it are."""
        self._early[position] = told
        while (ready := self._early.pop(self._told, None)) is not None:
            self._told += 1
            value, outcome = ready
            self._given_back = not self._sheet.add(self._seal(value, outcome), outcome)
        if self._timer is None and self._told < self.length:
            self._timer = self._loop.call_later(_SOON, self._report)

    def _report(self) -> None:
        self._timer = None
        if not self._given_back:
            self._sheet.report()

    def finish(self) -> None:
        """Report the rest."""
        if self._timer is not None:
            self._timer.cancel()
        if self._given_back:
            return
        if self._told == self.length:
            self._sheet.end()
        else:
            self._sheet.stop()
