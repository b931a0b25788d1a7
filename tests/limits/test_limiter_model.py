# this_file: tests/limits/test_limiter_model.py
"""The limiter against a naive model that keeps every start in a plain list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opero import RateLimiter
from opero.errors import DeadlineError, SpendCapError
from opero.testing import fake_clock

pytestmark = pytest.mark.timeout(120)

KINDS: list[tuple[str | None, dict[str, Any]]] = [
    ("10/s", {}),
    ("10/s", {"burst": 0}),
    ("5/2s", {"burst": 3}),
    ("2.5/s", {}),
    ("7/hour", {}),
    ("4/s & 9/10s", {}),
    ("4/s & 9/10s & 20/minute", {"burst": 0}),
    ("20 tokens/s", {}),
    ("3 calls/s & 20 tokens/10s", {"burst": 0}),
    ("20 tokens/s", {"cap": 45}),
    (None, {"cap": 25}),
]
COSTS = st.sampled_from([0, 0.5, 1, 3, 7.25, 20])
TICK = 1 / 64


@dataclass
class Entry:
    """One start, or a debt (no call)."""

    at: float
    cost: float
    calls: int = 1


class AgainstAModel(RuleBasedStateMachine):
    """Drives a limiter and a list of everything that has started."""

    def __init__(self) -> None:
        super().__init__()
        self.clock_context = fake_clock()
        self.clock = self.clock_context.__enter__()
        self.entries: list[Entry] = []
        self.open: list[tuple[Any, Entry]] = []
        self.paused_until = 0.0
        self.spent = 0.0

    @initialize(kind=st.sampled_from(KINDS))
    def start(self, kind: tuple[str | None, dict[str, Any]]) -> None:
        rate, options = kind
        self.limiter = RateLimiter(rate, **options)
        self.cap = options.get("cap")
        self.weighted = self.cap is not None or any(w.weighted for w in self.limiter.windows)

    def cost_of(self, cost: float) -> dict[str, float]:
        return {"cost": cost} if self.weighted else {}

    # the model

    def over(self, cost: float) -> bool:
        return bool(cost and self.cap is not None and self.spent + cost > self.cap + 1e-9)

    def started(self, cost: float) -> Entry:
        """A call has started now: every window that ends with it keeps its promise."""
        now = self.clock.elapsed
        assert now >= self.paused_until - 1e-6
        assert not self.over(cost)
        entry = Entry(now, cost)
        self.entries.append(entry)
        self.spent += cost
        for window in self.limiter.windows:
            # Times are floats here; what starts a period later is in the next window.
            inside = [e for e in self.entries if e.at > now - window.rate.period + 1e-7]
            if window.weighted:
                assert sum(e.cost for e in inside) <= window.rate.count + 1e-6
            else:
                most = window.rate.count + self.limiter.burst
                assert sum(e.calls for e in inside) <= max(most, -(-window.rate.count // 1))
        return entry

    # the calls

    @rule(ticks=st.integers(0, 400))
    def time_passes(self, ticks: int) -> None:
        self.clock.advance(ticks * TICK)

    @rule(cost=COSTS)
    def try_it(self, cost: float) -> None:
        if self.limiter.try_acquire(**self.cost_of(cost)) if not self.over(cost) else False:
            self.started(cost)

    @rule(cost=COSTS)
    def wait_for_it(self, cost: float) -> None:
        longest = max((w.rate.period for w in self.limiter.windows), default=0.0)
        begun = self.clock.elapsed
        bound = max(0.0, self.paused_until - begun) * 1.2 + 1.1 * longest + 1
        try:
            self.limiter.acquire(**self.cost_of(cost))
        except SpendCapError:
            assert self.over(cost)
        else:
            self.started(cost)
            assert self.clock.elapsed - begun <= bound

    @rule(cost=COSTS)
    def reserve(self, cost: float) -> None:
        try:
            reservation = self.limiter.reserve(0.5, **self.cost_of(cost))
        except DeadlineError:
            return
        except SpendCapError:
            assert self.over(cost)
            return
        self.open.append((reservation, self.started(cost)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        reservation, entry = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        if reservation.refund():
            entry.calls = 0
        self.spent -= entry.cost
        entry.cost = 0

    @precondition(lambda self: self.open and self.weighted)
    @rule(data=st.data(), real=COSTS)
    def settle(self, data: st.DataObject, real: float) -> None:
        reservation, entry = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        reservation.settle(real)
        reservation.settle(10_000)
        assert not reservation.refund()
        self.spent += real - entry.cost
        if real > entry.cost:
            self.entries.append(Entry(self.clock.elapsed, real - entry.cost, calls=0))
        entry.cost = min(real, entry.cost)

    @rule(ticks=st.integers(1, 300))
    def pause(self, ticks: int) -> None:
        self.limiter.pause(ticks * TICK)
        self.paused_until = max(self.paused_until, self.clock.elapsed + ticks * TICK)

    @rule()
    def resume(self) -> None:
        self.limiter.resume()
        self.paused_until = 0.0

    @invariant()
    def it_says_what_the_model_says(self) -> None:
        if not hasattr(self, "limiter"):
            return
        left = max(0.0, self.paused_until - self.clock.elapsed)
        assert abs(self.limiter.paused - left) < 1e-6
        if self.cap is not None:
            assert abs(self.limiter.spent - self.spent) < 1e-3

    def teardown(self) -> None:
        self.clock_context.__exit__(None, None, None)


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(stateful_step_count=30)
