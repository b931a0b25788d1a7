# this_file: src/opero/instrumentation/timeline.py
"""Draw a timeline: one line for each event, nested like the calls."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from opero.events import CallEnded, CallGaveUp, CallStarted, CallSucceeded, event_bus
from opero.events.messages import describe_event
from opero.events.types import Event

if TYPE_CHECKING:
    from opero.events import EventBus, Subscription


class Timeline:
    """Listens within its block, and prints as a timeline.

    Args:
        bus: The bus to listen to.
        longest: Most events that are kept; later ones are only counted.

    Attributes:
        events: The events, in order.
        left_out: How many events came after the last that was kept.

    Example:
        >>> from opero import opero
        >>> from opero.testing import flaky
        >>> with Timeline() as timeline:
        ...     opero(cache=False, min_delay=0)(flaky("ok", failures=1))()
        'ok'
        >>> print(timeline)  # doctest: +ELLIPSIS
        0.000 s  flaky
        0... s  │ attempt 1 failed with ConnectionError after ... s
        0... s  │ attempt 2 in 0 s
        0... s  └ ok after ... s in 2 attempts
    """

    def __init__(self, bus: EventBus = event_bus, *, longest: int = 10_000) -> None:
        self.events: list[Event] = []
        self.left_out: int = 0
        self._bus = bus
        self._longest = longest
        self._lock = threading.Lock()
        self._subscription: Subscription | None = None

    def __enter__(self) -> Self:
        self._subscription = self._bus.subscribe(self._record, types=[Event])
        return self

    def __exit__(self, *_: object) -> None:
        if self._subscription is not None:
            self._subscription.cancel()

    def _record(self, event: Event) -> None:
        if isinstance(event, CallSucceeded | CallGaveUp):
            return  # the end of the call follows at once and holds the same and more
        with self._lock:
            if len(self.events) < self._longest:
                self.events.append(event)
            else:
                self.left_out += 1

    def __str__(self) -> str:
        if not self.events:
            return "nothing happened"
        begin = self.events[0].at
        parents = {e.run_id: e.parent_id for e in self.events}
        lines = [
            f"{f'{event.at - begin:.3f} s':<9}{_bars(event, parents)}{_line(event)}"
            for event in self.events
        ]
        if self.left_out:
            lines.append(f"… and {self.left_out} events more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Timeline of {len(self.events)} events>"


def _bars(event: Event, parents: dict[str | None, str | None]) -> str:
    depth, run = 0, parents.get(event.run_id)
    while run in parents and run is not None:
        depth, run = depth + 1, parents[run]
    bars = "│ " * depth
    if isinstance(event, CallStarted) or event.run_id is None:
        return bars
    return bars + ("└ " if isinstance(event, CallEnded) else "│ ")


def _line(event: Event) -> str:
    if isinstance(event, CallStarted):
        return event.function
    if isinstance(event, CallEnded):
        outcome = "ok" if event.error is None else type(event.error).__name__
        if event.source != "fresh":
            return f"{outcome}, {event.source}"
        often = f"{event.attempts} attempt{'s' * (event.attempts != 1)}"
        return f"{outcome} after {event.seconds:.3f} s in {often}"
    return describe_event(event)[1].removeprefix(f"{event.function}: ")
