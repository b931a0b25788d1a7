# this_file: src/opero/concurrency/executors/process/protocol.py
"""What pool and worker send each other, and the page of memory that they share.

A message is a pickled tuple of a kind and its content. Values are encoded so that a bad one spoils no other: scalars
stand as they are, everything else in a pickle of its own, which is opened only when its turn comes.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done, ItemOutcome, WorkerFacts
from opero.concurrency.executors.process.pickling import dumps, dumps_with_errors, traceback_of
from opero.concurrency.executors.process.start import anonymous_file
from opero.core.deadline import current_deadline
from opero.errors import ShippingError

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk
    from opero.events import Event


Frame = tuple[Any, ...]
"""A message from a worker: its kind, then its content. To a worker go only the job and chunks: id and what
`encode_chunk` returns."""

UP: Final = "up"
"""It is ready."""
FAILED: Final = "failed"
"""It cannot begin; the traceback."""
DONE: Final = "done"
"""Id of a chunk, the position from which on it does nothing of it, whether it takes no other chunk and ends, and what
`encode_done` returns."""
LOG: Final = "log"
"""A log record as a dictionary, and its error."""

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
BUFFER: Final = 8 << 20
"""Bytes of a buffer: what is larger goes through the pipe."""
MOST: Final = 512 << 20
"""Bytes of all buffers of a map; those that are never used take no memory."""
_ALIGNED: Final = 64

Span = tuple[int, int]
"""Where something lies in a buffer's memory: its first byte and the one after its last."""


def shared_file(name: str, *sizes: int) -> tuple[int, mmap.mmap]:
    """Return the descriptor of a new file in memory, and the file mapped.

    Args:
        name: For the list of mappings of a process.
        sizes: Bytes; where the first are refused (by a limit of files or of addresses), the next are tried.

    Raises:
        OSError: None of them can be had.
    """
    fd = anonymous_file(name)
    error: Exception | None = None
    for size in sizes:
        try:
            os.ftruncate(fd, size)
            return fd, mmap.mmap(fd, size)
        except (OSError, ValueError) as refused:
            error = refused
    os.close(fd)
    raise OSError(f"no shared memory: {error}") from error


class SharedBuffer:
    """Bytes of a sender, one span after the other.

    Args:
        mapped: The memory.
        start: Its first byte in the memory.
        size: Its length.

    Attributes:
        used: Bytes in use.
    """

    __slots__ = ("_mapped", "_size", "_start", "used")

    def __init__(self, mapped: mmap.mmap, start: int, size: int) -> None:
        self._mapped, self._start, self._size = mapped, start, size
        self.used: int = 0

    def add(self, part: PickleBuffer) -> Span | None:
        """Copy a part of a value behind the others; return its place, None if there is no room or it is small."""
        with part.raw() as raw:
            size = raw.nbytes
            if size < LARGE or self.used + size > self._size:
                return None
            start = self._start + self.used
            self._mapped[start : start + size] = raw
        self.used += size + -size % _ALIGNED
        return start, start + size


def copy_span(mapped: mmap.mmap, span: Span) -> bytearray:
    """Return a copy of what a sender has put into shared memory, for the receiver, which may write to it."""
    with memoryview(mapped) as view, view[span[0] : span[1]] as part:
        return bytearray(part)


# --- the page -------------------------------------------------------------------------------------
#
# Words that say what a worker does; the pool reads them after its death. A message could not say it, because the last
# one before a crash is the one that is not sent. Each word is stored whole, and by one side only.

BEGUN, DUE, STOP, COPIED = range(4)
"""Up to which item it has begun, counted over all its chunks; when the call under way must have returned
(`time.monotonic` in ns, negative where a deadline says so, 0 if none is under way); whether it begins no other item;
how many buffers of results the pool has copied."""


def note_calls(page: memoryview[int], fn: Callable[..., Any], limit: float) -> Callable[..., Any]:
    """Return a function that notes when each call begins and by when it must end."""
    now = time.monotonic

    def call(*args: Any, **kwargs: Any) -> Any:
        due, end_of_all = now() + limit, current_deadline()
        page[DUE] = (
            int(due * 1e9) if end_of_all is None or due < end_of_all else -int(end_of_all * 1e9)
        )
        try:
            return fn(*args, **kwargs)
        finally:
            page[DUE] = 0

    return functools.update_wrapper(call, fn, updated=())


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

    def stays(part: PickleBuffer) -> bool:
        span = None if buffer is None else buffer.add(part)
        if span is not None:
            spans.append(span)
        return span is None

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


def decode_value(entry: Any, copy: Callable[[Span], Any] | None) -> Any:
    """Return a value.

    Args:
        entry: What stands for it.
        copy: Copies a part of it out of the shared buffer.

    Raises:
        ShippingError: It could not be pickled.
        Exception: It cannot be unpickled; whatever its class raises then.
    """
    if type(entry) is not tuple:
        return entry
    if len(entry) == 1:
        raise ShippingError(entry[0])
    data, spans = entry
    if not spans or copy is None:
        return pickle.loads(data)  # noqa: S301 - from our own worker or pool
    return pickle.loads(data, buffers=map(copy, spans))  # noqa: S301 - as above


def unreadable(error: Exception, what: str) -> ItemOutcome:
    """Return the outcome of an item that could not be pickled, or not be unpickled."""
    if isinstance(error, ShippingError):
        return ItemOutcome(error=error)
    reason = f"{type(error).__name__}: {error}"
    made = ShippingError(f"the {what} cannot be unpickled on the other side ({reason})")
    made.__cause__ = error
    return ItemOutcome(error=made)


# --- chunks and results ---------------------------------------------------------------------------


def encode_chunk(
    chunk: Chunk, free: list[SharedBuffer] | None = None
) -> tuple[Frame, list[SharedBuffer]]:
    """Return the content of a chunk, and the buffers in which large parts of it lie.

    The content is the entries, and what items bring from earlier attempts, pickled.

    Args:
        chunk: The chunk.
        free: Buffers that are not in use; what is needed is taken out.
    """
    entries: list[Any] = chunk.items
    used: list[SharedBuffer] = []
    if not set(map(type, entries)) <= PLAIN:
        buffer = free[-1] if free else None
        if buffer is not None:
            buffer.used = 0
        entries = [encode_value(item, "item", buffer) for item in entries]
        if free and buffer is not None and buffer.used:
            used.append(free.pop())
    return (entries, dumps_with_errors(chunk.parked) if chunk.parked else None), used


def encode_done(done: Done, stats: dict[str, float] | None, events: Iterable[Event]) -> Frame:
    """Return the content of results.

    Args:
        done: The results; each value is encoded, also those of outcomes.
        stats: Counters of the calls.
        events: What happened with them.
    """
    for n, outcome in done.odd.items():
        done.values[n], outcome.value = outcome.value, None
        if outcome.error is not None:
            outcome.trace = traceback_of(outcome.error)
        outcome.fallback = encode_value(outcome.fallback, "fallback", None)
    odd = dumps_with_errors(done.odd) if done.odd else None
    return (
        done.places, done.values, odd, done.busy_s, stats or None, [*map(_dump_event, events)]
    )  # fmt: skip


def decode_done(
    chunk: int, content: Frame, copy: Callable[[Span], Any] | None = None, *, weight: int = 0
) -> Done:
    """Return results; one that cannot be opened is the error of its item.

    Args:
        chunk: Id of the chunk.
        content: What `encode_done` has returned.
        copy: Copies parts of values out of the shared buffer.
        weight: Bytes that its items took beside their message.
    """
    places, values, pickled, busy_s, stats, events = content
    odd: dict[int, ItemOutcome] = pickle.loads(pickled) if pickled else {}  # noqa: S301 - from our own worker
    if tuple in set(map(type, values)):
        for n, entry in enumerate(values):
            if type(entry) is tuple:
                try:
                    values[n] = decode_value(entry, copy)
                except Exception as error:  # noqa: BLE001 - whatever a class raises when it is unpickled
                    failed = unreadable(error, "result")
                    odd.setdefault(n, failed).error = failed.error
                    values[n] = None
    for n, outcome in odd.items():
        if outcome.error is None:
            outcome.value = values[n]
        values[n] = None
        try:
            outcome.fallback = decode_value(outcome.fallback, None)
        except Exception:  # noqa: BLE001 - it is for information only, and its label comes along
            outcome.fallback = None
    facts = None
    if stats or events:
        loaded = tuple(map(pickle.loads, events))
        facts = WorkerFacts(stats=stats or {}, events=loaded)
    return Done(chunk, places, values, odd, busy_s, facts, weight)


def _dump_event(event: Event) -> bytes:
    try:
        return dumps_with_errors(event)
    except Exception:  # noqa: BLE001 - one that a program has defined may go by value only
        return dumps(event)
