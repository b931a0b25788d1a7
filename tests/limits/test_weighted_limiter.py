# this_file: tests/limits/test_weighted_limiter.py
from __future__ import annotations

import asyncio
import math
import os
import pickle
import subprocess
import sys
import threading
import urllib.error
import warnings
from types import SimpleNamespace

import pytest

from opero import RateLimiter, opero
from opero.core import get_rate_limit_decorator
from opero.errors import (
    CircuitOpenError,
    DeadlineError,
    OperoUsageError,
    OperoWarning,
    SpendCapError,
)
from opero.testing import set_disabled


def tokens_of(result: dict[str, int]) -> int:
    return result["tokens"]


def acquire(face, limiter: RateLimiter, **options: object) -> float:
    return face.run(limiter.wait if face.asynchronous else limiter.acquire, **options)


# --- several windows ------------------------------------------------------------------------------


def test_several_windows_hold_at_once(face, clock):
    limiter = RateLimiter("10/s & 15/minute", burst=0)
    waits = [acquire(face, limiter) for _ in range(16)]
    assert waits == pytest.approx([0, *[0.1] * 14, 60 - 1.4])


def test_several_windows_are_written_as_the_option_too(face, clock):
    fetch = opero(cache=False, rate_limit="10/s & 3/minute")(face.of(lambda: clock.elapsed))
    assert [face.run(fetch) for _ in range(4)] == pytest.approx([0, 0, 0.1, 60])
    assert "10 per second: one call each 0.1 s & 3 per minute: no spacing" in fetch.explain()
    assert fetch.stats.waited == pytest.approx(60)


def test_several_windows_hold_across_processes():
    limiter = RateLimiter("1000/s & 5/hour")
    script = (
        "import pickle, sys\n"
        "limiter = pickle.load(sys.stdin.buffer)\n"
        "while limiter.try_acquire() or limiter.paused: pass\n"
        "taken = 0\n"
        "import time\n"
        "end = time.monotonic() + 0.2\n"
        "while time.monotonic() < end: taken += limiter.try_acquire()\n"
        "print(taken)"
    )
    data = pickle.dumps(limiter)
    for _ in range(2):
        limiter.acquire()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.communicate(data, timeout=100)
        assert worker.returncode == 0
    with pytest.raises(DeadlineError, match=r"no slot for \d{4} s|no slot for (59|60) min"):
        limiter.acquire(timeout=1)


# --- costs ----------------------------------------------------------------------------------------


def test_a_cost_is_reserved_before_the_call(face, clock):
    limiter = RateLimiter("100 tokens/minute", cost=lambda prompt, most: most)

    def ask(prompt: str, most: int = 40) -> float:
        return clock.elapsed

    ask = opero(cache=False, rate_limit=limiter)(face.of(ask))
    assert [face.run(ask, "hi", most) for most in (40, 40, 20)] == [0, 0, 0]
    assert 60 <= face.run(ask, "hi", most=1) <= 60.5
    assert "100 tokens per minute: no spacing" in ask.explain()


def test_the_real_cost_is_settled_after_the_call(face, clock):
    limiter = RateLimiter("100/minute", cost=90, settle=tokens_of)
    ask = get_rate_limit_decorator(rate_limit=limiter)(face.of(lambda n: {"tokens": n}))
    assert face.run(ask, 10) == {"tokens": 10}
    face.run(ask, 95)
    assert clock.elapsed == 0
    face.run(ask, 5)
    assert clock.elapsed >= 60


def test_calls_and_tokens_are_counted_in_one_limiter(face, clock):
    limiter = RateLimiter("3 requests/minute & 100 tokens/minute", burst=0, cost=60)
    waits = [acquire(face, limiter, cost=c) for c in (10, 10, 10)]
    assert waits == pytest.approx([0, 20, 20])
    assert acquire(face, limiter, cost=90) > 20


def test_a_debt_larger_than_the_window_is_over_after_one_period(clock):
    limiter = RateLimiter("100 tokens/minute")
    limiter.reserve(cost=10).settle(500)
    assert 60 <= limiter.acquire(cost=1) <= 61
    assert limiter.acquire(cost=99) == 0


def test_a_debt_counts_from_the_moment_at_which_it_is_known(clock):
    limiter = RateLimiter("100 tokens/minute")
    reservation = limiter.reserve(cost=10)
    clock.advance(50)
    reservation.settle(100)
    clock.advance(15)
    assert [limiter.try_acquire(cost=cost) for cost in (11, 10)] == [False, True]


def test_a_refund_for_what_has_left_the_window_is_none(clock):
    limiter = RateLimiter("100 tokens/minute")
    reservation = limiter.reserve(cost=100)
    # What is spent now is counted in the place where that was: 128 parts of the window, and one.
    clock.advance(129 * 60 / 128)
    limiter.acquire(cost=90)
    reservation.settle(0)
    assert [limiter.try_acquire(cost=cost) for cost in (11, 10)] == [False, True]


def test_a_failed_call_keeps_what_was_reserved(face, clock):
    limiter = RateLimiter("100/minute", cost=60, settle=tokens_of)

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - made above
        face.run(opero(cache=False, retries=0, rate_limit=limiter)(face.of(fail)))
    assert not limiter.try_acquire(cost=50)


class AnswerError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.response = SimpleNamespace(status_code=status, headers={})


class APIConnectionError(Exception):
    """As the clients of language models raise it, whatever happened to the connection."""


def wrapped(cause: Exception) -> Exception:
    error = APIConnectionError("Connection error.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        wrapped(ConnectionResetError()),
        ExceptionGroup("g", [AnswerError(503), ValueError()]),
    ],
    ids=repr,
)
def test_a_call_that_may_have_been_billed_keeps_its_cost(face, clock, error):
    limiter = RateLimiter("100/minute", cost=60, settle=tokens_of)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        face.run(opero(cache=False, retries=0, rate_limit=limiter)(face.of(fail)))
    limiter.resume()
    assert not limiter.try_acquire(cost=50)


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionError(), AnswerError(401), AnswerError(429), AnswerError(503)),
        *(wrapped(ConnectionRefusedError()), urllib.error.URLError(ConnectionRefusedError())),
        ExceptionGroup("g", [AnswerError(503), ConnectionRefusedError()]),
    ],
    ids=repr,
)
def test_a_call_that_cannot_have_been_billed_gives_its_cost_back(face, clock, error):
    limiter = RateLimiter("100/minute", cost=60, settle=tokens_of)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        face.run(opero(cache=False, retries=0, rate_limit=limiter)(face.of(fail)))
    limiter.resume()
    assert limiter.try_acquire(cost=50)


def test_a_call_that_its_deadline_cuts_short_keeps_its_cost():
    limiter = RateLimiter(cap=10, cost=6)

    @opero(cache=False, retries=0, rate_limit=limiter, deadline="10ms")
    async def wait() -> None:
        await asyncio.sleep(5)

    with pytest.raises(DeadlineError):
        asyncio.run(wait())
    assert limiter.spent == 6


def test_a_cap_on_calls_counts_those_that_failed(face, clock):
    limiter = RateLimiter(cap=1)

    def fail() -> None:
        raise ConnectionError

    call = opero(cache=False, retries=0, rate_limit=limiter)(face.of(fail))
    with pytest.raises(ConnectionError):
        face.run(call)
    with pytest.raises(SpendCapError):
        face.run(call)


@pytest.mark.parametrize(("real", "spent"), [(30, 30), (0, 0), (None, 60)])
def test_settle_error_says_what_a_failed_call_has_cost(face, clock, real, spent):
    limiter = RateLimiter(cap=1000, cost=60, settle=tokens_of, settle_error=lambda error: real)

    def fail() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        face.run(opero(cache=False, retries=0, rate_limit=limiter)(face.of(fail)))
    assert limiter.spent == spent


def test_a_settle_error_that_fails_warns_and_keeps_what_was_reserved(clock):
    limiter = RateLimiter(cap=1000, cost=60, settle_error=lambda error: 1 / 0)

    @opero(cache=False, retries=0, rate_limit=limiter)
    def fail() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError), pytest.warns(OperoWarning, match="settle_error="):
        fail()
    assert limiter.spent == 60


@pytest.mark.parametrize(("options", "spent"), [({}, 0), ({"settle_error": lambda _: 20}, 20)])
def test_a_call_whose_body_another_pipeline_refuses_gives_its_cost_back(
    face, clock, options, spent
):
    limiter = RateLimiter(cap=1000, cost=60, **options)

    def refused_within() -> None:
        raise CircuitOpenError("another", 1.0)

    fetch = opero(cache=False, retries=0, rate_limit=limiter, circuit_breaker=True)
    with pytest.raises(CircuitOpenError):
        face.run(fetch(face.of(refused_within)))
    assert limiter.spent == spent


def test_a_rejected_result_is_settled(face, clock):
    limiter = RateLimiter("100/minute", cost=60, settle=tokens_of)
    ask = opero(cache=False, retries=0, rate_limit=limiter, retry_if_result=lambda r: True)(
        face.of(lambda: {"tokens": 10})
    )
    face.run(ask)
    assert limiter.try_acquire(cost=90)


def test_a_plain_function_that_returns_an_awaitable_is_settled_too(clock):
    limiter = RateLimiter("100/minute", cost=60, settle=tokens_of)

    async def answer() -> dict[str, int]:
        return {"tokens": 10}

    ask = opero(cache=False, rate_limit=limiter)(lambda: answer())  # noqa: PLW0108 - plain on purpose

    async def main() -> None:
        for _ in range(2):
            await ask()

    asyncio.run(main())
    assert limiter.try_acquire(cost=80)
    assert not limiter.try_acquire(cost=1)


def test_a_cost_sees_the_fallback_value_in_use(face, clock):
    seen = []

    def price(model: str) -> float:
        seen.append(model)
        return 1.0

    def ask(model: object) -> object:
        if model == "big":
            raise ConnectionError
        return model

    limiter = RateLimiter("100/minute", cost=price)
    ask = opero(cache=False, rate_limit=limiter, arg_fallback="model")(face.of(ask))
    assert face.run(ask, ["big", "small"]) == "small"
    assert seen == ["big", "small"]


def test_a_cost_that_never_fits_is_an_error_and_no_endless_wait(face, clock):
    limiter = RateLimiter("10 calls/s & 1000 tokens/minute")
    with pytest.raises(OperoUsageError, match=r"cost=1001 is more than 1000 tokens per minute"):
        acquire(face, limiter, cost=1001)
    assert acquire(face, limiter, cost=1000) == 0


def test_by_hand_a_slot_is_reserved_settled_and_given_back(clock):
    limiter = RateLimiter("100 tokens/minute")
    one = limiter.reserve(cost=80)
    assert (one.cost, one.waited) == (80, 0)
    one.settle(30)
    assert one.cost == 30
    two = asyncio.run(limiter.reserve_async(cost=70))
    assert not limiter.try_acquire(cost=1)
    assert two.refund()
    two.settle(100)
    assert limiter.try_acquire(cost=70)
    with limiter:
        assert clock.elapsed >= 60


@pytest.mark.parametrize("moved", [False, True])
def test_a_reservation_goes_with_the_limiter_into_a_file(moved):
    limiter = RateLimiter("100 tokens/hour", cap=500)
    one = limiter.reserve(cost=90)
    if moved:
        assert limiter.share()
    assert limiter.spent == 90
    one.settle(10)
    assert limiter.spent == 10
    assert limiter.try_acquire(cost=90)
    assert not limiter.try_acquire(cost=1)


def test_a_thread_that_waits_for_much_is_not_overtaken_by_one_that_needs_little(clock):
    limiter = RateLimiter("100 tokens/minute")
    limiter.acquire(cost=50)
    limiter.threads_waiting[object()] = None  # type: ignore[index]  # a waiter in line
    assert not limiter.try_acquire(cost=1)


def test_a_settle_that_fails_costs_no_result(face, clock):
    limiter = RateLimiter("100/minute", cost=60, settle=tokens_of)
    ask = opero(cache=False, rate_limit=limiter)(face.of(lambda: {"characters": 5}))
    with pytest.warns(OperoWarning, match=r"settle=tokens_of raised KeyError"):
        assert face.run(ask) == {"characters": 5}
    assert not limiter.try_acquire(cost=50)


@pytest.mark.parametrize(
    ("price", "what"), [(lambda x: 1 / x, "ZeroDivisionError"), (str, "cost='0'")]
)
def test_a_cost_that_fails_is_a_usage_error_and_never_retried(face, clock, price, what):
    fetch = opero(cache=False, rate_limit=RateLimiter("5/s", cost=price))(face.of(lambda x: x))
    with pytest.raises(OperoUsageError, match=what):
        face.run(fetch, 0)
    assert fetch.stats.calls == fetch.stats.retries == 0


def test_nothing_is_counted_while_opero_is_disabled(face):
    limiter = RateLimiter("10/hour", cost=lambda: 10, settle=tokens_of, cap=10)
    fetch = opero(cache=False, rate_limit=limiter)(face.of(lambda: 1))
    with set_disabled():
        assert [face.run(fetch) for _ in range(3)] == [1, 1, 1]
        assert limiter.try_acquire(cost=10)
    assert limiter.spent == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rate=None"),
        ({"rate": "10 calls/s", "cost": 5}, "counts calls only"),
        ({"rate": "10/s", "settle": tokens_of}, "counts calls only"),
        ({"rate": "10/s", "cost": "5"}, "cost='5' must be a number or a plain function"),
        ({"rate": "10/s", "cost": -5}, "cost=-5 must be a number, 0 or more"),
        ({"rate": "10 tokens/s", "settle": 5}, "settle=5 must be a plain function"),
        ({"rate": "10/s", "cap": 0}, "cap=0 lets nothing through"),
        ({"rate": "10/s", "cap": "20"}, "cap='20' must be a number"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(options, message):
    with pytest.raises(OperoUsageError, match=message):
        RateLimiter(**options)


def test_a_coroutine_function_is_no_cost():
    async def price() -> float:
        return 1.0

    with pytest.raises(OperoUsageError, match="plain function"):
        RateLimiter("10/s", cost=price)  # type: ignore[arg-type]


def test_a_limiter_of_calls_takes_no_cost(face):
    for use in (acquire, lambda face, limiter, cost: limiter.try_acquire(cost=cost)):
        with pytest.raises(OperoUsageError, match="counts calls, all alike"):
            use(face, RateLimiter("10/s"), cost=5)
    with pytest.raises(OperoUsageError, match="say what the call costs"):
        acquire(face, RateLimiter("10/s", cost=lambda: 1))


def test_a_generator_has_no_result_to_settle_with():
    with pytest.raises(OperoUsageError, match="is a generator"):

        @opero(rate_limit=RateLimiter("10/s", cost=5, settle=tokens_of))
        def items():
            yield 1


# --- the cap --------------------------------------------------------------------------------------


def test_a_cap_refuses_what_is_over_it(face, clock):
    limiter = RateLimiter(cap=3)
    fetch = opero(cache=False, rate_limit=limiter)(face.of(lambda: 1))
    assert [face.run(fetch) for _ in range(3)] == [1, 1, 1]
    assert (limiter.spent, limiter.left) == (3, 0)
    with pytest.raises(SpendCapError, match="costs 1 is over the cap: 3 of 3 are spent") as caught:
        face.run(fetch)
    assert (caught.value.cost, caught.value.spent, caught.value.cap) == (1, 3, 3)
    assert (fetch.stats.calls, fetch.stats.retries, clock.elapsed) == (3, 0, 0)
    assert "3 in all" in fetch.explain()
    limiter.reset_spent()
    assert face.run(fetch) == 1


def test_a_cap_of_money_is_settled(face):
    limiter = RateLimiter("10 calls/s", cost=0.5, settle=lambda price: price, cap=1)
    ask = opero(cache=False, rate_limit=limiter)(face.of(lambda price: price))
    for _ in range(9):
        face.run(ask, 0.05)
    assert limiter.spent == pytest.approx(0.45)
    assert limiter.left == pytest.approx(0.55)
    face.run(ask, 0.7)
    assert limiter.left == 0
    with pytest.raises(SpendCapError):
        face.run(ask, 0.01)


def test_a_limiter_without_a_cap_leaves_everything(face):
    for limiter in (RateLimiter("10/s"), RateLimiter("10 tokens/s")):
        assert (limiter.spent, limiter.left) == (0, math.inf)
        limiter.reset_spent()


def test_no_thread_gets_past_a_cap():
    limiter, refused = RateLimiter(cap=50), []

    def work() -> None:
        for _ in range(20):
            try:
                limiter.acquire()
            except SpendCapError as error:
                refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (limiter.spent, len(refused)) == (50, 70)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_process_gets_past_a_cap():
    limiter = RateLimiter(cap=50)
    limiter.acquire(cost=5)
    limiter.share()
    children = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(3):
            child = os.fork()
            if not child:
                try:
                    while True:
                        limiter.acquire()
                finally:
                    os._exit(0)
            children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert limiter.spent == 50


def test_a_named_cap_outlives_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path))
    script = (
        "from opero import RateLimiter\n"
        "limiter = RateLimiter('100 tokens/hour', cap=20, name='spend')\n"
        "limiter.acquire(cost=15)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    limiter = RateLimiter("100 tokens/hour", cap=20, name="spend")
    assert limiter.spent == 15
    with pytest.raises(SpendCapError):
        limiter.acquire(cost=6)
    del limiter
    raised = RateLimiter("100 tokens/hour", cap=30, name="spend")
    assert (raised.spent, raised.left) == (15, 15)


def test_waiters_in_line_learn_that_the_cap_is_spent(clock):
    limiter = RateLimiter("1 call/minute", burst=0, cap=2)
    assert limiter.acquire() == 0
    assert limiter.acquire() == pytest.approx(60)
    with pytest.raises(SpendCapError):
        limiter.acquire(timeout=1)
