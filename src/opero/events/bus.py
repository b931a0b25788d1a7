# this_file: src/opero/events/bus.py
"""The bus that carries events to those who listen."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from opero.errors import OperoUsageError
from opero.utils.switch import switch

if TYPE_CHECKING:
    from opero.events.kinds import Event

__all__ = ["EventBus", "Handler", "Subscription", "deliver", "event_bus"]

Handler = Callable[["Event"], object]


class Subscription:
    """A handler's place on a bus: `cancel()` it, or use it as a context manager."""

    __slots__ = ("_bus", "handler", "types")

    def __init__(self, bus: EventBus, handler: Handler, types: tuple[type[Event], ...]) -> None:
        self._bus = bus
        self.handler: Handler = handler
        self.types: tuple[type[Event], ...] = types

    def cancel(self) -> None:
        """Stop listening; calling it again does nothing."""
        self._bus.unsubscribe(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __repr__(self) -> str:
        wanted = ", ".join(t.__name__ for t in self.types) or "all events"
        return f"<Subscription of {self.handler!r} to {wanted}>"


class EventBus:
    """Delivers events to handlers, synchronously and in order of subscription.

    `emit` never raises: a handler's exception is printed to stderr, the call that caused the event
    goes on.

    Example:
        >>> from opero import opero
        >>> from opero.events import event_bus, RetryScheduled
        >>> from opero.testing import flaky
        >>> with event_bus.subscribe(lambda e: print("attempt", e.attempt), types=[RetryScheduled]):
        ...     opero(cache=False, min_delay=0)(flaky("ok", failures=1))()
        attempt 2
        'ok'
    """

    def __init__(self) -> None:
        self.subscriptions: tuple[Subscription, ...] = ()
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return bool(self.subscriptions)

    def subscribe(self, handler: Handler, types: Iterable[type[Event]] = ()) -> Subscription:
        """Call `handler` with each event from now on.

        Args:
            handler: Called in the thread and task in which the event happens; keep it short.
            types: Event classes it wants; empty for all.

        Returns:
            A handle with `cancel()`, which is a context manager too.

        Raises:
            OperoUsageError: `handler` cannot be called.
        """
        if not callable(handler):
            raise OperoUsageError(f"handler={handler!r} must be a callable that gets the event.")
        subscription = Subscription(self, handler, tuple(types))
        with self._lock:
            self.subscriptions += (subscription,)
        switch.hold()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Call the subscription's handler no more; once is enough, twice does no harm."""
        with self._lock:
            if subscription not in self.subscriptions:
                return
            self.subscriptions = tuple(s for s in self.subscriptions if s is not subscription)
        switch.release()

    def emit(self, event: Event) -> None:
        """Hand `event` to everybody who wants its type."""
        for subscription in self.subscriptions:
            if not subscription.types or isinstance(event, subscription.types):
                deliver(subscription.handler, event)

    def __repr__(self) -> str:
        return f"<EventBus with {len(self.subscriptions)} subscriptions>"


def deliver(handler: Handler, event: Event) -> None:
    """Call one handler; whatever it raises is reported, never passed on to the call."""
    try:
        handler(event)
    except Exception:  # noqa: BLE001 - a listener must never break the call it watches
        import traceback

        try:
            told = (
                f"Exception ignored in opero event handler {handler!r}:\n{traceback.format_exc()}"
            )
            sys.stderr.write(told)
        except Exception:  # noqa: BLE001, S110 - no repr, no stderr: the call goes before the report
            pass


event_bus: Final = EventBus()
