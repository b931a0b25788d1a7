# this_file: src/opero/durable/journal.py
"""Write steps in group commits, and hand out outcomes in their recorded order.

Group commit: all writes that wait are one transaction, so that many cost little more than one. A thread
that writes commits itself, with everything that others have queued meanwhile; tasks of an event loop leave
that to a thread. After "Group commit" in transaction systems (D. Gawlick and D. Kinkade, "Varieties of
Concurrency Control in IMS/VS Fast Path", 1985).

Replay order: "the first that is done wins" is decided by the order in which outcomes reach the tasks of a
workflow. So they are handed out one after another, as they were recorded: the next one when everything that
the one before has caused has been done, in the first run as well as in a replay.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

from opero.durable.records import JournalStore, Op, PutStep, Take

# --- replay order -------------------------------------------------------------------------------------------------

_MAX_ROUNDS: Final = 64
"""Rounds of the event loop that are waited for; a loop that is busy for longer never becomes idle."""

_AT_A_TIME: Final = 64
"""Outcomes handed out before the loop serves sockets and timers again."""

HandOut = Callable[[], object]


class ReplayOrder:
    """Hand out outcomes in one event loop, one at a time, in their recorded order.

    Args:
        loop: The loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # What is to be run in this or the next round; a loop that hides it gets a few rounds for each outcome.
        self._ready: Any = getattr(loop, "_ready", None)
        self._queues: dict[object, list[tuple[float, int, HandOut]]] = {}
        self._numbers = itertools.count()
        self._rounds = 0
        self._scheduled = False

    def queue(self, line: object, order: float, hand_out: HandOut) -> None:
        """Queue an outcome; must be called in the loop's thread.

        Args:
            line: Outcomes of the same line wait for each other.
            order: The smallest is the next.
            hand_out: Hands it out.
        """
        heapq.heappush(self._queues.setdefault(line, []), (order, next(self._numbers), hand_out))
        if not self._scheduled:
            self._scheduled = True
            self._rounds = 0
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        busy = self._rounds < 8 if self._ready is None else bool(self._ready)
        if busy and self._rounds < _MAX_ROUNDS:
            self._rounds += 1
            asyncio.get_running_loop().call_soon(self._run)
            return
        self._rounds = 0
        try:
            self._hand_out()
            if not busy:
                self._continue()
        finally:
            self._scheduled = bool(self._queues)
            if self._scheduled:
                asyncio.get_running_loop().call_soon(self._run)

    def _hand_out(self) -> None:
        """Hand out the next outcome of each line."""
        for line, waiting in list(self._queues.items()):
            heapq.heappop(waiting)[2]()
            if not waiting:
                del self._queues[line]

    def _continue(self) -> None:
        """Hand out further outcomes, and run what each causes, as the loop would in its next rounds.

        A replay of thousands of outcomes would else pay for several rounds of the loop with each. Nothing is done
        out of its order: this callback is the last of its round, so what is ready now has come after it.
        """
        loop, ready = asyncio.get_running_loop(), self._ready
        if ready is None:
            return
        for _ in range(_AT_A_TIME):
            for _ in range(_MAX_ROUNDS):
                for _ in range(len(ready)):
                    handle = ready.popleft()
                    if not handle.cancelled():
                        handle._run()  # noqa: SLF001 - as the loop itself does
                if not ready:
                    break
            if ready or not self._queues or getattr(loop, "_stopping", False):
                return
            self._hand_out()


_orders: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, ReplayOrder]] = WeakKeyDictionary()


def order_of(loop: asyncio.AbstractEventLoop) -> ReplayOrder:
    """Return the replay order of a loop; must be called in the loop's thread."""
    found = _orders.get(loop)
    if found is None:
        found = _orders[loop] = ReplayOrder(loop)
    return found


# --- group commit -------------------------------------------------------------------------------------------------

_TICK: Final = 1e-6
"""Seconds between two steps that end in one commit."""


@dataclass(slots=True, eq=False)
class _Write:
    """One write that waits for its answer."""

    op: Op
    future: asyncio.Future[Any] | None = None
    line: object = None
    done: bool = False
    answer: Any = None
    error: Exception | None = None


class Journal:
    """Write to a store in group commits, from many threads and one event loop.

    Args:
        store: The store.
    """

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._waiting: deque[_Write] = deque()
        self._committing = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._last = 0.0

    def not_before(self, moment: float) -> None:
        """End no step before a moment: the clock may have been set back since a step was recorded."""
        with self._committing:
            self._last = max(self._last, moment)

    def write(self, op: Op) -> Any:
        """Write, and return the answer once it is durable.

        Raises:
            JournalError: It was not written.
        """
        waiting = _Write(op)
        self._waiting.append(waiting)
        with self._committing:
            if not waiting.done:
                self._commit()
        if waiting.error is not None:
            raise waiting.error
        return waiting.answer

    def write_all(self, ops: Iterable[Op]) -> list[Any]:
        """Write several in one transaction, and return the answers once they are durable.

        Raises:
            JournalError: They were not written.
        """
        batch = [_Write(op) for op in ops]
        with self._committing:
            self._waiting.extend(batch)
            self._commit()
        for one in batch:
            if one.error is not None:
                raise one.error
        return [one.answer for one in batch]

    def submit(self, op: Op, line: object = None) -> asyncio.Future[Any]:
        """Queue a write, and return a future of the running loop that gets the answer.

        Args:
            op: The write.
            line: Answers of a line are handed out one after another, in replay order; None for at once.

        Raises:
            JournalError: It was not written (raised by the future).
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Should the future be cancelled meanwhile, it is written all the same.
        self._queue(_Write(op, future, line))
        return future

    def post(self, op: Op) -> None:
        """Queue something to be written before whatever is written later; nothing waits for it."""
        self._queue(_Write(op))

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._closed = True
        self._wanted.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _queue(self, one: _Write) -> None:
        self._waiting.append(one)
        if self._thread is None:
            with self._committing:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._serve, name="opero-journal", daemon=True
                    )
                    self._thread.start()
        self._wanted.set()

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
        """Write everything that waits; the lock is held."""
        batch: list[_Write] = []
        while self._waiting:
            one = self._waiting.popleft()
            batch.append(one)
            # Steps end one after another: a replay hands out their outcomes in this order.
            op = one.op
            if isinstance(op, PutStep) and op.step.ended is not None:
                op.step.ended = self._last = max(self._last + _TICK, time.time())
            elif type(op) is Take:
                op.at = self._last = max(self._last + _TICK, time.time())
        try:
            answers = self._store.apply([one.op for one in batch])
        except Exception as error:  # noqa: BLE001 - each of them gets it
            for one in batch:
                one.error = error
        else:
            for one, answer in zip(batch, answers, strict=True):
                one.answer = answer
        by_loop: dict[asyncio.AbstractEventLoop, list[_Write]] = {}
        for one in batch:
            one.done = True
            if one.future is not None:
                by_loop.setdefault(one.future.get_loop(), []).append(one)
        for loop, some in by_loop.items():
            try:
                loop.call_soon_threadsafe(_answer_all, some)
            except RuntimeError:  # the loop has ended, and with it what waited
                continue


def _answer_all(batch: list[_Write]) -> None:
    order = None
    for one in batch:
        if one.line is None:
            _answer(one)
        else:
            order = order or order_of(asyncio.get_running_loop())
            op: Any = one.op
            ended = op.at if type(op) is Take else op.step.ended
            order.queue(one.line, ended or 0.0, partial(_answer, one))


def _answer(one: _Write) -> None:
    future = one.future
    if future is None or future.done():
        return
    if one.error is None:
        future.set_result(one.answer)
    else:
        future.set_exception(one.error)
