# this_file: tests/core/test_pause.py
"""A service that asks one caller to wait is spared by all callers that share the limiter."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
import time

import asynciolimiter
import pytest

from opero import RateLimiter, failures, opero
from opero.core import get_rate_limit_decorator
from opero.errors import CircuitOpenError, RateLimitPausedError
from opero.events import LimiterPaused
from opero.testing import capture_events, set_disabled


class TooManyError(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"again in {seconds} s")
        self.headers = {"Retry-After": str(seconds)}


def failing_once(seconds: float):
    """A body that is throttled when it is called first."""
    errors = [TooManyError(seconds)]

    def body(x: int = 0) -> int:
        if errors:
            raise errors.pop()
        return x

    return body


# --- by hand --------------------------------------------------------------------------------------


def test_a_pause_is_waited_out_in_the_order_of_arrival(clock):
    limiter = RateLimiter("10/s", burst=5)
    assert limiter.pause("2s")
    assert limiter.paused == pytest.approx(2)
    assert "paused for 2 s" in repr(limiter)
    assert [limiter.acquire() for _ in range(3)] == pytest.approx([2, 0.1, 0.1])


@pytest.mark.asyncio
async def test_tasks_wait_a_pause_out_and_come_out_of_it_one_by_one(clock):
    limiter, starts = RateLimiter("1000/hour"), []
    limiter.pause(2)

    async def task(name: int) -> None:
        await limiter.wait()
        starts.append((name, round(clock.elapsed, 6)))

    await asyncio.gather(*(task(name) for name in range(4)))
    assert starts == [(0, 2), (1, 2.2), (2, 2.4), (3, 2.6)]


def test_a_pause_is_ended_by_hand(clock):
    limiter = RateLimiter("1000/hour")
    limiter.pause(600)
    limiter.resume()
    assert limiter.paused == 0
    assert limiter.acquire() == 0


def test_a_pause_goes_with_the_slot_into_a_file():
    limiter = RateLimiter("1000/hour")
    limiter.pause(600)
    assert limiter.share()
    assert 590 < limiter.paused <= 600
    assert not limiter.try_acquire()
    limiter.resume()
    assert limiter.try_acquire()


def test_another_process_pauses_the_limit_and_finds_it_paused():
    limiter = RateLimiter("1000/s")
    script = (
        "import pickle, sys\n"
        "limiter = pickle.load(sys.stdin.buffer)\n"
        "print(limiter.paused)\n"
        "limiter.pause(600)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(limiter),
        capture_output=True,
        check=True,
        timeout=20,
    )
    assert done.stdout == b"0.0\n"
    assert 580 < limiter.paused <= 600
    with pytest.raises(TimeoutError):
        limiter.acquire(timeout=1)


def test_a_pause_survives_a_killed_program_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path))
    script = (
        "import os, signal\n"
        "from opero import RateLimiter\n"
        "RateLimiter('1000/hour', name='api').pause(600)\n"
        "os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=False, timeout=100)
    assert RateLimiter("1000/hour", name="api").paused > 580


@pytest.mark.asyncio
async def test_a_limiter_of_ones_own_is_paused_too(clock):
    limiter = RateLimiter(asynciolimiter.Limiter(1000))
    limiter.pause(2)
    assert await limiter.wait() == pytest.approx(2)
    assert limiter.paused == 0


# --- by a throttled call --------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1])
def test_one_throttled_call_pauses_the_limiter_for_other_functions(face, clock, retries):
    limiter = RateLimiter("10/s")
    throttled = opero(cache=False, retries=retries, rate_limit=limiter)(face.of(failing_once(2)))
    other = opero(cache=False, rate_limit=limiter)(face.of(lambda: clock.elapsed))
    with capture_events(LimiterPaused) as reported:
        if retries:
            face.run(throttled)
        else:
            with pytest.raises(TooManyError):
                face.run(throttled)
    assert face.run(other) >= 2
    (event,) = reported
    assert (event.seconds, event.source) == (2, "retry-after")
    assert event.function == throttled.__qualname__


def test_the_stage_alone_obeys_a_service_too(face, clock):
    limiter = RateLimiter("10/s")
    fetch = get_rate_limit_decorator(rate_limit=limiter)(face.of(failing_once(3)))
    with pytest.raises(TooManyError):
        face.run(fetch)
    assert limiter.paused == pytest.approx(3)
    assert face.run(fetch, 5) == 5
    assert clock.elapsed == pytest.approx(3)


def test_a_rejected_result_that_asks_to_wait_pauses_the_limiter(face, clock):
    class Response:
        status = 429
        headers = {"Retry-After": "5"}  # noqa: RUF012 - as client libraries have it

    limiter = RateLimiter("10/s")
    fetch = opero(
        cache=False, retries=0, rate_limit=limiter, retry_if_result=lambda r: r.status == 429
    )(face.of(Response))
    assert face.run(fetch).status == 429
    assert limiter.paused == pytest.approx(5)


def test_with_several_values_the_limiter_is_not_paused(face, clock):
    limiter = RateLimiter("10/s")

    def ask(key: object) -> object:
        raise TooManyError(5)

    ask = opero(cache=False, retries=0, rate_limit=limiter, arg_fallback="key")(face.of(ask))
    with pytest.raises(TooManyError):
        face.run(ask, ["a", "b"])
    assert limiter.paused == 0
    with pytest.raises(TooManyError):
        face.run(ask, "a")
    assert limiter.paused == pytest.approx(5)


def test_a_refusal_of_a_guard_further_in_is_no_request_to_wait(face, clock):
    limiter = RateLimiter("10/s")

    def fetch() -> None:
        raise CircuitOpenError("inner", 30.0)

    with pytest.raises(CircuitOpenError):
        face.run(opero(cache=False, retries=0, rate_limit=limiter)(face.of(fetch)))
    assert limiter.paused == 0


def test_nothing_is_paused_while_opero_is_disabled(face):
    limiter = RateLimiter("10/s")
    fetch = opero(cache=False, rate_limit=limiter)(face.of(failing_once(5)))
    with set_disabled(), pytest.raises(TooManyError):
        face.run(fetch)
    assert limiter.paused == 0


# --- longer than a caller would wait ---------------------------------------------------------------


def test_a_call_that_meets_a_pause_that_is_too_long_fails_at_once(face, clock):
    limiter = RateLimiter("10/s")
    limiter.pause(120)
    fetch = opero(cache=False, retries=3, rate_limit=limiter)(face.of(lambda: 1))
    with pytest.raises(
        RateLimitPausedError, match="paused, because the service asked to wait"
    ) as caught:
        face.run(fetch)
    assert caught.value.retry_after == pytest.approx(120)
    assert (clock.elapsed, fetch.stats.calls, fetch.stats.retries) == (0, 0, 0)
    patient = opero(cache=False, rate_limit=limiter, retry_after_max=200)(face.of(lambda: 1))
    assert face.run(patient) == 1
    assert clock.elapsed == pytest.approx(120)


def test_no_other_value_is_tried_during_a_pause_that_is_too_long(face, clock):
    limiter = RateLimiter("10/s")
    limiter.pause(120)
    ask = opero(cache=False, rate_limit=limiter, arg_fallback="key")(face.of(lambda key: key))
    with pytest.raises(RateLimitPausedError):
        face.run(ask, ["a", "b"])
    assert ask.stats.fallbacks == 0


def test_the_call_that_was_asked_too_much_fails_with_its_own_error(face, clock):
    limiter = RateLimiter("10/s")
    fetch = opero(cache=False, rate_limit=limiter)(face.of(failing_once(120)))
    with pytest.raises(TooManyError):
        face.run(fetch)
    with pytest.raises(RateLimitPausedError):
        face.run(fetch)


def test_a_call_that_meets_the_pause_in_its_second_attempt_has_its_own_error_as_its_past(
    face, clock
):
    limiter = RateLimiter("10/s")

    def fetch() -> None:
        limiter.pause(120)
        raise ConnectionError

    fetch = opero(cache=False, rate_limit=limiter)(face.of(fetch))
    with pytest.raises(RateLimitPausedError) as caught:
        face.run(fetch)
    assert [type(e) for e in failures(caught.value)] == [ConnectionError, RateLimitPausedError]


def test_a_thread_in_line_leaves_when_a_pause_comes_up_that_is_too_long():
    limiter, errors = RateLimiter("1/minute", burst=0), []
    limiter.acquire()
    fetch = opero(cache=False, rate_limit=limiter, retry_after_max=5)(lambda: 1)

    def work() -> None:
        try:
            fetch()
        except RateLimitPausedError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(limiter._queue.threads) < 3:
        time.sleep(0.001)
    limiter.pause(120)
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3
    assert not limiter.threads_waiting


@pytest.mark.asyncio
async def test_tasks_in_line_leave_when_a_pause_comes_up_that_is_too_long():
    limiter = RateLimiter("1/minute", burst=0)
    await limiter.wait()

    async def one() -> int:
        return 1

    patient = opero(cache=False, rate_limit=limiter, retry_after_max=500)(one)
    hasty = opero(cache=False, rate_limit=limiter, retry_after_max=5)(one)
    first = asyncio.create_task(patient())
    rest = [asyncio.create_task(hasty()) for _ in range(3)]
    await asyncio.sleep(0)
    limiter.pause(120)
    ended = await asyncio.wait_for(asyncio.gather(*rest, return_exceptions=True), 10)
    assert {type(error) for error in ended} == {RateLimitPausedError}
    assert not first.done()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not limiter.loops_waiting


def test_the_stage_alone_has_its_own_bound(face, clock):
    limiter = RateLimiter("10/s")
    limiter.pause(120)
    fetch = get_rate_limit_decorator(rate_limit=limiter, retry_after_max="3m")(face.of(lambda: 1))
    assert face.run(fetch) == 1
