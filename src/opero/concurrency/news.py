# this_file: src/opero/concurrency/news.py
"""How far a map has got, told to listeners."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from opero import events
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.concurrency.watch import Bar
    from opero.events.bus import Emitter

__all__ = ["News"]

_EVERY: Final = 0.1
"""Seconds between two events; the last one comes in any case."""


class News:
    """Sends a `MapProgress` now and then, and passes everything on to the progress bar.

    Args:
        emitter: The function's.
        total: Items of the input, None if nobody knows.
        bar: The progress bar, None for none.
    """

    def __init__(self, emitter: Emitter, total: int | None, bar: Bar | None) -> None:
        self._emitter = emitter
        self._total = total
        self._bar = bar
        self._began = self._told = ambient.clock().monotonic()
        self._state = (0, 0, 0)

    def show(self, done: int, *, failed: int, hits: int, resumed: int) -> None:
        """Tell that so many items are done, unless that has just been told."""
        if self._bar is not None:
            self._bar.show(done, failed=failed, hits=hits, resumed=resumed)
        self._state = (done, failed, hits)
        now = ambient.clock().monotonic()
        if now - self._told >= _EVERY:
            self._told = now
            self._tell(now)

    def close(self) -> None:
        """Tell that the map has ended."""
        if self._bar is not None:
            self._bar.close()
        self._tell(ambient.clock().monotonic(), finished=True)

    def _tell(self, now: float, *, finished: bool = False) -> None:
        done, failed, cached = self._state
        self._emitter.emit(
            events.MapProgress(
                function=self._emitter.function,
                done=done,
                total=self._total,
                failed=failed,
                cached=cached,
                seconds=now - self._began,
                finished=finished,
            )
        )
