# this_file: src/opero/testing/switches.py
"""Switch retries, waits and caches off, collect events, and make functions that fail at first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from opero.events import Event, event_bus
from opero.utils import ambient

__all__ = ["capture_events", "flaky", "is_disabled", "set_disabled"]


class set_disabled:  # noqa: N801 - used as a function and as a context manager
    """Switch retries, waits and caches of all decorated functions off (or on again), at once and
    for the whole process.

    Every call is made exactly once then; argument fallback still tries its values.

    Args:
        value: False switches them on again.

    Example:
        >>> from opero import opero
        >>> from opero.testing import flaky, set_disabled
        >>> fetch = opero(cache=False)(flaky("ok", failures=1))
        >>> with set_disabled():
        ...     fetch()
        Traceback (most recent call last):
        ...
        ConnectionError: flaky failure 1 of 1
    """

    def __init__(self, value: bool = True) -> None:
        self._before = ambient.set_disabled(value)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ambient.set_disabled(self._before)


def is_disabled() -> bool:
    """Return whether retries, waits and caches are switched off."""
    return ambient.disabled()


@contextmanager
def capture_events(*types: type[Event]) -> Iterator[list[Event]]:
    """Collect the events of the default bus within the block.

    Args:
        types: Event classes wanted; all of them by default.
    """
    events: list[Event] = []
    with event_bus.subscribe(events.append, types):
        yield events


def flaky(
    value: Any, failures: int = 2, error: type[BaseException] | BaseException = ConnectionError
) -> Callable[..., Any]:
    """Make a function that fails at first and works then.

    Args:
        value: What it returns; a callable is called with the arguments instead. With a coroutine
            function the result is one.
        failures: How many calls fail.
        error: Exception type (gets a message) or instance to raise.

    Returns:
        A function of any arguments, with the number of its calls in its own `.calls` (a decorated function
        has a copy of the number, which does not change).

    Example:
        >>> fetch = flaky("ok", failures=1)
        >>> fetch()
        Traceback (most recent call last):
        ...
        ConnectionError: flaky failure 1 of 1
        >>> fetch()
        'ok'
    """

    def attempt() -> None:
        fetch.calls += 1
        if fetch.calls <= failures:
            raise (
                error(f"flaky failure {fetch.calls} of {failures}")
                if isinstance(error, type)
                else error
            )

    def sync_fetch(*args: Any, **kwargs: Any) -> Any:
        attempt()
        return value(*args, **kwargs) if callable(value) else value

    async def async_fetch(*args: Any, **kwargs: Any) -> Any:
        attempt()
        return await value(*args, **kwargs)

    fetch: Any = async_fetch if inspect.iscoroutinefunction(value) else sync_fetch
    fetch.calls = 0
    fetch.__name__ = fetch.__qualname__ = "flaky"
    made: Callable[..., Any] = fetch
    return made
