# this_file: src/opero/concurrency/segment.py
"""Memory in which large buffers travel: files without a name, written again and again.

New memory is what costs: the kernel clears and maps each of its pages, which takes some fifteen times as long as a copy
of an array to pages that are there already. So a sender has a few segments that it writes anew once they are free, and
a receiver copies out of them at once: what it hands on is its own. What is very large goes in a segment of its own that
is given away, and is used where it lies.

The descriptor of a segment goes with a frame, so nothing stays behind, whoever is killed.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from pickle import PickleBuffer
from typing import Any, Final

from opero.concurrency.slate import anonymous_file

__all__ = [
    "CAN_PASS",
    "FULL",
    "LARGE",
    "MOST_MAPS",
    "Intake",
    "Load",
    "Segment",
    "Span",
    "Supply",
    "count_map",
]

LARGE: Final = 1 << 16
"""Bytes from which a buffer travels beside its pickle."""
FULL: Final = 1 << 21
"""Bytes that a segment had better not exceed, so that it stays in the processor's cache."""
CAN_PASS: Final = os.name == "posix"
"""Whether descriptors can be sent to another process."""
MOST_MAPS: Final = 10_000
"""The kernel allows a process 65,530 mappings."""

Span = tuple[int, int]
"""Where a buffer lies: its first byte and its length."""
Load = tuple[int, int, bool]
"""What is said of a segment in a frame: its number, the bytes in use, and whether its sender will write it again."""

_ALIGNED: Final = 64
_KEPT: Final = 1 << 25
"""Bytes up to which a segment is used again; to copy what is larger would take twice the memory."""
_POPULATE: Final = getattr(mmap, "MAP_POPULATE", 0)
"""Pages are there already: to map them at once is cheaper than one fault each."""

_live: Final[set[int]] = set()


def count_map(mapped: mmap.mmap) -> bool:
    """Count a mapping that somebody else holds as long as he likes; tell whether it is one too many."""
    if len(_live) >= MOST_MAPS:
        return False
    key = id(mapped)
    _live.add(key)
    weakref.finalize(mapped, _live.discard, key).atexit = False
    return True


# --- the sender's side ----------------------------------------------------------------------------


class Segment:
    """Buffers, one after the other.

    Args:
        number: Its number among the sender's.
        meant: Whether the sender means to write it again.

    Attributes:
        number, meant: As above.
        used: Bytes in use.
    """

    __slots__ = ("_fd", "_filled", "_view", "meant", "number", "used")

    def __init__(self, number: int, *, meant: bool) -> None:
        self.number = number
        self.used = 0
        self.meant = meant
        self._fd = -1
        self._filled = 0
        self._view = memoryview(b"")

    def add(self, buffer: PickleBuffer) -> Span:
        """Copy a buffer behind the others."""
        with buffer.raw() as raw:
            start, size = self.used, raw.nbytes
            if start + size <= len(self._view):
                self._view[start : start + size] = raw
            else:
                # To write is cheaper than to map and clear pages that are not there yet.
                if self._fd < 0:
                    self._fd = anonymous_file("segment")
                done = 0
                while done < size:
                    done += os.pwrite(self._fd, raw[done:], start + done)
                self._filled = max(self._filled, start + size)
        self.used = start + size + -size % _ALIGNED
        return start, size

    @property
    def kept(self) -> bool:
        """Whether it will be written again."""
        return self.meant and self.used <= _KEPT

    @property
    def load(self) -> Load:
        """What is said of it in the frame."""
        return self.number, self.used, self.kept

    def descriptor(self, shown: dict[int, int]) -> int | None:
        """Return a descriptor for a receiver, None if it has this segment or there is nothing in it.

        Args:
            shown: What the receiver has: numbers of segments, and how much of them.
        """
        if not self.used:
            return None
        if self.kept:
            if self._filled <= shown.get(self.number, 0):
                return None
            shown[self.number] = self._filled
        os.ftruncate(self._fd, max(self._filled, self.used))
        return os.dup(self._fd)

    def rewind(self) -> None:
        """Begin again at the first byte."""
        self.used = 0
        if self._filled > len(self._view):
            self._view = memoryview(mmap.mmap(self._fd, self._filled, mmap.MAP_SHARED | _POPULATE))

    def close(self) -> None:
        """Let go of it; whoever has its descriptor still has the content."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._view = memoryview(b"")


class Supply:
    """A sender's segments.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        self._numbers: Iterator[int] = itertools.count()
        self._free: list[Segment] = []
        self._made: set[Segment] = set()
        self._left = most

    def take(self) -> Segment:
        """Return a segment to be filled."""
        if self._free:
            segment = self._free.pop()
            segment.rewind()
            return segment
        segment = Segment(next(self._numbers), meant=self._left > 0)
        self._left -= segment.meant
        self._made.add(segment)
        return segment

    def give_back(self, segment: Segment | None) -> None:
        """Take back a segment that no receiver will read again; one that was given away is let go of."""
        if segment is None:
            return
        if segment.kept:
            self._free.append(segment)
        else:
            self.drop(segment)

    def drop(self, segment: Segment | None) -> None:
        """Let go of a segment that somebody else has, or may still read."""
        if segment is not None:
            self._left += segment.meant
            self._made.discard(segment)
            segment.close()

    def close(self) -> None:
        """Let go of all."""
        for segment in self._made:
            segment.close()


# --- the receiver's side --------------------------------------------------------------------------


class Intake:
    """What a receiver has of one sender's segments.

    Args:
        copy: Makes a private copy of a buffer.
    """

    def __init__(self, copy: Callable[[memoryview], Any]) -> None:
        self._copy = copy
        self._views: dict[int, memoryview] = {}

    def open(self, load: Load, fd: int | None) -> Callable[[Span], Any]:
        """Return what gets buffers out of a segment.

        Args:
            load: What was said of it.
            fd: Its descriptor, closed here; None if it is known.
        """
        number, used, kept = load
        if kept and fd is None:
            view = self._views[number]
        else:
            mapped = _mapped(fd)
            view = memoryview(mapped)
            if used > _KEPT and count_map(mapped):
                return lambda span: view[span[0] : span[0] + span[1]]
            if kept:
                self._views[number] = view
        return lambda span: self._copy(view[span[0] : span[0] + span[1]])


def _mapped(fd: int | None) -> mmap.mmap:
    """Map a whole segment and close its descriptor."""
    if fd is None:
        raise ValueError("a segment came without its descriptor")
    try:
        return mmap.mmap(fd, 0, mmap.MAP_SHARED | _POPULATE)
    finally:
        os.close(fd)
