# this_file: src/opero/caching/skips.py
"""Who hears of what is not cached, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero import events

if TYPE_CHECKING:
    from opero.events.bus import Emitter

__all__ = ["Skips"]


class Skips:
    """Tells listeners that a result is not cached.

    Args:
        emitter: Where the events go.
    """

    __slots__ = ("_emitter", "_told")

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._told: set[str] = set()

    def tell(self, reason: str, *, once: bool = False) -> None:
        """Emit a `CacheSkipped`.

        Args:
            reason: Why.
            once: Whether the same reason is not to be told again.
        """
        if not self._emitter.active or reason in self._told:
            return
        if once:
            self._told.add(reason)
        self._emitter.emit(events.CacheSkipped(function=self._emitter.function, reason=reason))
