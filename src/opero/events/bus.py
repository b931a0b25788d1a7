# this_file: src/opero/events/bus.py
"""The bus that carries events to those who listen."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Final

from opero.events.subscription import Handler, Subscription
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.events.event import Event
    from opero.events.mailbox import Mailbox

__all__ = ["EventBus", "event_bus"]


class _Emitted:
    """What `emit` returns: everything is done already, but whoever is used to awaiting it may."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield  # makes it a generator

    def __repr__(self) -> str:
        return "<emitted>"


_EMITTED = _Emitted()


class EventBus:
    """Takes events to handlers, in order of subscription; `emit` never raises and never waits.

    Plain handlers are called at once, where the event happens. Asynchronous ones, and those that return
    a task, are called on their event loop: each handler gets its events one after the other, in order,
    from a bounded queue of its own. What a handler raises is reported and disturbs nobody.

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

    def hears(self, kind: type[Event]) -> bool:
        """Tell whether an event of a class would reach anybody, for events that cost something to make."""
        for one in self.subscriptions:  # noqa: SIM110 - a generator costs more than the loop
            if one.wants(kind):
                return True
        return False

    def subscribe(
        self, handler: Handler, types: Iterable[type[Event]] = (), *, queue: int = 10_000
    ) -> Subscription:
        """Call `handler` with each event from now on.

        Args:
            handler: A function, called in the thread and task in which the event happens (keep it short);
                or a coroutine function or a function that returns a task, called on the event loop that
                runs now, else on the one in which the event happens, else on a spare one.
            types: Event classes it wants; empty for all but the quiet ones (`CallStarted`, `CallEnded`,
                `HandlerFailed`).
            queue: Most events that wait for an asynchronous handler; then the oldest is dropped and counted.

        Returns:
            A handle with `cancel()`, which is a context manager too.

        Raises:
            OperoUsageError: `handler` cannot be called.
        """
        made = Subscription(handler, tuple(types), queue=queue, cancelled=self._left)
        with self._lock:
            self.subscriptions += (made,)
        return made

    def _left(self, subscription: Subscription) -> None:
        with self._lock:
            self.subscriptions = tuple(s for s in self.subscriptions if s is not subscription)

    def emit(self, event: Event | dict[str, Any]) -> _Emitted:
        """Hand an event, or a dict that becomes one, to everybody who wants it.

        Returns:
            Something that may be awaited, and has nothing to wait for.
        """
        if self.subscriptions:
            if isinstance(event, dict):
                from opero.events.work import event_of

                event = event_of(event)
            for subscription in self.subscriptions:
                subscription.deliver(event)
        return _EMITTED

    async def drain(self) -> None:
        """Wait until asynchronous handlers have dealt with all events sent so far.

        A handler that calls it does not wait for itself.
        """
        from opero.events.drain import drain

        await drain(self._mailboxes())

    def drain_sync(self, timeout: float | None = None) -> bool:
        """Wait like `drain`, in a thread without an event loop.

        Args:
            timeout: Most seconds to wait; None for as long as it takes.

        Returns:
            Whether all was dealt with.

        Raises:
            OperoUsageError: An event loop runs in this thread: its handlers could not.
        """
        from opero.events.drain import drain_sync

        return drain_sync(self._mailboxes(), timeout)

    def _mailboxes(self) -> list[Mailbox]:
        return [s.mailbox for s in self.subscriptions if s.mailbox is not None]

    def __repr__(self) -> str:
        return f"<EventBus with {len(self.subscriptions)} subscriptions>"


class _DefaultBus(EventBus):
    """The bus that all decorated functions send to: while anybody listens, they leave their express lanes."""

    def subscribe(
        self, handler: Handler, types: Iterable[type[Event]] = (), *, queue: int = 10_000
    ) -> Subscription:
        made = super().subscribe(handler, types, queue=queue)
        switch.hold()
        return made

    def _left(self, subscription: Subscription) -> None:
        super()._left(subscription)
        switch.release()

    def _mailboxes(self) -> list[Mailbox]:
        # Listeners of single functions (`on_event=`) are waited for as well: they have no bus that could do it.
        from opero.events.mailbox import mailboxes

        return mailboxes()


event_bus: Final[EventBus] = _DefaultBus()
