# this_file: tests/caching/test_single_flight.py
"""Single-flight: who leads, who waits, who takes over."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from opero import opero
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SingleFlight,
    become_leader,
    notify,
    stop_leading,
    take_verdict,
)
from opero.utils.steps import BlockingStep, run_async, run_sync

if TYPE_CHECKING:
    from opero.testing import FakeClock
    from opero.utils.steps import StepLogic

pytestmark = pytest.mark.internal


class FakeWaiter:
    """A waiter that notes what happens to it."""

    def __init__(self, *, ready=True, wakes=True):
        self.ready, self._wakes = ready, wakes
        self.request = self.value = None
        self.woken = 0

    def wake(self, value):
        self.woken += 1
        self.value = value if self._wakes else None
        return self._wakes


def elsewhere(work):
    """Run `work` in another thread, and so in another context."""
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join(20)
    return result[0]


def test_the_first_caller_leads_and_others_wait():
    flights = SingleFlight()
    assert flights.join("k") is not None
    assert elsewhere(lambda: flights.join("k")) is None
    assert elsewhere(lambda: flights.join("other")) is not None


def test_a_lone_leader_makes_nothing_for_waiters():
    flights = SingleFlight()
    flight = flights.join("k")
    assert flight.waiters is None
    assert list(flights.complete(flight)) == []
    assert len(flights) == 0


def test_a_flight_that_landed_between_look_and_join_is_not_waited_for():
    flights = SingleFlight()
    flight = flights.join("k")
    flights.complete(flight)
    assert not flights.wait_for("k", FakeWaiter())


def test_a_leader_never_waits():
    flights = SingleFlight()
    flight = flights.join("a")
    become_leader(flight)
    elsewhere(lambda: flights.join("b"))
    private = flights.join("b", blocking=False)
    assert private is not None
    assert list(flights.complete(private)) == []
    assert len(flights) == 2  # landing the private one left the other's alone
    stop_leading(flight)
    assert flights.join("b", blocking=False) is None


def test_a_context_copied_from_a_leader_does_not_count_flights_that_are_done():
    flights = SingleFlight()
    flight = flights.join("a")
    become_leader(flight)
    child = contextvars.copy_context()
    stop_leading(flight)
    elsewhere(lambda: flights.join("b"))
    assert child.run(flights.join, "b", blocking=False) is not None
    flights.complete(flight)
    assert child.run(flights.join, "b", blocking=False) is None


def test_a_thread_never_blocks_for_a_leader_in_the_same_thread():
    flights = SingleFlight()
    contextvars.Context().run(lambda: become_leader(flights.join("k")))
    assert flights.join("k") is not None
    assert flights.join("k", blocking=False) is None


def test_leaving_a_context_that_is_not_ones_own_is_harmless():
    flight = SingleFlight().join("k")
    contextvars.Context().run(become_leader, flight)
    stop_leading(flight)


def waiting(flights, *waiters):
    flight = flights.join("k")
    for waiter in waiters:
        assert flights.wait_for("k", waiter)
    return flight


def test_the_longest_waiting_takes_over_from_a_killed_leader():
    flights, first, second = SingleFlight(), FakeWaiter(), FakeWaiter()
    flight = waiting(flights, first, second)
    flights.abandon(flight)
    assert (first.value, second.value) == (Instruction.LEAD, None)
    assert list(flight.waiters) == [second]
    assert not flight.done


def test_waiter_that_cannot_go_on_is_skipped():
    flights = SingleFlight()
    still, closed, third = FakeWaiter(ready=False), FakeWaiter(wakes=False), FakeWaiter()
    flights.abandon(waiting(flights, still, closed, third))
    assert (still.value, closed.value, third.value) == (None, None, Instruction.LEAD)


def test_cancelled_successor_hands_on():
    flights, first, second = SingleFlight(), FakeWaiter(), FakeWaiter()
    flight = waiting(flights, first, second)
    flights.abandon(flight)
    flights.leave(flight, first)
    assert second.value is Instruction.LEAD


class FakeLease:
    """A lease that notes what had become of its flight when it was released."""

    def __init__(self, flights, waiter):
        self._flights, self._waiter = flights, waiter
        self.seen = []

    def release(self, flight):
        self.seen.append((len(self._flights), flight.done, self._waiter.value))
        flight.lease = None


@pytest.mark.parametrize(
    "end",
    [
        SingleFlight.abandon,
        SingleFlight.complete,
        lambda flights, flight: flights.abandon_late(flight, 1.0),
    ],
    ids=["abandoned", "completed", "late"],
)
@pytest.mark.parametrize("ready", [True, False])
def test_a_lease_is_released_once_and_before_anybody_else_can_lead(end, ready):
    flights = SingleFlight()
    flight, waiter = waiting(flights, FakeWaiter(ready=ready)), FakeWaiter(ready=ready)
    flights.wait_for("k", waiter)
    flight.lease = lease = FakeLease(flights, waiter)
    end(flights, flight)
    assert lease.seen == [(1, False, None)]


@pytest.mark.parametrize("end", ["give_up", "drop"])
def test_a_leader_that_has_handed_over_does_not_release_the_lease_of_its_successor(end):
    stage = opero(str).cache._cache
    flights = stage.single_flight
    flight, waiter = flights.join("k"), FakeWaiter()
    become_leader(flight)
    flights.wait_for("k", waiter)
    flight.lease, theirs = FakeLease(flights, waiter), FakeLease(flights, waiter)

    def wake_at_once(value):
        flight.lease = theirs  # in another thread, before this one goes on
        return True

    waiter.wake = wake_at_once
    getattr(stage, end)(flight)
    assert flight.lease is theirs
    assert not theirs.seen


def test_abandoned_flight_without_successor_ends_and_waiters_look_again():
    flights, still = SingleFlight(), FakeWaiter(ready=False)
    flight = waiting(flights, still)
    flights.abandon(flight)
    assert still.value is Instruction.LOOK_AGAIN
    assert flight.done
    assert len(flights) == 0


def test_a_waiter_that_leaves_is_not_leaked():
    flights, first, second = SingleFlight(), FakeWaiter(), FakeWaiter()
    flight = waiting(flights, first, second)
    flights.leave(flight, first)
    assert list(flights.complete(flight)) == [second]
    assert first.woken == 0


def test_an_invalidated_flight_is_replaced_by_the_next_caller():
    flights, waiter = SingleFlight(), FakeWaiter()
    old = waiting(flights, waiter)
    flights.invalidate("k")
    new = flights.join("k")
    assert old.invalidated
    assert new is not old
    assert not new.invalidated
    assert list(flights.complete(old)) == [waiter]
    assert len(flights) == 1


def test_no_waiter_takes_over_an_invalidated_flight():
    flights, waiter = SingleFlight(), FakeWaiter()
    flight = waiting(flights, waiter)
    flights.invalidate_all()
    flights.abandon(flight)
    assert waiter.value is Instruction.LOOK_AGAIN


def test_abandoning_a_flight_that_has_landed_does_nothing():
    flights = SingleFlight()
    flight = flights.join("k")
    flights.complete(flight)
    other = elsewhere(lambda: flights.join("k"))
    flights.abandon(flight)
    assert not other.done
    assert len(flights) == 1


def test_reset_forgets_leaders_of_another_process():
    flights = SingleFlight()
    elsewhere(lambda: flights.join("k"))
    flights.after_fork()
    assert flights.join("k") is not None


def test_a_verdict_is_taken_once():
    waiter = FakeWaiter()
    notify([waiter], Instruction.COMPUTE)
    notify([waiter], Instruction.LOOK_AGAIN)
    assert take_verdict(waiter) is Instruction.COMPUTE
    assert (waiter.value, waiter.woken) == (None, 1)


# --- deadlines ------------------------------------------------------------------------------------


class BoundWaiter(FakeWaiter):
    def __init__(self, deadline, **others):
        super().__init__(**others)
        self.request = deadline


@pytest.mark.parametrize(
    ("deadlines", "successor"),
    [([5.0, 10.0], None), ([5.0, 11.0, None], 1), ([None, 11.0], 0), ([], None)],
)
def test_late_leader_hands_over_to_the_first_waiter_with_more_time(deadlines, successor):
    flights = SingleFlight()
    flight = flights.join("k")
    waiters = [BoundWaiter(deadline) for deadline in deadlines]
    for waiter in waiters:
        flights.wait_for("k", waiter)
    assert flights.abandon_late(flight, 10.0) is (successor is not None)
    led = [n for n, waiter in enumerate(waiters) if waiter.value is Instruction.LEAD]
    assert led == ([] if successor is None else [successor])
    assert flight.done is False


def test_waiter_for_an_invalidated_result_looks_again_when_its_leader_ends():
    flights, waiter = SingleFlight(), FakeWaiter()
    flight = flights.join("k")
    flights.wait_for("k", waiter)
    flights.invalidate("k")
    assert flights.abandon_late(flight, 10.0)
    assert waiter.value is Instruction.LOOK_AGAIN


@pytest.mark.parametrize(
    ("verdict", "left"), [(None, True), (Instruction.LEAD, True), (Instruction.LOOK_AGAIN, False)]
)
def test_leave_returns_whether_the_waiter_was_handed_an_outcome_meanwhile(verdict, left):
    flights, waiter = SingleFlight(), FakeWaiter()
    flights.join("k")
    flight = flights.wait_for("k", waiter)
    waiter.value = verdict
    assert flights.leave(flight, waiter) is left


def test_threads_that_wait_for_a_failing_leader_get_the_expired_result(clock: FakeClock) -> None:
    begun, go = threading.Event(), threading.Event()

    @opero(cache_ttl=60, cache_stale_ttl=60, retries=0)
    def fetch() -> list[int]:
        if not clock.elapsed:
            return [1]
        begun.set()
        go.wait(10)
        raise ConnectionError

    fetch()
    clock.advance(61)
    receipts: list[Any] = []
    threads = [
        threading.Thread(target=lambda: receipts.append(fetch.call()), daemon=True)
        for _ in range(4)
    ]
    threads[0].start()
    begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    flights = fetch.__opero__.cache.single_flight
    while sum(len(flight.waiters or ()) for flight in list(flights._open.values())) < 3:
        pass
    go.set()
    for thread in threads:
        thread.join(10)
    assert [r.source for r in receipts] == ["stale"] * 4
    assert sorted(r.calls for r in receipts) == [0, 0, 0, 1]
    assert len({id(r.value) for r in receipts}) == 4
    assert fetch.stats.stale == 4


@pytest.mark.parametrize("seed", [1, 2])
def test_threads_and_two_loops_with_cancellations_lose_and_double_no_flight(seed: int) -> None:
    flights, lock = SingleFlight(), threading.Lock()
    inside = most = led = shared = 0
    running = [True, True]  # one for each loop

    def call(draw: random.Random, *, blocking: bool) -> StepLogic[None]:
        """Do what a cached call does: compute, or take what another caller computes."""
        nonlocal inside, most, led, shared
        found = yield from flights.follow("key", None, blocking=blocking)
        if not isinstance(found, Flight):
            shared += 1
            return
        become_leader(found)
        try:
            with lock:
                led, inside = led + 1, inside + 1
                most = max(most, inside)
            try:
                yield BlockingStep(time.sleep, asyncio.sleep, (draw.choice([0, 0.0003]),))
            finally:
                with lock:
                    inside -= 1
            notify(flights.complete(found), Instruction.COMPUTE)
        finally:
            flights.abandon(found)
            stop_leading(found)

    def in_thread(number: int) -> None:
        draw = random.Random(f"{seed} thread {number}")
        while running:
            run_sync(call(draw, blocking=True))

    async def one(draw: random.Random) -> None:
        while True:
            await run_async(call(draw, blocking=False))
            await asyncio.sleep(0)

    async def in_loop(number: int) -> None:
        draw = random.Random(f"{seed} loop {number}")
        tasks = [asyncio.create_task(one(draw)) for _ in range(6)]
        for _ in range(300):
            for _ in range(draw.randrange(4)):
                await asyncio.sleep(0)
            victims = draw.sample(tasks, draw.randrange(1, 6))
            for victim in victims:  # a leader, and then, perhaps, who has just taken over
                victim.cancel()
                if draw.random() < 0.7:
                    await asyncio.sleep(0)
            await asyncio.wait(victims)
            tasks = [task for task in tasks if task not in victims]
            tasks += [asyncio.create_task(one(draw)) for _ in victims]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        running.pop()

    threads = [threading.Thread(target=in_thread, args=(n,), daemon=True) for n in range(3)]
    threads += [
        threading.Thread(target=asyncio.run, args=(in_loop(n),), daemon=True) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a caller waits for ever"
    assert (inside, most, len(flights)) == (0, 1, 0)
    assert led
    assert shared
