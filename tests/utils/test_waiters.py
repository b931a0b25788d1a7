# this_file: tests/utils/test_waiters.py
"""Gates: opened once, from anywhere, for a thread or a task."""

from __future__ import annotations

import asyncio
import signal
import threading
from types import SimpleNamespace

import pytest

from opero.utils import waiters as gates
from opero.utils.waiters import TaskGate, ThreadGate


def later(work):
    """Do `work` in another thread in a moment."""
    timer = threading.Timer(0.005, work)
    timer.daemon = True
    timer.start()
    return timer


def test_a_thread_goes_through_a_gate_that_is_open_already():
    gate = ThreadGate()
    assert not gate.opened
    assert gate.open()
    assert gate.opened
    assert gate.wait()


@pytest.mark.parametrize("seconds", [None, 5, 1e300])
def test_a_thread_waits_until_another_one_opens(seconds):
    gate = ThreadGate()
    later(gate.open)
    assert gate.wait(seconds)


@pytest.mark.parametrize("seconds", [0.005, 0, -1])
def test_a_thread_goes_when_its_time_is_over(seconds):
    gate = ThreadGate()
    assert not gate.wait(seconds)
    # Whoever opens it afterwards gave something to somebody who has left, and that shows.
    assert gate.open()
    assert gate.opened


def test_time_that_is_over_does_not_matter_at_an_open_gate():
    gate = ThreadGate()
    gate.open()
    assert gate.wait(-1)


@pytest.mark.parametrize("seconds", [None, 5])
def test_a_thread_that_looks_up_goes_on_waiting(seconds, monkeypatch):
    monkeypatch.setattr(gates, "_PATIENCE", 0.001)
    gate = ThreadGate()
    later(gate.open)
    assert gate.wait(seconds)


def test_a_thread_that_looks_up_still_goes_in_time(monkeypatch):
    monkeypatch.setattr(gates, "_PATIENCE", 0.001)
    assert not ThreadGate().wait(0.01)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
@pytest.mark.parametrize("seconds", [None, 20])
def test_an_interrupt_reaches_a_waiting_thread(seconds):
    me = threading.main_thread().ident
    later(lambda: signal.pthread_kill(me, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        ThreadGate().wait(seconds)


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [None, 5, float("inf")])
async def test_a_task_waits_until_a_thread_opens(seconds):
    gate = TaskGate()
    later(gate.open)
    assert await gate.wait(seconds)
    assert gate.opened


@pytest.mark.asyncio
async def test_a_task_waits_until_another_task_opens():
    gate = TaskGate()
    asyncio.get_running_loop().call_soon(gate.open)
    assert await gate.wait()


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [0.005, 0, -1])
async def test_a_task_goes_when_its_time_is_over(seconds):
    gate = TaskGate()
    assert not await gate.wait(seconds)
    assert not gate.opened
    assert gate.open()
    assert gate.opened


@pytest.mark.asyncio
async def test_an_opened_gate_leaves_no_timer_behind():
    gate = TaskGate()
    gate.open()
    loop = asyncio.get_running_loop()
    assert await gate.wait(3600)
    assert all(timer.cancelled() for timer in loop._scheduled)


@pytest.mark.asyncio
async def test_a_cancelled_task_lets_nothing_through():
    gate = TaskGate()
    task = asyncio.create_task(gate.wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not gate.open()
    assert not gate.opened


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_after_the_opening_can_tell():
    gate = TaskGate()
    task = asyncio.create_task(gate.wait())
    await asyncio.sleep(0)
    assert gate.open()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.opened


def started_in(loop):
    """A task that waits at a gate in `loop`, which stands still afterwards."""

    async def start():
        gate = TaskGate()
        task = asyncio.ensure_future(gate.wait())
        await asyncio.sleep(0)
        return gate, task

    return loop.run_until_complete(start())


def test_a_loop_that_stands_still_wakes_up_to_a_gate_that_is_not_open():
    loop = asyncio.new_event_loop()
    gate, task = started_in(loop)
    assert not gate.open()
    assert not gate.opened
    assert loop.run_until_complete(task)
    assert not gate.opened
    loop.close()


def test_a_loop_that_closes_at_this_very_moment_lets_nobody_out():
    loop = asyncio.new_event_loop()
    gate, task = started_in(loop)

    def closed(*args):
        raise RuntimeError("Event loop is closed")

    gate._loop = SimpleNamespace(is_running=lambda: True, call_soon_threadsafe=closed)
    assert not gate.open()
    assert not gate.opened
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()


def test_nobody_comes_out_of_a_closed_loop():
    loop = asyncio.new_event_loop()
    gate, task = started_in(loop)
    loop._ready.clear()
    loop.close()
    assert not gate.open()
    assert not gate.opened
    # A pending task complains when it is collected.
    task._log_destroy_pending = False
    task.get_coro().close()
