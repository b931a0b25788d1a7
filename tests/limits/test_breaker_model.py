# this_file: tests/limits/test_breaker_model.py
"""The circuit breaker against a naive model that keeps everything in plain lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opero import CircuitBreaker, CircuitState
from opero.errors import CircuitOpenError
from opero.testing import fake_clock

pytestmark = pytest.mark.timeout(120)

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
FORCED_OPEN, DISABLED = CircuitState.FORCED_OPEN, CircuitState.DISABLED
REFUSED = ConnectionRefusedError("refused")


class AgainstAModel(RuleBasedStateMachine):
    """Drives a breaker and a model that keeps everything in plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.clock_context = fake_clock()
        self.clock = self.clock_context.__enter__()
        self.under_way: list[tuple[Any, int, float]] = []
        self.generation = 0
        self.opened_at = self.opened_for = 0.0
        self.level = self.successes = self.streak = 0
        self.state = CLOSED

    @initialize(fail_max=st.integers(1, 3), most=st.integers(1, 3), threshold=st.integers(1, 3))
    def start(self, fail_max: int, most: int, threshold: int) -> None:
        self.fail_max, self.most, self.threshold = fail_max, most, threshold
        self.breaker = CircuitBreaker(
            fail_max=fail_max,
            reset_timeout=16,
            max_reset_timeout=64,
            half_open_max=most,
            success_threshold=threshold,
            probe_timeout=8,
            jitter=0,
            ignore=KeyError,
        )

    # the model

    def go(self, state: CircuitState) -> None:
        self.state = state
        self.generation += 1
        self.successes = self.streak = 0
        if state is OPEN:
            self.opened_at = self.clock.elapsed
            self.opened_for = min(64, 16 * 2**self.level)
        elif state is CLOSED:
            self.level = 0

    def settle(self) -> None:
        if self.state is OPEN and self.clock.elapsed >= self.opened_at + self.opened_for - 1e-4:
            self.go(HALF_OPEN)

    def holding(self) -> int:
        """Probes of this half-open period that hold a place."""
        now = self.clock.elapsed + 1e-4
        return sum(g == self.generation and now < at + 8 for _, g, at in self.under_way)

    def admits(self) -> bool:
        self.settle()
        if self.state is HALF_OPEN:
            return self.holding() < self.most
        return self.state in (CLOSED, DISABLED)

    # the calls

    @rule()
    def begin(self) -> None:
        admits = self.admits()
        try:
            permit = self.breaker.acquire()
        except CircuitOpenError:
            assert not admits
            held = math.isinf(self.breaker.refuses() or 0)
            assert held is (self.state is FORCED_OPEN)
        else:
            assert admits
            self.under_way.append((permit, self.generation, self.clock.elapsed))

    def take(self, data: st.DataObject) -> tuple[Any, bool]:
        place = data.draw(st.integers(0, len(self.under_way) - 1))
        permit, generation, _ = self.under_way.pop(place)
        return permit, generation == self.generation

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def end_well(self, data: st.DataObject) -> None:
        permit, counts = self.take(data)
        permit.success()
        if counts and self.state is CLOSED:
            self.streak = 0
        elif counts and self.state is HALF_OPEN:
            self.successes += 1
            if self.successes == self.threshold:
                self.go(CLOSED)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def end_badly(self, data: st.DataObject) -> None:
        permit, counts = self.take(data)
        permit.failure(REFUSED)
        if counts and self.state is CLOSED:
            self.streak += 1
            if self.streak == self.fail_max:
                self.go(OPEN)
        elif counts and self.state is HALF_OPEN:
            self.level += 1
            self.go(OPEN)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), how=st.sampled_from(["release", "ignored"]))
    def end_without_a_word(self, data: st.DataObject, how: str) -> None:
        permit, _ = self.take(data)
        if how == "release":
            permit.release()
        else:
            permit.failure(KeyError())

    @rule(seconds=st.sampled_from([1, 4, 8, 16, 64]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(verb=st.sampled_from(["open", "force_open", "close", "reset", "disable"]))
    def by_hand(self, verb: str) -> None:
        self.settle()
        assert self.breaker.state is self.state
        getattr(self.breaker, verb)()
        self.go({"open": OPEN, "force_open": FORCED_OPEN, "disable": DISABLED}.get(verb, CLOSED))

    @rule()
    def check(self) -> None:
        admits = self.admits()
        try:
            self.breaker.check()
        except CircuitOpenError:
            assert not admits
        else:
            assert admits

    @invariant()
    def same_state(self) -> None:
        if hasattr(self, "breaker"):
            self.settle()
            stats = self.breaker.stats
            assert stats.state is self.state
            assert stats.failures == self.streak
            if self.state is HALF_OPEN:
                assert stats.probes == self.holding() <= self.most

    def teardown(self) -> None:
        self.clock_context.__exit__(None, None, None)


AgainstAModel.TestCase.settings = settings(stateful_step_count=40)
# A loaded machine takes longer than the usual limit.
TestAgainstAModel = pytest.mark.timeout(240)(AgainstAModel.TestCase)
