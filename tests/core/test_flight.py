# this_file: tests/core/test_flight.py
"""SingleError-flight: who leads, who waits, who takes over. And copies of exceptions."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import signal
import threading
import time
import traceback

import pytest

from opero.core.copy_error import copy_error
from opero.core.flight import (
    Crashed,
    Flights,
    Order,
    TaskWaiter,
    ThreadWaiter,
    board,
    tell,
    unboard,
    verdict_of,
)


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


# --- copies of exceptions -------------------------------------------------------------------------


class CustomError(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class SlottedError(Exception):
    __slots__ = ("empty", "extra", "none")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


def slotted():
    error = SlottedError("x")
    error.extra = [1]
    error.none = None
    return error


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (ValueError("a", 1), []),
        (KeyError("k"), []),
        (CustomError(5, detail="d"), ["code", "detail"]),
        (slotted(), ["extra", "none"]),
        (FrozenError(3), ["code"]),
        (FileNotFoundError(2, "gone", "x.txt"), ["errno", "strerror", "filename"]),
        (StopIteration(7), ["value"]),
        (ImportError("m", name="n", path="p"), ["name", "path"]),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ["encoding", "object", "start", "reason"]),
        (SyntaxError("bad", ("f", 1, 2, "t")), ["lineno", "text"]),
        (AttributeError("a", name="n", obj=1), ["name", "obj"]),
        (ExceptionGroup("g", [ValueError()]), ["message", "exceptions"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_is_copied_with_all_that_it_carries(error, attributes):
    copy = copy_error(error)
    assert copy is not error
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert str(copy) == str(error)
    for name in attributes:
        assert getattr(copy, name) == getattr(error, name)


def test_notes_cause_context_and_traceback_are_carried_over():
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as caught:
        caught.add_note("a note")
        error = caught
    copy = copy_error(error)
    copy.add_note("of the copy")
    assert error.__notes__ == ["a note"]
    assert copy.__notes__ == ["a note", "of the copy"]
    assert copy.__cause__ is error.__cause__
    assert copy.__context__ is error.__context__
    assert copy.__suppress_context__
    assert copy.__traceback__ is error.__traceback__


def test_suppressed_context_stays_suppressed_and_open_context_open():
    error = ValueError()
    error.__context__ = KeyError()
    assert not copy_error(error).__suppress_context__


def test_raising_a_copy_leaves_the_original_traceback_alone():
    try:
        raise ValueError
    except ValueError as caught:
        error = caught
    before = traceback.format_tb(error.__traceback__)
    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        raise copy_error(error)
    assert traceback.format_tb(error.__traceback__) == before


class StubbornError(Exception):
    def __new__(cls, *, need):
        return super().__new__(cls)

    def __init__(self, *, need):
        pass


class SingleError(Exception):
    _one = None

    def __new__(cls):
        cls._one = cls._one or super().__new__(cls)
        return cls._one


@pytest.mark.parametrize(
    "error", [StubbornError(need=1), SingleError()], ids=["needs arguments", "singleton"]
)
def test_an_exception_that_cannot_be_copied_is_itself(error):
    assert copy_error(error) is error


def test_copying_makes_no_cycle():
    gc.collect()
    gc.disable()
    try:
        error = Crashed(copy_error(ValueError("x")))
        del error
        assert gc.collect() == 0
    finally:
        gc.enable()
