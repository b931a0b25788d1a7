# this_file: src/opero/concurrency/executors/process/worker_handle.py
"""Track one worker process: its connection, the chunks that it has, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opero.concurrency.executors.encoding import SharedBuffer
from opero.concurrency.executors.process.session import ASK, STARTED
from opero.concurrency.executors.process.start import EXIT_STATUS, Channel, read_end, shared_file
from opero.utils.secrets import mask_text

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Why
    from opero.concurrency.executors.process.start import ForkServer


PIPE: Final = 1 << 16
"""Bytes that a pipe takes in any case while its reader is busy."""


@dataclass(eq=False)
class PendingChunk:
    """A chunk, encoded, on its way to a worker or in it.

    Attributes:
        number: Its id.
        message: What is sent; empty once that is done.
        left: Positions that are still to be reported.
        kept: Position from which on its worker does nothing.
        buffers: Where large parts of its items and results lie: one, or none if there is none.
        suspect: Whether nothing else may be in its worker, because a worker has died of these items.
        base: Items of the chunks that its worker was given before.
        since: When it was sent, or its worker was asked for what is done.
        size: Bytes of the message.
    """

    number: int
    message: bytes
    left: Collection[int]
    kept: int
    buffers: list[SharedBuffer]
    suspect: bool
    base: int = 0
    since: float = 0.0
    size: int = 0

    def cut(self, kept: int) -> list[int]:
        """Note that the worker does nothing from a position on; return the positions that are free now."""
        free = [place for place in sorted(self.left) if place >= kept]
        self.kept = kept
        self.left = set(self.left).difference(free)
        return free


class WorkerHandle:
    """One worker process as the pool sees it.

    Args:
        server: The fork server that begins it.
        pool_fd: File with the buffers of chunks.
        fresh: Whether it is a fresh interpreter.

    Attributes:
        server: As above.
        conn: The connection.
        sentinel: Descriptor of what the server says of it.
        page: The words that say what it does.
        pid: Its process, 0 before it is known.
        up: Whether it is ready.
        pending: The chunks that it works on, by number, in the order in which they were sent.
        open: Items of them that are still to be reported.
        retires: Whether it takes no other.
        why: Why it is to be killed; None if it is not.
        judged: What the page said when a call was found to take too long.
        closed: Whether its connection is at its end.
        gone: Whether the process has ended.
        orphaned: Whether its server has ended before it, so that its exit code is not known.
        exitcode: How it ended, None if not known.
        failure: Why it could not begin.
    """

    def __init__(self, server: ForkServer, pool_fd: int, *, fresh: bool = False) -> None:
        self.server = server
        self.pid: int = 0
        self.up: bool = False
        self.pending: dict[int, PendingChunk] = {}
        self.open: int = 0
        self.retires: bool = False
        self.why: Why | None = None
        self.judged: int = 0
        self.closed: bool = False
        self.gone: bool = False
        self.orphaned: bool = False
        self.exitcode: int | None = None
        self.failure: str | None = None
        self._given = 0
        self._started = False
        ours, theirs = socket.socketpair()
        self.conn: Channel = Channel(ours)
        self.sentinel: int = -1
        self._fd, self._memory = shared_file("worker")
        self.page: memoryview[int] = memoryview(self._memory).cast("q")
        try:
            with theirs:
                fds = (theirs.fileno(), self._fd, pool_fd)
                self._number, self.sentinel = server.start(fds, fresh=fresh)
        except BaseException:
            self.close()
            raise

    def has_room(self, pending: PendingChunk, in_flight: int) -> bool:
        """Return whether it could take a chunk now.

        An item of it would begin at once, the pipe has room, and one that a worker has died of would be alone.

        Args:
            pending: The chunk.
            in_flight: Items that it can have under way at once.
        """
        return not self.pending or (
            not pending.suspect
            and self.open < in_flight
            and not any(other.suspect for other in self.pending.values())
            and pending.size + sum(other.size for other in self.pending.values()) < PIPE
        )

    def take(self, pending: PendingChunk) -> None:
        """Send it a chunk."""
        pending.base, pending.since = self._given, time.monotonic()
        self._given += pending.kept
        self.open += pending.kept
        self.pending[pending.number] = pending
        message, pending.message = pending.message, b""
        with suppress(OSError):  # it is dead, which its sentinel shows
            self.conn.send(message)

    def last_started(self, pending: PendingChunk) -> int:
        """Return the position of the item of a chunk that began last, a negative one if none did."""
        return min(self.page[STARTED] - pending.base, pending.kept) - 1

    def ended(self) -> bool:
        """Read the sentinel; return whether it is at its end."""
        data = os.read(self.sentinel, 4 * EXIT_STATUS.size)
        for pid, code in EXIT_STATUS.iter_unpack(data):
            # The first says that it has started, the second that it has ended.
            self.gone, self._started = self._started, True
            self.pid, self.exitcode = pid, code if self.gone else None
        if not data:
            self.orphaned = not self.gone
        return not data

    def kill(self, why: Why | None) -> None:
        """End the process, whatever it does."""
        self.why = why
        if not self.orphaned:
            try:
                self.server.request(("kill", self._number))
            except OSError:
                self.orphaned = True
        if self.orphaned and not self.closed:
            # Its new parent reaps it.
            self._signal(signal.SIGKILL)

    def ask(self) -> None:
        """Let it send what is done, and give back what has not begun."""
        if ASK is not None and not self.gone:
            self._signal(ASK)

    def _signal(self, number: int) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """The end of what it wrote to stderr while it began."""
        return mask_text(read_end(self._fd))

    def close(self) -> None:
        """Release everything."""
        self.closed = True
        self.conn.close()
        self.page.release()
        self._memory.close()
        os.close(self._fd)
        if self.sentinel >= 0:
            os.close(self.sentinel)

    def __repr__(self) -> str:
        state = "busy" if self.pending else "idle" if self.up else "starting"
        return f"<WorkerHandle: process {self.pid or '?'}, {'gone' if self.gone else state}>"
