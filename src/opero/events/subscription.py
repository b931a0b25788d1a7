# this_file: src/opero/events/subscription.py
"""A handler's place: whom it wants to hear, how it is called, and what becomes of its failures."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from opero.errors import OperoUsageError
from opero.utils.async_utils import is_async_function

if TYPE_CHECKING:
    from opero.events.event import Event
    from opero.events.mailbox import Mailbox

__all__ = ["Handler", "Subscription"]

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
        types: Event classes it wants; empty for all but the quiet ones.
        queue: Most events that wait for an asynchronous handler.
        cancelled: Called when it has been cancelled.

    Attributes:
        errors: How often the handler has raised.

    Raises:
        OperoUsageError: `handler` cannot be called, or the queue has no place.
    """

    __slots__ = (
        "__weakref__", "_cancelled", "_mailbox", "_queue", "_reported", "errors", "handler", "live", "types"
    )  # fmt: skip

    def __init__(
        self,
        handler: Handler,
        types: tuple[type[Event], ...] = (),
        *,
        queue: int = _QUEUE,
        cancelled: Callable[[Subscription], None] | None = None,
    ) -> None:
        if not callable(handler):
            raise OperoUsageError(f"handler={handler!r} must be a callable that gets the event.")
        if queue < 1:
            raise OperoUsageError(
                f"queue={queue!r}: at least one event must have room; give 1 or more."
            )
        self.handler: Handler = handler
        self.types: tuple[type[Event], ...] = types
        self.live: bool = True
        self.errors: int = 0
        self._cancelled = cancelled
        self._queue = queue
        self._reported: set[type] = set()
        self._mailbox: Mailbox | None = None
        if _needs_a_loop(handler):
            self._become_asynchronous()

    @property
    def dropped(self) -> int:
        """Events that an asynchronous handler has lost, because its queue was full or its loop ended."""
        return 0 if self._mailbox is None else self._mailbox.dropped

    @property
    def mailbox(self) -> Mailbox | None:
        """The queue of an asynchronous handler."""
        return self._mailbox

    def wants(self, kind: type[Event]) -> bool:
        """Tell whether events of a class reach the handler."""
        return self.live and (issubclass(kind, self.types) if self.types else not kind.quiet)

    def deliver(self, event: Event) -> None:
        """Take one event to the handler if it wants it; whatever the handler raises is reported, never passed on."""
        if not self.live or not (isinstance(event, self.types) if self.types else not event.quiet):
            return
        if self._mailbox is not None:
            self._mailbox.put(functools.partial(self.handler, event), event)
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
        """Stop listening at once; events that wait for the handler are thrown away. Twice does no harm."""
        self.live = False
        if self._mailbox is not None:
            self._mailbox.clear()
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            cancelled(self)

    def _become_asynchronous(self, begun: Any = None) -> Mailbox:
        # Loaded here: most handlers are plain.
        from opero.events.drain import drain_at_exit
        from opero.events.mailbox import Mailbox, running_loop

        get_loop = getattr(begun, "get_loop", running_loop)
        drain_at_exit()
        mailbox = Mailbox(self._queue, self._failed, get_loop())
        self._mailbox = mailbox
        return mailbox

    def _failed(self, error: Exception, event: Event) -> None:
        """Report what the handler raised: to those who listen for it, else on stderr, there once for each type."""
        from opero.events import bus
        from opero.events.types import HandlerFailed

        self.errors += 1
        try:
            name = getattr(self.handler, "__qualname__", type(self.handler).__qualname__)
            if bus.event_bus.hears(HandlerFailed) and not isinstance(event, HandlerFailed):
                bus.event_bus.emit(
                    HandlerFailed(function=name, handler=self.handler, error=error, event=event)
                )
            elif type(error) not in self._reported:
                self._reported.add(type(error))
                import traceback

                told = "".join(traceback.format_exception(error))
                sys.stderr.write(
                    f"Exception ignored in opero event handler {self.handler!r}:\n{told}"
                )
        except Exception:  # noqa: BLE001, S110 - no repr, no stderr: the call goes before the report
            pass

    # --- context manager ---------------------------------------------------------------------------------------------

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
        lost = f", {self.dropped} dropped" if self.dropped else ""
        raised = f", raised {self.errors} times" if self.errors else ""
        return f"<Subscription of {self.handler!r} to {wanted}{lost}{raised}>"


def _needs_a_loop(handler: Handler) -> bool:
    """Tell whether a handler can only be called on an event loop, as far as can be seen from outside."""
    if is_async_function(handler):
        return True
    plain: Any = handler
    while isinstance(plain, functools.partial):
        plain = plain.func
    code = getattr(plain, "__code__", None)
    return code is not None and not _NEEDS_A_LOOP.isdisjoint(code.co_names)
