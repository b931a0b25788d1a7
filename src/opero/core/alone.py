# this_file: src/opero/core/alone.py
"""The stages as decorators of their own: one is on, the rest off, option names as in `@opero`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from opero.core.decorate import decorate
from opero.core.options import Options, Stage

if TYPE_CHECKING:
    from opero.core.protocols import Decorate

__all__ = [
    "get_cache_decorator",
    "get_fallback_decorator",
    "get_rate_limit_decorator",
    "get_retry_decorator",
]


def get_cache_decorator(**options: Any) -> Decorate:
    """Return a decorator that only caches.

    Args:
        options: Any of the `cache…` options; `cache=False` gives a decorator that does nothing.

    Example:
        >>> @get_cache_decorator(cache_ttl="15m")
        ... def double(x):
        ...     return 2 * x
        >>> double(2), double(2), double.stats.calls
        (4, 4, 1)
    """
    return _decorator("get_cache_decorator", "cache", options)


def get_retry_decorator(**options: Any) -> Decorate:
    """Return a decorator that only retries.

    Args:
        options: retries, backoff_factor, min_delay, max_delay, jitter, retry_on, retry_if_result,
            wait, stop.

    Example:
        >>> from opero.testing import flaky
        >>> get_retry_decorator(retries=2, min_delay=0)(flaky("ok", failures=2))()
        'ok'
    """
    return _decorator("get_retry_decorator", "retry", options)


def get_fallback_decorator(**options: Any) -> Decorate:
    """Return a decorator that only tries the values of one parameter in order.

    Args:
        options: arg_fallback, fallback_on.

    Example:
        >>> @get_fallback_decorator(arg_fallback="divisor")
        ... def divide(x, divisor=(0, 2)):
        ...     return x // divisor
        >>> divide(10)
        5
    """
    return _decorator("get_fallback_decorator", "fallback", options)


def get_rate_limit_decorator(**options: Any) -> Decorate:
    """Return a decorator that only limits the rate of calls.

    Args:
        options: rate_limit, retry_after_max.

    Example:
        >>> @get_rate_limit_decorator(rate_limit="1000/s")
        ... def ping():
        ...     return "pong"
        >>> ping()
        'pong'
    """
    return _decorator("get_rate_limit_decorator", "rate limit", options)


def _decorator(by: str, stage: Stage, given: dict[str, Any]) -> Decorate:
    options = Options.alone(by, stage, **given)
    return cast("Decorate", lambda function: decorate(function, options, by=by))
