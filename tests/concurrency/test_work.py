# this_file: tests/concurrency/test_work.py
"""What a worker does with a chunk: plain values, outcomes, pauses, partial reports, what it gives back."""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import TYPE_CHECKING, Any

import pytest

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter
from opero.concurrency.executors.base import Chunk, Done, GaveBack, MapJob, Report
from opero.concurrency.sheet import Sheet
from opero.concurrency.work import Work
from opero.core.function import describe_function
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.errors import CircuitOpenError

if TYPE_CHECKING:
    from tests.conftest import Face


def job_of(fn: Any, *, before: tuple[Any, ...] = (), **given: Any) -> MapJob:
    names = ("target_s", "in_flight", "parks", "details", "after")
    of_job = {name: given.pop(name) for name in names if name in given}
    options = Options.of("test", **{"cache": False, "min_delay": 0, **given})
    pipeline = Pipeline(describe_function(fn), options)
    return MapJob(function=fn, options=options, pipeline=pipeline, before=before, **of_job)


def reports_of(job: MapJob, items: list[Any], **fields: Any) -> list[Report]:
    told: list[Report] = []
    chunk = Chunk(0, range(len(items)), items, **fields)
    work = Work(job)
    sheet = Sheet(chunk, job, "w", told.append)
    if job.pipeline.awaits:
        asyncio.run(work.achunk(chunk, sheet))
    else:
        work.chunk(chunk, sheet)
    return told


def last_of(reports: list[Report]) -> Done:
    assert isinstance(reports[-1], Done)
    return reports[-1]


def test_plain_successes_are_bare_values(face: Face) -> None:
    job = job_of(face.of(lambda x: 2 * x))
    (done,) = reports_of(job, [1, 2, 3])
    assert isinstance(done, Done)
    assert (done.places, done.values, done.odd) == (range(3), [2, 4, 6], {})
    assert job.pipeline.stats.calls == 3


def test_further_arguments_stand_around_the_item(face: Face) -> None:
    job = job_of(face.of(lambda a, x, b: (a, x, b)), before=("a",), after=("b",))
    assert last_of(reports_of(job, [1, 2])).values == [("a", 1, "b"), ("a", 2, "b")]


def test_a_failure_is_retried_beside_the_function(face: Face) -> None:
    seen: list[int] = []

    def once_broken(x: int) -> int:
        seen.append(x)
        if len(seen) == 1:
            raise ConnectionError("x")
        return x

    job = job_of(face.of(once_broken))
    done = last_of(reports_of(job, [7]))
    assert (done.odd[0].value, done.odd[0].attempts, done.odd[0].calls) == (7, 2, 2)
    assert (job.pipeline.stats.calls, job.pipeline.stats.failures) == (2, 1)


def test_a_spent_item_is_an_outcome_with_its_own_error(face: Face) -> None:
    def broken(x: int) -> int:
        raise KeyError(x)

    done = last_of(reports_of(job_of(face.of(broken), retries=1), [1, 2]))
    assert [type(o.error) for o in done.odd.values()] == [KeyError, KeyError]
    assert [o.attempts for o in done.odd.values()] == [2, 2]
    assert done.values == [None, None]


def test_before_a_long_pause_the_item_is_parked_and_goes_on_where_it_was(face: Face) -> None:
    calls: list[int] = []

    def broken(x: int) -> int:
        calls.append(x)
        if len(calls) < 3:
            raise ConnectionError(len(calls))
        raise TimeoutError("end")

    job = job_of(face.of(broken), retries=2, min_delay=5, max_delay=5)
    first = last_of(reports_of(job, [1])).odd[0]
    assert first.retry_in == 5
    assert first.parked
    assert (first.parked.attempts, first.parked.calls, first.parked.slept) == (2, 1, 5)
    second = last_of(reports_of(job, [1], parked={0: first.parked})).odd[0]
    assert second.parked
    assert second.parked.attempts == 3
    third = last_of(reports_of(job, [1], parked={0: second.parked})).odd[0]
    assert third.retry_in is None
    assert isinstance(third.error, TimeoutError)
    assert third.error.__notes__[0].startswith("opero: broken() gave up after 3 attempts, 3 calls")
    assert job.pipeline.stats.retries == 2
    assert job.pipeline.stats.slept == 10


def test_a_short_pause_is_slept_by_the_worker(face: Face) -> None:
    def broken(x: int) -> int:
        raise KeyError(x)

    job = job_of(face.of(broken), retries=1, min_delay="1ms", max_delay="1ms")
    assert last_of(reports_of(job, [1])).odd[0].retry_in is None


def test_an_open_circuit_refuses_items(face: Face) -> None:
    breaker = CircuitBreaker("svc")
    job = job_of(face.of(lambda x: x), circuit_breaker=breaker, retries=0)
    assert last_of(reports_of(job, [1, 2])).values == [1, 2]
    breaker.force_open()
    done = last_of(reports_of(job, [1, 2]))
    assert [type(o.error) for o in done.odd.values()] == [CircuitOpenError, CircuitOpenError]
    assert job.pipeline.stats.calls == 2


def test_each_item_takes_a_permit_and_a_slot(face: Face) -> None:
    limiter = RateLimiter("10/minute", smooth=False, burst=0)
    limit = ConcurrencyLimit(1)
    seen: list[int] = []
    body = face.of(lambda x: seen.append(limit.in_flight))
    job = job_of(body, concurrency=limit, rate_limit=limiter, retries=0)
    reports_of(job, [1, 2, 3])
    assert seen == [1, 1, 1]
    assert [limiter.try_acquire() for _ in range(8)] == [True] * 7 + [False]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_would_end_the_program_is_the_outcome_of_its_item(kind: type[BaseException]) -> None:
    def ends(x: int) -> int:
        raise kind

    for retries in (0, 3):
        done = last_of(reports_of(job_of(ends, retries=retries, on_event=print), [1]))
        assert type(done.odd[0].error) is kind


def test_what_is_done_is_told_when_the_target_is_reached_and_the_rest_is_given_back() -> None:
    ran: list[int] = []

    def slow(x: int) -> int:
        ran.append(x)
        time.sleep(0.002)
        return x

    told = reports_of(job_of(slow, target_s=0.0005), list(range(50)))
    assert isinstance(told[-1], GaveBack)
    assert told[-1].kept == len(ran) < 50
    done = [r for r in told if isinstance(r, Done)]
    assert [v for r in done for v in r.values] == ran
    assert [p for r in done for p in r.places] == ran


def test_a_worker_told_to_stop_begins_no_further_item() -> None:
    ran: list[int] = []
    job = job_of(ran.append)
    told: list[Report] = []
    chunk = Chunk(3, range(5), list(range(5)))
    Work(job).chunk(chunk, Sheet(chunk, job, "w", told.append), stopped=lambda: len(ran) == 2)
    assert ran == [0, 1]
    assert told[-1] == GaveBack(3, 2)


def test_items_do_not_see_each_others_context() -> None:
    seen = contextvars.ContextVar("seen", default="nobody")

    def look(x: int) -> str:
        before = seen.get()
        seen.set(str(x))
        return before

    job = job_of(look)
    seen.set("caller")
    told: list[Report] = []
    chunk = Chunk(0, range(2), [1, 2])
    Work(job, context=contextvars.copy_context()).chunk(chunk, Sheet(chunk, job, "w", told.append))
    assert last_of(told).values == ["caller", "caller"]


def test_a_function_that_returns_awaitables_is_awaited() -> None:
    async def later(x: int) -> int:
        return x

    assert last_of(reports_of(job_of(lambda x: later(x)), [1])).odd == {}  # noqa: PLW0108


def test_details_ask_for_an_outcome_of_every_item(face: Face) -> None:
    done = last_of(reports_of(job_of(face.of(lambda x: x), details=True), [1]))
    assert (done.odd[0].value, done.odd[0].attempts) == (1, 1)
