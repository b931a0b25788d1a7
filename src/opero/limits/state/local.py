# this_file: src/opero/limits/state/local.py
"""Keep the state of a limiter in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from opero.limits.gcra import LimitPause, Rule
from opero.limits.state.base import LimiterState

__all__ = ["LocalState"]

T = TypeVar("T")


class LocalState(LimiterState):
    """The state of one limit in the memory of this process.

    Args:
        rule: What decides.
        now: The clock, in nanoseconds.
    """

    __slots__ = ("_lock", "_now", "_pause", "_state", "_successor", "_take", "rule")

    def __init__(self, rule: Rule, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.rule: Rule = rule
        self._now = now
        self._state: Any = rule.new_state()
        self._pause = LimitPause()
        # Without a pause no call pays for the possibility of one.
        self._take: Callable[[Any, int], int] = rule.take
        self._successor: LimiterState | None = None
        self._lock = threading.Lock()

    def take(self) -> int:
        """Start a call and return 0, or return the nanoseconds to wait."""
        with self._lock:
            return self._take(self._state, self._now())

    def _take_paused(self, state: Any, now: int) -> int:
        pause = self._pause
        wait = pause.wait_for(now) or self.rule.take(state, now)
        if not wait:
            pause.started(now)
            if not pause.on:
                self._take = self.rule.take
        return wait

    def update(self, change: Callable[[Any, LimitPause, int], T]) -> T:
        """Do something with the rule's state, the pause and the time while no other caller does."""
        with self._lock:
            if self._successor is not None:
                return self._successor.update(change)
            found = change(self._state, self._pause, self._now())
            self._take = self._take_paused if self._pause.on else self.rule.take
            return found

    def replace(self, make: Callable[[Any], LimiterState]) -> LimiterState:
        """Move the state elsewhere; callers that still hold this object reach it there.

        Args:
            make: Makes the new state from the rule's state.
        """
        with self._lock:
            successor = make(self._state)
            self._successor = successor
            self._take = lambda state, now: successor.take()
        paused = self._pause.left(self._now())
        if paused:
            successor.pause(paused)
        return successor

    def after_fork(self) -> None:
        """Drop a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()
