# this_file: src/opero/concurrency/executors/process/buffers.py
"""Shared memory for large buffers: written by the sender, copied out by the receiver, then written again.

New memory is what costs: the kernel clears and maps each of its pages, which takes many times as long as a copy to
pages that are there already. So a few buffers of fixed size are used in turn; what does not fit goes through the pipe.
Files without a name lie behind them: nothing of them outlives the processes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Final

from opero.concurrency.executors.process.start import anonymous_file

__all__ = [
    "LARGE",
    "PAGE",
    "BufferPool",
    "SharedBuffer",
    "Span",
    "buffer_size",
    "keep_freed_memory",
    "shared_file",
]

LARGE: Final = 1 << 16
"""Bytes from which a buffer goes through shared memory."""
PAGE: Final = 4096
_SIZE: Final = 8 << 20
"""Bytes of a buffer: what is larger goes through the pipe."""
_MOST: Final = 512 << 20
"""Bytes of all buffers of a map; those that are never used take no memory."""
_ALIGNED: Final = 64
_KEPT: Final = 16 << 20

Span = tuple[int, int]
"""Where something lies in a buffer: its first byte and its length."""


def buffer_size(workers: int) -> int:
    """Return the bytes of each of the four buffers that a map has for each worker."""
    return min(_SIZE, _MOST // (4 * workers) // PAGE * PAGE)


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
        self.index = index
        self._view = view
        self.used = 0

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
