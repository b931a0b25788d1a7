# this_file: tests/core/test_bulkhead.py
"""The stage that holds a permit during a call, and the queue for permits from within."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.core.test_concurrency_limit import full, in_thread, until, waiting_in

from opero import ConcurrencyLimit, events
from opero.core.call import Call
from opero.core.concurrency_limit import Bulkhead
from opero.core.function import Stats
from opero.errors import BulkheadFullError, DeadlineError
from opero.events.bus import Emitter
from opero.utils.ambient import set_disabled
from opero.utils.threads import ThreadCall, run_in_thread

pytestmark = pytest.mark.internal


class StubWaiter:
    """A waiting caller; the test says whether it can be woken."""

    def __init__(self):
        self.alive, self.granted, self.request = True, False, True

    def wake(self, value=True):
        self.granted = self.alive
        return self.alive


def queue_up(limit, waiter):
    """Do what a caller does that has to wait."""
    limit._permits.join(waiter)
    limit._permits.serve()


def test_no_waiter_overtakes_the_queue():
    limit = full()
    first = StubWaiter()
    queue_up(limit, first)
    # It is back, but not handed on yet.
    limit._permits.put_back(True)
    assert not limit.try_acquire()
    limit._permits.serve()
    assert first.granted


def test_a_closed_loop_delays_no_other():
    limit, loop = full(), asyncio.new_event_loop()
    tasks = waiting_in(loop, limit, 3)
    loop._ready.clear()
    loop.close()
    thread = in_thread(limit.acquire)
    until(lambda: limit.waiting == 4)
    limit.release()
    thread.join(10)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()
    assert limit.in_flight == 1


def test_a_permit_that_comes_just_before_the_refusal_is_taken():
    limit, gate = full(queue=0), StubWaiter()
    # Between the first look and the place in the queue.
    limit.release()
    queue_up(limit, gate)
    assert gate.granted
    assert (limit.in_flight, limit.waiting) == (1, 0)


def test_tasks_that_can_never_come_do_not_fill_the_queue():
    limit, loop = full(queue=1), asyncio.new_event_loop()
    (task,) = waiting_in(loop, limit)
    loop._ready.clear()
    loop.close()
    # Its permit comes while no thread looks at the queue.
    limit._permits.put_back(True)
    assert limit.acquire(timeout=0)
    task._log_destroy_pending = False
    task.get_coro().close()


class Nosy(list):
    """A permit that comes back, from a coroutine that is collected, while another is handed out."""

    def pop(self):
        permit = super().pop()
        again, self.again = self.again, None
        if again is not None:
            again()
        return permit


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_permit_that_comes_back_while_another_is_handed_out(others):
    limit = full(2)
    gates = [StubWaiter() for _ in range(1 + others)]
    for gate in gates:
        queue_up(limit, gate)
    limit._permits.free = Nosy()
    limit._permits.free.again = limit.release
    limit.release()
    assert [gate.granted for gate in gates] == [True, True, False][: 1 + others]
    assert limit.in_flight == min(2, 1 + others)
    assert limit.waiting == max(0, others - 1)


@pytest.fixture
def received():
    return []


@pytest.fixture
def stage(received):
    return Bulkhead(ConcurrencyLimit(1), Stats(), Emitter("f", [received.append]))


def test_it_describes_itself():
    def line(**options):
        return Bulkhead(ConcurrencyLimit(4, **options), Stats(), Emitter("f")).describe()

    assert line() == "at most 4 calls in flight; others wait"
    assert line(queue=9) == "at most 4 calls in flight; 9 may wait"
    assert line(queue=0) == "at most 4 calls in flight; others are refused"


def test_a_call_holds_its_permit_until_it_ends(stage, received):
    seen = []
    run = stage.wrap_sync(lambda call: seen.append(stage.limit.in_flight) or "value")
    assert run(Call((), {})) == "value"
    assert seen == [1]
    assert stage.limit.in_flight == 0
    assert received == []


@pytest.mark.asyncio
async def test_an_asynchronous_call_holds_its_permit_until_it_ends(stage, received):
    async def proceed(call):
        await asyncio.sleep(0)
        return stage.limit.in_flight

    assert await stage.wrap_async(proceed)(Call((), {})) == 1
    assert stage.limit.in_flight == 0
    assert received == []


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_call_that_fails_gives_its_permit_back(stage, error):
    def proceed(call):
        raise error

    async def aproceed(call):
        raise error

    with pytest.raises(error):
        stage.wrap_sync(proceed)(Call((), {}))
    coroutine = stage.wrap_async(aproceed)(Call((), {}))
    with pytest.raises(error):
        coroutine.send(None)
    assert stage.limit.in_flight == 0


def test_waiting_is_counted_and_reported(stage, received):
    stage.limit.acquire()
    in_thread(lambda: (until(lambda: stage.limit.waiting), stage.limit.release()))
    call = Call((), {})
    stage.wrap_sync(lambda call: None)(call)
    assert call.waited > 0
    assert stage._stats.waited == call.waited
    (event,) = received
    assert isinstance(event, events.LimiterWaited)
    assert event.seconds == call.waited


@pytest.mark.asyncio
async def test_waiting_in_a_task_is_counted_and_reported(stage, received):
    async def proceed(call):
        return None

    stage.limit.try_acquire()
    call = Call((), {})
    task = asyncio.create_task(stage.wrap_async(proceed)(call))
    await asyncio.sleep(0.001)
    stage.limit.release()
    await task
    assert call.waited > 0
    assert [event.seconds for event in received] == [call.waited]


def call_with(seconds):
    call = Call((), {})
    call.deadline = time.monotonic() + seconds
    return call


def test_a_deadline_ends_the_wait(stage):
    stage.limit.acquire()
    called = []
    with pytest.raises(DeadlineError, match="permit"):
        stage.wrap_sync(called.append)(call_with(0.005))
    with pytest.raises(DeadlineError, match="permit"):
        asyncio.run(stage.wrap_async(called.append)(call_with(0.005)))
    assert called == []
    assert (stage.limit.in_flight, stage.limit.waiting) == (1, 0)


def test_a_deadline_that_is_over_refuses_only_calls_that_have_to_wait(stage):
    assert stage.wrap_sync(lambda call: "value")(call_with(-1)) == "value"


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:a synchronous function waits")
async def test_a_listener_that_is_interrupted_does_not_keep_the_permit():
    def listen(event):
        raise KeyboardInterrupt

    stage = Bulkhead(full(), Stats(), Emitter("f", [listen]))
    in_thread(lambda: (until(lambda: stage.limit.waiting), stage.limit.release()))
    with pytest.raises(KeyboardInterrupt):
        stage.wrap_sync(lambda call: None)(Call((), {}))
    assert stage.limit.in_flight == 0
    stage.limit.acquire()

    async def proceed(call):
        return None

    coroutine = stage.wrap_async(proceed)(Call((), {}))
    coroutine.send(None)
    stage.limit.release()
    with pytest.raises(KeyboardInterrupt):
        coroutine.send(None)
    assert stage.limit.in_flight == 0


def test_a_full_queue_refuses_the_call():
    stage = Bulkhead(full(queue=0), Stats(), Emitter("f"))
    with pytest.raises(BulkheadFullError):
        stage.wrap_sync(lambda call: None)(Call((), {}))
    with pytest.raises(BulkheadFullError):
        asyncio.run(stage.wrap_async(lambda call: None)(Call((), {})))
    assert stage.limit.in_flight == 1


def test_a_call_that_was_left_behind_holds_its_permit_until_it_is_over(stage):
    release, ran = threading.Event(), threading.Event()

    def proceed(call):
        job = ThreadCall(lambda: ran.set() or release.wait(10))
        run_in_thread(job)
        call.orphan_thread = job
        assert not job.wait(0)
        raise TimeoutError

    call = Call((), {})
    with pytest.raises(TimeoutError):
        stage.wrap_sync(proceed)(call)
    assert ran.wait(10)
    assert stage.limit.in_flight == 1
    assert call.orphan_thread is None
    release.set()
    until(lambda: stage.limit.in_flight == 0)


def test_a_call_whose_thread_is_over_by_then_gives_its_permit_back_at_once(stage):
    def proceed(call):
        call.orphan_thread = ThreadCall(lambda: None)
        call.orphan_thread.run()
        call.orphan_thread.finish()
        raise TimeoutError

    with pytest.raises(TimeoutError):
        stage.wrap_sync(proceed)(Call((), {}))
    assert stage.limit.in_flight == 0


def test_no_call_waits_where_waits_are_switched_off(stage):
    async def proceed(call):
        return "value"

    stage.limit.acquire()
    old = set_disabled(True)
    try:
        assert stage.wrap_sync(lambda call: "value")(Call((), {})) == "value"
        assert asyncio.run(stage.wrap_async(proceed)(Call((), {}))) == "value"
    finally:
        set_disabled(old)
    assert stage.limit.in_flight == 1


class Limits(RuleBasedStateMachine):
    """Random histories against the rule: in order, all permits used, none invented."""

    SIZE, QUEUE = 2, 3

    def __init__(self):
        super().__init__()
        self.limit = ConcurrencyLimit(self.SIZE, queue=self.QUEUE)
        self.line: list[StubWaiter] = []
        self.holders: list[StubWaiter | None] = []

    def settle(self):
        """Who has come through by now."""
        while self.line and len(self.holders) < self.SIZE:
            gate = self.line.pop(0)
            assert gate.granted is gate.alive
            if gate.alive:
                self.holders.append(gate)

    @rule()
    def hurry(self):
        expected = len(self.holders) < self.SIZE and not self.line
        assert self.limit.try_acquire() is expected
        if expected:
            self.holders.append(None)

    @rule()
    def come(self):
        gate = StubWaiter()
        if len(self.holders) == self.SIZE and len(self.line) == self.QUEUE:
            with pytest.raises(BulkheadFullError):
                queue_up(self.limit, gate)
        else:
            queue_up(self.limit, gate)
            self.line.append(gate)
            self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def die(self, data):
        data.draw(st.sampled_from(self.line)).alive = False

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def leave(self, data):
        gate = data.draw(st.sampled_from(self.line))
        assert self.limit._permits.leave(gate)
        self.line.remove(gate)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def finish(self, data):
        holder = data.draw(st.sampled_from(self.holders))
        # Who is cancelled when the permit has come already does the same.
        assert holder is None or not self.limit._permits.leave(holder)
        self.limit.release()
        self.holders.remove(holder)
        self.settle()

    @rule()
    def give_back_too_much(self):
        if not self.holders:
            self.limit.release()

    @invariant()
    def numbers_agree(self):
        assert self.limit.in_flight == len(self.holders) <= self.SIZE
        assert self.limit.waiting == len(self.line)
        assert not any(gate.granted for gate in self.line)
        assert not self.line or len(self.holders) == self.SIZE


TestLimits = Limits.TestCase
TestLimits.settings = settings(stateful_step_count=40)
