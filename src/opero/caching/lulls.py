# this_file: src/opero/caching/lulls.py
"""Keys whose last call has just failed: for a while nobody needs to try them again."""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock
from typing import Final, NamedTuple

__all__ = ["Lulls"]

_MOST: Final = 10_000
"""Keys that are remembered; beyond it the oldest lulls end early."""


class _Lull(NamedTuple):
    until: float
    excused: bool


class Lulls:
    """What follows a failure, by key.

    Example:
        >>> lulls = Lulls()
        >>> lulls.begin("key", now=100.0, seconds=5.0, excused=True)
        >>> lulls.lasts("key", 104.0), lulls.lasts("key", 105.0), lulls.lasts("other", 104.0)
        (True, False, False)
    """

    def __init__(self) -> None:
        self._lulls: dict[Hashable, _Lull] = {}
        self._lock = Lock()

    def begin(self, key: Hashable, now: float, seconds: float, *, excused: bool) -> None:
        """Take note of a failure.

        Args:
            key: What could not be computed.
            now: Clock reading.
            seconds: How long the failure counts as fresh.
            excused: Whether it is one for which an expired entry may be served.
        """
        with self._lock:
            lulls = self._lulls
            lulls.pop(key, None)
            lulls[key] = _Lull(now + seconds, excused)
            # They stand in the order of their beginning, so those that are over come first.
            while lulls:
                oldest = next(iter(lulls))
                if len(lulls) <= _MOST and now < lulls[oldest].until:
                    break
                del lulls[oldest]

    def lasts(self, key: Hashable, now: float) -> bool:
        """Whether the last failure is still fresh."""
        return self._current(key, now) is not None

    def excused(self, key: Hashable, now: float) -> bool:
        """Whether it is, and an expired entry may be served for it."""
        lull = self._current(key, now)
        return lull is not None and lull.excused

    def end(self, key: Hashable) -> None:
        """Forget the failure of a key."""
        if key in self._lulls:
            with self._lock:
                self._lulls.pop(key, None)

    def clear(self) -> None:
        """Forget all failures."""
        with self._lock:
            self._lulls.clear()

    def renew_lock(self) -> None:
        """After a fork: forget that a thread which does not exist here may hold the lock."""
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._lulls)

    def _current(self, key: Hashable, now: float) -> _Lull | None:
        lull = self._lulls.get(key)
        return lull if lull is not None and now < lull.until else None
