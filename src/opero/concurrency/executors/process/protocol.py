# this_file: src/opero/concurrency/executors/process/protocol.py
"""What pool and worker send each other, and the memory that they share.

A message is a pickled tuple of a kind and its content.
"""

from __future__ import annotations

import functools
import mmap
import os
import signal
import time
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any, Final

from opero.concurrency.executors.process.start import anonymous_file
from opero.core.deadline import current_deadline

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
"""A log record as a dictionary, with its error pickled for `exc_info`."""

ASK: Final = getattr(signal, "SIGURG", None)
"""Asks a worker that is busy with an item to send what is done. A process that does not handle it ignores it."""
SLOW_CHUNK: Final = 5
"""A chunk that takes so many times its target gives back what has not begun."""


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

    def add(self, part: PickleBuffer, spans: list[Span]) -> bool:
        """Copy a part of a value behind the others and note its place; return whether it is small, or has no room."""
        with part.raw() as raw:
            size = raw.nbytes
            if size < LARGE or self.used + size > self._size:
                return True
            start = self._start + self.used
            self._mapped[start : start + size] = raw
        self.used += size + -size % _ALIGNED
        spans.append((start, start + size))
        return False


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
