# this_file: src/opero/durable/group_commit.py
"""Group commit: all writes that wait are one transaction, so that many cost little more than one.

A thread that writes commits itself, and takes along what others have queued meanwhile; tasks of an
event loop leave that to a thread. After "Group commit" in transaction systems (D. Gawlick and
D. Kinkade, "Varieties of Concurrency Control in IMS/VS Fast Path", 1985).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opero.durable.records import Op
    from opero.durable.store import Store

__all__ = ["GroupCommit"]


class _Ticket:
    """One write that waits for its answer."""

    __slots__ = ("answer", "done", "error", "future", "op")

    def __init__(self, op: Op, future: asyncio.Future[Any] | None = None) -> None:
        self.op = op
        self.future = future
        self.done = False
        self.answer: Any = None
        self.error: Exception | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.answer


class GroupCommit:
    """The way to a store's `apply` for many threads and one event loop.

    Args:
        store: Where to.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[_Ticket] = deque()
        self._committing = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def write(self, op: Op) -> Any:
        """Write, and return the answer once it is durable.

        Raises:
            JournalError: It was not written.
        """
        ticket = _Ticket(op)
        self._waiting.append(ticket)
        with self._committing:
            if not ticket.done:
                self._commit()
        return ticket.result()

    async def awrite(self, op: Op) -> Any:
        """Write from an event loop, without blocking it.

        Raises:
            JournalError: It was not written.
        """
        ticket = _Ticket(op, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        if self._thread is None:
            self._start()
        self._wanted.set()
        # A task that is cancelled meanwhile has still written.
        assert ticket.future is not None  # noqa: S101 - for type checkers
        return await asyncio.shield(ticket.future)

    def post(self, op: Op) -> None:
        """Leave something to be written before whatever is written later; nobody hears how it went."""
        self._waiting.append(_Ticket(op))
        if self._thread is None:
            self._start()
        self._wanted.set()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._closed = True
        self._wanted.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        with self._committing:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="opero-journal", daemon=True
                )
                self._thread.start()

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            with self._committing:
                while self._waiting:
                    self._commit()
            if self._closed:
                return

    def _commit(self) -> None:
        """Write everything that waits; holds the lock."""
        tickets: list[_Ticket] = []
        while self._waiting:
            tickets.append(self._waiting.popleft())
        try:
            answers = self._store.apply([ticket.op for ticket in tickets])
        except Exception as error:  # noqa: BLE001 - each of them is told
            for ticket in tickets:
                ticket.error = error
        else:
            for ticket, answer in zip(tickets, answers, strict=True):
                ticket.answer = answer
        by_loop: dict[asyncio.AbstractEventLoop, list[_Ticket]] = {}
        for ticket in tickets:
            ticket.done = True
            if ticket.future is not None:
                by_loop.setdefault(ticket.future.get_loop(), []).append(ticket)
        for loop, some in by_loop.items():
            try:
                loop.call_soon_threadsafe(_tell, some)
            except RuntimeError:  # the loop has ended: nobody waits any more
                continue


def _tell(tickets: list[_Ticket]) -> None:
    for ticket in tickets:
        future = ticket.future
        if future is None or future.done():
            continue
        if ticket.error is None:
            future.set_result(ticket.answer)
        else:
            future.set_exception(ticket.error)
