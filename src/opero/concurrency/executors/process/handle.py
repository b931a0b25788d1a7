# this_file: src/opero/concurrency/executors/process/handle.py
"""Track one worker process: its connection, the chunks that it has, and what its death means for them."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections import deque
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import ChunkProgress, Lost
from opero.concurrency.executors.process import protocol
from opero.concurrency.executors.process.protocol import (
    ASK,
    PAGE,
    BufferPool,
    WorkerStatus,
    shared_file,
)
from opero.concurrency.executors.process.start import EXIT_STATUS, close_in_child

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Done, Why
    from opero.concurrency.executors.process.protocol import Frame, SharedBuffer
    from opero.concurrency.executors.process.start import ForkServer

__all__ = ["PendingChunk", "WorkerHandle", "assign", "judge", "judge_all"]

_PIPE: Final = 1 << 16
"""Bytes that a pipe takes in any case while its reader is busy."""


# --- chunks ---------------------------------------------------------------------------------------


class PendingChunk:
    """A chunk, encoded, on its way to a worker or in it.

    Attributes:
        number: Its id.
        message: What is sent.
        size: Bytes of that.
        progress: What of it was reported.
        buffer: Where its large parts lie.
        suspect: Whether nothing else may be in its worker, because a worker has died of these items.
        turn: Of the chunks that its worker was given, which this is.
        since: When it was sent, or its worker was asked for what is done.
    """

    __slots__ = ("buffer", "message", "number", "progress", "since", "size", "suspect", "turn")

    def __init__(
        self,
        number: int,
        count: int,
        message: bytes = b"",
        *,
        buffer: SharedBuffer | None = None,
        suspect: bool = False,
    ) -> None:
        self.number: int = number
        self.message: bytes = message
        self.size: int = len(message)
        self.progress: ChunkProgress = ChunkProgress(count)
        self.buffer: SharedBuffer | None = buffer
        self.suspect: bool = suspect
        self.turn: int = 0
        self.since: float = 0.0


def judge(
    pending: PendingChunk,
    started: int | None,
    *,
    why: Why,
    desperate: bool = False,
    several: bool = False,
    pid: int | None = None,
    exitcode: int | None = None,
) -> Lost:
    """Decide what becomes of the chunk of a dead worker: which item is to blame, if any.

    Args:
        pending: The chunk.
        started: Position of the item that the worker began last, None if it began none of this chunk.
        why: What ended the worker.
        desperate: Whether several workers in a row have died without beginning an item, so that it must be the chunk.
        several: Whether it has several items under way at once, so that all that were not reported are suspects.
        pid: The process.
        exitcode: How it ended.

    Example:
        >>> pending = PendingChunk(7, 5)
        >>> pending.progress.report(range(2))
        >>> judge(pending, started=3, why="crash").culprit
        3
        >>> judge(pending, started=1, why="crash").why
        'stopped'
    """
    left = pending.progress.left()
    last = -1 if started is None else started
    suspects = [n for n in left if (n <= last if several else n == last)]
    if not suspects and desperate:
        suspects = [*left[:1]]
    if not suspects:
        return Lost(pending.number, None, "stopped", pid, exitcode)
    return Lost(pending.number, suspects[0] if len(suspects) == 1 else None, why, pid, exitcode)


def judge_all(started: Iterable[tuple[PendingChunk, int | None]], **known: Any) -> list[Lost]:
    """Decide what becomes of all chunks of a dead worker; where several are suspects, no item is blamed.

    Args:
        started: The chunks, each with the position of its item that began last.
        **known: As for `judge`.
    """
    found = [judge(pending, last, **known) for pending, last in started]
    if sum(lost.why != "stopped" for lost in found) < 2:
        return found
    return [lost._replace(culprit=None, only_chunk=False) for lost in found]


# --- workers --------------------------------------------------------------------------------------


class WorkerHandle:
    """One worker process as the pool sees it.

    Args:
        server: The fork server that begins it.
        pool_fd: File with the buffers for items.
        size: Bytes of each of them.
        fresh: Whether it is a fresh interpreter.

    Attributes:
        pid: Its process, 0 before it is known.
        up: Whether it is ready.
        pending: The chunks that it works on, by number, in the order in which they were sent.
        retires: Whether it takes no other.
        why: Why it is to be killed; None if it is not.
        judged: By when the call that took too long should have returned.
        closed: Whether its connection is at its end.
        gone: Whether the process has ended.
        orphaned: Whether its server has ended before it, so that its exit code is not known.
        exitcode: How it ended, None if not known.
        failure: Why it could not begin.
    """

    closed: bool
    gone: bool
    orphaned: bool
    number: int
    sentinel: int

    def __init__(self, server: ForkServer, pool_fd: int, size: int, *, fresh: bool = False) -> None:
        self.server = server
        self.pid: Any = 0
        self.up = self.retires = self.closed = self.gone = self.orphaned = False
        self.pending: dict[int, PendingChunk] = {}
        self.why: Why | None = None
        self.judged: float = 0.0
        self.exitcode: int | None = None
        self.failure: str | None = None
        self._turn = 0
        self._reported_start = False
        self._fd, self._memory = shared_file("worker", PAGE + 2 * size, PAGE)
        self.status: WorkerStatus = WorkerStatus(self._memory)
        self.status.buffer_size = size
        half = (len(self._memory) - PAGE) // 2
        self._results = BufferPool(self._memory, PAGE, half, 2)
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self.conn: Connection[Any, Any] = Connection(ours.detach())
                close_in_child(self.conn)
                fds = (theirs.fileno(), self._fd, pool_fd)
                self.number, self.sentinel = server.start(fds, fresh=fresh)
        except BaseException:
            self._release()
            raise

    @property
    def ready(self) -> bool:
        """Whether it takes chunks at all."""
        return self.up and not (self.retires or self.closed or self.why)

    @property
    def open(self) -> int:
        """How many items of it are still to be reported."""
        return sum(pending.progress.open for pending in self.pending.values())

    def has_room(self, pending: PendingChunk, in_flight: int) -> bool:
        """Return whether it could take a chunk now.

        An item of it would begin at once, the pipe has room, and one that a worker has died of would be alone.
        """
        if not self.pending:
            return True
        return (
            not pending.suspect
            and self.open < in_flight
            and not any(other.suspect for other in self.pending.values())
            and pending.size + sum(other.size for other in self.pending.values()) < _PIPE
        )

    def take(self, pending: PendingChunk) -> None:
        """Send it a chunk."""
        self._turn += 1
        pending.turn, pending.since = self._turn, time.monotonic()
        self.pending[pending.number] = pending
        message, pending.message = pending.message, b""
        self.send(message)

    def send(self, message: bytes) -> None:
        """Send it a message; if it is dead, that is noticed when it is read from."""
        try:
            self.conn.send_bytes(message)
        except OSError:
            pass

    def last_started(self, pending: PendingChunk) -> int | None:
        """Return the position of the item of a chunk that began last, None if none did."""
        turn = self.status.turn
        if pending.turn == turn:
            return self.status.item
        # Chunks begin in their turn, so those before are begun as a whole.
        return pending.progress.kept - 1 if pending.turn < turn else None

    def receive(self) -> Frame | None:
        """Return a message; None if the connection is at its end."""
        try:
            frame: Frame = pickle.loads(self.conn.recv_bytes())  # noqa: S301 - from our own worker
        except (EOFError, OSError):
            self.closed = True
            return None
        return frame

    def rest(self) -> Iterable[Frame]:
        """Return what the dead worker has sent and the pool has not read yet."""
        while not self.closed and self.conn.poll():
            if (frame := self.receive()) is not None:
                yield frame

    def decode(self, content: Frame, pending: PendingChunk) -> Done:
        """Return results, with copies of what lies in the buffers."""
        weight = 0 if pending.buffer is None else pending.buffer.used
        index = content[2]
        done = protocol.decode_done(
            pending.number, content, self._results.reader(index), weight=weight
        )
        if index is not None:
            self.status.copied()
        return done

    def ended(self) -> bool:
        """Read the sentinel; return whether it is at its end."""
        data = os.read(self.sentinel, 4 * EXIT_STATUS.size)
        for start in range(0, len(data), EXIT_STATUS.size):
            self.pid, code = EXIT_STATUS.unpack_from(data, start)
            # The first says that it has started, the second that it has ended.
            self.gone, self._reported_start = self._reported_start, True
            self.exitcode = code if self.gone else None
        if not data:
            self.orphaned = not self.gone
        return not data

    def kill(self, why: Why | None) -> None:
        """End the process, whatever it does."""
        self.why = why
        if not self.orphaned:
            try:
                self.server.kill(self.number)
            except OSError:
                self.orphaned = True
        if self.orphaned and self.pid and not self.closed:
            # Its new parent reaps it.
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def ask(self) -> None:
        """Let it send what is done, and give back what has not begun."""
        if ASK is not None and self.pid and not self.gone:
            try:
                os.kill(self.pid, ASK)
            except ProcessLookupError:
                pass

    @property
    def said(self) -> str:
        """The end of what it wrote to stderr while it began."""
        size, start = os.fstat(self._fd).st_size, len(self._memory)
        begin = max(start, size - 16_384)
        text = os.pread(self._fd, 16_384, begin) if size > start else b""
        return text.decode(errors="replace").strip()

    def close(self) -> None:
        """Release everything but what the status page says."""
        self.closed = True
        os.close(self.sentinel)
        self._release()

    def _release(self) -> None:
        conn = getattr(self, "conn", None)
        if conn is not None:
            conn.close()
        self.status.freeze()
        self._results.close()
        self._memory.close()
        os.close(self._fd)

    def __repr__(self) -> str:
        state = (
            "gone"
            if self.gone
            else "starting"
            if not self.up
            else "busy"
            if self.pending
            else "idle"
        )
        return f"<WorkerHandle {self.number}: process {self.pid or '?'}, {state}>"


def assign(waiting: deque[PendingChunk], workers: Iterable[WorkerHandle], in_flight: int) -> None:
    """Send waiting chunks to workers that have room, the emptiest first.

    A chunk that must be alone waits for a worker that has nothing else; the emptiest is given nothing more meanwhile.

    Args:
        waiting: The chunks, the next one first; what is sent is taken out.
        workers: The workers.
        in_flight: Items that a worker can have under way at once.
    """
    if not waiting:
        return
    ready = [worker for worker in workers if worker.ready]
    for pending in list(waiting):
        able = [worker for worker in ready if worker.has_room(pending, in_flight)]
        if able:
            waiting.remove(pending)
            min(able, key=_load).take(pending)
        elif not pending.suspect:
            return
        elif ready:
            ready.remove(min(ready, key=_load))


def _load(worker: WorkerHandle) -> int:
    return worker.open
