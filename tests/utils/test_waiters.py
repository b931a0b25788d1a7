# this_file: tests/utils/test_waiters.py
"""Waiters and queues: each waiter is served once, and nothing that is handed over is lost."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from opero.utils import threads
from opero.utils.waiters import HandoffQueue, TaskWaiter, ThreadWaiter, WaitingLine

pytestmark = pytest.mark.internal


def until(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def later(work):
    """Do `work` in another thread in a moment."""
    timer = threading.Timer(0.005, work)
    timer.daemon = True
    timer.start()
    return timer


def test_a_thread_that_was_woken_before_it_waits_goes_on():
    waiter = ThreadWaiter()
    assert not waiter.granted
    assert waiter.wake()
    assert waiter.granted
    assert waiter.wait()


@pytest.mark.parametrize("seconds", [None, 5, 1e300])
def test_a_thread_waits_until_another_one_wakes_it(seconds):
    waiter = ThreadWaiter()
    later(waiter.wake)
    assert waiter.wait(seconds)


@pytest.mark.parametrize("seconds", [0.005, 0, -1])
def test_a_thread_goes_on_when_its_time_is_up(seconds):
    waiter = ThreadWaiter()
    assert not waiter.wait(seconds)
    # What it is handed afterwards was granted all the same, and that shows.
    assert waiter.wake()
    assert waiter.granted


def test_time_that_is_up_does_not_matter_once_woken():
    waiter = ThreadWaiter()
    waiter.wake()
    assert waiter.wait(-1)


@pytest.mark.parametrize("seconds", [None, 5])
def test_a_thread_that_checks_for_interrupts_goes_on_waiting(seconds, monkeypatch):
    monkeypatch.setattr(threads, "_CHECK_SECONDS", 0.001)
    waiter = ThreadWaiter()
    later(waiter.wake)
    assert waiter.wait(seconds)


def test_a_thread_that_checks_for_interrupts_still_ends_in_time(monkeypatch):
    monkeypatch.setattr(threads, "_CHECK_SECONDS", 0.001)
    assert not ThreadWaiter().wait(0.01)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
@pytest.mark.parametrize("seconds", [None, 20])
def test_an_interrupt_reaches_a_waiting_thread(seconds):
    me = threading.main_thread().ident

    def wait_for_it():
        later(lambda: signal.pthread_kill(me, signal.SIGINT))
        ThreadWaiter().wait(seconds)

    # Whenever it comes, even before the wait begins, it is expected.
    with pytest.raises(KeyboardInterrupt):
        wait_for_it()


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [None, 5, float("inf")])
async def test_a_task_waits_until_a_thread_wakes_it(seconds):
    waiter = TaskWaiter()
    later(waiter.wake)
    assert await waiter.wait(seconds)
    assert waiter.granted


@pytest.mark.asyncio
async def test_a_task_waits_until_another_task_wakes_it():
    waiter = TaskWaiter()
    asyncio.get_running_loop().call_soon(waiter.wake)
    assert await waiter.wait()


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [0.005, 0, -1])
async def test_a_task_goes_on_when_its_time_is_up_and_may_wait_again(seconds):
    waiter = TaskWaiter()
    assert not await waiter.wait(seconds)
    assert not waiter.granted
    assert not await waiter.wait(seconds)
    assert waiter.wake()
    assert waiter.granted
    assert await waiter.wait()


@pytest.mark.asyncio
async def test_a_woken_task_leaves_no_timer_behind():
    waiter = TaskWaiter()
    waiter.wake()
    loop = asyncio.get_running_loop()
    assert await waiter.wait(3600)
    assert all(timer.cancelled() for timer in loop._scheduled)


@pytest.mark.asyncio
async def test_a_cancelled_task_is_granted_nothing():
    waiter = TaskWaiter()
    task = asyncio.create_task(waiter.wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not waiter.wake()
    assert not waiter.granted


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_after_it_was_woken_can_tell():
    waiter = TaskWaiter()
    task = asyncio.create_task(waiter.wait())
    await asyncio.sleep(0)
    assert waiter.wake()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiter.granted


def started_in(loop):
    """A task that waits in `loop`, which does not run afterwards."""

    async def start():
        waiter = TaskWaiter()
        task = asyncio.ensure_future(waiter.wait())
        await asyncio.sleep(0)
        return waiter, task

    return loop.run_until_complete(start())


def test_a_task_whose_loop_does_not_run_is_granted_nothing_and_wakes_later():
    loop = asyncio.new_event_loop()
    waiter, task = started_in(loop)
    assert not waiter.wake()
    assert not waiter.granted
    assert loop.run_until_complete(task)
    assert not waiter.granted
    loop.close()


def test_a_task_whose_loop_closes_at_this_very_moment_is_granted_nothing():
    loop = asyncio.new_event_loop()
    waiter, task = started_in(loop)

    def closed(*args):
        raise RuntimeError("Event loop is closed")

    waiter._loop = SimpleNamespace(is_running=lambda: True, call_soon_threadsafe=closed)
    assert not waiter.wake()
    assert not waiter.granted
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()


def test_a_task_of_a_closed_loop_is_granted_nothing():
    loop = asyncio.new_event_loop()
    waiter, task = started_in(loop)
    loop._ready.clear()
    loop.close()
    assert not waiter.wake()
    assert not waiter.granted
    # A pending task complains when it is collected.
    task._log_destroy_pending = False
    task.get_coro().close()


# --- queues ---------------------------------------------------------------------------------------


class Permits(HandoffQueue):
    """So many permits."""

    def __init__(self, count):
        super().__init__()
        self.free = [None] * count

    def put_back(self, taken):
        self.free.append(None)

    def give_back(self, taken=True):
        super().give_back(taken)

    def take(self, request=None):
        try:
            self.free.pop()
        except IndexError:
            return False
        return True


def test_callers_are_served_in_order_of_arrival():
    queue, waiters_ = Permits(0), [ThreadWaiter(), ThreadWaiter(), ThreadWaiter()]
    for waiter in waiters_:
        queue.join(waiter)
    queue.give_back()
    assert queue.leave(waiters_[1])
    queue.give_back()
    assert [waiter.value for waiter in waiters_] == [True, None, True]
    assert not queue.leave(waiters_[0])
    queue.give_back()
    assert queue.take()


def test_the_waits_of_some_callers_are_ended_with_a_value():
    line, one, other = WaitingLine(), ThreadWaiter(request=1), ThreadWaiter(request=2)
    line.join(one)
    line.join(other)
    line.dismiss("short", lambda waiter: waiter.request < 2)
    assert (one.value, other.value, len(line)) == ("short", None, 1)


def test_the_first_in_line_has_the_turn_until_it_leaves():
    line, waiters_ = WaitingLine(), [ThreadWaiter() for _ in range(3)]
    for waiter in waiters_:
        line.join(waiter)
    assert line.first is waiters_[0]
    assert line.leave(waiters_[1])
    assert not waiters_[2].granted
    assert line.leave(waiters_[0])
    assert waiters_[2].granted
    assert line.first is waiters_[2]
    assert not line.leave(waiters_[0])
    assert line.leave(waiters_[2])
    assert line.first is None
    assert not line


def test_a_turn_goes_from_thread_to_thread_in_order_of_arrival():
    line, served = WaitingLine(), []
    line.join(first := ThreadWaiter())

    def work(name):
        line.join(waiter := ThreadWaiter())
        assert waiter.wait()
        assert line.first is waiter
        served.append(name)
        line.leave(waiter)

    threads = []
    for name in range(5):
        threads.append(threading.Thread(target=work, args=(name,)))
        threads[-1].start()
        until(lambda: len(line) == name + 2)  # noqa: B023 - called in this very round
    line.leave(first)
    for thread in threads:
        thread.join(10)
    assert served == list(range(5))


def test_a_wait_ends_with_the_error_or_the_time_of_its_look_up():
    permits = Permits(0)

    def late():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        permits.wait(late)
    assert permits.wait(lambda: 0) is False
    assert not permits.waiting
    permits.give_back()
    assert permits.wait(lambda: 0) is True


@pytest.mark.parametrize("cancel_at", range(8))
@pytest.mark.parametrize("released", ["before", "in the same round", "after"])
@pytest.mark.parametrize("by_thread", [True, False])
def test_a_task_cancelled_at_any_await_loses_no_permit(cancel_at, released, by_thread):
    permits = Permits(1)

    def release():
        if by_thread:
            thread = threading.Thread(target=permits.give_back)
            thread.start()
            thread.join()
        else:
            permits.give_back()

    async def work():
        assert await permits.wait_async(lambda: 5)
        try:
            await asyncio.sleep(0)
        finally:
            permits.give_back()

    async def main():
        assert permits.take()
        tasks = [asyncio.ensure_future(work()) for _ in range(3)]
        for number in range(8):
            if number == cancel_at and released == "before":
                release()
            if number == cancel_at:
                tasks[0].cancel()
            if number == cancel_at and released == "in the same round":
                release()
            await asyncio.sleep(0)
        if released == "after":
            release()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(task.cancelled() or task.exception() is None for task in tasks)

    asyncio.run(main())
    assert (len(permits.free), len(permits)) == (1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_threads_and_two_loops_with_cancellations_lose_and_double_nothing(seed):
    permits, count = Permits(2), 2
    out, most, served, lock = 0, 0, 0, threading.Lock()
    cancelled = 0
    end = time.monotonic() + 0.4

    def enter():
        nonlocal out, most, served
        with lock:
            out += 1
            served += 1
            most = max(most, out)

    def leave():
        nonlocal out
        with lock:
            out -= 1
        permits.give_back()

    def thread(number):
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            until_ = time.monotonic() + draw.choice([0, 0.0002, 0.002, 5])
            if permits.wait(lambda: until_ - time.monotonic()):  # noqa: B023 - at once
                enter()
                time.sleep(draw.choice([0, 0, 0.0003]))
                leave()

    async def task(draw):
        while time.monotonic() < end:
            until_ = time.monotonic() + draw.choice([0.0002, 0.002, 5])
            if await permits.wait_async(lambda: until_ - time.monotonic()):  # noqa: B023
                enter()
                try:
                    for _ in range(draw.randrange(3)):
                        await asyncio.sleep(0)
                finally:
                    leave()

    async def main(number):
        nonlocal cancelled
        draw = random.Random(f"{seed} loop {number}")
        tasks = {asyncio.ensure_future(task(random.Random(draw.random()))) for _ in range(8)}
        while time.monotonic() < end:
            for _ in range(draw.randrange(4)):
                await asyncio.sleep(0)
            victim = draw.choice(list(tasks))
            victim.cancel()
            cancelled += 1
            await asyncio.wait([victim])
            assert victim.cancelled() or victim.exception() is None
            tasks.discard(victim)
            tasks.add(asyncio.ensure_future(task(random.Random(draw.random()))))
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(4)]
    threads += [threading.Thread(target=asyncio.run, args=(main(number),)) for number in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
        assert not one.is_alive()
    assert most <= count
    assert served > 20
    assert cancelled > 20
    assert (len(permits.free), len(permits), out) == (count, 0, 0)
