# this_file: src/opero/events.py
"""What happens inside a call, as typed events, and the bus that carries them.

Nothing is built and nothing is sent while nobody listens. Events carry no argument values, except
for the label of a fallback value, which is masked where the parameter looks like a secret.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self

from opero.errors import OperoUsageError
from opero.utils.record import Record
from opero.utils.switch import switch

__all__ = [
    "AttemptFailed",
    "CacheHit",
    "CacheMiss",
    "CacheSkipped",
    "CallGaveUp",
    "CallSucceeded",
    "CircuitChanged",
    "Event",
    "EventBus",
    "FallbackUsed",
    "LimiterWaited",
    "RetryScheduled",
    "Subscription",
    "event_bus",
]


class Event(Record):
    """Base of all events.

    Attributes:
        function: Qualified name of the decorated function.
        at: Wall-clock seconds since the epoch.
    """

    function: str
    at: float = 0.0

    def __init__(self, **given: Any) -> None:
        given.setdefault("at", time.time())
        super().__init__(**given)


class AttemptFailed(Event):
    """One real call of the function failed (or its result was rejected, then `error` is None).

    Attributes:
        attempt: Number of the attempt, from 1.
        value: Label of the fallback value it was made with, None without fallback.
        error: The function's own exception.
    """

    attempt: int
    value: str | None
    error: BaseException | None


class RetryScheduled(Event):
    """Another attempt will be made.

    Attributes:
        attempt: Number of the attempt to come.
        delay: Seconds of pause before it.
    """

    attempt: int
    delay: float


class FallbackUsed(Event):
    """The next value of the fallback parameter is tried.

    Attributes:
        value: Its label.
        index: Its place in the caller's list, from 0.
    """

    value: str
    index: int


class LimiterWaited(Event):
    """A call waited for its slot.

    Attributes:
        seconds: How long.
    """

    seconds: float


class CacheHit(Event):
    """A stored result was served."""


class CacheMiss(Event):
    """No stored result was there; the function is called."""


class CacheSkipped(Event):
    """A result was not stored, or the cache could not be used.

    Attributes:
        reason: A sentence for people.
    """

    reason: str


class CallSucceeded(Event):
    """A call returned a value that was not in the cache.

    Attributes:
        attempts: Attempts it took.
        calls: Real calls it took.
    """

    attempts: int
    calls: int


class CallGaveUp(Event):
    """A call failed for good.

    Attributes:
        attempts: Attempts made.
        calls: Real calls made.
        error: What the caller gets.
    """

    attempts: int
    calls: int
    error: BaseException


class CircuitChanged(Event):
    """A circuit breaker went from one state to another.

    `function` is the function that it guards, or the circuit's own name where it guards several or
    none.

    Attributes:
        circuit: Its name.
        old_state, new_state: "closed", "open", "half_open", "forced_open" or "disabled".
        retry_after: Seconds until it may let a call through again, where it has just opened; None
            otherwise.
    """

    circuit: str
    old_state: str
    new_state: str
    retry_after: float | None


Handler = Callable[[Event], object]


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
