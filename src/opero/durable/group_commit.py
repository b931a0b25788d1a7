# this_file: src/opero/durable/group_commit.py
"""Group commit: all writes that wait are one transaction, so that many cost little more than one.

A thread that writes commits itself, and takes along what others have queued meanwhile; tasks of an
event loop leave that to a thread. After "Group commit" in transaction systems (D. Gawlick and
D. Kinkade, "Varieties of Concurrency Control in IMS/VS Fast Path", 1985).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from opero.durable.records import PutStep, Take
from opero.durable.turns import turns_of

if TYPE_CHECKING:
    from opero.durable.records import Op
    from opero.durable.store import Store

__all__ = ["GroupCommit"]

_TICK: Final = 1e-6
"""Seconds between two steps that end in one commit."""


class _Ticket:
    """One write that waits for its answer."""

    __slots__ = ("answer", "done", "error", "future", "line", "op")

    def __init__(
        self, op: Op, future: asyncio.Future[Any] | None = None, line: object = None
    ) -> None:
        self.op = op
        self.future = future
        self.line = line
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
        self._last = 0.0

    def not_before(self, moment: float) -> None:
        """End no step before a moment: the clock may have been set back since a step that is recorded."""
        with self._committing:
            self._last = max(self._last, moment)

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

    def write_all(self, ops: Iterable[Op]) -> list[Any]:
        """Write several, all in one transaction, and return the answers once they are durable.

        Raises:
            JournalError: They were not written.
        """
        tickets = [_Ticket(op) for op in ops]
        with self._committing:
            self._waiting.extend(tickets)
            self._commit()
        return [ticket.result() for ticket in tickets]

    async def awrite(self, op: Op, line: object = None) -> Any:
        """Write from an event loop, without blocking it; arguments and errors as for `submit`."""
        return await self.submit(op, line)

    def submit(self, op: Op, line: object = None) -> asyncio.Future[Any]:
        """Leave something to be written, and return a future of the running loop that gets the answer.

        Args:
            op: What.
            line: Answers of a line are given one after another, as `turns` tells; None does not care.

        Raises:
            JournalError: It was not written (raised by the future).
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Should the future be cancelled meanwhile, it is written all the same.
        self._waiting.append(_Ticket(op, future, line))
        if self._thread is None:
            self._start()
        self._wanted.set()
        return future

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
            self._stamp(tickets[-1].op)
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

    def _stamp(self, op: Op) -> None:
        """Have steps end one after another: a replay gives their outcomes in this order."""
        if isinstance(op, PutStep) and op.step.ended is not None:
            op.step.ended = self._last = max(self._last + _TICK, time.time())
        elif type(op) is Take:
            op.at = self._last = max(self._last + _TICK, time.time())


def _tell(tickets: list[_Ticket]) -> None:
    turns = None
    for ticket in tickets:
        if ticket.line is None:
            _answer(ticket)
        else:
            turns = turns or turns_of(asyncio.get_running_loop())
            op: Any = ticket.op
            ended = op.at if type(op) is Take else op.step.ended
            turns.queue(ticket.line, ended or 0.0, partial(_answer, ticket))


def _answer(ticket: _Ticket) -> None:
    future = ticket.future
    if future is None or future.done():
        return
    if ticket.error is None:
        future.set_result(ticket.answer)
    else:
        future.set_exception(ticket.error)
