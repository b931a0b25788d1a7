# this_file: src/opero/concurrency/worker_loop.py
"""The event loop of a worker process: coroutines of a chunk, several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency import bodies
from opero.concurrency.rounds import LOOK

if TYPE_CHECKING:
    from opero.concurrency.engine import Outcome, Parked
    from opero.concurrency.parcel import Parcel
    from opero.concurrency.sheet import Sheet
    from opero.concurrency.slate import Slate
    from opero.concurrency.work import Work

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
        begin: Callable[[int], object],
        stopped: Callable[[], bool],
        seal: Seal,
    ) -> None:
        """Run a chunk.

        Args:
            parcel: Its items.
            parked: What some of them bring from earlier attempts.
            sheet: Takes what becomes of them.
            begin: Notes that an item begins.
            stopped: Whether none may any more.
            seal: Makes a result ready for the sheet.
        """
        self._runner.run(self._run(_Page(parcel, parked, sheet, begin, stopped, seal)))

    async def _run(self, page: _Page) -> None:
        with self._alive(), page.watched():
            pullers = min(self._in_flight, len(page.parcel.entries))
            if pullers == 1:
                await self._pull(page)
            else:
                async with asyncio.TaskGroup() as group:
                    for _ in range(pullers):
                        group.create_task(self._pull(page))
        page.sheet.end()

    async def _pull(self, page: _Page) -> None:
        for position in page.sheet.positions(page.stopped):
            page.begin(position)
            try:
                item = page.parcel.open(position)
            except Exception as error:  # noqa: BLE001 - whatever its class raises when it is unpickled
                page.add(position, None, bodies.unopened(error, "item"))
                continue
            page.add(position, *await self._work.aone(item, page.parked.get(position)))

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
    """A chunk under way, whose items finish in any order."""

    def __init__(
        self,
        parcel: Parcel,
        parked: dict[int, Parked],
        sheet: Sheet,
        begin: Callable[[int], object],
        stopped: Callable[[], bool],
        seal: Seal,
    ) -> None:
        self.parcel = parcel
        self.parked = parked
        self.sheet = sheet
        self.begin = begin
        self.stopped = stopped
        self.seal = seal
        self._soon: asyncio.TimerHandle | None = None

    def add(self, position: int, value: Any, outcome: Outcome | None) -> None:
        """Write down what became of an item, and let that be reported soon."""
        self.sheet.add(position, self.seal(value, outcome), outcome)
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(_SOON, self._report)

    def _report(self) -> None:
        self._soon = None
        self.sheet.flush()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the sheet now and then, so that what has not begun is given back."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            timer = loop.call_later(LOOK, look) if self.sheet.look() else None

        timer = loop.call_later(LOOK, look)
        try:
            yield
        finally:
            for pending in (timer, self._soon):
                if pending is not None:
                    pending.cancel()
