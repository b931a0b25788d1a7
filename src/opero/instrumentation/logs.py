# this_file: src/opero/instrumentation/logs.py
"""Write events as log lines: to loguru, or to a logger of the standard library.

opero is silent until one of these functions is called, and neither adds nor removes a sink: the program decides
where lines go. `loguru.logger.disable("opero")` silences it again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from opero.errors import OperoUsageError, did_you_mean
from opero.events import event_bus
from opero.events.messages import EventLogger, describe_event, log_event

if TYPE_CHECKING:
    from opero.events import Event, EventBus, Subscription


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
    if level.upper() not in _LEVELS:
        raise OperoUsageError(
            f"level={level!r} is no level.{did_you_mean(level.upper(), _LEVELS)} Levels: {', '.join(_LEVELS)}."
        )
    return logging.getLevelNamesMapping()[level.upper()]


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
