# this_file: src/opero/concurrency/executors/process/protocol.py
"""What pool and worker send each other, and the page of memory that they share.

A message is a pickled tuple of a kind and its content. Values are encoded so that a bad one spoils no other: scalars
stand as they are, everything else in a pickle of its own, which is opened only when its turn comes.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done, ItemOutcome, Parked, WorkerFacts
from opero.concurrency.executors.process.pickling import (
    decode_error,
    dumps,
    encode_error,
    traceback_of,
)
from opero.concurrency.executors.process.start import anonymous_file
from opero.errors import ShippingError

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk
    from opero.events import Event

__all__ = [
    "ASK", "CHUNK", "DONE", "FAILED", "GAVE_BACK", "ITEM", "LOG", "PAGE", "PLAIN", "RETIRES", "SLOW_CHUNK", "UP",
    "BufferPool", "Frame", "SharedBuffer", "Span", "StartOutput", "WorkerStatus", "buffer_size", "decode_done",
    "decode_parked", "decode_value", "encode_chunk", "encode_done", "encode_value", "keep_freed_memory", "shared_file",
    "unreadable",
]  # fmt: skip

Frame = tuple[Any, ...]
"""A message: its kind, then its content."""

CHUNK: Final = "chunk"
"""To a worker: id, entries, index of the shared buffer, what items bring from earlier attempts."""
UP: Final = "up"
"""From a worker: it is ready; its process id."""
FAILED: Final = "failed"
"""From a worker: it cannot begin; the traceback."""
DONE: Final = "done"
"""From a worker: id of the chunk, then what `encode_done` returns."""
GAVE_BACK: Final = "gave back"
"""From a worker: id of the chunk, and the position from which on it does nothing of it."""
RETIRES: Final = "retires"
"""From a worker: it takes no other chunk and ends."""
LOG: Final = "log"
"""From a worker: a log record as a dictionary, and its error."""

ASK: Final = getattr(signal, "SIGURG", None)
"""Asks a worker that is busy with an item to send what is done. A process that does not handle it ignores it."""
SLOW_CHUNK: Final = 5
"""A chunk that takes so many times its target gives back what has not begun."""

PLAIN: Final = frozenset({int, float, complex, str, bytes, bool, type(None)})
"""Types whose instances can always be pickled and opened again."""


# --- shared memory --------------------------------------------------------------------------------
#
# New memory is what costs: the kernel clears and maps each of its pages, which takes many times as long as a copy to
# pages that are there already. So a few buffers of fixed size are used in turn: written by the sender, copied out by
# the receiver, then written again. What does not fit goes through the pipe. Files without a name lie behind them.

LARGE: Final = 1 << 16
"""Bytes from which a buffer goes through shared memory."""
PAGE: Final = 4096
_BUFFER: Final = 8 << 20
"""Bytes of a buffer: what is larger goes through the pipe."""
_MOST: Final = 512 << 20
"""Bytes of all buffers of a map; those that are never used take no memory."""
_ALIGNED: Final = 64
_KEPT: Final = 16 << 20

Span = tuple[int, int]
"""Where something lies in a buffer: its first byte and its length."""


def buffer_size(workers: int) -> int:
    """Return the bytes of each of the four buffers that a map has for each worker."""
    return min(_BUFFER, _MOST // (4 * workers) // PAGE * PAGE)


def shared_file(name: str, *sizes: int) -> tuple[int, mmap.mmap]:
    """Return the descriptor of a new file in memory, and the file mapped.

    Args:
        name: For the list of mappings of a process.
        sizes: Bytes; where the first are refused (by a limit of files or of addresses), the next are tried.

    Raises:
        OSError: None of them can be had.
    """
    fd = anonymous_file(name)
    try:
        for size in sizes:
            try:
                os.ftruncate(fd, size)
                return fd, mmap.mmap(fd, size)
            except (OSError, ValueError):
                if size == sizes[-1]:
                    raise
    except BaseException:
        os.close(fd)
        raise
    raise ValueError("no size")


class SharedBuffer:
    """Bytes of a sender, one span after the other.

    Args:
        index: Its number in the pool.
        view: Its memory.

    Attributes:
        index: As above.
        used: Bytes in use.
    """

    __slots__ = ("_view", "index", "used")

    def __init__(self, index: int, view: memoryview) -> None:
        self.index: int = index
        self._view = view
        self.used: int = 0

    def add(self, buffer: PickleBuffer) -> Span | None:
        """Copy a buffer behind the others; return its place, None if there is no room or it is small."""
        with buffer.raw() as raw:
            start, size = self.used, raw.nbytes
            if size < LARGE or start + size > len(self._view):
                return None
            self._view[start : start + size] = raw
        self.used = start + size + -size % _ALIGNED
        return start, size

    def release(self) -> None:
        """Release the memory."""
        self._view.release()

    def copy(self, span: Span) -> bytearray:
        """Return a copy of a span for the receiver, which may write to it."""
        return bytearray(self._view[span[0] : span[0] + span[1]])


class BufferPool:
    """Buffers of the same size in one mapping; those that are not in use are taken in turn.

    Args:
        mapped: The mapping.
        start: Where the buffers begin in it.
        size: Bytes of each.
        count: How many there are.
    """

    def __init__(self, mapped: mmap.mmap, start: int, size: int, count: int) -> None:
        self._view = view = memoryview(mapped)
        self.buffers: list[SharedBuffer] = []
        if size and start + count * size <= len(view):
            for n in range(count):
                first = start + n * size
                self.buffers.append(SharedBuffer(n, view[first : first + size]))
        self._free = list(reversed(self.buffers))

    def take(self) -> SharedBuffer | None:
        """Return an empty buffer, None if all are in use."""
        if not self._free:
            return None
        buffer = self._free.pop()
        buffer.used = 0
        return buffer

    def give_back(self, buffer: SharedBuffer | None) -> None:
        """Take a buffer back when its receiver has copied everything, or is dead."""
        if buffer is not None:
            self._free.append(buffer)

    def close(self) -> None:
        """Release the memory."""
        for buffer in self.buffers:
            buffer.release()
        self._view.release()

    def reader(self, index: int | None) -> Callable[[Span], bytearray] | None:
        """Return what copies spans out of a buffer; None for no buffer."""
        return None if index is None else self.buffers[index].copy


def keep_freed_memory() -> None:
    """Let the allocator keep large blocks that are freed: copies of the next items then go to pages that are there.

    It keeps blocks up to the size of the largest that was freed (mallopt(3), M_MMAP_THRESHOLD); these bytes are never
    touched.
    """
    try:
        bytes(_KEPT)
    except MemoryError:
        pass


# --- the page -------------------------------------------------------------------------------------

ITEM: Final = 0
"""Word of the position of the item that was begun last."""
_TURN, _DUE, _STOP, _COPIED, _SIZE = range(1, 6)
_NONE: Final = -1


class WorkerStatus:
    """A page of memory that says what a worker does; it is read there after its death.

    A message could not say it, because the last one before a crash is the one that is not sent. Each word is stored
    whole, and by one side only.

    Args:
        mapped: Memory that begins with the page.

    Attributes:
        words: The page; what runs items writes `words[ITEM]` itself.
    """

    def __init__(self, mapped: mmap.mmap) -> None:
        self._view = memoryview(mapped)
        self.words: memoryview[int] = self._view[:PAGE].cast("q")

    def begin_chunk(self, turn: int) -> None:
        """Note that items of the worker's n-th chunk are next, and none of them has begun."""
        self.words[ITEM] = _NONE
        self.words[_TURN] = turn

    def begin_call(self, due: float, *, deadline: bool = False) -> None:
        """Note that the user's function is called.

        Args:
            due: When it must have returned (`time.monotonic`).
            deadline: Whether a deadline says so, and not the time that a call may take.
        """
        nanoseconds = int(due * 1e9)
        self.words[_DUE] = -nanoseconds if deadline else nanoseconds

    def end_call(self) -> None:
        """Note that the user's function has returned."""
        self.words[_DUE] = 0

    def stop(self) -> None:
        """Let the worker begin no other item."""
        self.words[_STOP] = 1

    @property
    def stopped(self) -> bool:
        """Whether the worker begins no other item."""
        return self.words[_STOP] != 0

    def copied(self) -> None:
        """Count a buffer of results that the pool has copied, so that the worker may write it again."""
        self.words[_COPIED] += 1

    @property
    def copies(self) -> int:
        """How many buffers of results the pool has copied."""
        return self.words[_COPIED]

    @property
    def buffer_size(self) -> int:
        """Bytes of each shared buffer for items."""
        return self.words[_SIZE]

    @buffer_size.setter
    def buffer_size(self, size: int) -> None:
        self.words[_SIZE] = size

    @property
    def turn(self) -> int:
        """The turn of the chunk that was begun last; 0 if none was."""
        return self.words[_TURN]

    @property
    def item(self) -> int | None:
        """Position of the item that was begun last, None if none of the chunk was."""
        position = self.words[ITEM]
        return None if position == _NONE else position

    @property
    def due(self) -> tuple[float, bool]:
        """When the call under way must have returned, and whether a deadline says so; 0 if none is under way."""
        nanoseconds = self.words[_DUE]
        return abs(nanoseconds) / 1e9, nanoseconds < 0

    def freeze(self) -> None:
        """Keep what the page says now, and release the memory."""
        kept = bytes(self.words[: _SIZE + 1].tobytes())
        self.words.release()
        self._view.release()
        self.words = memoryview(bytearray(kept)).cast("q")


# --- values ---------------------------------------------------------------------------------------


def encode_value(value: Any, what: str, buffer: SharedBuffer | None) -> Any:
    """Return what stands for a value in a message.

    Args:
        value: The value.
        what: What it is, for the message about one that cannot be pickled: "item" or "result".
        buffer: Takes large parts of it; without one everything stands in the message.

    Returns:
        The value itself if it is plain; else a pickle and the places of its parts; else a text that says why not.
    """
    if type(value) in PLAIN:
        return value
    before = 0 if buffer is None else buffer.used
    spans: list[Span] = []

    def stays(part: pickle.PickleBuffer) -> bool:
        span = None if buffer is None else buffer.add(part)
        if span is None:
            return True
        spans.append(span)
        return False

    def again() -> None:
        if buffer is not None:
            buffer.used = before
        spans.clear()

    try:
        data = dumps(value, stays, again, home=what == "result")
    except Exception as error:  # noqa: BLE001 - whatever a user's `__reduce__` raises
        again()
        kind, reason = type(value), f"{type(error).__name__}: {error}"
        return (
            f"the {what}, a {kind.__module__}.{kind.__qualname__}, cannot travel between processes ({reason})",
        )
    return data, spans


def decode_value(entry: Any, read: Callable[[Span], Any] | None) -> Any:
    """Return a value.

    Args:
        entry: What stands for it.
        read: Copies a part of it out of the shared buffer.

    Raises:
        ShippingError: It could not be pickled.
        Exception: It cannot be unpickled; whatever its class raises then.
    """
    if type(entry) is not tuple:
        return entry
    if len(entry) == 1:
        raise ShippingError(entry[0])
    data, spans = entry
    if not spans or read is None:
        return pickle.loads(data)  # noqa: S301 - from our own worker or pool
    return pickle.loads(data, buffers=map(read, spans))  # noqa: S301 - as above


def unreadable(error: Exception, what: str) -> ItemOutcome:
    """Return the outcome of an item that could not be pickled, or not be unpickled."""
    if isinstance(error, ShippingError):
        return ItemOutcome(error=error)
    reason = f"{type(error).__name__}: {error}"
    made = ShippingError(f"the {what} cannot be unpickled on the other side ({reason})")
    made.__cause__ = error
    return ItemOutcome(error=made)


# --- chunks and results ---------------------------------------------------------------------------


def encode_chunk(chunk: Chunk, buffer: SharedBuffer | None = None) -> Frame:
    """Return the content of a chunk: entries, index of the buffer in use, what items bring along."""
    entries = chunk.items
    if not set(map(type, entries)) <= PLAIN:
        entries = [encode_value(item, "item", buffer) for item in entries]
    parked = {n: _encode_parked(one) for n, one in (chunk.parked or {}).items()}
    return entries, buffer.index if buffer is not None and buffer.used else None, parked or None


def decode_parked(encoded: dict[int, Any] | None) -> dict[int, Parked]:
    """Return what items of a chunk bring from earlier attempts."""
    return {} if not encoded else {n: _decode_parked(one) for n, one in encoded.items()}


def encode_done(
    done: Done,
    stats: dict[str, float] | None,
    events: Sequence[Event],
    index: int | None = None,
) -> Frame:
    """Return the content of results.

    Args:
        done: The results; each value is encoded, also those of outcomes.
        stats: Counters of the calls.
        events: What happened with them.
        index: The shared buffer in use.
    """
    odd = {}
    for n, outcome in done.odd.items():
        done.values[n] = outcome.value
        odd[n] = _encode_outcome(outcome)
    encoded = [_encode_event(event) for event in events]
    return done.places, done.values, index, odd, done.busy_s, done.worker, stats or None, encoded


def decode_done(
    chunk: int, content: Frame, read: Callable[[Span], Any] | None = None, *, weight: int = 0
) -> Done:
    """Return results; one that cannot be opened is the error of its item.

    Args:
        chunk: Id of the chunk.
        content: What `encode_done` has returned.
        read: Copies parts of values out of the shared buffer.
        weight: Bytes that its items took beside their message.
    """
    places, values, _, encoded, busy_s, worker, stats, events = content
    odd = {n: _decode_outcome(outcome) for n, outcome in encoded.items()}
    if tuple in set(map(type, values)):
        for n, entry in enumerate(values):
            if type(entry) is tuple:
                try:
                    values[n] = decode_value(entry, read)
                except Exception as error:  # noqa: BLE001 - whatever a class raises when it is unpickled
                    failed = unreadable(error, "result")
                    odd.setdefault(n, failed).error = failed.error
                    values[n] = None
    for n, outcome in odd.items():
        if outcome.error is None:
            outcome.value = values[n]
        values[n] = None
    facts = None
    if stats or events:
        facts = WorkerFacts(stats=stats or {}, events=tuple(map(_decode_event, events)))
    return Done(chunk, places, values, odd, busy_s, worker, facts, weight)


def _encode_parked(parked: Parked) -> tuple[Parked, list[tuple[str | None, Any]]]:
    failures = [(label, encode_error(error)) for label, error in parked.failures]
    return dataclasses.replace(parked, failures=()), failures


def _decode_parked(encoded: tuple[Parked, list[tuple[str | None, Any]]]) -> Parked:
    parked, failures = encoded
    errors = [(label, decode_error(record)) for label, record in failures]
    # Only failures of a function are kept, and these are exceptions.
    parked.failures = tuple((label, e) for label, e in errors if isinstance(e, Exception))
    return parked


def _encode_outcome(outcome: ItemOutcome) -> tuple[ItemOutcome, Any, Any, bytes | None]:
    error = outcome.error
    record = trace = None
    if error is not None:
        record, trace = encode_error(error), traceback_of(error)
    parked = None if outcome.parked is None else _encode_parked(outcome.parked)
    try:
        fallback = dumps(outcome.fallback)
    except Exception:  # noqa: BLE001 - it is for information only, and its label comes along
        fallback = None
    bare = dataclasses.replace(
        outcome, value=None, error=None, trace=trace, parked=None, fallback=None
    )
    return bare, record, parked, fallback


def _decode_outcome(encoded: tuple[ItemOutcome, Any, Any, bytes | None]) -> ItemOutcome:
    outcome, record, parked, fallback = encoded
    if record is not None:
        outcome.error = decode_error(record)
    if parked is not None:
        outcome.parked = _decode_parked(parked)
    if fallback is not None:
        try:
            outcome.fallback = pickle.loads(fallback)  # noqa: S301 - from our own worker
        except Exception:  # noqa: BLE001, S110 - as above
            pass
    return outcome


def _encode_event(event: Event) -> tuple[bytes, Any]:
    error: BaseException | None = getattr(event, "error", None)
    if error is None:
        return dumps(event), None
    # Events are frozen dataclasses; those with an error have it as a field.
    change: dict[str, Any] = {"error": None}
    return dumps(dataclasses.replace(event, **change)), encode_error(error)


def _decode_event(encoded: tuple[bytes, Any]) -> Event:
    data, record = encoded
    event: Event = pickle.loads(data)  # noqa: S301 - from our own worker
    if record is None:
        return event
    change: dict[str, Any] = {"error": decode_error(record)}
    return dataclasses.replace(event, **change)


# --- what a worker writes to stderr while it begins -----------------------------------------------


class StartOutput:
    """Keep what this process writes to stderr until it is ready, where the pool can read it after its death.

    Args:
        fd: File behind whose content it goes.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._start = os.lseek(fd, 0, os.SEEK_END)
        self._before = os.dup(2)
        os.dup2(fd, 2)

    def close(self) -> None:
        """Pass on what was written meanwhile."""
        os.dup2(self._before, 2)
        os.close(self._before)
        said = os.pread(self._fd, 1 << 20, self._start)
        if said:
            os.write(2, said)
        os.ftruncate(self._fd, self._start)
