# this_file: tests/limits/test_breaker.py
"""The circuit breaker by itself: what it counts, what it lets through, what it tells."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from tests.tables import rows

from opero import CircuitBreaker, CircuitState
from opero.errors import (
    CircuitOpenError,
    OperoUsageError,
    OperoWarning,
)
from opero.events import CircuitChanged, Event
from opero.testing import FakeClock, capture_events, fake_clock

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
FORCED_OPEN, DISABLED = CircuitState.FORCED_OPEN, CircuitState.DISABLED
REFUSED = ConnectionRefusedError("refused")


def fail(breaker: CircuitBreaker, times: int = 1, error: Exception = REFUSED) -> None:
    for _ in range(times):
        breaker.acquire().failure(error)


def succeed(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.acquire().success("ok")


@pytest.fixture
def run_python() -> Callable[[str, bytes], str]:
    """Runs code in another process and returns what it prints."""

    def run(code: str, data: bytes = b"") -> str:
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=100)
        assert not done.returncode, done.stderr.decode()
        return done.stdout.decode().strip()

    return run


def half_open(clock: FakeClock, **options: Any) -> CircuitBreaker:
    breaker = CircuitBreaker(fail_max=1, reset_timeout=30, **options)
    fail(breaker)
    clock.advance(30)
    return breaker


# --- closed: what is counted --------------------------------------------------------------------


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    breaker = CircuitBreaker(fail_max=3)
    fail(breaker, 2)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_a_success_starts_the_row_afresh() -> None:
    breaker = CircuitBreaker(fail_max=3)
    for _ in range(5):
        fail(breaker, 2)
        succeed(breaker)
    assert breaker.state is CLOSED
    assert breaker.stats.failures == 0


def test_an_error_that_does_not_count_is_no_success_either() -> None:
    breaker = CircuitBreaker(fail_max=2, ignore=TypeError)
    fail(breaker)
    fail(breaker, error=TypeError())
    fail(breaker)
    assert breaker.state is OPEN


def test_results_can_be_failures() -> None:
    breaker = CircuitBreaker(fail_max=2, counts_result=lambda status: status >= 500)
    for status in (503, 200, 503):
        breaker.acquire().success(status)
    assert breaker.state is CLOSED
    breaker.acquire().success(503)
    assert breaker.state is OPEN


def test_a_broken_predicate_means_no_and_warns() -> None:
    breaker = CircuitBreaker(fail_max=1, counts=lambda error: vars(error)["status"] >= 500)
    with pytest.warns(OperoWarning, match="KeyError"):
        fail(breaker)
    assert breaker.state is CLOSED


def test_success_without_failures_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    breaker = CircuitBreaker()
    monkeypatch.setattr(breaker, "_lock", None)
    succeed(breaker, 3)
    with breaker.acquire():
        pass
    assert breaker.acquire().silent


def test_a_success_after_failures_makes_the_path_free_again() -> None:
    breaker = CircuitBreaker()
    fail(breaker)
    assert not breaker.acquire().silent
    succeed(breaker)
    assert breaker.acquire().silent


# --- closed: windows ----------------------------------------------------------------------------


def test_a_time_window_forgets_without_calls(clock: FakeClock) -> None:
    breaker = CircuitBreaker(failure_rate=0.5, window="10s")
    fail(breaker, 3)
    assert breaker.stats.failures == 3
    clock.advance(11)
    assert breaker.stats.failures == 0


def test_a_time_window_survives_a_clock_that_goes_back() -> None:
    breaker = CircuitBreaker(failure_rate=0.5, window="10s", minimum_calls=2)
    with fake_clock() as fake:
        fake.advance(10_000)
        fail(breaker)
    succeed(breaker, 2)
    assert (breaker.stats.calls, breaker.stats.failures) == (2, 0)


def test_only_a_failure_trips_a_window() -> None:
    breaker = CircuitBreaker(failure_rate=0.5, window=10, minimum_calls=4)
    fail(breaker, 3)
    succeed(breaker)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


# --- open ---------------------------------------------------------------------------------------


def test_an_open_circuit_refuses_and_says_until_when(clock: FakeClock) -> None:
    breaker = CircuitBreaker("geocoder", fail_max=1, reset_timeout=30, jitter=0)
    fail(breaker)
    clock.advance(10)
    for refused in (breaker.acquire, breaker.check):
        with pytest.raises(CircuitOpenError) as caught:
            refused()
        assert caught.value.name == "geocoder"
        assert caught.value.retry_after == pytest.approx(20)
    assert breaker.refuses() == pytest.approx(20)
    assert breaker.stats.refused == 2


def test_the_open_time_grows_with_each_failed_probe_up_to_its_limit(clock: FakeClock) -> None:
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=10, backoff=3, max_reset_timeout=50, jitter=0
    )
    seen = []
    for _ in range(4):
        fail(breaker)
        seen.append(round(breaker.refuses() or 0, 6))
        clock.advance(seen[-1])
    assert seen == [10, 30, 50, 50]
    succeed(breaker)
    fail(breaker)
    assert breaker.refuses() == pytest.approx(10)


def test_randomness_can_be_handed_in(clock: FakeClock) -> None:
    breaker = CircuitBreaker(fail_max=1, reset_timeout=10, jitter=0.5, draw=lambda: 0.5)
    fail(breaker)
    assert breaker.refuses() == pytest.approx(7.5)


def test_retry_after_is_when_it_really_lets_a_call_through(clock: FakeClock) -> None:
    breaker = CircuitBreaker(fail_max=1)
    fail(breaker)
    clock.advance(breaker.refuses() or 0)
    breaker.acquire()


def test_a_reader_of_the_state_sees_that_the_time_is_over(clock: FakeClock) -> None:
    breaker = half_open(clock)
    assert breaker.state is HALF_OPEN


def test_an_open_circuit_does_not_wait_for_a_clock_that_went_back() -> None:
    breaker = CircuitBreaker(fail_max=1)
    with fake_clock() as fake:
        fake.advance(10_000)
        fail(breaker)
        assert breaker.state is OPEN
    assert breaker.state is HALF_OPEN


def test_the_wall_clock_means_nothing(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    breaker = CircuitBreaker(fail_max=1, reset_timeout=30, jitter=0)
    fail(breaker)
    now = time.time()
    for hours in (8, -8):
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        monkeypatch.setenv("TZ", f"X{hours:+d}")
        time.tzset()
        assert breaker.refuses() == pytest.approx(30)
    monkeypatch.undo()
    time.tzset()


# --- half-open ----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_half_open_admits_exactly_so_many_probes(clock: FakeClock, most: int) -> None:
    breaker = half_open(clock, half_open_max=most)
    probes = [breaker.acquire() for _ in range(most)]
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    probes[0].release()
    breaker.acquire()
    with pytest.raises(CircuitOpenError):
        breaker.acquire()


def test_a_check_takes_no_permit(clock: FakeClock) -> None:
    breaker = half_open(clock)
    breaker.check()
    breaker.check()
    breaker.acquire()
    with pytest.raises(CircuitOpenError):
        breaker.check()


def test_a_successful_probe_closes_it(clock: FakeClock) -> None:
    breaker = half_open(clock)
    succeed(breaker)
    assert breaker.state is CLOSED


def test_it_takes_as_many_successes_as_asked_for(clock: FakeClock) -> None:
    breaker = half_open(clock, success_threshold=3)
    succeed(breaker, 2)
    assert breaker.state is HALF_OPEN
    succeed(breaker)
    assert breaker.state is CLOSED


def test_a_failed_probe_opens_it_again(clock: FakeClock) -> None:
    breaker = half_open(clock, success_threshold=3)
    succeed(breaker, 2)
    fail(breaker)
    assert breaker.state is OPEN


@pytest.mark.parametrize("error", [TypeError(), CircuitOpenError("inner", 1.0)])
def test_a_probe_that_says_nothing_gives_its_place_back(clock: FakeClock, error: Exception) -> None:
    breaker = half_open(clock, ignore=TypeError)
    fail(breaker, 3, error)
    assert breaker.state is HALF_OPEN
    breaker.acquire()


def test_a_probe_whose_predicate_is_interrupted_gives_its_place_back(clock: FakeClock) -> None:
    def interrupted(result: object) -> bool:
        if result == "probe":
            raise KeyboardInterrupt
        return False

    breaker = half_open(clock, counts_result=interrupted)
    with pytest.raises(KeyboardInterrupt):
        breaker.acquire().success("probe")
    assert breaker.stats.probes == 0


def test_a_lost_probe_does_not_hold_its_place_for_ever(clock: FakeClock) -> None:
    breaker = half_open(clock, probe_timeout=5)
    breaker.acquire()
    clock.advance(4.9)
    assert breaker.refuses() == pytest.approx(0.1)
    clock.advance(0.1)
    succeed(breaker)
    assert breaker.state is CLOSED


def test_a_slow_probe_still_counts_while_the_circuit_is_half_open(clock: FakeClock) -> None:
    breaker = half_open(clock, probe_timeout=5)
    slow = breaker.acquire()
    clock.advance(6)
    breaker.acquire()
    slow.success()
    assert breaker.state is CLOSED


def test_a_probe_counts_once(clock: FakeClock) -> None:
    breaker = half_open(clock, success_threshold=2)
    probe = breaker.acquire()
    probe.success()
    probe.success()
    probe.failure(REFUSED)
    assert breaker.state is HALF_OPEN
    another = breaker.acquire()
    probe.release()
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    another.success()
    assert breaker.state is CLOSED


def test_retry_after_of_a_busy_half_open_circuit_is_no_longer_than_the_first_open_time(
    clock: FakeClock,
) -> None:
    breaker = half_open(clock, probe_timeout=600)
    breaker.acquire()
    assert breaker.refuses() == pytest.approx(30)


# --- generations --------------------------------------------------------------------------------


def test_a_late_failure_neither_opens_again_nor_prolongs(clock: FakeClock) -> None:
    breaker = CircuitBreaker(fail_max=1, jitter=0)
    late = [breaker.acquire() for _ in range(3)]
    fail(breaker)
    clock.advance(10)
    late[0].failure(REFUSED)
    assert breaker.refuses() == pytest.approx(20)
    clock.advance(20)
    assert breaker.state is HALF_OPEN
    late[1].failure(REFUSED)
    assert breaker.state is HALF_OPEN
    succeed(breaker)
    late[2].failure(REFUSED)
    assert breaker.state is CLOSED


def test_a_late_success_closes_nothing(clock: FakeClock) -> None:
    breaker = CircuitBreaker(fail_max=2)
    late = breaker.acquire()
    fail(breaker, 2)
    late.success()
    assert breaker.state is OPEN
    clock.advance(30)
    assert breaker.state is HALF_OPEN
    late.success()
    assert breaker.state is HALF_OPEN


def test_a_late_success_does_not_end_a_new_row(clock: FakeClock) -> None:
    breaker = CircuitBreaker(fail_max=2)
    fail(breaker)
    late = breaker.acquire()
    breaker.close()
    fail(breaker)
    late.success()
    assert breaker.stats.failures == 1


def test_the_outcomes_of_other_probes_do_not_count_after_one_has_decided(clock: FakeClock) -> None:
    breaker = half_open(clock, half_open_max=3)
    first, second, third = (breaker.acquire() for _ in range(3))
    first.success()
    second.failure(REFUSED)
    third.release()
    assert breaker.state is CLOSED
    assert breaker.stats.failures == 0


# --- by hand ------------------------------------------------------------------------------------


def test_open_by_hand_ends_with_time(clock: FakeClock) -> None:
    breaker = CircuitBreaker(reset_timeout=30)
    breaker.open()
    assert breaker.state is OPEN
    clock.advance(30)
    assert breaker.state is HALF_OPEN


def test_forced_open_ends_only_by_hand(clock: FakeClock) -> None:
    breaker = CircuitBreaker("geocoder")
    breaker.force_open()
    clock.advance(1e6)
    with pytest.raises(CircuitOpenError, match="held open by hand") as caught:
        breaker.acquire()
    assert caught.value.retry_after is None
    assert breaker.refuses() == math.inf
    breaker.close()
    breaker.acquire()


def test_close_starts_afresh_and_keeps_the_statistics(clock: FakeClock) -> None:
    breaker = CircuitBreaker(fail_max=2, reset_timeout=10, jitter=0)
    for _ in range(3):
        fail(breaker, 2 if breaker.state is CLOSED else 1)
        clock.advance(breaker.refuses() or 0)
    breaker.close()
    fail(breaker)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.refuses() == pytest.approx(10)
    assert breaker.stats.opened == 4


def test_reset_forgets_the_statistics_too() -> None:
    breaker = CircuitBreaker(fail_max=1)
    fail(breaker)
    with pytest.raises(CircuitOpenError):
        breaker.check()
    breaker.reset()
    stats = breaker.stats
    assert (stats.state, stats.opened, stats.refused, stats.failures) == (CLOSED, 0, 0, 0)


# --- permits as context managers ----------------------------------------------------------------


def test_a_with_block_reports_its_outcome() -> None:
    breaker = CircuitBreaker(fail_max=2)
    with pytest.raises(ConnectionError), breaker.acquire():
        raise REFUSED
    assert breaker.stats.failures == 1
    with breaker.acquire():
        pass
    assert breaker.stats.failures == 0


@pytest.mark.parametrize("counts", [Exception, BaseException])
def test_a_with_block_that_is_interrupted_counts_neither_way(
    clock: FakeClock, counts: type[BaseException]
) -> None:
    breaker = half_open(clock, counts=counts)
    with pytest.raises(KeyboardInterrupt), breaker.acquire():
        raise KeyboardInterrupt
    assert breaker.state is HALF_OPEN
    assert breaker.stats.probes == 0


# --- events -------------------------------------------------------------------------------------


def changes(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.old_state, e.new_state) for e in events if isinstance(e, CircuitChanged)]


def test_every_change_is_reported_in_order(clock: FakeClock) -> None:
    reported: list[Event] = []
    with capture_events(CircuitChanged) as events:
        breaker = CircuitBreaker("geocoder", fail_max=1, jitter=0, on_change=reported.append)
        fail(breaker)
        clock.advance(30)
        fail(breaker)
        clock.advance(60)
        succeed(breaker)
        breaker.force_open()
        breaker.disable()
        breaker.close()
    assert changes(events) == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
        ("closed", "forced_open"),
        ("forced_open", "disabled"),
        ("disabled", "closed"),
    ]
    assert reported == events
    first, _, again, *_ = events
    assert isinstance(first, CircuitChanged)
    assert isinstance(again, CircuitChanged)
    assert (first.circuit, first.retry_after, again.retry_after) == ("geocoder", 30.0, 60.0)


def test_no_change_no_event() -> None:
    breaker = CircuitBreaker()
    with capture_events(CircuitChanged) as events:
        breaker.close()
        breaker.reset()
        succeed(breaker)
    assert events == []


def test_a_listener_may_use_the_breaker() -> None:
    reported: list[tuple[str, str]] = []

    def react(event: CircuitChanged) -> None:
        reported.append((event.old_state, event.new_state))
        if event.new_state == OPEN:
            breaker.force_open()
            reported.append(("after", breaker.state))

    breaker = CircuitBreaker(fail_max=1, on_change=react)
    fail(breaker)
    assert reported == [("closed", "open"), ("after", "forced_open"), ("open", "forced_open")]


def test_a_listener_that_raises_disturbs_no_call(capsys: pytest.CaptureFixture[str]) -> None:
    reported: list[CircuitChanged] = []

    def broken(event: CircuitChanged) -> None:
        raise RuntimeError(event.circuit)

    breaker = CircuitBreaker(fail_max=1, on_change=broken)
    breaker.subscribe(reported.append)
    fail(breaker)
    assert len(reported) == 1
    assert "RuntimeError" in capsys.readouterr().err


def test_a_cancelled_listener_gets_no_more_events() -> None:
    reported: list[CircuitChanged] = []
    breaker = CircuitBreaker()
    cancel = breaker.subscribe(reported.append)
    breaker.open()
    cancel()
    cancel()
    breaker.close()
    assert changes(list(reported)) == [("closed", "open")]


# --- sharing ------------------------------------------------------------------------------------


def test_a_name_stands_for_one_breaker() -> None:
    first = CircuitBreaker.named("test one breaker", fail_max=2)
    assert CircuitBreaker.named("test one breaker") is first
    assert CircuitBreaker.named("test one breaker", fail_max=2) is first
    with pytest.raises(OperoUsageError, match=r"fail_max=3.*fail_max=2"):
        CircuitBreaker.named("test one breaker", fail_max=3)
    with pytest.raises(OperoUsageError, match="already"):
        CircuitBreaker("test one breaker")


def test_a_copy_is_the_same_breaker() -> None:
    breaker = CircuitBreaker()
    assert copy.copy(breaker) is breaker
    assert copy.deepcopy({"circuit_breaker": [breaker]})["circuit_breaker"][0] is breaker


def test_a_pickled_breaker_is_met_again_in_its_own_process() -> None:
    breaker = CircuitBreaker(on_change=lambda event: None)
    assert pickle.loads(pickle.dumps(breaker)) is breaker


def test_a_pickled_breaker_has_the_same_state_in_another_process(run_python: Any) -> None:
    breaker = CircuitBreaker("geocoder", fail_max=2, jitter=0)
    fail(breaker)
    code = """
import pickle, sys
data = sys.stdin.buffer.read()
one, two = pickle.loads(data), pickle.loads(data)
before = one.state
one.acquire().failure(ConnectionError())
print(one is two, one.name, one.rules.fail_max, before, one.state)
"""
    assert run_python(code, pickle.dumps(breaker)) == "True geocoder 2 closed open"
    assert breaker.state is OPEN
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    assert "'geocoder' open" in repr(breaker)


def test_a_pickled_named_breaker_is_met_by_its_name() -> None:
    breaker = CircuitBreaker.named("test pickled by name")
    assert pickle.loads(pickle.dumps(breaker)) is breaker


def test_a_pickled_named_breaker_is_registered_where_it_arrives(run_python: Any) -> None:
    breaker = CircuitBreaker.named("test arrives by name", fail_max=2)
    code = """
import pickle, sys
from opero import CircuitBreaker
data = sys.stdin.buffer.read()
arrived = pickle.loads(data)
print(CircuitBreaker.named("test arrives by name") is arrived is pickle.loads(data), arrived.rules.fail_max)
"""
    assert run_python(code, pickle.dumps(breaker)) == "True 2"


def test_a_breaker_made_with_a_name_is_the_one_of_that_name() -> None:
    breaker = CircuitBreaker("test made with a name", fail_max=2)
    assert CircuitBreaker.named("test made with a name") is breaker
    with pytest.raises(OperoUsageError, match=r"already.*CircuitBreaker.named"):
        CircuitBreaker("test made with a name")


@pytest.mark.parametrize("make", [CircuitBreaker, CircuitBreaker.named])
def test_a_name_is_free_again_when_its_breaker_is_gone(
    make: Callable[[str], CircuitBreaker],
) -> None:
    make("test free again")
    gc.collect()
    assert CircuitBreaker("test free again", fail_max=1).rules.fail_max == 1


def test_two_processes_share_the_probes_and_the_rate_of_a_circuit(run_python: Any) -> None:
    breaker = CircuitBreaker(
        failure_rate=0.5, window=10, minimum_calls=4, reset_timeout=0.01, jitter=0
    )
    succeed(breaker, 2)
    code = """
import pickle, sys
breaker = pickle.load(sys.stdin.buffer)
for _ in range(2):
    breaker.acquire().failure(ConnectionError())
print(breaker.stats.failures, breaker.stats.calls, breaker.stats.opened)
"""
    data = pickle.dumps(breaker)
    assert run_python(code, data) == "0 0 1"
    time.sleep(0.02)
    with breaker.acquire():
        refused = "import pickle, sys\nprint(pickle.load(sys.stdin.buffer).refuses() is not None)"
        assert run_python(refused, data) == "True"
    assert breaker.state is CLOSED


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CircuitOpenError("geocoder", 1.5)))
    assert (error.name, error.retry_after) == ("geocoder", 1.5)
    assert str(error) == "circuit 'geocoder' is open: try again in 1.5 s"


def test_an_unused_breaker_can_be_collected() -> None:
    breaker = CircuitBreaker()
    fail(breaker)
    gone = weakref.ref(breaker)
    del breaker
    gc.collect()
    assert gone() is None


# --- what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "opens after 5 failures in a row, for 30 s, growing to 5 min, then 1 probe at once"),
        ({"backoff": 1, "half_open_max": 2}, "in a row, for 30 s, then 2 probes at once"),
        ({"failure_rate": 0.5}, "50 % failures in the last 100 calls (10 calls at least)"),
        (
            {"failure_rate": 0.25, "window": "1m", "minimum_calls": 4},
            "25 % failures in the last 60 s (4 calls at least)",
        ),
        ({"failure_rate": 1, "window": 4}, "100 % failures in the last 4 calls (4 calls at least)"),
    ],
)
def test_it_describes_its_rules(options: dict[str, Any], text: str) -> None:
    assert text in CircuitBreaker(**options).describe()


def test_it_describes_a_state_that_is_not_the_usual_one() -> None:
    breaker = CircuitBreaker()
    breaker.disable()
    assert breaker.describe().endswith("; now disabled")


def test_the_snapshot_is_frozen(clock: FakeClock) -> None:
    stats = half_open(clock).stats
    assert (stats.state, stats.opened, stats.refused) == (HALF_OPEN, 1, 0)
    with pytest.raises(AttributeError):
        stats.opened = 2  # type: ignore[misc]


@rows(
    ("options", "message"),
    [
        ({"name": ""}, "name=''"),
        ({"fail_max": 0}, "fail_max=0 must be a whole number, 1 or more"),
        ({"half_open_max": 0}, "half_open_max"),
        ({"success_threshold": 1.5}, "success_threshold"),
        ({"failure_rate": 0}, "failure_rate=0 must be a number, more than 0"),
        ({"failure_rate": 50}, r"0\.5 is half"),
        ({"failure_rate": True}, "failure_rate"),
        ({"window": 10}, "window=10 needs failure_rate"),
        ({"minimum_calls": 10}, "minimum_calls=10 needs failure_rate"),
        ({"failure_rate": 0.5, "window": 0}, "window=0"),
        ({"failure_rate": 0.5, "window": 0.0}, r"window=0\.0 must be longer than 0"),
        ({"failure_rate": 0.5, "window": "soon"}, "window='soon' is no duration"),
        ({"failure_rate": 0.5, "window": 5, "minimum_calls": 6}, "minimum_calls=6"),
        ({"failure_rate": 0.5, "minimum_calls": 0}, "minimum_calls=0"),
        ({"reset_timeout": -1}, "reset_timeout=-1"),
        ({"reset_timeout": 30, "max_reset_timeout": 20}, "max_reset_timeout=20 is shorter"),
        ({"max_reset_timeout": "soon"}, "max_reset_timeout='soon' is no duration"),
        ({"backoff": 0.5}, "backoff"),
        ({"jitter": 1}, "jitter=1 must be a number, 0 or more and less than 1"),
        ({"jitter": "much"}, "jitter"),
        ({"probe_timeout": 0}, "probe_timeout=0"),
        ({"counts": "OSError"}, "counts"),
        ({"ignore": OSError()}, "ignore"),
        ({"counts_result": 503}, "counts_result"),
        ({"on_change": "print"}, "on_change"),
        ({"draw": 0.5}, "draw"),
    ],
)
def test_wrong_options_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OperoUsageError, match=message):
        CircuitBreaker(**options)
