# this_file: tests/events/test_asynchronous_handlers.py
"""Handlers that are coroutines, or return tasks: on which loop, in which order, and what becomes of them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest

from opero import opero
from opero.errors import OperoUsageError
from opero.events import CacheHit, Event, EventBus, HandlerFailed, event_bus
from opero.events.delivery import DeliveryQueue, background_loop
from opero.testing import flaky

pytestmark = pytest.mark.internal


def event(number: int) -> Event:
    return CacheHit(function=str(number))


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


class Log:
    """Handlers of several kinds that record their events, the earlier ones slower."""

    def __init__(self) -> None:
        self.caught_events: list[str] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.tasks: list[asyncio.Task[None]] = []

    async def slowly(self, event: Event) -> None:
        for _ in range(20 - int(event.function)):
            await asyncio.sleep(0)
        self.caught_events.append(event.function)
        self.loops.add(asyncio.get_running_loop())

    def task_later(self, event: Event) -> asyncio.Task[None]:
        # Nothing in the handler itself shows that it makes a task.
        return begin(self.slowly(event))


def begin(running: Any) -> asyncio.Task[None]:
    return asyncio.create_task(running)


def begin_nothing(running: Any) -> Any:
    return running


HANDLERS = {
    "a coroutine function": lambda log: log.slowly,
    "a lambda that makes a task": lambda log: lambda e: asyncio.create_task(log.slowly(e)),
    "a lambda that returns a coroutine": lambda log: lambda e: begin_nothing(log.slowly(e)),
    "a function that returns a task": lambda log: log.task_later,
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", HANDLERS)
async def test_each_event_waits_until_the_one_before_is_dealt_with(
    kind: str, bus: EventBus
) -> None:
    log = Log()
    with bus.subscribe(HANDLERS[kind](log)):
        for number in range(10):
            bus.emit(event(number))
        await bus.drain()
    assert log.caught_events == [str(n) for n in range(10)]
    assert log.loops == {asyncio.get_running_loop()}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", HANDLERS)
async def test_an_event_of_another_thread_is_handled_on_the_handlers_own_loop(
    kind: str, bus: EventBus
) -> None:
    log = Log()
    with bus.subscribe(HANDLERS[kind](log)):
        bus.emit(event(0))
        await bus.drain()
        await asyncio.to_thread(lambda: [bus.emit(event(n)) for n in range(1, 5)])
        await bus.drain()
    assert log.caught_events == [str(n) for n in range(5)]
    assert log.loops == {asyncio.get_running_loop()}


def test_the_documents_lambda_may_be_subscribed_before_any_loop_runs(bus: EventBus) -> None:
    log = Log()

    async def main() -> None:
        bus.emit(event(1))
        await asyncio.to_thread(bus.emit, event(2))
        await bus.drain()

    with bus.subscribe(lambda e: asyncio.create_task(log.slowly(e))):
        asyncio.run(main())
    assert log.caught_events == ["1", "2"]


def test_a_handler_survives_the_loops_that_it_ran_on(bus: EventBus) -> None:
    log = Log()

    async def main(number: int) -> None:
        bus.emit(event(number))
        await bus.drain()

    async def subscribe() -> Any:
        return bus.subscribe(log.slowly)

    with asyncio.run(subscribe()):
        for number in range(3):
            asyncio.run(main(number))
    assert log.caught_events == ["0", "1", "2"]
    assert len(log.loops) == 3


def test_what_a_loop_leaves_behind_is_dealt_with_later(bus: EventBus) -> None:
    log = Log()

    async def main() -> None:
        for number in range(3):
            bus.emit(event(number))

    with bus.subscribe(log.slowly) as subscription:
        asyncio.run(main())
        assert bus.drain_sync(10)
        assert len(log.caught_events) + subscription.dropped == 3
        assert log.caught_events[-2:] == ["1", "2"]


def test_a_program_without_a_loop_uses_the_background_loop(bus: EventBus) -> None:
    log = Log()
    with bus.subscribe(log.slowly):
        bus.emit(event(1))
        bus.emit(event(2))
        assert bus.drain_sync(10)
    assert log.caught_events == ["1", "2"]
    assert log.loops == {background_loop.get()}


def test_the_background_loop_starts_again_after_stop() -> None:
    first = background_loop.get()
    assert repr(background_loop) == "<LoopThread opero-event-handlers, running>"
    background_loop.stop()
    background_loop.stop()
    assert first.is_closed()
    assert repr(background_loop) == "<LoopThread opero-event-handlers, not started>"
    assert background_loop.get() is not first


@pytest.mark.asyncio
async def test_the_oldest_are_dropped_when_a_slow_handler_has_a_full_queue(bus: EventBus) -> None:
    go_on = asyncio.Event()
    caught_events: list[str] = []

    async def slow(event: Event) -> None:
        caught_events.append(event.function)
        await go_on.wait()

    with bus.subscribe(slow, queue=2) as subscription:
        bus.emit(event(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number in range(1, 6):
            bus.emit(event(number))
        go_on.set()
        await bus.drain()
        assert caught_events == ["0", "4", "5"]
        assert subscription.dropped == 3
        assert repr(subscription).endswith("to all events, 3 dropped>")


@pytest.mark.asyncio
async def test_a_slow_handler_delays_no_other(bus: EventBus) -> None:
    caught_events: list[str] = []
    with (
        bus.subscribe(lambda e: asyncio.create_task(asyncio.sleep(60))),
        bus.subscribe(lambda e: caught_events.append(e.function)),
    ):
        for number in range(3):
            bus.emit(event(number))
    assert caught_events == ["0", "1", "2"]


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", HANDLERS)
async def test_a_handler_that_raises_is_reported_once_and_goes_on(
    kind: str, bus: EventBus, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log()

    class Broken(Log):
        async def slowly(self, event: Event) -> None:
            raise ValueError(f"no such thing as {event.function}")

    with bus.subscribe(HANDLERS[kind](Broken())) as broken, bus.subscribe(log.slowly):
        for number in range(3):
            bus.emit(event(number))
        await bus.drain()
        assert broken.errors == 3
        assert repr(broken).endswith("raised 3 times>")
    assert log.caught_events == ["0", "1", "2"]
    received = capsys.readouterr().err
    assert received.count("Exception ignored in opero event handler") == 1
    assert "ValueError: no such thing as 0" in received


@pytest.mark.asyncio
async def test_a_listener_for_failed_handlers_gets_them_instead_of_stderr(
    bus: EventBus, capsys: pytest.CaptureFixture[str]
) -> None:
    caught_events: list[Any] = []

    async def broken(event: Event) -> None:
        raise ValueError("no such thing")

    sent = event(1)
    with event_bus.subscribe(caught_events.append, [HandlerFailed]), bus.subscribe(broken):
        bus.emit(sent)
        await bus.drain()
    (failed,) = caught_events
    assert failed.handler is broken
    assert failed.event is sent
    assert str(failed["error"]) == "no such thing"
    assert capsys.readouterr().err == ""


@pytest.mark.asyncio
async def test_a_handler_whose_task_is_cancelled_goes_on_with_the_next(bus: EventBus) -> None:
    caught_events: list[str] = []

    async def first_is_cancelled(event: Event) -> None:
        caught_events.append(event.function)
        if event.function == "0":
            raise asyncio.CancelledError

    with bus.subscribe(lambda e: asyncio.create_task(first_is_cancelled(e))):
        bus.emit(event(0))
        bus.emit(event(1))
        await bus.drain()
    assert caught_events == ["0", "1"]


@pytest.mark.asyncio
async def test_an_asynchronous_handler_may_unsubscribe_itself(bus: EventBus) -> None:
    caught_events: list[str] = []

    async def once(event: Event) -> None:
        subscription.cancel()
        caught_events.append(event.function)

    subscription = bus.subscribe(once)
    for number in range(3):
        bus.emit(event(number))
    await asyncio.sleep(0.01)
    assert caught_events == ["0"]
    assert not bus.active


@pytest.mark.asyncio
async def test_a_handler_that_drains_does_not_wait_for_itself(bus: EventBus) -> None:
    other = Log()

    async def draining(event: Event) -> None:
        await bus.drain()
        assert other.caught_events == ["1"]

    with bus.subscribe(draining) as subscription, bus.subscribe(other.slowly):
        bus.emit(event(1))
        await bus.drain()
        assert subscription.errors == 0


@pytest.mark.asyncio
async def test_draining_waits_for_what_was_sent_before_and_not_for_ever(bus: EventBus) -> None:
    async def endless(event: Event) -> None:
        bus.emit(event)
        await asyncio.sleep(0)

    with bus.subscribe(endless):
        bus.emit(event(1))
        await asyncio.wait_for(bus.drain(), 10)


@pytest.mark.asyncio
async def test_draining_synchronously_on_a_loop_is_refused(bus: EventBus) -> None:
    with pytest.raises(OperoUsageError, match=r"write `await bus\.drain\(\)`"):
        bus.drain_sync()


def test_draining_synchronously_gives_up_in_time(bus: EventBus) -> None:
    ended = threading.Event()

    async def hangs(event: Event) -> None:
        await asyncio.to_thread(ended.wait)

    with bus.subscribe(hangs):
        bus.emit(event(1))
        assert not bus.drain_sync(0.01)
        ended.set()
        assert bus.drain_sync(10)


@pytest.mark.asyncio
async def test_the_default_bus_drains_listeners_of_functions_too() -> None:
    caught_events: list[str] = []

    async def listen(event: Event) -> None:
        await asyncio.sleep(0)
        caught_events.append(type(event).__name__)

    fetch = opero(cache=False, min_delay=0, on_event=listen)(flaky("ok", failures=1))
    fetch()
    await event_bus.drain()
    assert caught_events == ["AttemptFailed", "RetryScheduled", "CallSucceeded"]


@pytest.mark.asyncio
async def test_a_handlers_task_is_not_collected_while_it_waits(bus: EventBus) -> None:
    caught_events: list[str] = []

    async def forgets_itself(event: Event) -> None:
        waiting = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.01, waiting.set_result, None)
        await waiting
        caught_events.append(event.function)

    with bus.subscribe(lambda e: asyncio.create_task(forgets_itself(e))):
        bus.emit(event(1))
        await asyncio.sleep(0)
        gc.collect()
        await bus.drain()
    assert caught_events == ["1"]


@pytest.mark.asyncio
async def test_emit_may_be_awaited_and_takes_a_dict(bus: EventBus) -> None:
    caught_events: list[Event] = []
    with bus.subscribe(caught_events.append):
        await bus.emit({"type": "mine", "speed": 3})
    assert (caught_events[0]["type"], caught_events[0]["speed"]) == ("mine", 3)


def test_many_threads_lose_no_event(bus: EventBus) -> None:
    log = Log()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with bus.subscribe(log.slowly):
            threads = [
                threading.Thread(target=lambda: [bus.emit(event(19)) for _ in range(200)])
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert bus.drain_sync(30)
    finally:
        sys.setswitchinterval(before)
    assert len(log.caught_events) == 800


def test_a_queue_without_a_place_is_refused(bus: EventBus) -> None:
    with pytest.raises(OperoUsageError, match="queue=0: at least one event must have room"):
        bus.subscribe(print, queue=0)


def test_repr_of_a_delivery_queue() -> None:
    queue = DeliveryQueue(1, lambda error, subject: None, None)
    assert repr(queue) == "<DeliveryQueue, 0 waiting, 0 dropped>"
    assert not queue.is_pending(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_with_empty_queues() -> None:
    received = in_a_process(
        """
        import os
        log = []
        async def handler(event):
            log.append(event.function)
        event_bus.subscribe(handler)
        event_bus.emit(CacheHit(function="parent"))
        event_bus.drain_sync()
        child = os.fork()
        if not child:
            event_bus.emit(CacheHit(function="child"))
            event_bus.drain_sync()
            print(log, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        """
    )
    assert received == "['parent', 'child']\n"


def test_a_program_that_ends_delivers_what_waits() -> None:
    received = in_a_process(
        """
        async def handler(event):
            await asyncio.sleep(0.01)
            print(event.function)
        event_bus.subscribe(lambda e: asyncio.create_task(handler(e)))
        async def main():
            for n in range(3):
                event_bus.emit(CacheHit(function=str(n)))
        asyncio.run(main())
        event_bus.emit(CacheHit(function="last"))
        """
    )
    assert received.split()[-3:] == ["1", "2", "last"]


def in_a_process(code: str) -> str:
    head = "import asyncio\nfrom opero.events import CacheHit, event_bus\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
