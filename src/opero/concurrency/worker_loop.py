# this_file: src/opero/concurrency/worker_loop.py
"""The event loop of a worker process: coroutines of its chunks, several at once."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero.concurrency import bodies
from opero.concurrency.rounds import LOOK

if TYPE_CHECKING:
    import socket

    from opero.concurrency.executors.base import ItemOutcome
    from opero.concurrency.page import Page
    from opero.concurrency.slate import Slate
    from opero.concurrency.work import Work

__all__ = ["Desk", "WorkerLoop"]

_SOON: Final = 0.002
"""Seconds after which what is finished is reported, though the next item is not."""
_BEATS: Final = 4
"""Signs of life within the time that a call may take."""


class Desk(Protocol):
    """What a loop needs of its worker."""

    def count(self) -> object:
        """Count an item that is about to begin."""
        ...

    def note(self, turn: int, position: int) -> object:
        """Note that an item begins: the turn of its chunk, and its position."""
        ...

    def seal(self, page: Page, value: Any, outcome: ItemOutcome | None) -> Any:
        """Make a result of a chunk ready to travel."""
        ...

    def retires(self) -> bool:
        """Tell whether the worker has done its share."""
        ...

    def receive(self) -> list[Page]:
        """Return the chunks that have come."""
        ...

    def leave(self) -> object:
        """Do what is done after each chunk."""
        ...


class WorkerLoop:
    """Runs coroutine functions, all on one loop, so that clients and pools live on between chunks.

    As long as slow items of one chunk are at work, the next chunk goes on beside them. A call that takes too long is
    cancelled by its pipeline. One that holds up the loop cannot be; as long as the loop turns it says so on the slate,
    and the map kills a worker that has been silent for the time of a call.

    Args:
        work: Runs an item.
        slate: Where the signs of life go.
        in_flight: Most items at once.
        limit: Longest time of a call in seconds, None for no limit.
        desk: The worker.
    """

    def __init__(
        self,
        work: Work,
        slate: Slate,
        *,
        in_flight: int,
        limit: float | None,
        desk: Desk,
    ) -> None:
        self._work = work
        self._slate = slate
        self._in_flight = in_flight
        self._limit = limit
        self._desk = desk
        self._runner = asyncio.Runner()
        self._pages: list[Page] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._beating: asyncio.TimerHandle | None = None
        self._ended = False

    def serve(self, sock: socket.socket) -> None:
        """Run the chunks that come through a socket until it is closed, or the worker has done its share."""
        self._runner.run(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, self._guarded(self._readable))
        try:
            await self._over
        finally:
            self._loop.remove_reader(sock)
            for timer in (self._looking, self._beating):
                if timer is not None:
                    timer.cancel()

    def _guarded(self, step: Callable[[], object]) -> Callable[[], None]:
        """Return a callback whose error ends the worker, as it would outside of a loop."""

        @functools.wraps(step)
        def run() -> None:
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - `serve` raises it
                self._fail(error)

        return run

    def _fail(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    # --- chunks -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            self._pages += self._desk.receive()
        except (EOFError, OSError):
            self._ended = True
        self._fill()

    def _fill(self) -> None:
        """Begin as many items as may be; end what is over."""
        while len(self._tasks) < self._in_flight and (found := self._next()) is not None:
            if not self._tasks:
                self._live()
            task = self._loop.create_task(self._pull(*found))
            self._tasks.add(task)
            task.add_done_callback(self._pulled)
        if self._looking is None and self._pages:
            self._looking = self._loop.call_later(LOOK, self._guarded(self._look))
        if not self._tasks and (self._ended or self._desk.retires()):
            while self._pages:
                self._finish(self._pages[0])
            if not self._over.done():
                self._over.set_result(None)

    def _next(self) -> tuple[Page, int] | None:
        """Return an item to begin, of the oldest chunk that has one."""
        for page in self._pages:
            if (position := next(page.positions, None)) is not None:
                self._desk.count()
                return page, position
        return None

    def _look(self) -> None:
        """Give back what has not begun of chunks that take long."""
        self._looking = None
        for page in self._pages:
            page.sheet.look()
        if self._pages:
            self._looking = self._loop.call_later(LOOK, self._guarded(self._look))

    def _finish(self, page: Page) -> None:
        self._pages.remove(page)
        if page.soon is not None:
            page.soon.cancel()
        page.sheet.end()
        self._desk.leave()

    # --- items ------------------------------------------------------------------------------------

    async def _pull(self, page: Page, position: int) -> None:
        """Run an item, and others after it as long as there are some."""
        found: tuple[Page, int] | None = (page, position)
        while found is not None:
            page, position = found
            self._desk.note(page.turn, position)
            try:
                item = page.parcel.open(position)
            except Exception as error:  # noqa: BLE001 - whatever its class raises when it is unpickled
                self._add(page, position, None, bodies.unopened(error, "item"))
            else:
                told = await self._work.aone(item, page.parked.get(position))
                del item
                self._add(page, position, *told)
            found = self._next()

    def _pulled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._fail(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self._fail(error)
        else:
            if not self._tasks:
                self._rest()
            self._guarded(self._fill)()

    def _add(self, page: Page, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Write down what became of an item, and let that be reported soon."""
        page.sheet.add(position, self._desk.seal(page, value, outcome), outcome)
        if page.sheet.over:
            self._finish(page)
        elif page.soon is None:
            flush = self._guarded(functools.partial(self._report, page))
            page.soon = self._loop.call_later(_SOON, flush)

    @staticmethod
    def _report(page: Page) -> None:
        page.soon = None
        page.sheet.flush()

    # --- signs of life ----------------------------------------------------------------------------

    def _live(self) -> None:
        """Give signs of life as long as the loop turns."""
        if self._limit is None:
            return
        pause = self._limit / _BEATS
        # Dated ahead, so that no call is taken for late before it is.
        self._slate.begin_call(time.monotonic_ns() + int(pause * 1e9))
        self._beating = self._loop.call_later(pause, self._live)

    def _rest(self) -> None:
        """Give none while no call is under way."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
            self._slate.end_call()

    def close(self) -> None:
        """End the loop."""
        self._runner.close()
