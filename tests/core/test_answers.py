# this_file: tests/core/test_answers.py
"""What callers see of a service's answers: statuses, requests to wait, streams, budgets. Documented names only."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import sqlite3
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from opero import CircuitBreaker, CircuitState, ConcurrencyLimit, RateLimiter, opero
from opero.errors import CircuitOpenError, RateLimitPausedError
from opero.testing import fake_clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Face


class AnswerError(Exception):
    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        super().__init__(f"status {status}")
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = SimpleNamespace(status_code=status, headers=named)
        self.body = body


def caused(error: Exception) -> Exception:
    outer = RuntimeError("wrapped")
    outer.__cause__ = error
    return outer


def attempts(error: Exception, **options: Any) -> int:
    """Return how often a function is called that always fails with this error."""
    calls: list[int] = []

    def fetch() -> None:
        calls.append(1)
        raise error

    with fake_clock(), pytest.raises(type(error)):
        opero(cache=False, retries=2, **options)(fetch)()
    return len(calls)


FINAL = [
    *(AnswerError(status) for status in (400, 401, 403, 404, 405, 410, 422, 451, 501)),
    *(AnswerError(402), AnswerError(429, {"error": {"code": "insufficient_quota"}})),
    AnswerError(503, x_should_retry="false"),
    *(caused(AnswerError(404)), ExceptionGroup("g", [AnswerError(404), AnswerError(503)])),
    *(sqlite3.IntegrityError("UNIQUE constraint failed"), caused(sqlite3.ProgrammingError("near"))),
]
PASSING = [
    *(AnswerError(status) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
    AnswerError(400, {"error": {"code": "ThrottlingException"}}),
    *(AnswerError(400, x_should_retry="true"), AnswerError(403, retry_after="1")),
    *(ConnectionResetError(), TimeoutError(), OSError(errno.ENETUNREACH, "unreachable")),
    *(caused(AnswerError(503)), ExceptionGroup("g", [AnswerError(503), ConnectionError()])),
]
UNKNOWN = [ValueError(), OSError(errno.ENOENT, "no file"), ExceptionGroup("g", [ValueError()])]


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_is_answered_for_good_is_asked_once_unless_the_program_says_otherwise(
    error: Exception,
) -> None:
    assert attempts(error) == attempts(error, retry_on="transient") == 1
    assert attempts(error, retry_on=Exception) == 3


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_is_known_to_pass_is_tried_again(error: Exception) -> None:
    assert attempts(error) == attempts(error, retry_on="transient") == 3


@pytest.mark.parametrize("error", UNKNOWN, ids=repr)
def test_what_nobody_knows_is_tried_again_by_default_only(error: Exception) -> None:
    assert attempts(error) == 3
    assert attempts(error, retry_on="transient") == 1


def asked_to_wait(error: Exception) -> float:
    """Return the pause before the second call."""
    begun: list[float] = []

    def fetch() -> None:
        begun.append(clock.monotonic())
        if len(begun) == 1:
            raise error

    with fake_clock() as clock:
        opero(cache=False, min_delay=0, max_delay=0)(fetch)()
    return begun[1] - begun[0]


def date(seconds: float) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


class WaitError(Exception):
    """As clients raise it that have read the answer already."""

    retry_after = "4"


class DetailedError(Exception):
    details = ({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"},)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (AnswerError(503, retry_after="5"), 5),
        (AnswerError(503, Retry_After="5, 9"), 9),
        (AnswerError(429, retry_after_ms="2500"), 2.5),
        (AnswerError(503, retry_after=date(1030), date=date(1000)), 30),
        (AnswerError(429, x_ratelimit_remaining="0", x_ratelimit_reset="8"), 8),
        (AnswerError(429, x_ratelimit_remaining_tokens="0", x_ratelimit_reset_tokens="1m2s"), 0),
        (AnswerError(500, x_ratelimit_remaining="0", x_ratelimit_reset="8"), 0),
        (AnswerError(503, retry_after="soon"), 0),
        (AnswerError(503, retry_after="-3"), 0),
        (WaitError(), 4),
        (DetailedError(), 7),
        (caused(AnswerError(503, retry_after="5")), 5),
        (ExceptionGroup("g", [AnswerError(503, retry_after="5"), AnswerError(503)]), 5),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_service_that_asks_for_time_gets_it(error: Exception, seconds: float) -> None:
    if seconds == 0 and "tokens" in str(vars(error)):
        with pytest.raises(AnswerError):
            asked_to_wait(error)  # 62 seconds are more than retry_after_max
        return
    assert asked_to_wait(error) == pytest.approx(seconds, abs=0.01)


# --- streams --------------------------------------------------------------------------------------


def collect(face: Face, stream: Any) -> list[int]:
    async def of_tasks() -> list[int]:
        return [item async for item in stream]

    return asyncio.run(of_tasks()) if face.asynchronous else list(stream)


def items_of(face: Face, *, torn: bool = False) -> Callable[[], Any]:
    def stream() -> Any:
        yield 1
        if torn:
            raise ConnectionError("torn")
        yield 2

    async def astream() -> Any:
        for item in stream():
            yield item

    return astream if face.asynchronous else stream


def drop(face: Face, stream: Any) -> None:
    async def of_tasks() -> None:
        await anext(stream)
        await stream.aclose()

    if face.asynchronous:
        asyncio.run(of_tasks())
    else:
        next(stream)
        stream.close()


def test_a_stream_that_is_torn_is_a_failure_and_one_that_is_dropped_is_neither(face: Face) -> None:
    breaker = CircuitBreaker(fail_max=2)
    guarded = opero(
        cache=False, retries=0, circuit_breaker=breaker, concurrency=ConcurrencyLimit(1)
    )
    torn = guarded(items_of(face, torn=True))
    for _ in range(3):
        drop(face, torn())
    assert breaker.state is CircuitState.CLOSED
    for _ in range(2):
        with pytest.raises(ConnectionError) as caught:
            collect(face, torn())
        assert "1 item" in caught.value.__notes__[0]
    with pytest.raises(CircuitOpenError):
        collect(face, guarded(items_of(face))())


def test_a_stream_is_counted_when_it_has_ended(face: Face) -> None:
    stream = opero(cache=False, retries=0, concurrency=1, timeout=5)(items_of(face))
    assert collect(face, stream()) == [1, 2]
    drop(face, stream())
    assert collect(face, stream()) == [1, 2]
    assert stream.stats.calls == 3
    assert stream.concurrency.in_flight == 0


# --- limits ---------------------------------------------------------------------------------------


def test_a_paused_limiter_refuses_those_that_would_wait_too_long(face: Face) -> None:
    limiter = RateLimiter("100/s & 1000/minute", name=None)
    fetch = opero(cache=False, retries=0, rate_limit=limiter, retry_after_max=5)(face.of(lambda: 1))
    with fake_clock():
        limiter.pause(100)
        with pytest.raises(RateLimitPausedError) as caught:
            face.run(fetch)
        assert caught.value.retry_after == pytest.approx(100)
        assert limiter.paused
        limiter.resume()
        assert face.run(fetch) == 1


def test_each_key_has_a_bucket_of_its_own(face: Face) -> None:
    limiter = RateLimiter("1/hour", burst=1, key=lambda user: user)
    fetch = opero(cache=False, retries=0, rate_limit=limiter, deadline=1)(
        face.of(lambda user: time.monotonic())
    )
    with fake_clock():
        for user in ("a", "b", "c"):
            face.run(fetch, user)
    assert "3 buckets" in repr(limiter)
