# this_file: src/opero/concurrency/slate.py
"""A page of memory that a worker and the map share: what the worker does is read there after its death.

A message could not tell it, because the last one before a crash is the one that is not sent. Each word is stored
whole, and by one side only.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from functools import partial
from typing import Final

__all__ = ["Slate", "anonymous_file"]

_PAGE: Final = 4096
_CHUNK, _ITEM, _CALL, _STOP, _TAKEN = range(5)
_NONE: Final = -1
_MOST_SAID: Final = 16_384


def anonymous_file(name: str) -> int:
    """Return the descriptor of a file without a name: nothing is left of it when its users are gone.

    It is in memory where the system has such files, else an unlinked temporary file.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"opero-{name}", getattr(os, "MFD_CLOEXEC", 1))
    import tempfile

    with tempfile.TemporaryFile(prefix=f"opero-{name}-") as file:
        return os.dup(file.fileno())


class Slate:
    """The page, and behind it what the worker writes to its stderr while it starts.

    Attributes:
        fd: The file; -1 once it is closed.
        begin_item: Takes the position of the item that is next.
        is_stopped: Tells whether the map wants no other item to begin.
    """

    def __init__(self, fd: int | None = None) -> None:
        made = fd is None
        if fd is None:
            fd = anonymous_file("slate")
            os.ftruncate(fd, _PAGE)
        self.fd: int = fd
        self._map = mmap.mmap(fd, _PAGE)
        self._words = memoryview(self._map).cast("q")
        # Called for each item, so straight into the memory.
        self.begin_item: Callable[[int], None] = partial(self._words.__setitem__, _ITEM)
        self.is_stopped: Callable[[], object] = partial(self._words.__getitem__, _STOP)
        if made:
            self._words[_ITEM] = _NONE

    # --- the worker's side ------------------------------------------------------------------------

    def begin_chunk(self, turn: int) -> None:
        """Note that items of the worker's n-th chunk are next, and none of them has begun."""
        self._words[_ITEM] = _NONE
        self._words[_CHUNK] = turn

    def begin_call(self, now_ns: int) -> None:
        """Note that the user's function is called."""
        self._words[_CALL] = now_ns

    def end_call(self) -> None:
        """Note that the user's function is left."""
        self._words[_CALL] = 0

    @property
    def taken(self) -> int:
        """How many of the worker's segments the map has emptied."""
        return self._words[_TAKEN]

    def divert(self, fd: int) -> int:
        """Let what is written to `fd` go behind the page; return a descriptor of where it went before."""
        before = os.dup(fd)
        os.lseek(self.fd, _PAGE, os.SEEK_SET)
        os.dup2(self.fd, fd)
        return before

    def restore(self, fd: int, before: int) -> None:
        """Undo `divert`, and pass on what was written meanwhile."""
        os.dup2(before, fd)
        os.close(before)
        said = self._read()
        if said:
            os.write(fd, said)
        os.ftruncate(self.fd, _PAGE)

    # --- the map's side ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the worker to give back what it has not begun."""
        self._words[_STOP] = 1

    def empty_one(self) -> None:
        """Note that a segment of results is empty, and may be written again."""
        self._words[_TAKEN] += 1

    @property
    def chunk(self) -> int:
        """The turn of the chunk that was begun last; 0 if none was."""
        return self._words[_CHUNK]

    @property
    def item(self) -> int | None:
        """Position of the item that was begun last, None if none of the chunk was."""
        position = self._words[_ITEM]
        return None if position == _NONE else position

    @property
    def call_began(self) -> int:
        """When the call of the user's function began (`time.monotonic_ns`); 0 if none is under way."""
        return self._words[_CALL]

    @property
    def said(self) -> str:
        """The end of what the worker wrote to stderr while it started."""
        return self._read().decode(errors="replace").strip()

    def _read(self) -> bytes:
        size = os.fstat(self.fd).st_size
        begin = max(_PAGE, size - _MOST_SAID)
        return os.pread(self.fd, _MOST_SAID, begin) if size > _PAGE else b""

    def close(self) -> None:
        """Let go of the page; what it said last can still be read."""
        if self.fd < 0:
            return
        kept = bytes(self._map[:40])
        self._words.release()
        self._map.close()
        os.close(self.fd)
        self.fd = -1
        self._words = memoryview(bytearray(kept)).cast("q")
