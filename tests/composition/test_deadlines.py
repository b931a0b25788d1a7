# this_file: tests/composition/test_deadlines.py
"""A deadline bounds everything in a call: pauses, waits, other callers' results, the call itself."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

import opero as front
from opero import ConcurrencyLimit, events, failures, opero, remaining
from opero.errors import BulkheadFullError, CallTimeoutError, DeadlineError
from opero.testing import capture_events, flaky


def fail(*_: Any) -> None:
    raise ConnectionError("no route")


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


@pytest.fixture(params=["option", "block"])
def bounded(request: pytest.FixtureRequest, face: Any) -> Any:
    """Decorate a body and call it within so many seconds, in one of the two ways to say so."""

    def run(seconds: float, body: Any, *args: Any, **options: Any) -> Any:
        options = {"cache": False, **options}
        if request.param == "option":
            return face.run(opero(deadline=seconds, **options)(face.of(body)), *args)
        fn = opero(**options)(face.of(body))

        async def main() -> Any:
            with front.deadline(seconds):
                return await fn(*args)

        if face.asynchronous:
            return asyncio.run(main())
        with front.deadline(seconds):
            return fn(*args)

    return run


# --- pauses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [25, 30])
def test_no_pause_is_begun_that_would_outlast_it(bounded: Any, clock: Any, seconds: int) -> None:
    with (
        pytest.raises(ConnectionError) as caught,
        capture_events(events.DeadlinePassed) as received,
    ):
        bounded(seconds, fail, retries=9, min_delay=10, max_delay=10)
    assert clock.elapsed == 20
    assert len(failures(caught.value)) == 3
    (note,) = caught.value.__notes__
    assert note.startswith("opero: fail() gave up after 3 attempts, 3 calls")
    assert note.endswith("\n  the deadline comes before the end of a pause of 10 s")
    assert [event.where for event in received] == ["before the next attempt"]


def test_a_service_that_asks_for_more_time_than_there_is_ends_it_at_once(
    bounded: Any, clock: Any
) -> None:
    class SlowDownError(Exception):
        retry_after = 40

    def throttled() -> None:
        raise SlowDownError

    with pytest.raises(SlowDownError) as caught:
        bounded(30, throttled)
    assert clock.elapsed == 0
    assert (
        "was not retried: the deadline comes before the end of a pause of 40 s"
        in (caught.value.__notes__[0])
    )


def test_pauses_that_fit_are_made(bounded: Any, clock: Any) -> None:
    assert bounded(100, flaky("ok"), retries=2, min_delay=10, max_delay=10) == "ok"
    assert clock.elapsed == 20


# --- the call ---------------------------------------------------------------------------------------


def test_a_call_is_not_begun_when_time_is_up(bounded: Any, clock: Any) -> None:
    called: list[int] = []

    def spend() -> None:
        called.append(1)
        clock.advance(60)
        raise ConnectionError

    with pytest.raises(ConnectionError) as caught:
        bounded(30, spend, retries=5, min_delay=0)
    assert called == [1]
    assert "the deadline comes before the next attempt" in caught.value.__notes__[0]


def test_a_call_in_a_spent_block_is_refused(face: Any) -> None:
    fn = opero(cache=False)(face.of(fail))
    with front.deadline(0), pytest.raises(DeadlineError, match=r"fail\(\) ran out of time before"):
        face.run(fn)
    assert fn.stats.calls == 0


def test_the_next_value_is_not_tried_when_time_is_up(bounded: Any, clock: Any) -> None:
    def ask(model: Any = ("a", "b")) -> None:
        clock.advance(60)
        raise ConnectionError(model)

    with pytest.raises(ConnectionError, match="a") as caught:
        bounded(30, ask, arg_fallback="model", retries=0)
    assert caught.value.args == ("a",)


def test_a_synchronous_result_that_comes_late_is_not_thrown_away(clock: Any) -> None:
    def slow() -> str:
        clock.advance(60)
        return "late"

    assert opero(cache=False, deadline=30)(slow)() == "late"


def test_an_asynchronous_call_is_cancelled() -> None:
    cancelled = []

    async def hang() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with capture_events(events.DeadlinePassed) as received, pytest.raises(DeadlineError) as caught:
        asyncio.run(opero(cache=False, deadline=0.2)(hang)())
    assert cancelled == [True]
    assert str(caught.value).endswith("hang() ran out of time during the call")
    assert isinstance(caught.value, TimeoutError)
    assert [event.where for event in received] == ["during the call"]


def test_after_a_real_failure_that_failure_is_what_the_caller_gets() -> None:
    calls = []

    @opero(cache=False, deadline=1, min_delay=0)
    async def fetch() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("no route")
        await forever()

    with pytest.raises(ConnectionError) as caught:
        asyncio.run(fetch())
    assert "then DeadlineError: " in caught.value.__notes__[0]
    assert len(calls) == 2


def test_a_foreign_cancellation_stays_one() -> None:
    fetch = opero(cache=False, deadline=10)(forever)

    async def main() -> None:
        task = asyncio.create_task(fetch())
        await asyncio.sleep(0.01)
        task.cancel("stop")
        with pytest.raises(asyncio.CancelledError, match="stop"):
            await task
        assert task.cancelled()

    asyncio.run(main())


def test_a_foreign_cancellation_that_meets_our_own_is_not_swallowed() -> None:
    async def main() -> None:
        leaving = asyncio.Event()

        @opero(cache=False, deadline=0.2)
        async def slow_to_leave() -> None:
            try:
                await forever()
            finally:
                leaving.set()
                await asyncio.sleep(0.05)

        task = asyncio.create_task(slow_to_leave())
        await leaving.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_an_outer_timeout_stays_the_users_own() -> None:
    fetch = opero(cache=False, deadline=10)(forever)

    async def main() -> None:
        async with asyncio.timeout(0.01):
            await fetch()

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(main())
    assert not isinstance(caught.value, DeadlineError)


@pytest.mark.parametrize(
    ("timeout", "deadline", "kind"), [(0.01, 10, CallTimeoutError), (10, 0.01, DeadlineError)]
)
def test_of_timeout_and_deadline_the_smaller_one_ends_the_call(
    face: Any, timeout: float, deadline: float, kind: type[Exception]
) -> None:
    end = threading.Event()
    body = forever if face.asynchronous else lambda: end.wait(20)
    fetch = opero(cache=False, retries=0, timeout=timeout, deadline=deadline)(body)
    with pytest.raises(kind):
        face.run(fetch)
    end.set()


def test_what_a_thread_that_was_left_behind_calls_ends_with_the_deadline() -> None:
    end, reported = threading.Event(), []
    inner = opero(cache=False, retries=9, min_delay=60, max_delay=60)(fail)

    def work() -> None:
        end.wait(20)
        try:
            inner()
        except DeadlineError as error:
            reported.append(error)

    with pytest.raises(DeadlineError):
        opero(cache=False, timeout=10, deadline=0.2)(work)()
    end.set()
    while not reported:
        time.sleep(0.001)
    assert isinstance(reported[0], DeadlineError)


# --- what is around and within ----------------------------------------------------------------------


def test_it_reaches_what_the_function_calls(face: Any, clock: Any) -> None:
    @opero(cache=False, retries=9, min_delay=10, max_delay=10)
    def inner() -> None:
        raise ConnectionError

    def outer() -> None:
        assert remaining() == pytest.approx(25)
        inner()

    with pytest.raises(ConnectionError):
        face.run(opero(cache=False, retries=0, deadline=25)(face.of(outer)))
    assert inner.stats.calls == 3


@pytest.mark.parametrize("timeout", [None, 10])
def test_it_reaches_the_thread_of_a_timeout(timeout: Any) -> None:
    left = opero(cache=False, timeout=timeout, deadline=25)(remaining)()
    assert left is not None
    assert 0 < left <= 25


def test_a_function_that_returns_an_awaitable_is_bounded_too() -> None:
    def fetch() -> Any:
        return forever()

    with pytest.raises(DeadlineError):
        asyncio.run(opero(cache=False, deadline=0.01)(fetch)())


def test_a_task_that_outlives_the_block_goes_on_without_it() -> None:
    seen = []

    @opero(cache=False)
    async def fetch() -> None:
        seen.append(remaining())

    async def main() -> None:
        with front.deadline(0.01):
            task = asyncio.create_task(fetch())
        await asyncio.sleep(0.02)
        await task

    asyncio.run(main())
    assert seen == [None]


def test_a_deadline_bounds_a_stream_until_its_last_item(clock: Any) -> None:
    @opero(deadline=30, min_delay=10, max_delay=10, jitter=False)
    def read() -> Any:
        yield remaining()
        clock.advance(20)
        yield remaining()
        clock.advance(20)
        yield "late"
        yield "not asked for"

    stream = read()
    assert [*map(next, [stream] * 3)] == [pytest.approx(30), pytest.approx(10), "late"]
    with pytest.raises(DeadlineError, match="during the stream"):
        next(stream)


def test_a_stream_that_is_begun_in_a_block_and_read_after_it_is_not_bounded(clock: Any) -> None:
    @opero
    def read() -> Any:
        yield remaining()

    with front.deadline(5):
        stream = read()
    assert list(stream) == [None]


def test_a_hit_of_the_cache_takes_no_time_even_if_there_is_none() -> None:
    fetch = opero(lambda: "value")
    fetch()
    with front.deadline(0):
        assert fetch() == "value"


def test_the_receipt_says_what_is_left(face: Any, clock: Any) -> None:
    def fetch() -> str:
        clock.advance(10)
        return "value"

    receipt = face.run(opero(cache=False, deadline=30)(face.of(fetch)).call)
    assert receipt.remaining == pytest.approx(20)
    assert face.run(opero(cache=False)(face.of(fetch)).call).remaining is None


def test_explain_shows_it_first_and_counts_with_it() -> None:
    shown = opero(cache=False, deadline="5s", min_delay=10, max_delay=10, jitter=False)(fail)
    lines = shown.explain().splitlines()
    reported = "5 s for the whole call, waits included"
    late = f"{reported}; without timeout= a call under way is not cut short"
    assert lines[1].split(None, 2)[1:] == ["deadline", late]
    limited = shown.with_options(timeout=1).explain().splitlines()
    assert limited[1].split(None, 2)[1:] == ["deadline", reported]
    assert lines[-1].endswith("worst case 4 calls and 5 s of pauses, then the last error")


# --- waits ------------------------------------------------------------------------------------------


def test_a_wait_for_a_permit_ends_with_it(bounded: Any) -> None:
    limit = ConcurrencyLimit(1)
    called: list[int] = []
    with limit, pytest.raises(DeadlineError, match="waiting for a permit"):
        bounded(0.01, called.append, 1, concurrency=limit)
    assert called == []
    assert (limit.in_flight, limit.waiting) == (0, 0)


def test_a_call_that_finds_a_permit_free_does_not_wait(bounded: Any) -> None:
    assert bounded(10, lambda: "value", concurrency=ConcurrencyLimit(1, queue=0)) == "value"


def test_a_full_queue_is_reported_before_the_deadline() -> None:
    limit = ConcurrencyLimit(1, queue=0)
    fetch = opero(cache=False, deadline=5, concurrency=limit)(lambda: "value")
    with limit, pytest.raises(BulkheadFullError):
        fetch()


class Meeting:
    """A function whose calls wait to be let go on, each with its own deadline."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.calls: list[float | None] = []

    async def __call__(self, x: int) -> str:
        self.calls.append(remaining())
        self.begun.release()
        if len(self.calls) == 1:
            await forever()
        return f"call {len(self.calls)}"


async def within(seconds: float | None, fn: Any, *args: Any) -> Any:
    if seconds is None:
        return await fn(*args)
    with front.deadline(seconds):
        return await fn(*args)


def test_a_followers_wait_ends_at_its_own_deadline() -> None:
    fetch = opero(Meeting())

    async def main() -> None:
        leader = asyncio.create_task(fetch(1))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError, match="waiting for another caller's result"):
            await within(0.01, fetch, 1)
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("more", [None, 10])
def test_a_leader_short_of_time_hands_over_to_a_waiter_that_has_more(more: float | None) -> None:
    meeting = Meeting()
    fetch = opero(meeting)

    async def main() -> list[Any]:
        return await asyncio.gather(
            within(0.25, fetch, 1),  # all the others come before, on a slow machine too
            within(0.04, fetch, 1),
            within(more, fetch, 1),
            within(None, fetch, 1),
            return_exceptions=True,
        )

    first, short, *rest = asyncio.run(main())
    assert isinstance(first, DeadlineError)
    assert isinstance(short, DeadlineError)
    assert rest == ["call 2", "call 2"]
    assert len(meeting.calls) == 2


def test_a_leader_that_does_not_begin_a_pause_hands_over_too(clock: Any) -> None:
    calls = []
    go_on = threading.Event()

    @opero(min_delay=60, max_delay=60)
    def fetch() -> str:
        calls.append(threading.get_ident())
        if len(calls) == 1:
            go_on.wait(10)
            raise ConnectionError
        return "value"

    results: list[Any] = []

    def lead() -> None:
        with front.deadline(30):
            try:
                fetch()
            except ConnectionError as error:
                results.append(error)

    leader = threading.Thread(target=lead)
    leader.start()
    while not calls:
        time.sleep(0.001)
    follower = threading.Thread(target=lambda: results.append(fetch()))
    follower.start()
    flights = fetch.__opero__.cache.single_flight
    while not any(flight.waiters for flight in flights._open.values()):
        time.sleep(0.001)
    go_on.set()
    leader.join(10)
    follower.join(10)
    assert sorted(map(str, results)) == ["", "value"]
    assert len(calls) == 2


def test_no_waiter_takes_over_from_a_leader_that_failed_by_itself() -> None:
    calls = []

    @opero(retries=0)
    async def fetch() -> None:
        calls.append(1)
        await asyncio.sleep(0.01)
        raise ConnectionError

    async def main() -> list[Any]:
        return await asyncio.gather(within(10, fetch), within(None, fetch), return_exceptions=True)

    assert [type(error) for error in asyncio.run(main())] == [ConnectionError] * 2
    assert len(calls) == 1
