# this_file: src/opero/instrumentation/logs.py
"""Write events as text: as log lines, to loguru or a logger of the standard library, or as a timeline.

opero is silent until one of these functions is called, and neither adds nor removes a sink: the program decides
where lines go. `loguru.logger.disable("opero")` silences it again.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import opero.utils.checks as checks
from opero.errors import OperoUsageError, did_you_mean
from opero.events import CallEnded, CallGaveUp, CallStarted, CallSucceeded, event_bus
from opero.events.messages import EventLogger, describe_event, log_event
from opero.events.types import Event

if TYPE_CHECKING:
    from opero.events import EventBus, Subscription


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def log_events(
    to: EventLogger | str | None = None,
    *,
    level: int | str = "DEBUG",
    types: Iterable[type[Event]] = (),
    messages: bool = False,
    bus: EventBus = event_bus,
) -> Subscription:
    """Write events to a log from now on.

    Args:
        to: A logger of the standard library or its name; None for loguru.
        level: Lowest level that is written. Failed attempts are warnings, a call that fails for good is an error, an
            undisturbed one is "DEBUG".
        types: Event classes wanted; empty for all but the quiet ones.
        messages: Show errors with their messages, not only their types. Known forms of secrets in them are masked.
        bus: The bus to listen to.

    Returns:
        The subscription: `cancel()` it, or use it as a context manager.

    Raises:
        OperoUsageError: The level is not known.

    Example:
        >>> import logging, sys
        >>> from opero import opero
        >>> from opero.events import RetryScheduled
        >>> from opero.testing import flaky
        >>> logger = logging.getLogger("shop")
        >>> logger.setLevel("INFO")
        >>> logger.addHandler(logging.StreamHandler(sys.stdout))
        >>> with log_events(logger, level="INFO", types=[RetryScheduled]):
        ...     opero(cache=False, min_delay=0)(flaky("ok", failures=1))()
        flaky: attempt 2 in 0 s
        'ok'
        >>> logger.handlers.clear()
    """
    lowest = _number(level)
    if to is None:
        write = functools.partial(_log_with_loguru, _loguru(), lowest, messages)
    else:
        logger = logging.getLogger(to) if isinstance(to, str) else to
        checks.logger("to", logger)
        write = functools.partial(_log, logger, lowest, messages)
    return bus.subscribe(write, types)


class _Configured:
    """The subscription that `configure_logging` has made."""

    subscription: Subscription | None = None


def configure(
    level: int | str | None, to: EventLogger | str | None = None, *, messages: bool = False
) -> None:
    """Do the work of `configure_logging`."""
    made = None if level is None else log_events(to, level=level, messages=messages)
    before, _Configured.subscription = _Configured.subscription, made
    if before is not None:
        before.cancel()


def _number(level: int | str) -> int:
    if isinstance(level, int):
        return level
    name = str(level).upper()
    if name not in _LEVELS:
        raise OperoUsageError(
            f"level={level!r} is no level.{did_you_mean(name, _LEVELS)} Levels: {', '.join(_LEVELS)}."
        )
    return logging.getLevelNamesMapping()[name]


def _loguru() -> Any:
    """Load loguru and enable the lines of opero in it."""
    from loguru import logger

    logger.enable("opero")
    return logger


def _log_with_loguru(logger: Any, lowest: int, messages: bool, event: Event) -> None:
    level, text = describe_event(event, messages=messages)
    if level >= lowest:
        logger.bind(event=event).log(logging.getLevelName(level), "{}", text)


def _log(logger: EventLogger, lowest: int, messages: bool, event: Event) -> None:
    if describe_event(event)[0] >= lowest:
        log_event(logger, event, messages=messages)


# --- a timeline: one line for each event, nested like the calls -----------------------------------


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
