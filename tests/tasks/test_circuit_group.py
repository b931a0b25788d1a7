# this_file: tests/tasks/test_circuit_group.py
"""Steps behind a circuit breaker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from opero import CircuitBreaker, CircuitState
from opero.errors import CircuitOpenError, OperoUsageError
from opero.events import CircuitChanged
from opero.tasks import CircuitGroup, Sequence, Task, run_sync
from opero.testing import FakeClock, capture_events, flaky, set_disabled

if TYPE_CHECKING:
    from tests.tasks.conftest import Received


def failures_of(group: CircuitGroup, runs: int) -> list[str]:
    seen = []
    for _ in range(runs):
        try:
            run_sync(group)
            seen.append("ok")
        except Exception as error:  # noqa: BLE001 - whatever it is, is looked at
            seen.append(type(error).__name__)
    return seen


def test_it_gives_what_a_sequence_gives() -> None:
    group = CircuitGroup(Task(str.upper, "tea"), len)
    assert run_sync(group) == ["TEA", 3]
    assert run_sync(CircuitGroup(Task(str.upper, "tea"), len, returns="last")) == 3
    assert run_sync(Sequence(group, float)) == [["TEA", 3], 3.0]


def test_group_opens_after_fail_max_failures_each_with_its_own_error(received: Received) -> None:
    fetch = flaky("ok", failures=9)
    group = CircuitGroup(fetch, fail_max=2, reset_timeout=10, name="shop")
    assert failures_of(group, 3) == ["ConnectionError", "ConnectionError", "CircuitOpenError"]
    assert fetch.calls == 2  # type: ignore[attr-defined]  # of flaky functions
    assert received.states("shop") == ["RUNNING", "FAILED"] * 3
    assert isinstance(received.of("shop")[-1].error, CircuitOpenError)
    assert len(received.of("flaky")) == 4


def test_group_lets_one_probe_through_after_reset_timeout(clock: FakeClock) -> None:
    group = CircuitGroup(flaky("ok", failures=1), fail_max=1, reset_timeout=10, name="shop")
    with capture_events(CircuitChanged) as events:
        assert failures_of(group, 2) == ["ConnectionError", "CircuitOpenError"]
        clock.advance(10)
        assert failures_of(group, 2) == ["ok", "ok"]
    changes = [(e["type"], e["circuit"], e["old_state"], e["new_state"]) for e in events]
    assert changes == [
        ("circuit", "shop", CircuitState.CLOSED, CircuitState.OPEN),
        ("circuit", "shop", CircuitState.OPEN, CircuitState.HALF_OPEN),
        ("circuit", "shop", CircuitState.HALF_OPEN, CircuitState.CLOSED),
    ]


def test_of_fifty_runs_at_once_one_is_the_probe(clock: FakeClock) -> None:
    calls = 0

    async def fetch() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        raise ConnectionError

    group = CircuitGroup(fetch, fail_max=1, reset_timeout=10)

    async def main() -> list[BaseException]:
        with pytest.raises(ConnectionError):
            await group.run()
        clock.advance(10)
        return list(await asyncio.gather(*(group.run() for _ in range(50)), return_exceptions=True))

    kinds = sorted(type(error).__name__ for error in asyncio.run(main()))
    assert kinds == ["CircuitOpenError"] * 49 + ["ConnectionError"]
    assert calls == 2


def test_a_cancelled_run_counts_neither_way() -> None:
    group = CircuitGroup(Task(asyncio.sleep, 60), fail_max=1)

    async def main() -> None:
        started = group.start()
        await asyncio.sleep(0)
        started.cancel()
        with pytest.raises(asyncio.CancelledError):
            await started

    asyncio.run(main())
    assert group.breaker.state is CircuitState.CLOSED
    assert group.breaker.stats.failures == 0


def test_a_breaker_with_further_rules_may_be_shared() -> None:
    breaker = CircuitBreaker("shop", fail_max=1, ignore=TypeError)

    def wrong() -> None:
        raise TypeError

    assert failures_of(CircuitGroup(wrong, breaker=breaker), 3) == ["TypeError"] * 3
    assert failures_of(CircuitGroup(flaky("", 9), breaker=breaker), 1) == ["ConnectionError"]
    assert failures_of(CircuitGroup(wrong, breaker=breaker), 1) == ["CircuitOpenError"]


def test_with_the_test_switch_on_nothing_is_refused() -> None:
    group = CircuitGroup(flaky("ok", failures=3), fail_max=1)
    with set_disabled():
        assert failures_of(group, 4) == ["ConnectionError"] * 3 + ["ok"]


def test_rules_and_a_breaker_exclude_each_other() -> None:
    with pytest.raises(OperoUsageError, match="fail_max= and breaker="):
        CircuitGroup(len, fail_max=2, breaker=CircuitBreaker("x"))


@pytest.mark.parametrize("rule", [{"fail_max": 0}, {"reset_timeout": -1}])
def test_wrong_rules_are_refused_when_the_group_is_made(rule: dict[str, int]) -> None:
    with pytest.raises(OperoUsageError):
        CircuitGroup(len, **rule)  # type: ignore[arg-type]  # values of both kinds


def test_current_state_is_the_state_of_the_breaker() -> None:
    group = CircuitGroup(flaky("ok", failures=1), fail_max=1)
    assert group.current_state is CircuitState.CLOSED
    with pytest.raises(ConnectionError):
        run_sync(group)
    assert group.current_state is group.breaker.state is CircuitState.OPEN
