# this_file: src/opero/limits/breaker/news.py
"""Who hears of a circuit's changes, and in which order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock, RLock
from typing import TYPE_CHECKING, cast

from opero.events import CircuitChanged, Subscription, event_bus

if TYPE_CHECKING:
    from opero.events import Handler
    from opero.limits.breaker.machine import Change

__all__ = ["Listener", "News"]

Listener = Callable[[CircuitChanged], object]
"""What is called with each change."""


class News:
    """Takes changes from a queue to listeners and the default event bus, in order.

    Args:
        changes: The queue; filled under the breaker's lock, emptied outside it, so that a listener
            may use the breaker.
    """

    def __init__(self, changes: deque[Change]) -> None:
        self._changes = changes
        self._listeners: tuple[Subscription, ...] = ()
        self.renew_locks()

    def renew_locks(self) -> None:
        """Make new locks: after a fork, who held them is in another process."""
        self._lock = RLock()
        self._telling = Lock()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Add a listener and return a function that takes it out again."""
        made = Subscription(cast("Handler", listener), cancelled=self._left)
        with self._lock:
            self._listeners += (made,)
        return made.cancel

    def _left(self, listener: Subscription) -> None:
        with self._lock:
            self._listeners = tuple(one for one in self._listeners if one is not listener)

    def hand_on(self, event: CircuitChanged) -> None:
        """Deliver an event to the listeners; equal ones are called once."""
        listeners = self._listeners
        for place, listener in enumerate(listeners):
            if not any(listener.handler == other.handler for other in listeners[:place]):
                listener.deliver(event)

    def tell(self, event_of: Callable[[Change], CircuitChanged]) -> None:
        """Deliver what waits. One thread does it at a time, so that the order is kept."""
        changes = self._changes
        # The thread that is at it looks once more after it has let go, so nothing stays behind.
        while changes and self._telling.acquire(blocking=False):
            try:
                while changes:
                    change = changes.popleft()
                    if self._listeners or event_bus.active:
                        event = event_of(change)
                        self.hand_on(event)
                        event_bus.emit(event)
            finally:
                self._telling.release()

    def __repr__(self) -> str:
        return f"<News for {len(self._listeners)} listeners>"
