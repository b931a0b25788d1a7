# this_file: src/opero/caching/stores/redis_client.py
"""The room of the library `redis`: its connections, and its errors in our words.

A command is tried once and does not wait long: what would be a stall of seconds is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from redis import Redis
from redis import exceptions as errors
from redis.asyncio import ConnectionPool as AsyncPool
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

__all__ = ["async_connector", "client", "connector", "is_down", "is_gone", "is_refusal", "reason"]

_CONNECT: Final = 1.0
_ANSWER: Final = 1.0
"""Seconds. The latter is between two pieces of an answer, so that large values may take longer."""


def client(url: str) -> Redis:
    """Return a client for threads. It connects when it is first used."""
    made: Redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_settings())
    made.set_retry(Retry(NoBackoff(), 0))
    return made


def connector(client: Redis) -> Callable[[], Any]:
    """Return what makes connections of a client's kind, past its pool: that costs more than a command."""
    pool = client.connection_pool
    return lambda: pool.connection_class(**pool.connection_kwargs)


def async_connector(url: str) -> Callable[[], Any]:
    """Return what makes connections for event loops."""
    pool = AsyncPool.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **_settings())
    return lambda: pool.connection_class(**pool.connection_kwargs)


def _settings() -> dict[str, Any]:
    return {
        "socket_connect_timeout": _CONNECT,
        "socket_timeout": _ANSWER,
        "decode_responses": False,
        # The newer one brings messages that nobody has asked for, and a log line where it fails.
        "protocol": 2,
    }


def is_refusal(error: BaseException) -> bool:
    """Whether an error is the server's answer to a command, so that the connection is good."""
    return isinstance(error, errors.ResponseError)


def is_gone(error: BaseException) -> bool:
    """Whether an error says that the connection has ended, perhaps long ago."""
    return isinstance(error, errors.ConnectionError | ConnectionError)


def is_down(error: Exception) -> bool:
    """Whether the server could not be asked at all, as against refusing one command."""
    return isinstance(error, errors.ConnectionError | errors.TimeoutError | OSError | TimeoutError)


def reason(error: Exception) -> str:
    """Say what happened. The library's own words may hold addresses and keys, so they are not used."""
    # The asynchronous client wraps what goes wrong while it connects.
    for kinds, told in _REASONS:
        if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
            return told
    return type(error).__name__


_REASONS: Final[tuple[tuple[Any, str], ...]] = (
    (
        (errors.AuthenticationError, errors.AuthenticationWrongNumberOfArgsError),
        "the server refuses the password",
    ),
    ((errors.NoPermissionError, errors.AuthorizationError), "the server does not permit it"),
    (errors.ReadOnlyError, "the server is a replica that takes no writes"),
    (errors.OutOfMemoryError, "the server is out of memory"),
    (errors.BusyLoadingError, "the server is still loading its data"),
    ((errors.TimeoutError, TimeoutError), "the server does not answer"),
    ((errors.ConnectionError, OSError), "the server cannot be reached"),
)
