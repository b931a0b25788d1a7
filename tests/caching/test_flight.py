# this_file: tests/caching/test_flight.py
"""Single-flight: who leads, who waits, who takes over."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
import time

import pytest

from opero.caching.flight import Flights, board, unboard
from opero.caching.waiter import Order, TaskWaiter, ThreadWaiter, tell, verdict_of


class FakeWaiter:
    """A waiter that notes what happens to it."""

    def __init__(self, *, ready=True, wakes=True):
        self.ready, self._wakes = ready, wakes
        self.flight = self.verdict = None
        self.woken = 0

    def wake(self):
        self.woken += 1
        return self._wakes


def elsewhere(work):
    """Run `work` in another thread, and so in another context."""
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join(5)
    return result[0]


def test_the_first_caller_leads_and_others_wait():
    flights = Flights()
    assert flights.join("k") is not None
    assert elsewhere(lambda: flights.join("k")) is None
    assert elsewhere(lambda: flights.join("other")) is not None


def test_a_lone_leader_makes_nothing_for_waiters():
    flights = Flights()
    flight = flights.join("k")
    assert flight.waiters is None
    assert list(flights.land(flight)) == []
    assert len(flights) == 0


def test_a_flight_that_landed_between_look_and_join_is_not_waited_for():
    flights = Flights()
    flight = flights.join("k")
    flights.land(flight)
    assert not flights.wait_for("k", FakeWaiter())


def test_a_leader_never_waits():
    flights = Flights()
    token = board(flights.join("a"))
    elsewhere(lambda: flights.join("b"))
    private = flights.join("b", blocking=False)
    assert private is not None
    assert list(flights.land(private)) == []
    assert len(flights) == 2  # landing the private one left the other's alone
    unboard(token)
    assert flights.join("b", blocking=False) is None


def test_a_context_copied_from_a_leader_does_not_count_flights_that_are_done():
    flights = Flights()
    flight = flights.join("a")
    token = board(flight)
    child = contextvars.copy_context()
    unboard(token)
    elsewhere(lambda: flights.join("b"))
    assert child.run(flights.join, "b", blocking=False) is not None
    flights.land(flight)
    assert child.run(flights.join, "b", blocking=False) is None


def test_a_thread_never_blocks_for_a_leader_in_the_same_thread():
    flights = Flights()
    contextvars.Context().run(lambda: board(flights.join("k")))
    assert flights.join("k") is not None
    assert flights.join("k", blocking=False) is None


def test_leaving_a_context_that_is_not_ones_own_is_harmless():
    token = contextvars.Context().run(lambda: board(Flights().join("k")))
    unboard(token)


def waiting(flights, *waiters):
    flight = flights.join("k")
    for waiter in waiters:
        assert flights.wait_for("k", waiter)
    return flight


def test_the_longest_waiting_takes_over_from_a_killed_leader():
    flights, first, second = Flights(), FakeWaiter(), FakeWaiter()
    flight = waiting(flights, first, second)
    flights.abandon(flight)
    assert (first.verdict, second.verdict) == (Order.LEAD, None)
    assert list(flight.waiters) == [second]
    assert not flight.done


def test_a_waiter_that_is_gone_is_passed_over():
    flights = Flights()
    still, closed, third = FakeWaiter(ready=False), FakeWaiter(wakes=False), FakeWaiter()
    flights.abandon(waiting(flights, still, closed, third))
    assert (still.verdict, closed.verdict, third.verdict) == (None, None, Order.LEAD)


def test_an_heir_that_is_cancelled_hands_on():
    flights, first, second = Flights(), FakeWaiter(), FakeWaiter()
    flights.abandon(waiting(flights, first, second))
    flights.leave(first)
    assert second.verdict is Order.LEAD


def test_a_flight_without_heirs_ends_and_sleepers_look_again():
    flights, still = Flights(), FakeWaiter(ready=False)
    flight = waiting(flights, still)
    flights.abandon(flight)
    assert still.verdict is Order.AGAIN
    assert flight.done
    assert len(flights) == 0


def test_a_waiter_that_leaves_is_not_leaked():
    flights, first, second = Flights(), FakeWaiter(), FakeWaiter()
    flight = waiting(flights, first, second)
    flights.leave(first)
    assert list(flights.land(flight)) == [second]
    assert first.woken == 0


def test_an_invalidated_flight_is_replaced_by_the_next_caller():
    flights, waiter = Flights(), FakeWaiter()
    old = waiting(flights, waiter)
    flights.void("k")
    new = flights.join("k")
    assert old.void
    assert new is not old
    assert not new.void
    assert list(flights.land(old)) == [waiter]
    assert len(flights) == 1


def test_nobody_takes_over_an_invalidated_flight():
    flights, waiter = Flights(), FakeWaiter()
    flight = waiting(flights, waiter)
    flights.void_all()
    flights.abandon(flight)
    assert waiter.verdict is Order.AGAIN


def test_abandoning_a_flight_that_has_landed_does_nothing():
    flights = Flights()
    flight = flights.join("k")
    flights.land(flight)
    other = elsewhere(lambda: flights.join("k"))
    flights.abandon(flight)
    assert not other.done
    assert len(flights) == 1


def test_reset_forgets_leaders_of_another_process():
    flights = Flights()
    elsewhere(lambda: flights.join("k"))
    flights.reset()
    assert flights.join("k") is not None


def test_a_verdict_is_taken_once():
    waiter = ThreadWaiter()
    tell([waiter], Order.ALONE)
    waiter.wait()
    assert verdict_of(waiter) is Order.ALONE
    assert waiter.verdict is None


def test_a_task_is_woken_from_another_thread():
    async def main():
        waiter = TaskWaiter()
        assert waiter.ready
        threading.Timer(0.01, waiter.wake).start()
        await asyncio.wait_for(waiter.wait(), 5)

    asyncio.run(main())


def test_a_task_is_woken_by_its_own_loop():
    async def main():
        waiter = TaskWaiter()
        asyncio.get_running_loop().call_soon(waiter.wake)
        await asyncio.wait_for(waiter.wait(), 5)

    asyncio.run(main())


def test_a_waiter_of_a_closed_loop_breaks_nobody():
    async def main():
        return TaskWaiter()

    waiter = asyncio.run(main())
    assert not waiter.ready
    assert not waiter.wake()


@pytest.mark.asyncio
async def test_a_cancelled_waiter_is_not_ready_and_may_be_woken():
    waiter = TaskWaiter()
    task = asyncio.create_task(waiter.wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not waiter.ready
    assert waiter.wake()


def test_a_waiting_thread_hears_ctrl_c():
    def strike():
        time.sleep(0.03)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=strike).start()
    with pytest.raises(KeyboardInterrupt):
        ThreadWaiter().wait()


# --- deadlines ------------------------------------------------------------------------------------


class BoundWaiter(FakeWaiter):
    def __init__(self, deadline, **others):
        super().__init__(**others)
        self.deadline = deadline


@pytest.mark.parametrize(
    ("deadlines", "heir"),
    [([5.0, 10.0], None), ([5.0, 11.0, None], 1), ([None, 11.0], 0), ([], None)],
)
def test_a_leader_whose_time_is_up_is_outlived_by_the_first_waiter_with_more(deadlines, heir):
    flights = Flights()
    flight = flights.join("k")
    waiters = [BoundWaiter(deadline) for deadline in deadlines]
    for waiter in waiters:
        flights.wait_for("k", waiter)
    assert flights.outlive(flight, 10.0) is (heir is not None)
    led = [n for n, waiter in enumerate(waiters) if waiter.verdict is Order.LEAD]
    assert led == ([] if heir is None else [heir])
    assert flight.done is False


def test_who_waits_for_an_outdated_result_begins_anew_when_its_leader_ends():
    flights, waiter = Flights(), FakeWaiter()
    flight = flights.join("k")
    flights.wait_for("k", waiter)
    flights.void("k")
    assert flights.outlive(flight, 10.0)
    assert waiter.verdict is Order.AGAIN


@pytest.mark.parametrize(
    ("verdict", "left"), [(None, True), (Order.LEAD, True), (Order.AGAIN, False)]
)
def test_a_waiter_that_leaves_learns_whether_it_was_told_meanwhile(verdict, left):
    flights, waiter = Flights(), FakeWaiter()
    flights.join("k")
    flights.wait_for("k", waiter)
    waiter.verdict = verdict
    assert flights.leave(waiter) is left


def test_a_wait_ends_at_its_deadline():
    soon = time.monotonic() + 0.005
    assert ThreadWaiter(soon).wait() is False

    async def main():
        return await TaskWaiter(soon).wait()

    assert asyncio.run(main()) is False


def test_a_wait_that_ends_before_its_deadline_is_no_different():
    late = time.monotonic() + 20
    waiter = ThreadWaiter(late)
    waiter.wake()
    assert waiter.wait()

    async def main():
        waiter = TaskWaiter(late)
        asyncio.get_running_loop().call_soon(waiter.wake)
        return await waiter.wait()

    assert asyncio.run(main())
