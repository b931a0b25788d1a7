# this_file: src/opero/events/emitter.py
"""Send the events of one function to its own listeners and to the default bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from opero.events import Subscription, event_bus

if TYPE_CHECKING:
    from opero.events import Event, Handler

__all__ = ["Emitter"]


class Emitter:
    """Where a function's stages send their events: its own listeners and the default bus.

    Stages ask `active` before they build an event, so that an unheard event costs one attribute and
    one truth test.
    """

    __slots__ = ("function", "listeners")

    def __init__(self, function: str, listeners: Sequence[Handler] = ()) -> None:
        self.function: Final = function
        self.listeners: Final[tuple[Subscription, ...]] = tuple(Subscription(h) for h in listeners)

    @property
    def active(self) -> bool:
        """Whether anybody would hear an event."""
        return bool(self.listeners or event_bus.subscriptions)

    def hears(self, kind: type[Event]) -> bool:
        """Tell whether an event of a class would reach anybody, for those that cost something to make."""
        for listener in self.listeners:
            if listener.wants(kind):
                return True
        return event_bus.hears(kind)

    def emit(self, event: Event) -> None:
        """Deliver an event; never raises."""
        for listener in self.listeners:
            listener.deliver(event)
        event_bus.emit(event)
