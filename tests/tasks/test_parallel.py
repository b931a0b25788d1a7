# this_file: tests/tasks/test_parallel.py
"""Jobs side by side: order, limits, failures, cancellation, contexts."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tests.tasks.conftest import until

from opero import failures
from opero.errors import OperoUsageError
from opero.tasks import Parallel, Sequence, Task, TaskState, run_sync
from opero.utils.ambient import fork

if TYPE_CHECKING:
    from tests.tasks.conftest import Received

pytestmark = pytest.mark.internal


async def fetch(number: int) -> int:
    await asyncio.sleep(0)
    return number


def fail(error: BaseException) -> Callable[[], Any]:
    async def failing() -> None:
        raise error

    return failing


# --- order and limit ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1, 2, 100])
def test_results_come_in_the_order_of_the_jobs(limit: int | None) -> None:
    async def late(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    jobs = [Task(late, turns) for turns in (9, 1, 5, 0, 3)]
    assert run_sync(Parallel(*jobs, limit=limit)) == [9, 1, 5, 0, 3]


def test_synchronous_jobs_run_at_once_and_do_not_block_the_loop() -> None:
    meeting = threading.Barrier(3, timeout=10)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        await Parallel(*[Task(meeting.wait) for _ in range(3)]).run()
        ticking.cancel()

    asyncio.run(main())
    assert ticks > 1


@pytest.mark.parametrize("make", [list, iter, tuple])
def test_without_a_limit_all_jobs_are_at_work_together(make: Callable[[Any], Any]) -> None:
    async def main() -> list[Any]:
        waiting, all_here = 0, asyncio.Event()

        async def meet() -> int:
            nonlocal waiting
            waiting += 1
            if waiting == 50:
                all_here.set()
            await all_here.wait()
            return waiting

        async with asyncio.timeout(10):
            result: list[Any] = await Parallel(make([Task(meet) for _ in range(50)])).run()
            return result

    assert asyncio.run(main()) == [50] * 50


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_no_more_than_the_limit_are_at_work(limit: int) -> None:
    busy, most = 0, 0

    async def work() -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.001)
        busy -= 1

    run_sync(Parallel([work] * 30, limit=limit))
    assert most == limit


def test_fifty_thousand_jobs_cost_no_fifty_thousand_tasks() -> None:
    made = pulled = ended = ahead = 0

    def factory(loop: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
        nonlocal made
        made += 1
        return asyncio.Task(coro, loop=loop, **more)

    async def job(number: int) -> int:
        nonlocal ended, ahead
        ahead = max(ahead, pulled - ended)
        await asyncio.sleep(0)
        ended += 1
        return number

    def jobs() -> Iterator[Task]:
        nonlocal pulled
        for number in range(50_000):
            pulled += 1
            yield Task(job, number)

    async def main() -> list[int]:
        asyncio.get_running_loop().set_task_factory(factory)
        results = await Parallel(jobs(), limit=100).run()
        assert made == 100
        return list(results)

    assert asyncio.run(main()) == list(range(50_000))
    assert ahead <= 100


@pytest.mark.parametrize("limit", [None, 2, 100])
def test_there_are_no_more_workers_than_jobs(limit: int | None) -> None:
    made = []

    def factory(loop: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
        made.append(1)
        return asyncio.Task(coro, loop=loop, **more)

    async def main() -> int:
        asyncio.get_running_loop().set_task_factory(factory)
        await Parallel([Task(asyncio.sleep, 0.001)] * 3, limit=limit).run()
        return len(made)

    assert asyncio.run(main()) == min(3, limit or 3)


def test_jobs_that_never_wait_let_others_have_a_turn() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def at_once() -> None:
        pass

    async def main() -> int:
        counting = asyncio.create_task(count())
        await Parallel((at_once for _ in range(1000)), limit=1).run()
        counting.cancel()
        return turns

    assert asyncio.run(main()) > 50


def test_nothing_to_do_is_done_at_once() -> None:
    assert run_sync(Parallel()) == []
    assert run_sync(Parallel([])) == []
    assert run_sync(Parallel(iter([]))) == []
    assert run_sync(Parallel([], limit=3)) == []


def test_a_definition_runs_a_hundred_times_at_once() -> None:
    async def main() -> list[Any]:
        parallel = Parallel(fetch, Task(fetch, 7))
        return list(await asyncio.gather(*(parallel.run(n) for n in range(100))))

    assert asyncio.run(main()) == [[n, 7] for n in range(100)]


def test_an_iterator_is_read_once() -> None:
    parallel = Parallel(Task(fetch, n) for n in range(3))
    assert run_sync(parallel) == [0, 1, 2]
    with pytest.raises(OperoUsageError, match="iterator"):
        run_sync(parallel)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parallel(3), "cannot be a step"),
        (lambda: Parallel("text"), "cannot be a step"),
        (lambda: Parallel([len], len), "cannot be a step"),
        (lambda: Parallel(limit=0), "limit=0"),
        (lambda: Parallel(limit=1.5), "limit=1.5"),
        (lambda: Parallel(on_error="ignore"), "on_error='ignore'"),
        (lambda: run_sync(Parallel([3])), "cannot be a step"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OperoUsageError, match=message):
        make()


# --- failures -------------------------------------------------------------------------------------


def test_the_first_error_itself_is_raised_when_all_siblings_have_ended(received: Received) -> None:
    error = ValueError("no")
    ended = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # it takes its time, and is waited for
            ended.append("slow")

    async def late() -> None:
        await asyncio.sleep(0.001)
        raise error

    with pytest.raises(ValueError, match="no") as caught:
        run_sync(Parallel(slow, late, name="both"))
    assert caught.value is error
    assert ended == ["slow"]
    assert error.__notes__ == ["opero: both() ended with job 1 (late)"]
    assert received.states("slow") == ["RUNNING", "CANCELLED"]
    assert received.states("late") == ["RUNNING", "FAILED"]
    assert received.states("both") == ["RUNNING", "FAILED"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_type_of_the_error_does_not_depend_on_how_many_fail(count: int) -> None:
    with pytest.raises(ValueError, match="0"):
        run_sync(Parallel(*[fail(ValueError(str(number))) for number in range(count)]))


def test_errors_after_the_first_stand_behind_it() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise KeyError("cleaning up")

    async def late() -> None:
        await asyncio.sleep(0.001)
        raise ValueError("first")

    with pytest.raises(ValueError, match="first") as caught:
        run_sync(Parallel(stubborn, late, name="both"))
    assert caught.value.__notes__ == [
        "opero: both() ended with job 1 (late)\n  then job 0 (stubborn): KeyError"
    ]
    assert [type(error) for error in failures(caught.value)] == [KeyError, ValueError]


def test_on_error_collect_returns_errors_in_their_places(received: Received) -> None:
    error = ValueError("no")

    async def given_up() -> None:
        raise asyncio.CancelledError("mine")

    jobs = [Task(fetch, 1), fail(error), given_up, Task(fetch, 2)]
    one, two, three, four = run_sync(Parallel(*jobs, on_error="collect", name="all"))
    assert (one, two, four) == (1, error, 2)
    assert isinstance(three, asyncio.CancelledError)
    assert received.states("all") == ["RUNNING", "SUCCEEDED"]


def test_a_job_that_cancels_itself_ends_it_as_any_failure_does(received: Received) -> None:
    async def given_up() -> None:
        raise asyncio.CancelledError("mine")

    async def main() -> None:
        await Parallel(Task(asyncio.sleep, 60, name="nap"), given_up).run()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert received.states("given_up") == ["RUNNING", "CANCELLED"]
    assert received.states("nap") == ["RUNNING", "CANCELLED"]


@pytest.mark.parametrize("on_error", ["raise", "collect"])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, BaseException])
def test_what_ends_the_program_is_never_collected(
    kind: type[BaseException], on_error: Any, received: Received
) -> None:
    async def main() -> None:
        nap = Task(asyncio.sleep, 60, name="nap")
        await Parallel(nap, fail(kind()), on_error=on_error).run()

    with pytest.raises(kind):
        asyncio.run(main())
    assert received.states("nap") == ["RUNNING", "CANCELLED"]
    assert received.states("failing") == ["RUNNING", "FAILED"]


def test_no_job_begins_after_a_failure() -> None:
    begun = []

    async def work(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise ValueError(number)

    with pytest.raises(ValueError, match="2"):
        run_sync(Parallel((Task(work, n) for n in range(10)), limit=1))
    assert begun == [0, 1, 2]


def test_an_iterable_that_fails_ends_it_and_is_closed() -> None:
    closed = []

    def jobs() -> Iterator[Task]:
        try:
            yield Task(asyncio.sleep, 60)
            yield Task(asyncio.sleep, 60)
            raise LookupError("no more")
        finally:
            closed.append(1)

    with pytest.raises(LookupError, match="no more") as caught:
        run_sync(Parallel(jobs()))
    assert closed == [1]
    assert caught.value.__notes__ == ["opero: Parallel() ended with its iterable"]


def test_a_generator_of_jobs_that_is_left_early_is_closed() -> None:
    closed = []

    def jobs() -> Iterator[Any]:
        try:
            while True:
                yield fail(ValueError("no"))
        finally:
            closed.append(1)
            raise KeyError("closing")

    with pytest.raises(ValueError, match="no") as caught:
        run_sync(Parallel(jobs(), limit=2))
    assert closed == [1]
    assert KeyError in {type(error) for error in failures(caught.value)}


def test_an_error_object_that_is_raised_again_and_again_gathers_no_notes() -> None:
    error = ValueError("always this one")
    for _ in range(3):
        with pytest.raises(ValueError, match="always"):
            run_sync(Parallel(fail(error), fail(error)))
    assert len(error.__notes__) == 1


# --- cancellation ---------------------------------------------------------------------------------


def test_a_cancelled_parallel_cancels_and_awaits_its_jobs(received: Received) -> None:
    ended = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append(1)

    parallel = Parallel([slow] * 5, limit=3, name="all")

    async def main() -> None:
        started = parallel.start()
        await until(lambda: len(received.of("slow")) == 3)
        started.cancel()
        await asyncio.sleep(0)
        started.cancel()  # once more changes nothing
        with pytest.raises(asyncio.CancelledError):
            await started
        assert ended == [1, 1, 1]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert received.states("slow") == ["RUNNING"] * 3 + ["CANCELLED"] * 3
    assert received.states("all") == ["RUNNING", "CANCELLED"]
    assert parallel.state is TaskState.CANCELLED


def test_a_timeout_around_it_is_a_timeout() -> None:
    async def main() -> None:
        async with asyncio.timeout(0.01):
            await Parallel(Task(asyncio.sleep, 60), Task(asyncio.sleep, 60)).run()

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_a_timeout_within_a_job_is_the_jobs() -> None:
    async def patient() -> str:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.sleep(60)
        except TimeoutError:
            return "went on"
        return "never"

    assert run_sync(Parallel([patient] * 4, limit=2)) == ["went on"] * 4


def test_a_loop_that_is_left_leaves_nothing_behind() -> None:
    async def main() -> None:
        Parallel(Task(asyncio.sleep, 60), Task(asyncio.sleep, 60)).start()
        await asyncio.sleep(0.001)

    asyncio.run(main())  # it cancels all tasks, and warnings are errors
    gc.collect()


def test_a_job_that_swallows_its_own_cancellation_does_not_cancel_the_next() -> None:
    async def careless() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass

    def cancelling() -> int:
        task = asyncio.current_task()
        return -1 if task is None else task.cancelling()

    async def look() -> int:
        return cancelling()

    assert run_sync(Parallel(careless, look, limit=1)) == [None, 0]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.parametrize("limit", [1, 3, None])
def test_eager_tasks_keep_to_the_limit_too(limit: int | None) -> None:
    busy = most = 0

    async def work() -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        busy -= 1

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        await Parallel(iter([work] * 2000), limit=limit).run()

    asyncio.run(main())
    assert most == limit if limit else most > 100


# --- contexts and branches ------------------------------------------------------------------------


def test_jobs_of_one_worker_do_not_see_each_others_variables() -> None:
    variable = contextvars.ContextVar("variable", default="mine")

    async def look() -> str:
        seen = variable.get()
        variable.set("changed")
        await asyncio.sleep(0)
        assert variable.get() == "changed"
        return seen

    assert run_sync(Parallel([look] * 4, limit=1)) == ["mine"] * 4


def test_runs_of_jobs_are_children_of_the_parallels(received: Received) -> None:
    run_sync(Parallel(Task(fetch, 1), Sequence(Task(fetch, 2), name="inner"), name="outer"))
    outer, inner = received.of("outer")[0].run_id, received.of("inner")[0]
    parents = {event.parent_id for event in received.of("fetch")}
    assert inner.parent_id == outer
    assert parents == {outer, inner.run_id}


class Books:
    """Keeps books of branches, as a durable workflow does."""

    def __init__(self) -> None:
        self.groups = 0
        self.place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="root")

    def fork(self) -> _Group:
        self.groups += 1
        return _Group(self, f"{self.place.get()}/{self.groups}")


class _Group:
    def __init__(self, books: Books, prefix: str) -> None:
        self._books = books
        self._prefix = prefix

    def enter(self, index: int) -> None:
        self._books.place.set(f"{self._prefix}.{index}")

    def aside(self) -> None:
        self._books.place.set("nowhere")


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_branch_is_known_by_its_index_whatever_the_timing(limit: int | None) -> None:
    books, made = Books(), []

    def factory(loop: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
        made.append(books.place.get())
        return asyncio.Task(coro, loop=loop, **more)

    async def where(turns: int) -> str:
        for _ in range(turns):
            await asyncio.sleep(0)
        return books.place.get()

    async def main() -> list[Any]:
        asyncio.get_running_loop().set_task_factory(factory)
        fork.set(books.fork)
        jobs = [Task(where, turns) for turns in (5, 0, 3)]
        places = await Parallel(*jobs, limit=limit).run()
        assert set(made) == {"nowhere"}  # the workers belong to no branch
        return [places, books.place.get()]

    assert asyncio.run(main()) == [["root/1.0", "root/1.1", "root/1.2"], "root"]


def test_a_parallel_in_a_branch_forks_from_there_also_in_threads() -> None:
    books = Books()

    def where() -> str:
        return books.place.get()

    async def main() -> list[Any]:
        fork.set(books.fork)
        return list(await Parallel(Sequence(where, Parallel(where, where)), where, limit=1).run())

    assert asyncio.run(main()) == [["root/1.0", ["root/1.0/2.0", "root/1.0/2.1"]], "root/1.1"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1])
def test_an_error_leaves_no_reference_cycle(limit: int | None) -> None:
    class OopsError(Exception):
        pass

    async def broken() -> None:
        await asyncio.sleep(0)
        raise OopsError

    def sync_broken() -> None:
        raise OopsError

    async def main(made: Any) -> weakref.ref[BaseException]:
        try:
            await made.run()
        except OopsError as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        for job in (broken, sync_broken, Parallel(broken)):
            made = Parallel(job, Task(asyncio.sleep, 0), limit=limit)
            assert asyncio.run(main(made))() is None
    finally:
        gc.enable()


def test_max_workers_is_another_name_of_limit() -> None:
    parallel = Parallel(len, max_workers=3)
    assert parallel.limit == 3
    with pytest.raises(OperoUsageError, match="limit= and max_workers= are the same"):
        Parallel(len, limit=3, max_workers=3)
