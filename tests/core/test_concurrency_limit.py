# this_file: tests/core/test_concurrency_limit.py
"""Concurrency limit: never more in flight than allowed, in order, and no permit lost or doubled."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from opero import events
from opero.core.call import Call
from opero.core.concurrency_limit import Bulkhead
from opero.core.stats import Stats
from opero.errors import BulkheadFullError, DeadlineError, OperoUsageError
from opero.events.bus import Emitter
from opero.limits.permits import ConcurrencyLimit
from opero.utils.ambient import set_disabled
from opero.utils.threads import ThreadCall, run_in_thread

pytestmark = pytest.mark.internal


def until(condition):
    """Wait until another thread has got there."""
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def full(size=1, **options):
    """A limit whose permits are all out."""
    limit = ConcurrencyLimit(size, **options)
    for _ in range(size):
        assert limit.try_acquire()
    return limit


class StubWaiter:
    """A waiting caller; the test says whether it can be woken."""

    def __init__(self):
        self.alive, self.granted = True, False

    def wake(self, value=True):
        self.granted = self.alive
        return self.alive


def queue_up(limit, waiter):
    """Do what a caller does that has to wait."""
    limit._permits.join(waiter)
    limit._permits.serve()


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, None, 1_000_001])
def test_a_limit_is_a_whole_number_of_at_least_one(value):
    with pytest.raises(OperoUsageError, match=r"concurrency=.* must be a whole number, 1 to"):
        ConcurrencyLimit(value)


@pytest.mark.parametrize("value", [-1, 1.5, "3", False])
def test_a_queue_is_a_whole_number(value):
    with pytest.raises(OperoUsageError, match=r"queue=.* must be a whole number, 0 to"):
        ConcurrencyLimit(1, queue=value)


def test_it_shows_its_state():
    limit = full(2, name="db")
    assert repr(limit) == "<ConcurrencyLimit db: 2 of 2 in flight, 0 waiting>"
    limit.release()
    assert repr(limit) == "<ConcurrencyLimit db: 1 of 2 in flight, 0 waiting>"


# --- threads --------------------------------------------------------------------------------------


def test_permits_are_taken_and_given_back():
    limit = ConcurrencyLimit(2)
    assert limit.try_acquire()
    assert limit.acquire()
    assert limit.in_flight == 2
    assert not limit.try_acquire()
    limit.release()
    assert limit.acquire()


def test_a_permit_that_is_given_back_twice_counts_once():
    limit = ConcurrencyLimit(1)
    limit.release()
    assert limit.in_flight == 0
    assert limit.try_acquire()
    assert not limit.try_acquire()


def test_a_with_block_gives_its_permit_back_whatever_happens():
    limit = ConcurrencyLimit(1)
    with pytest.raises(ZeroDivisionError), limit:
        1 / (1 - limit.in_flight)
    assert limit.in_flight == 0


def test_threads_come_through_in_order_of_arrival():
    limit, served, threads = full(), [], []

    def come(name):
        limit.acquire()
        served.append(name)
        limit.release()

    for name in range(6):
        threads.append(in_thread(functools.partial(come, name)))
        until(lambda: limit.waiting == name + 1)  # noqa: B023 - called in this very round
    limit.release()
    for thread in threads:
        thread.join(10)
    assert served == list(range(6))
    assert (limit.in_flight, limit.waiting) == (0, 0)


def test_no_waiter_overtakes_the_queue():
    limit = full()
    first = StubWaiter()
    queue_up(limit, first)
    # It is back, but not handed on yet.
    limit._permits.put_back()
    assert not limit.try_acquire()
    limit._permits.serve()
    assert first.granted


def test_no_waiter_overtakes_a_thread_that_is_served_but_not_awake():
    limit = full()
    waiting = threading.Event()
    thread = in_thread(lambda: (limit.acquire(), waiting.wait(10)))
    until(lambda: limit.waiting == 1)
    limit.release()
    assert not limit.try_acquire()
    waiting.set()
    thread.join(10)


@pytest.mark.parametrize("seconds", [0.005, 0, -1])
def test_a_thread_goes_without_permit_when_its_time_is_over(seconds):
    limit = full()
    assert not limit.acquire(timeout=seconds)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert limit.acquire(timeout=seconds)


def test_a_permit_that_comes_in_the_last_moment_is_kept(monkeypatch):
    limit = full()

    def late(gate, seconds):
        if not gate.granted:
            limit.release()
        assert gate.granted
        return False

    monkeypatch.setattr("opero.utils.waiters.ThreadWaiter.wait", late)
    assert limit.acquire(timeout=1)
    assert limit.in_flight == 1


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
def test_an_interrupted_thread_leaves_the_queue():
    limit, me = full(), threading.main_thread().ident

    def interrupt():
        until(lambda: limit.waiting == 1)
        signal.pthread_kill(me, signal.SIGINT)

    in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        limit.acquire()
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert limit.in_flight == 0


def test_an_interrupt_after_the_permit_has_come_gives_it_on(monkeypatch):
    limit = full()

    def interrupted(gate, seconds):
        limit.release()
        assert gate.granted
        raise KeyboardInterrupt

    monkeypatch.setattr("opero.utils.waiters.ThreadWaiter.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        limit.acquire()
    assert limit.in_flight == 0


# --- tasks ----------------------------------------------------------------------------------------


async def waiter(limit, **options):
    """A task that waits for a permit."""
    before = limit.waiting
    task = asyncio.create_task(limit.wait(**options))
    await asyncio.sleep(0)
    assert limit.waiting == before + 1
    return task


@pytest.mark.asyncio
async def test_tasks_come_through_in_order_of_arrival():
    limit, served = full(), []

    async def come(name):
        async with limit:
            served.append(name)

    tasks = [asyncio.create_task(come(name)) for name in range(6)]
    await asyncio.sleep(0)
    limit.release()
    await asyncio.gather(*tasks)
    assert served == list(range(6))
    assert limit.in_flight == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [0.005, 0, -1])
async def test_a_task_goes_without_permit_when_its_time_is_over(seconds):
    limit = full()
    assert not await limit.wait(timeout=seconds)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert await limit.wait(timeout=seconds)


@pytest.mark.asyncio
async def test_a_cancelled_task_leaves_the_queue():
    limit = full()
    first, second = await waiter(limit), await waiter(limit)
    first.cancel()
    await asyncio.wait([first])
    assert limit.waiting == 1
    limit.release()
    assert await second
    assert limit.in_flight == 1


@pytest.mark.asyncio
async def test_a_cancelled_task_that_has_not_run_yet_is_passed_over_without_a_second_permit():
    limit = full()
    first, second = await waiter(limit), await waiter(limit)
    first.cancel()
    # It has been cancelled, but does not know yet.
    limit.release()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert limit.in_flight == 1
    limit.release()
    assert limit.in_flight == 0


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_after_the_permit_has_come_gives_it_on():
    limit = full()
    first, second = await waiter(limit), await waiter(limit)
    limit.release()
    first.cancel()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert second.result()
    assert limit.in_flight == 1


@pytest.mark.asyncio
async def test_a_permit_that_another_thread_gave_in_the_last_moment_is_kept():
    limit = full()
    task = await waiter(limit, timeout=0.1)
    thread = in_thread(limit.release)
    thread.join(10)
    time.sleep(0.11)  # noqa: ASYNC251 - the loop shall miss that the time runs out
    assert await task
    assert limit.in_flight == 1


@pytest.mark.asyncio
async def test_a_task_that_is_closed_by_the_collector_gives_its_place_back():
    limit = full()
    coroutine = limit.wait()
    coroutine.send(None)
    assert limit.waiting == 1
    coroutine.close()
    assert (limit.waiting, limit.in_flight) == (0, 1)
    coroutine = limit.wait()
    coroutine.send(None)
    limit.release()
    del coroutine
    gc.collect()
    assert (limit.waiting, limit.in_flight) == (0, 0)


# --- several loops --------------------------------------------------------------------------------


def waiting_in(loop, limit, count=1):
    """Tasks that wait in `loop`, which stands still afterwards."""

    async def start():
        return [await waiter(limit) for _ in range(count)]

    return loop.run_until_complete(start())


def test_a_blocked_loop_delays_no_other_and_its_tasks_ask_again():
    limit, loop = full(), asyncio.new_event_loop()
    (stalled,) = waiting_in(loop, limit)
    limit.release()
    assert limit.try_acquire()
    loop.run_until_complete(asyncio.sleep(0))
    assert not stalled.done()
    loop.call_soon(limit.release)
    assert loop.run_until_complete(asyncio.wait_for(stalled, 5))
    assert limit.in_flight == 1
    loop.close()


def test_a_task_that_asks_again_is_not_refused():
    limit, loop = full(queue=1), asyncio.new_event_loop()
    (stalled,) = waiting_in(loop, limit)
    limit.release()
    assert limit.try_acquire()
    thread = in_thread(limit.acquire)
    until(lambda: limit.waiting == 1)
    loop.call_later(0.005, limit.release)
    loop.call_later(0.01, limit.release)
    assert loop.run_until_complete(asyncio.wait_for(stalled, 5))
    thread.join(10)
    assert limit.in_flight == 1
    loop.close()


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


def test_a_loop_that_ends_takes_its_tasks_out_of_the_queue():
    limit = full()

    async def main():
        return await waiter(limit)

    assert asyncio.run(main()).cancelled()
    assert (limit.in_flight, limit.waiting) == (1, 0)


def test_a_permit_on_its_way_to_a_loop_that_stops_comes_back():
    limit = full()

    async def come():
        async with limit:
            await asyncio.sleep(10)

    async def main():
        task = asyncio.create_task(come())
        await asyncio.sleep(0)
        in_thread(limit.release).join(10)
        return task

    assert asyncio.run(main()).cancelled()
    assert limit.in_flight == 0


def test_a_limit_serves_one_loop_after_the_other():
    limit = ConcurrencyLimit(1)

    async def main():
        async with limit:
            task = await waiter(limit)
        assert await task
        limit.release()

    for _ in range(3):
        asyncio.run(main())
    assert limit.in_flight == 0


def test_threads_and_tasks_come_through_in_order_of_arrival():
    limit, served = full(), []

    def come(name):
        limit.acquire()
        served.append(name)
        limit.release()

    async def acome(name):
        async with limit:
            served.append(name)

    threads = []
    for name in range(6):
        work = functools.partial(come, name)
        if name % 2:
            work = lambda name=name: asyncio.run(acome(name))  # noqa: E731 - as short as its twin
        threads.append(in_thread(work))
        until(lambda: limit.waiting == name + 1)  # noqa: B023 - called in this very round
    limit.release()
    for thread in threads:
        thread.join(10)
    assert served == list(range(6))


# --- bounded queue --------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_name_and_numbers():
    limit = full(queue=0, name="db")
    with pytest.raises(BulkheadFullError) as caught:
        limit.acquire()
    assert "db" in str(caught.value)
    assert (limit.in_flight, limit.waiting) == (1, 0)
    limit.release()
    assert limit.acquire()


def test_a_permit_that_comes_just_before_the_refusal_is_taken():
    limit, gate = full(queue=0), StubWaiter()
    # Between the first look and the place in the queue.
    limit.release()
    queue_up(limit, gate)
    assert gate.granted
    assert (limit.in_flight, limit.waiting) == (1, 0)


@pytest.mark.asyncio
async def test_a_full_queue_refuses_tasks_too():
    limit = full(queue=2)
    tasks = [await waiter(limit), await waiter(limit)]
    with pytest.raises(BulkheadFullError):
        await limit.wait()
    assert limit.waiting == 2
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    third = await waiter(limit)
    limit.release()
    limit.release()
    assert await tasks[1]
    assert await third


def test_tasks_that_can_never_come_do_not_fill_the_queue():
    limit, loop = full(queue=1), asyncio.new_event_loop()
    (task,) = waiting_in(loop, limit)
    loop._ready.clear()
    loop.close()
    # Its permit comes while no thread looks at the queue.
    limit._permits.put_back()
    assert limit.acquire(timeout=0)
    task._log_destroy_pending = False
    task.get_coro().close()


# --- permits are never lost or doubled ------------------------------------------------------------


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


def test_permits_are_never_lost_or_doubled_by_threads_loops_and_cancellations():
    size, end = 3, time.monotonic() + 1.0
    limit, lock, most, served = ConcurrencyLimit(size), threading.Lock(), [0], [0]
    inside: list[None] = []

    def enter():
        with lock:
            inside.append(None)
            most[0] = max(most[0], len(inside))
            served[0] += 1

    def leave():
        with lock:
            inside.pop()

    def threads_work(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            if limit.acquire(chance.choice([None, 0, 0.0005])):
                enter()
                time.sleep(chance.choice([0, 0.0002]))
                leave()
                limit.release()

    async def visit(chance):
        if await limit.wait(chance.choice([None, None, 0, 0.0005])):
            try:
                enter()
                try:
                    await asyncio.sleep(chance.choice([0, 0.0005]))
                finally:
                    leave()
            finally:
                limit.release()

    async def loops_work(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            tasks = [asyncio.create_task(visit(chance)) for _ in range(8)]
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
            for task in chance.sample(tasks, 4):
                task.cancel()
            await asyncio.wait(tasks)

    works = [functools.partial(threads_work, seed) for seed in range(3)]
    works += [lambda seed=seed: asyncio.run(loops_work(seed)) for seed in range(2)]
    threads = [in_thread(work) for work in works]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert (limit.in_flight, limit.waiting) == (0, 0)
    assert most[0] == size
    assert served[0] > 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_starts_with_all_permits():
    code = """
import os, threading
from opero.limits.permits import ConcurrencyLimit
limit = ConcurrencyLimit(2)
limit.acquire()
limit.acquire()
thread = threading.Thread(target=limit.acquire, daemon=True)
thread.start()
while not limit.waiting:
    pass
limit._permits.lock.acquire()
child = os.fork()
if not child:
    assert (limit.in_flight, limit.waiting) == (0, 0)
    assert limit.acquire(timeout=0)
    limit.release()
    # The one that the forking thread had in the parent.
    limit.release()
    assert limit.acquire(timeout=0) and limit.acquire(timeout=0) and not limit.acquire(timeout=0)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (limit.in_flight, limit.waiting) == (2, 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=100)


# --- the stage ------------------------------------------------------------------------------------


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
