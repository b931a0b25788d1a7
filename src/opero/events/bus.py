# this_file: src/opero/events/bus.py
"""Deliver events to handlers: the bus, subscriptions to it, and the emitter of one function."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from opero.errors import OperoUsageError
from opero.utils.ambient import running_loop, switch
from opero.utils.async_utils import is_async_function
from opero.utils.checks import is_whole
from opero.utils.parameters import unwrap_partial

if TYPE_CHECKING:
    from opero.events.delivery import DeliveryQueue
    from opero.events.types import Event


Handler = Callable[["Event"], object]
"""What is called with each event: a function, a coroutine function, or a function that returns a task."""

_NEEDS_A_LOOP = frozenset({"create_task", "ensure_future", "get_running_loop"})
_QUEUE = 10_000


class Subscription:
    """A handler and the events that it wants: `cancel()` it, or use it as a context manager.

    A plain handler is called at once, in the thread and task in which the event happens. An asynchronous
    one, or one that returns a task or another awaitable, is called on its event loop, one event after
    the other.

    Args:
        handler: What to call.
        types: Event class or classes it wants; empty for all but the quiet ones.
        queue: Most events that wait for an asynchronous handler.
        cancelled: Called when it has been cancelled.

    Attributes:
        errors: How often the handler has raised.
        queue: The queue of an asynchronous handler; None of a plain one.

    Raises:
        OperoUsageError: `handler` cannot be called, `types` are no classes, or the queue has no place.
    """

    __slots__ = (
        "__weakref__", "_cancelled", "_reported", "_size", "errors", "handler", "live", "queue", "types"
    )  # fmt: skip

    def __init__(
        self,
        handler: Handler,
        types: type[Event] | Iterable[type[Event]] = (),
        *,
        queue: int = _QUEUE,
        cancelled: Callable[[Subscription], None] | None = None,
    ) -> None:
        if not callable(handler):
            raise OperoUsageError(f"handler={handler!r} must be a callable that gets the event.")
        if not is_whole(queue, 1):
            raise OperoUsageError(
                f"queue={queue!r}: at least one event must have room; give 1 or more."
            )
        wanted: tuple[Any, ...] = tuple(types) if isinstance(types, Iterable) else (types,)
        if not all(isinstance(kind, type) for kind in wanted):
            raise OperoUsageError(f"types={types!r} must be event classes, like [RetryScheduled].")
        self.handler: Handler = handler
        self.types: tuple[type[Event], ...] = wanted
        self.live: bool = True
        self.errors: int = 0
        self._cancelled = cancelled
        self._size = queue
        self._reported: set[type] = set()
        self.queue: DeliveryQueue | None = None
        if _needs_a_loop(handler):
            self._become_asynchronous()

    @property
    def dropped(self) -> int:
        """Events that an asynchronous handler has lost, because its queue was full or its loop ended."""
        return 0 if self.queue is None else self.queue.dropped

    def wants(self, kind: type[Event]) -> bool:
        """Return whether events of a class reach the handler."""
        return self.live and (issubclass(kind, self.types) if self.types else not kind.quiet)

    def deliver(self, event: Event) -> None:
        """Call the handler with an event if it wants it; report whatever the handler raises."""
        if not self.live or not (isinstance(event, self.types) if self.types else not event.quiet):
            return
        if self.queue is not None:
            self.queue.put(functools.partial(self.handler, event), event)
            return
        try:
            result = self.handler(event)
        except Exception as error:  # noqa: BLE001 - a listener must never break the call it watches
            self._failed(error, event)
            return
        if result is not None and hasattr(type(result), "__await__"):
            # From now on the others wait until this one is done.
            self._become_asynchronous(result).put(lambda: result, event)

    def cancel(self) -> None:
        """Stop at once and discard events that wait for the handler. May be called twice."""
        self.live = False
        if self.queue is not None:
            self.queue.clear()
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            cancelled(self)

    def _become_asynchronous(self, awaitable: Any = None) -> DeliveryQueue:
        # Loaded here: most handlers are plain.
        from opero.events.delivery import DeliveryQueue

        get_loop = getattr(awaitable, "get_loop", running_loop)
        queue = DeliveryQueue(self._size, self._failed, get_loop())
        self.queue = queue
        return queue

    def _failed(self, error: Exception, event: Event) -> None:
        """Report an error of the handler as an event; without a handler for it on stderr, once for each type."""
        from opero.events.types import HandlerFailed

        self.errors += 1
        try:
            name = getattr(self.handler, "__qualname__", type(self.handler).__qualname__)
            module = getattr(self.handler, "__module__", None)
            if event_bus.wants(HandlerFailed) and not isinstance(event, HandlerFailed):
                event_bus.emit(
                    HandlerFailed(
                        function=name, module=module, handler=self.handler, error=error, event=event
                    )
                )
            elif type(error) not in self._reported:
                self._reported.add(type(error))
                import traceback

                trace = "".join(traceback.format_exception(error))
                sys.stderr.write(
                    f"Exception ignored in opero event handler {self.handler!r}:\n{trace}"
                )
        except Exception:  # noqa: BLE001, S110 - no repr, no stderr: the call goes before the report
            pass

    # --- context manager ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        wanted = ", ".join(t.__name__ for t in self.types) or "all events"
        lost = f", {self.dropped} dropped" if self.dropped else ""
        raised = f", raised {self.errors} times" if self.errors else ""
        return f"<Subscription of {self.handler!r} to {wanted}{lost}{raised}>"


class _Emitted:
    """Result of `emit`: everything is done already, but it may be awaited."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield  # makes it a generator

    def __repr__(self) -> str:
        return "<emitted>"


_EMITTED = _Emitted()


class EventBus:
    """Calls handlers with events, in order of subscription; `emit` never raises and never waits.

    Plain handlers are called at once, where the event happens. Asynchronous ones, and those that return
    a task, are called on their event loop: each handler gets its events one after the other, in order,
    from a bounded queue of its own. An error of a handler is reported and affects no other handler.

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
        """Whether there is a subscription."""
        return bool(self.subscriptions)

    def wants(self, kind: type[Event]) -> bool:
        """Return whether a handler wants events of a class, for events that are costly to make."""
        for one in self.subscriptions:  # noqa: SIM110 - a generator costs more than the loop
            if one.wants(kind):
                return True
        return False

    def subscribe(
        self,
        handler: Handler,
        types: type[Event] | Iterable[type[Event]] = (),
        *,
        queue: int = _QUEUE,
    ) -> Subscription:
        """Call `handler` with each event from now on.

        Args:
            handler: A function, called in the thread and task in which the event happens (keep it short);
                or a coroutine function or a function that returns a task, called on the event loop that
                runs now, else on the one in which the event happens, else on one in a background thread.
            types: Event class or classes it wants; empty for all but the quiet ones (`CallStarted`, `CallEnded`,
                `HandlerFailed`).
            queue: Most events that wait for an asynchronous handler; then the oldest is dropped and counted.

        Returns:
            A handle with `cancel()`, which is a context manager too.

        Raises:
            OperoUsageError: `handler` cannot be called, `types` are no classes, or the queue has no place.
        """
        made = Subscription(handler, types, queue=queue, cancelled=self._remove)
        with self._lock:
            self.subscriptions += (made,)
        if self is event_bus:
            switch.turn_on()
        return made

    def unsubscribe(self, handler: Handler) -> int:
        """Cancel all subscriptions of a handler on this bus; may be called from within the handler.

        Args:
            handler: The handler, compared by equality: `sink.write` is the same bound method each time.

        Returns:
            How many there were.
        """
        found = [s for s in self.subscriptions if s.handler == handler]
        for subscription in found:
            subscription.cancel()
        return len(found)

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            self.subscriptions = tuple(s for s in self.subscriptions if s is not subscription)
        if self is event_bus:
            switch.turn_off()

    def emit(self, event: Event | dict[str, Any]) -> _Emitted:
        """Send an event, or a dict that becomes one, to all handlers that want it.

        Returns:
            Something that may be awaited, and has nothing to wait for.
        """
        if self.subscriptions:
            if isinstance(event, dict) or not hasattr(event, "quiet"):
                from opero.events.types import event_from_dict

                event = event_from_dict(event)
            for subscription in self.subscriptions:
                subscription.deliver(event)
        return _EMITTED

    async def drain(self) -> None:
        """Wait until asynchronous handlers have processed all events sent so far.

        A handler that calls it does not wait for itself.
        """
        from opero.events.delivery import drain

        await drain(self._queues())

    def drain_sync(self, timeout: float | None = None) -> bool:
        """Wait like `drain`, in a thread without an event loop.

        Args:
            timeout: Most seconds to wait; None for as long as it takes.

        Returns:
            Whether all events have been processed.

        Raises:
            OperoUsageError: An event loop runs in this thread: its handlers could not run.
        """
        from opero.events.delivery import drain_sync

        return drain_sync(self._queues(), timeout)

    def _queues(self) -> list[DeliveryQueue]:
        if self is event_bus:
            # Listeners of single functions (`on_event=`) are waited for as well: they have no bus that could do it.
            from opero.events.delivery import delivery_queues

            return delivery_queues()
        return [s.queue for s in self.subscriptions if s.queue is not None]

    def __repr__(self) -> str:
        return f"<EventBus with {len(self.subscriptions)} subscriptions>"


event_bus: Final[EventBus] = EventBus()
"""The bus that all decorated functions send to: while it has a subscription, they leave their fast paths."""


class Emitter:
    """Sends the events of one function to its own listeners and to the default bus.

    Stages read `active` before they build an event, so that without listeners an event costs one attribute and
    one truth test.

    Args:
        function: Qualified name of the function.
        listeners: Its own handlers.
        module: Module of the function; it and the function are stamped on events that have none.
    """

    __slots__ = ("function", "listeners", "module")

    def __init__(
        self, function: str, listeners: Sequence[Handler] = (), *, module: str | None = None
    ) -> None:
        self.function: Final = function
        self.module: Final = module
        self.listeners: Final[tuple[Subscription, ...]] = tuple(Subscription(h) for h in listeners)

    @property
    def active(self) -> bool:
        """Whether an event would reach a handler."""
        return bool(self.listeners or event_bus.subscriptions)

    def wants(self, kind: type[Event]) -> bool:
        """Return whether a handler wants events of a class, for those that are costly to make."""
        for listener in self.listeners:
            if listener.wants(kind):
                return True
        return event_bus.wants(kind)

    def emit(self, event: Event) -> None:
        """Deliver an event; never raises."""
        # Frozen for handlers, which have not seen it yet.
        if not event.function:
            object.__setattr__(event, "function", self.function)
        if event.module is None and self.module is not None:
            object.__setattr__(event, "module", self.module)
        for listener in self.listeners:
            listener.deliver(event)
        event_bus.emit(event)


def _needs_a_loop(handler: Handler) -> bool:
    """Return whether a handler can only be called on an event loop, as far as can be seen from outside."""
    if is_async_function(handler):
        return True
    code = getattr(unwrap_partial(handler), "__code__", None)
    return code is not None and not _NEEDS_A_LOOP.isdisjoint(code.co_names)
