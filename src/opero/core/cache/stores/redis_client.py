# this_file: src/opero/core/cache/stores/redis_client.py
"""The room of the library `redis`: its clients, and its errors in our words.

A client makes one attempt per command and does not wait long: what would be a stall of seconds is
a miss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from redis import Redis
from redis import exceptions as errors
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from redis.asyncio.client import Redis as AnyAsyncRedis

__all__ = ["CONNECTIONS", "async_client", "client", "is_down", "reason"]

CONNECTIONS: Final = 16
"""Most connections of one event loop; tasks beyond wait for their turn."""

_CONNECT: Final = 1.0
_ANSWER: Final = 1.0
"""Seconds. The latter is between two pieces of an answer, so that large values may take longer."""


def client(url: str) -> Redis:
    """Return a client for threads. It connects when it is first used."""
    made: Redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_settings())
    made.set_retry(Retry(NoBackoff(), 0))
    return made


def async_client(url: str) -> AnyAsyncRedis:
    """Return a client for the event loop that it is first used in."""
    made: AnyAsyncRedis = AsyncRedis.from_url(
        url, retry=AsyncRetry(NoBackoff(), 0), max_connections=CONNECTIONS, **_settings()
    )
    made.set_retry(AsyncRetry(NoBackoff(), 0))
    return made


def _settings() -> dict[str, Any]:
    return {
        "socket_connect_timeout": _CONNECT,
        "socket_timeout": _ANSWER,
        "decode_responses": False,
    }


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
