# this_file: src/opero/concurrency/lane.py
"""A lane: one worker process, the stream to it, and what it is at."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opero.concurrency.chunks import ChunkProgress
from opero.concurrency.executors.base import Lost, Why
from opero.concurrency.nurse import own_socket
from opero.concurrency.segment import Segment
from opero.concurrency.slate import Slate
from opero.concurrency.wire import Frame, Reader, Writer
from opero.concurrency.worker import CHUNK, JOB

if TYPE_CHECKING:
    from opero.concurrency.nurse import Nurse
    from opero.concurrency.segment import Intake

__all__ = ["Held", "Lane", "verdict", "verdicts"]


@dataclass(slots=True)
class Held:
    """A chunk, packed, on its way to a lane or in it.

    Attributes:
        number: Its id.
        body: What will be sent.
        segment: Where its large buffers lie.
        tally: What of it was reported.
        alone: Whether nothing else may be in its lane, because some worker has died of these items.
        turn: Of the chunks that its lane was given, which this is.
    """

    number: int
    body: bytes | memoryview
    tally: ChunkProgress
    segment: Segment | None = None
    alone: bool = False
    turn: int = 0

    @property
    def weight(self) -> int:
        """Bytes of its large buffers."""
        return 0 if self.segment is None else self.segment.used


# --- decisions ------------------------------------------------------------------------------------


def verdict(
    held: Held,
    begun: int | None,
    *,
    why: Why,
    barren: bool,
    several: bool = False,
    pid: int | None = None,
    exitcode: int | None = None,
) -> Lost:
    """Decide what becomes of the chunk of a dead worker: which item is to blame, if any.

    Args:
        held: The chunk.
        begun: Position of the item that the worker began last, None if it began none of this chunk.
        why: What ended the worker.
        barren: Whether workers have been dying without beginning anything for a while, so that it must be the
            chunk.
        several: Whether it has several items under way at once, so that all that were not reported are suspects.
        pid: The process.
        exitcode: How it ended.

    Example:
        >>> held = Held(7, b"", Tally(5))
        >>> held.tally.report(range(2))
        >>> verdict(held, begun=3, why="crash", barren=False).culprit
        3
        >>> verdict(held, begun=1, why="crash", barren=False).why
        'stopped'
    """
    left = held.tally.left()
    last = -1 if begun is None else begun
    suspects = [n for n in left if (n <= last if several else n == last)]
    if not suspects and barren:
        suspects = [*left[:1]]
    if not suspects:
        return Lost(held.number, None, "stopped", pid, exitcode)
    return Lost(held.number, suspects[0] if len(suspects) == 1 else None, why, pid, exitcode)


def verdicts(
    begun: Iterable[tuple[Held, int | None]],
    *,
    why: Why,
    barren: bool,
    several: bool,
    pid: int | None = None,
    exitcode: int | None = None,
) -> list[Lost]:
    """Decide what becomes of all chunks of a dead worker; where several are suspects, nobody is blamed.

    Args:
        begun: The chunks, each with the position of its item that began last.
        why: As for `verdict`.
        barren: As there.
        several: As there.
        pid: As there.
        exitcode: As there.
    """
    found = [
        verdict(held, last, why=why, barren=barren, several=several, pid=pid, exitcode=exitcode)
        for held, last in begun
    ]
    if sum(lost.why != "stopped" for lost in found) < 2:
        return found
    return [lost._replace(culprit=None, alone=False) for lost in found]


# --- the lane -------------------------------------------------------------------------------------


class Lane:
    """One worker process.

    Args:
        number: Its number in the map.
        nurse: The nursery that begins it.
        job: The job, pickled; None if the lane inherits it.

    Attributes:
        pid: Its process, 0 before it is known.
        up: Whether it is ready.
        held: The chunks that it works on, by number, in the order in which they were given.
        retires: Whether it takes no other.
        why: Why it is to be killed; None if it is not.
        judged: When the call that took too long had begun.
        gone: Whether the process has ended.
        closed: Whether its stream has.
        exitcode: How it ended, None if nobody can tell.
        failure: Why it could not begin.
        intake: What is known of its segments.
    """

    def __init__(self, number: int, nurse: Nurse, job: bytes | None, intake: Intake) -> None:
        self.number = number
        self.nurse = nurse
        self.pid = 0
        self.up = self.retires = self.gone = self.closed = False
        self.held: dict[int, Held] = {}
        self._turn = 0
        self.why: Why | None = None
        self.judged = 0
        self.exitcode: int | None = None
        self.failure: str | None = None
        self.intake = intake
        self._shown: dict[int, int] = {}
        self.slate = Slate()
        self.sock, theirs = own_socket()
        self._reader, self._writer = Reader(self.sock), Writer(self.sock)
        with theirs:
            nurse.begin(number, theirs, self.slate.fd)
        if job is not None:
            self._writer.send(Frame(JOB, number, job))

    @property
    def ready(self) -> bool:
        """Whether it takes chunks at all."""
        return self.up and not (self.retires or self.closed or self.why)

    @property
    def open(self) -> int:
        """How many items of it are still to be reported."""
        return sum(held.tally.open for held in self.held.values())

    def has_room(self, held: Held, in_flight: int) -> bool:
        """Tell whether it could take a chunk now.

        An item of it would begin at once, and one that a worker has died of would have no neighbours.
        """
        if not self.held:
            return True
        return (
            not held.alone
            and self.open < in_flight
            and not any(other.alone for other in self.held.values())
        )

    @property
    def pending(self) -> bool:
        """Whether there is something left to `flush`."""
        return self._writer.pending

    def begun(self, held: Held) -> int | None:
        """Return the position of the item of a chunk that began last, None if none did."""
        turn = self.slate.chunk
        if held.turn == turn:
            return self.slate.item
        # Chunks begin in their turn, so those before are begun as a whole.
        return held.tally.kept - 1 if held.turn < turn else None

    def flush(self) -> None:
        """Send on what could not be sent before."""
        self._writer.flush()

    def take(self, held: Held) -> None:
        """Send it a chunk."""
        self._turn += 1
        held.turn = self._turn
        self.held[held.number] = held
        # The packed items are not needed again: who lost them makes them anew.
        fd = None if held.segment is None else held.segment.descriptor(self._shown)
        frame = Frame(CHUNK, held.number, held.body, fd)
        held.body = b""
        try:
            self._writer.send(frame)
        except OSError:
            # It is dead already; that is noticed when it is read from.
            pass

    def frames(self) -> Iterator[Frame]:
        """Return what it has sent."""
        while not self.closed:
            try:
                yield from self._reader.receive()
            except BlockingIOError:
                return
            except (EOFError, OSError):
                self.closed = True

    def kill(self, why: Why | None) -> None:
        """End the process, whatever it does."""
        self.why = why
        try:
            self.nurse.kill(self.number)
        except OSError:
            # The nursery is dead; its lanes have a new parent, which reaps them.
            if self.pid and not self.closed:
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def stop(self) -> None:
        """Ask it to end after the item that it is at."""
        self.slate.stop()
        try:
            self.sock.shutdown(1)
        except OSError:
            pass

    def close(self) -> None:
        """Let go of everything but what the slate says."""
        self.closed = True
        self._reader.close()
        self._writer.close()
        self.sock.close()
        self.slate.close()

    def __repr__(self) -> str:
        state = (
            "gone" if self.gone else "starting" if not self.up else "busy" if self.held else "idle"
        )
        return f"<Lane {self.number}: process {self.pid or '?'}, {state}>"
