# this_file: src/opero/concurrency/arena.py
"""Memory for large results: taken from the kernel in blocks, because many pages at once are cheap and single ones not.

Where the kernel has pages of 2 MB for those who ask for them, a block costs a quarter of what its small pages would.
"""

from __future__ import annotations

import mmap
from typing import Final

from opero.concurrency.segment import count_map

__all__ = ["Arena"]

_BLOCK: Final = 1 << 22
"""Bytes of a block. It lives as long as one of its results, so it is only a few times as large as these."""
_LEAST: Final = 1 << 18
"""Results below this size get memory of their own from the interpreter."""
_MOST: Final = 1 << 21
"""Results above this size get a block of their own."""
_ALIGNED: Final = 64


class Arena:
    """Makes private copies of buffers; each is there as long as somebody uses it."""

    def __init__(self) -> None:
        self._block = memoryview(b"")
        self._used = 0

    def copy(self, buffer: memoryview) -> memoryview:
        """Return a writable copy of contiguous bytes."""
        size = buffer.nbytes
        if size < _LEAST:
            return memoryview(bytearray(buffer))
        if size > _MOST:
            block = _block(size)
            start = 0
        else:
            start = self._used + -self._used % _ALIGNED
            if start + size > len(self._block):
                self._block, start = _block(_BLOCK), 0
            self._used = start + size
            block = self._block
        view = block[start : start + size]
        view[:] = buffer
        return view


def _block(size: int) -> memoryview:
    mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not count_map(mapped):
        return memoryview(bytearray(size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # This kernel was built without them.
            pass
    return memoryview(mapped)
