# this_file: tests/composition/test_wall_clock.py
"""Setting the wall clock, or another time zone, changes nothing that opero waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from opero import CircuitBreaker, RateLimiter, opero
from opero.core.retry_after import requested_wait
from opero.errors import CircuitOpenError

pytestmark = pytest.mark.internal

HOUR = 3600


@pytest.fixture(params=[-8, 8, "Pacific/Kiritimati", "America/Anchorage"])
def set_the_clock(request, monkeypatch):
    """Return what sets the wall clock by so many hours, or moves the machine to another zone."""

    def change() -> None:
        if isinstance(request.param, str):
            if not hasattr(time, "tzset"):
                pytest.skip("this system's zone cannot be set")
            monkeypatch.setenv("TZ", request.param)
            time.tzset()
            return
        seconds, nanoseconds = time.time, time.time_ns
        by = request.param * HOUR
        monkeypatch.setattr(time, "time", lambda: seconds() + by)
        monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + by * 10**9)

    yield change
    monkeypatch.undo()
    if hasattr(time, "tzset"):
        time.tzset()


@pytest.mark.parametrize("rate", ["3/hour", "1 call/hour & 5/day", "3 tokens/hour"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_limiter_waits_as_long_as_before(set_the_clock: Callable[[], None], rate, shared):
    limiter = RateLimiter(rate)
    if shared:
        limiter.share()
    while limiter.try_acquire():
        pass
    before = limiter.current_state().wait_for()
    set_the_clock()
    assert before - 10**10 <= limiter.current_state().wait_for() <= before


def test_a_pause_lasts_as_long_as_before(set_the_clock: Callable[[], None]):
    limiter = RateLimiter("1000/s")
    limiter.pause(600)
    set_the_clock()
    assert 590 < limiter.paused <= 600


def test_a_breaker_stays_open_as_long_as_before(set_the_clock: Callable[[], None]):
    breaker = CircuitBreaker(fail_max=1, reset_timeout=600)

    @opero(cache=False, retries=0, circuit_breaker=breaker)
    def fetch() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fetch()
    set_the_clock()
    with pytest.raises(CircuitOpenError) as caught:
        fetch()
    assert caught.value.retry_after is not None
    assert 500 < caught.value.retry_after <= 1000


def test_a_date_to_wait_for_is_counted_against_the_answers_own(set_the_clock: Callable[[], None]):
    class TooManyError(Exception):
        sent = datetime(2031, 3, 30, 0, 59, 30, tzinfo=UTC)
        headers = {  # noqa: RUF012 - as client libraries have it
            "Date": format_datetime(sent, usegmt=True),
            "Retry-After": format_datetime(sent + timedelta(seconds=90), usegmt=True),
        }

    set_the_clock()
    hint = requested_wait(TooManyError())
    assert hint is not None
    assert hint.seconds == 90


def test_a_date_in_an_answer_without_its_own_is_of_no_zone(set_the_clock: Callable[[], None]):
    set_the_clock()
    now = time.time()

    class TooManyError(Exception):
        headers = {  # noqa: RUF012 - as above
            "Retry-After": format_datetime(datetime.fromtimestamp(now, UTC) + timedelta(seconds=90))
        }

    hint = requested_wait(TooManyError(), now=now)
    assert hint is not None
    assert 89 <= hint.seconds <= 90
