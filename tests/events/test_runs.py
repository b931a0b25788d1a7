# this_file: tests/events/test_runs.py
"""Runs: what an event belongs to, and the start and the end of watched calls."""

from __future__ import annotations

import asyncio
import contextvars
import os
from typing import Any

import pytest

from opero import opero
from opero.events import (
    AttemptFailed,
    CacheHit,
    CallEnded,
    CallGaveUp,
    CallStarted,
    CallSucceeded,
    Event,
    Run,
    current_run,
)
from opero.testing import FakeClock, capture_events, flaky


def test_an_event_outside_of_a_run_belongs_to_none() -> None:
    event = CacheHit(function="f")
    assert (event.run_id, event.parent_id, current_run()) == (None, None, None)


def test_an_event_is_stamped_with_the_run_that_it_happens_in() -> None:
    with Run("outer") as outer, Run("inner") as inner:
        event = CacheHit(function="f")
        assert (event.run_id, event.parent_id) == (inner.id, outer.id)
        assert repr(inner) == f"<Run {inner.id} inner of {outer.id}>"
        assert repr(outer) == f"<Run {outer.id} outer>"
    assert current_run() is None


def test_a_run_may_have_an_id_and_a_parent_already() -> None:
    run = Run("workflow", id="order-7", parent_id="batch-1")
    assert (run.id, run.parent_id) == ("order-7", "batch-1")


def test_a_run_that_ends_in_another_context_raises_nothing() -> None:
    run = Run("closed by the garbage collector")
    contextvars.copy_context().run(run.__enter__)
    run.__exit__(None, None, None)
    run.__exit__(None, None, None)
    assert current_run() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gives_out_ids_of_its_own() -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, Run("child").id.encode())
        os._exit(0)
    os.waitpid(child, 0)
    received = os.read(read, 100).decode()
    os.close(read)
    os.close(write)
    assert received.split("-")[0] != Run("parent").id.split("-")[0]


def test_all_events_of_a_call_have_its_run(face: Any) -> None:
    fetch = opero(cache=False, min_delay=0)(face.of(flaky("ok", failures=2)))
    with capture_events(Event) as received:
        face.run(fetch)
        face.run(fetch)
    assert isinstance(received[0], CallStarted)
    first, second = dict.fromkeys(e.run_id for e in received)
    assert first is not None
    assert second is not None
    assert {e.parent_id for e in received} == {None}
    assert current_run() is None


def test_a_call_within_a_call_names_its_parent(face: Any) -> None:
    inner = opero(cache=False)(face.of(lambda: 1))

    def nested() -> Any:
        return inner()

    async def anested() -> Any:
        return await inner()

    outer = opero(cache=False)(anested if face.asynchronous else nested)
    with capture_events(CallStarted) as received:
        face.run(outer)
    assert received[1].parent_id == received[0].run_id


def test_calls_side_by_side_do_not_mix_their_runs() -> None:
    @opero(cache=False, min_delay=0, retries=1)
    async def fetch(n: int) -> int:
        await asyncio.sleep(0)
        if n not in seen:
            seen.add(n)
            raise ConnectionError(n)
        return n

    seen: set[int] = set()

    async def main() -> None:
        await asyncio.gather(*(fetch(n) for n in range(5)))

    with capture_events(AttemptFailed, CallSucceeded) as received:
        asyncio.run(main())
    runs = [e.run_id for e in received]
    assert sorted(runs[:5], key=str) == sorted(runs[5:], key=str)
    assert len(set(runs)) == 5


def test_a_call_takes_its_run_into_the_thread_of_its_timeout() -> None:
    seen: list[Run | None] = []
    fetch = opero(cache=False, timeout=10)(lambda: seen.append(current_run()))
    with capture_events(CallStarted) as received:
        fetch()
    (run,) = seen
    assert run is not None
    assert run.id == received[0].run_id


def test_a_function_that_turns_out_to_be_asynchronous_is_one_run() -> None:
    async def later() -> str:
        return "later"

    @opero(cache=False)
    def fetch() -> Any:
        return later()

    with capture_events(Event) as received:
        assert asyncio.run(fetch()) == "later"
    assert [type(e) for e in received] == [CallStarted, CallSucceeded, CallEnded]
    assert len({e.run_id for e in received}) == 1


# --- timings and ends -----------------------------------------------------------------------------


def test_events_have_the_seconds_of_a_call_and_its_attempts(face: Any, clock: FakeClock) -> None:
    calls = 0

    def slow() -> str:
        nonlocal calls
        calls += 1
        clock.advance(calls)
        if calls < 3:
            raise ConnectionError
        return "ok"

    fetch = opero(cache=False, min_delay=10, jitter=False, backoff_factor=1)(face.of(slow))
    with capture_events(AttemptFailed, CallSucceeded, CallEnded) as received:
        face.run(fetch)
    assert [e["seconds"] for e in received] == [1, 2, 26, 26]
    end = received[-1]
    assert isinstance(end, CallEnded)
    assert (end.source, end.attempts, end.calls, end.slept, end.error) == ("fresh", 3, 3, 20, None)


def test_call_gave_up_has_the_seconds_of_the_call(face: Any, clock: FakeClock) -> None:
    error = ConnectionError()
    fetch = opero(cache=False, retries=1, min_delay=7, jitter=False)(
        face.of(flaky("ok", failures=9, error=error))
    )
    with capture_events(CallGaveUp, CallEnded) as received, pytest.raises(ConnectionError):
        face.run(fetch)
    assert [e["seconds"] for e in received] == [7, 7]
    assert [e["error"] for e in received] == [error, error]
    assert clock.elapsed == 7


def test_a_hit_ends_like_every_call(face: Any) -> None:
    fetch = opero(face.of(lambda: 1))
    with capture_events(CallEnded) as received:
        face.run(fetch)
        face.run(fetch)
    assert [(e["source"], e["attempts"], e["calls"]) for e in received] == [
        ("fresh", 1, 1),
        ("hit", 0, 0),
    ]


def test_a_cancelled_call_ends_too() -> None:
    @opero(cache=False)
    async def hang() -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(hang())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with capture_events(CallEnded) as received:
        asyncio.run(main())
    assert isinstance(received[0]["error"], asyncio.CancelledError)


def test_quiet_events_reach_only_handlers_that_name_them() -> None:
    caught_events: list[Event] = []
    fetch = opero(cache=False, on_event=caught_events.append)(lambda: 1)
    with capture_events() as received:
        fetch()
    assert [type(e) for e in (*received, *caught_events)] == [CallSucceeded, CallSucceeded]


def test_a_listener_added_during_a_call_gets_its_later_events() -> None:
    received: list[Event] = []
    with capture_events() as first:
        first.clear()

    @opero(cache=False, min_delay=0)
    def fetch() -> str:
        if not subscribed:
            subscribed.append(event_bus.subscribe(received.append))
            raise ConnectionError
        return "ok"

    from opero.events import event_bus

    subscribed: list[Any] = []
    fetch()
    subscribed[0].cancel()
    assert [type(e).__name__ for e in received] == [
        "AttemptFailed",
        "RetryScheduled",
        "CallSucceeded",
    ]
    assert {e.run_id for e in received} == {None}
    assert received[0]["seconds"] is None
