# this_file: tests/core/test_rate_limit.py
from __future__ import annotations

import asyncio
import subprocess
import sys

import asynciolimiter
import pytest

from opero.core.call import Call
from opero.core.function import Stats
from opero.core.rate_limit import RateLimit, RateLimiter
from opero.errors import CircuitOpenError, OperoUsageError
from opero.events import LimiterWaited
from opero.events.bus import Emitter
from opero.testing import capture_events, fake_clock

pytestmark = pytest.mark.internal


def stage_with(limiter: RateLimiter) -> tuple[RateLimit, Stats]:
    stats = Stats()
    return RateLimit(limiter, stats, Emitter("fetch")), stats


def answer(call: Call) -> str:
    return "answer"


async def async_answer(call: Call) -> str:
    return "answer"


def run(stage: RateLimit, kind: str, call: Call) -> str:
    if kind == "sync":
        return stage.wrap_sync(answer)(call)
    return asyncio.run(stage.wrap_async(async_answer)(call))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_finds_a_slot_leaves_no_trace(kind):
    stage, stats = stage_with(RateLimiter("1/hour"))
    call = Call((), {})
    with capture_events() as events:
        assert run(stage, kind, call) == "answer"
    assert (call.waited, stats.waited, events) == (0, 0, [])


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_waits_says_for_how_long(kind):
    stage, stats = stage_with(RateLimiter("1/minute", burst=0))
    with fake_clock(), capture_events() as events:
        run(stage, kind, Call((), {}))
        call = Call((), {})
        run(stage, kind, call)
        run(stage, kind, call)
    assert call.waited == pytest.approx(120)
    assert stats.waited == pytest.approx(120)
    assert [(type(e), e.function) for e in events] == [(LimiterWaited, "fetch")] * 2
    assert [e.seconds for e in events] == pytest.approx([60, 60])


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_wait_without_listeners_builds_no_event(kind, monkeypatch):
    monkeypatch.setattr("opero.events.LimiterWaited", None)
    stage, stats = stage_with(RateLimiter("1/minute", burst=0))
    with fake_clock():
        for _ in range(2):
            run(stage, kind, Call((), {}))
    assert stats.waited == pytest.approx(60)


def test_functions_share_a_limiter():
    limiter = RateLimiter("1/minute", burst=0)
    with fake_clock() as clock:
        for _ in range(3):
            stage, _ = stage_with(limiter)
            run(stage, "sync", Call((), {}))
        assert clock.elapsed == pytest.approx(120)


def test_the_stage_describes_its_limiter():
    stage, _ = stage_with(RateLimiter("100/minute"))
    assert stage.name == "rate limit"
    assert stage.describe() == "100 per minute: one call each 0.6 s, shared by all threads"


def test_a_limiter_that_can_only_be_awaited_is_refused_before_a_plain_function():
    stage, _ = stage_with(RateLimiter(asynciolimiter.Limiter(5)))
    with pytest.raises(OperoUsageError, match=r"not async.*\"100/minute\""):
        stage.wrap_sync(answer)


def test_using_a_limiter_without_waiting_loads_nothing_heavy():
    script = """
import sys
from opero.core.rate_limit import RateLimiter
limiter = RateLimiter(1000)
limiter.acquire()
limiter.acquire()
limiter.acquire()
heavy = {"asyncio", "asynciolimiter", "platformdirs", "tempfile", "mmap", "logging", "hashlib"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_refusal_further_in_gives_the_slot_back(kind):
    limiter = RateLimiter("1/hour")
    stage = RateLimit(limiter, Stats(), Emitter("f"))

    def refuse(call):
        raise CircuitOpenError("svc", 1.0)

    async def arefuse(call):
        refuse(call)

    def attempt():
        if kind == "sync":
            return stage.wrap_sync(refuse)(Call((), {}))
        return asyncio.run(stage.wrap_async(arefuse)(Call((), {})))

    with pytest.raises(CircuitOpenError):
        attempt()
    assert limiter.try_acquire()


def test_a_refusal_of_another_pipeline_has_used_its_slot():
    limiter = RateLimiter("1/hour")
    stage = RateLimit(limiter, Stats(), Emitter("f"))

    def call_refused(call):
        call.calls += 1
        raise CircuitOpenError("svc", 1.0)

    with pytest.raises(CircuitOpenError):
        stage.wrap_sync(call_refused)(Call((), {}))
    assert not limiter.try_acquire()


def test_a_call_that_a_breaker_refuses_costs_nothing(face, clock):
    limiter = RateLimiter("100/minute", cost=60, cap=1000)
    stage = RateLimit(limiter, Stats(), Emitter("f"))

    def refuse(call: Call) -> None:
        raise CircuitOpenError("svc", 1.0)

    wrap = stage.wrap_async if face.asynchronous else stage.wrap_sync
    with pytest.raises(CircuitOpenError):
        face.run(wrap(face.of(refuse)), Call((), {}))
    assert limiter.spent == limiter.paused == 0
    assert limiter.try_acquire(cost=100)
