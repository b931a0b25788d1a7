# this_file: src/opero/concurrency/buffers.py
"""Large arrays travel in memory that both sides map: one copy on the way in, none on the way out.

The memory is a file without a name whose descriptor goes with the frame, so nothing stays behind, whoever is killed.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from pickle import PickleBuffer
from typing import Final

from opero.concurrency.slate import anonymous_file

__all__ = ["CAN_PASS", "LARGE", "Span", "map_segment", "write_segment"]

LARGE: Final = 1 << 16
"""Bytes from which a buffer travels beside its pickle."""
CAN_PASS: Final = os.name == "posix"
"""Whether descriptors can be sent to another process."""

Span = tuple[int, int]
"""Where a buffer lies: its first byte and its length."""

_ALIGNED: Final = 64
_MOST_MAPS: Final = 10_000
"""The kernel allows a process 65,530 mappings."""
_live: Final[set[int]] = set()


def write_segment(buffers: Sequence[PickleBuffer]) -> tuple[int, list[Span]]:
    """Copy buffers one after the other into a new file in memory.

    Args:
        buffers: Contiguous buffers.

    Returns:
        The descriptor of the file, and where each buffer lies in it.
    """
    spans: list[Span] = []
    end = 0
    fd = anonymous_file("buffers")
    try:
        for buffer in buffers:
            with buffer.raw() as view:
                spans.append((end, view.nbytes))
                at = end
                while at - end < view.nbytes:
                    at += os.pwrite(fd, view[at - end :], at)
                end += view.nbytes + -view.nbytes % _ALIGNED
    except BaseException:
        os.close(fd)
        raise
    os.ftruncate(fd, max(end, 1))
    return fd, spans


def map_segment(fd: int) -> memoryview:
    """Return the content of a segment and close its descriptor; the memory lives as long as its views."""
    try:
        size = os.fstat(fd).st_size
        if len(_live) >= _MOST_MAPS:
            copy = bytearray(size)
            os.preadv(fd, [copy], 0)
            return memoryview(copy)
        # Pages are there already: to map them at once is cheaper than one fault each.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(fd, size, flags)
    finally:
        os.close(fd)
    key = id(mapped)
    _live.add(key)
    weakref.finalize(mapped, _live.discard, key).atexit = False
    return memoryview(mapped)
