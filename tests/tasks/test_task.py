# this_file: tests/tasks/test_task.py
"""One function with its arguments: how it is called, attributes of its run, its events."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tests.tasks.conftest import until

from opero import deadline, event_bus, opero
from opero.errors import CallTimeoutError, DeadlineError, OperoUsageError
from opero.events import RetryScheduled
from opero.tasks import Task, TaskRun, TaskState, run, run_sync
from opero.tasks.task import NOTHING, _note_retry, carry_out, running_task
from opero.testing import FakeClock, flaky
from opero.utils.async_utils import MOST_THREADS

if TYPE_CHECKING:
    from tests.tasks.conftest import Received

pytestmark = pytest.mark.internal


async def fetch(number: int) -> str:
    await asyncio.sleep(0)
    return f"data_{number}"


def upper(text: str) -> str:
    return text.upper()


class Client:
    def __init__(self, base: str = "") -> None:
        self.base = base

    def get(self, path: str) -> str:
        return self.base + path

    async def aget(self, path: str) -> str:
        return self.base + path

    @opero(cache=False, retries=1, min_delay=0)
    def guarded(self, path: str) -> str:
        return self.base + path

    def __call__(self, path: str) -> str:
        return f"called {self.base}{path}"


# --- calling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "result"),
    [
        (Task(fetch, 1), "data_1"),
        (Task(upper, "tea"), "TEA"),
        (Task(upper, text="tea"), "TEA"),
        (Task(str.upper, "tea"), "TEA"),
        (Task("a-b".split, "-"), ["a", "b"]),
        (Task(int, "ff", base=16), 255),
        (Task(functools.partial(pow, 2), 5), 32),
        (Task(functools.partial(fetch, 3)), "data_3"),
        (Task(Client("/a").get, "/b"), "/a/b"),
        (Task(Client("/a").aget, "/b"), "/a/b"),
        (Task(Client("/a").guarded, "/b"), "/a/b"),
        (Task(Client.guarded, Client("/a"), "/b"), "/a/b"),
        (Task(Client("/a"), "/b"), "called /a/b"),
        (Task(lambda *, key: key, key=1), 1),
        (Task(lambda **more: more, self=1, fn=2), {"self": 1, "fn": 2}),
        (Task(lambda: None), None),
        (Task(lambda: fetch(4)), "data_4"),
    ],
)
def test_whatever_can_be_called_is_called_and_awaited(task: Task, result: Any) -> None:
    assert run_sync(task) == result


def test_three_ways_to_run() -> None:
    async def main() -> list[str]:
        return [await Task(fetch, 1).run(), await run(Task(fetch, 2)), await Task(fetch, 3).start()]

    assert asyncio.run(main()) == ["data_1", "data_2", "data_3"]
    assert run_sync(Task(fetch, 4)) == "data_4"


def test_run_sync_works_where_a_loop_runs() -> None:
    async def main() -> str:
        result: str = run_sync(Task(fetch, 1))
        return result

    assert asyncio.run(main()) == "data_1"


def test_a_function_is_a_task_for_run() -> None:
    assert run_sync(lambda: 3) == 3


def test_a_value_is_the_first_argument_of_a_task_without_any() -> None:
    assert run_sync(Task(upper), "tea") == "TEA"


@pytest.mark.parametrize("task", [Task(upper, "own"), Task(upper, text="own"), Task(lambda: 1)])
def test_a_value_for_a_task_that_takes_none_is_refused(task: Task) -> None:
    with pytest.raises(OperoUsageError, match="takes no input"):
        run_sync(task, "tea")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Task(lambda *, key: key),
        lambda: Task(lambda first, second: 0),
        lambda: Task(upper, "a", "b"),
        lambda: Task(upper, wrong=1),
        lambda: Task(lambda: 1, 2),
    ],
)
def test_arguments_that_cannot_fit_are_refused_when_the_task_is_made(
    make: Callable[[], Task],
) -> None:
    with pytest.raises(OperoUsageError, match="cannot be called") as caught:
        make()
    assert isinstance(caught.value, TypeError)


def test_a_decorator_that_fills_in_an_argument_is_believed() -> None:
    def with_session(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def inner(*args: Any) -> Any:
            return fn(*args, "session")

        return inner

    @with_session
    def save(item: str, session: str) -> str:
        return f"{item} in {session}"

    assert run_sync(Task(save, "tea")) == "tea in session"
    assert run_sync(Task(save), "tea") == "tea in session"


@pytest.mark.parametrize("given", [3, "tea", None])
def test_what_cannot_be_called_is_no_task(given: Any) -> None:
    with pytest.raises(OperoUsageError, match=r"callable, not \w+: write Task\(fetch, url\)"):
        Task(given)


def test_a_task_in_a_task_is_refused() -> None:
    with pytest.raises(OperoUsageError, match="can run already"):
        Task(Task(upper))


def test_a_coroutine_instead_of_its_function_is_refused_with_the_fix() -> None:
    with pytest.raises(OperoUsageError, match=r"write Task\(fetch, ...\)"):
        run_sync(fetch(1))  # type: ignore[arg-type]  # that is what is wrong


# --- threads --------------------------------------------------------------------------------------


def test_a_synchronous_function_never_blocks_the_loop() -> None:
    async def main() -> bool:
        let_go = threading.Event()
        waiting = Task(let_go.wait, 10).start()
        await asyncio.sleep(0)
        let_go.set()  # the loop is free to do so
        return bool(await waiting)

    assert asyncio.run(main())


def test_a_thread_sees_the_context_and_keeps_its_changes_to_itself() -> None:
    variable = contextvars.ContextVar("variable", default="none")

    def look() -> str:
        seen = variable.get()
        variable.set("changed")
        return seen

    async def main() -> tuple[str, str]:
        variable.set("mine")
        return await Task(look).run(), variable.get()

    assert asyncio.run(main()) == ("mine", "mine")


def test_threads_are_bounded() -> None:
    busy, most = 0, 0
    lock = threading.Lock()
    let_go = threading.Event()

    def work() -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        let_go.wait(10)
        with lock:
            busy -= 1

    async def main() -> None:
        runs = [Task(work).start() for _ in range(MOST_THREADS + 8)]
        await until(lambda: busy == MOST_THREADS)
        let_go.set()
        for each in runs:
            await each

    asyncio.run(main())
    assert most == MOST_THREADS


def test_a_function_in_a_thread_may_run_tasks_although_all_threads_are_taken() -> None:
    def nested() -> str:
        result: str = run_sync(Task(upper, "tea"))
        return result

    async def main() -> list[str]:
        return [await one for one in [Task(nested).start() for _ in range(MOST_THREADS)]]

    assert asyncio.run(main()) == ["TEA"] * MOST_THREADS


def test_an_abandoned_thread_keeps_its_slot_until_it_ends() -> None:
    let_go = threading.Event()

    async def main() -> None:
        hanging = [Task(let_go.wait, 10).start() for _ in range(MOST_THREADS)]
        await asyncio.sleep(0)
        for one in hanging:
            one.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        late = Task(upper, "tea").start()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not late.done
        let_go.set()
        assert await late == "TEA"

    asyncio.run(main())


@pytest.mark.parametrize("kind", [StopIteration, KeyError, SystemExit])
def test_what_a_function_raises_in_a_thread_is_raised(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind

    # As everywhere in Python, a StopIteration cannot leave a coroutine as such.
    expected = RuntimeError if kind is StopIteration else kind
    with pytest.raises(expected):
        run_sync(Task(fail))


def test_a_slot_is_given_back_when_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(job: object) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> str:
        with monkeypatch.context() as patch:
            patch.setattr("opero.utils.threads.run_in_thread", refuse)
            for _ in range(MOST_THREADS + 1):
                with pytest.raises(RuntimeError, match="new thread"):
                    await Task(upper, "tea").run()
        result: str = await Task(upper, "tea").run()
        return result

    assert asyncio.run(main()) == "TEA"


# --- the run --------------------------------------------------------------------------------------


def test_a_run_knows_its_state_times_and_result(clock: FakeClock) -> None:
    async def slow() -> str:
        await clock.asleep(3)
        return "tea"

    async def main() -> TaskRun:
        started = Task(slow).start()
        assert started.state is TaskState.PENDING
        assert (started.started, started.seconds, started.done) == (None, None, False)
        await asyncio.sleep(0)
        assert started.state is TaskState.RUNNING
        await started
        return started

    ended = asyncio.run(main())
    assert ended.state is TaskState.SUCCEEDED
    assert (ended.result, ended.error, ended.done, ended.attempt) == ("tea", None, True, 1)
    assert ended.seconds == pytest.approx(3)
    assert repr(ended) == f"<TaskRun {ended.id} slow succeeded after 3 s>"
    assert ended.given is NOTHING


def test_a_run_that_fails_has_the_error() -> None:
    async def main() -> TaskRun:
        started = Task(flaky("never", failures=9)).start()
        with pytest.raises(ConnectionError):
            await started
        return started

    ended = asyncio.run(main())
    assert ended.state is TaskState.FAILED
    assert isinstance(ended.error, ConnectionError)
    assert ended.result is None


def test_a_cancelled_run_has_the_state_cancelled(received: Received) -> None:
    async def main() -> TaskRun:
        started = Task(asyncio.sleep, 60, name="nap").start()
        await asyncio.sleep(0)
        assert started.cancel()
        with pytest.raises(asyncio.CancelledError):
            await started
        assert not started.cancel()
        return started

    assert asyncio.run(main()).state is TaskState.CANCELLED
    assert received.states() == ["RUNNING", "CANCELLED"]
    assert isinstance(received.events[-1]["error"], asyncio.CancelledError)


def test_a_cancelled_waiter_cancels_its_run() -> None:
    async def main() -> TaskRun:
        started = Task(asyncio.sleep, 60).start()

        async def wait() -> None:
            await started

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return started

    assert asyncio.run(main()).state is TaskState.CANCELLED


def test_a_run_that_was_closed_counts_as_cancelled() -> None:
    run = TaskRun(Task(asyncio.sleep, 60))
    running = carry_out(run)

    async def main() -> None:
        running.send(None)

    asyncio.run(main())
    running.close()
    assert run.state is TaskState.CANCELLED


def test_a_run_that_was_not_started_cannot_be_awaited() -> None:
    async def main() -> None:
        await TaskRun(Task(upper, "tea"))

    with pytest.raises(OperoUsageError, match=r"start\(\)"):
        asyncio.run(main())


def test_a_run_without_a_reference_continues() -> None:
    done = []
    waited_for: weakref.WeakSet[asyncio.Event] = weakref.WeakSet()

    async def work() -> None:
        event = asyncio.Event()
        waited_for.add(event)
        await event.wait()
        done.append(1)

    async def main() -> None:
        Task(work).start()
        await until(lambda: waited_for)
        gc.collect()  # only the run holds its event
        for event in waited_for:
            event.set()
        await until(lambda: done)

    asyncio.run(main())


def test_a_definition_runs_a_hundred_times_at_once(received: Received) -> None:
    async def main() -> list[TaskRun]:
        task = Task(fetch)
        runs = [task.start(number) for number in range(100)]
        assert [await one for one in runs] == [f"data_{n}" for n in range(100)]
        return runs

    runs = asyncio.run(main())
    assert len({one.id for one in runs}) == 100
    assert [one.result for one in runs] == [f"data_{n}" for n in range(100)]
    for one in runs:
        states = [e.state.name for e in received.events if e.run_id == one.id]
        assert states == ["RUNNING", "SUCCEEDED"]


def test_the_definition_shows_the_state_of_its_last_run() -> None:
    task = Task(flaky("ok", failures=1))
    assert task.state is TaskState.PENDING
    with pytest.raises(ConnectionError):
        run_sync(task)
    assert task.state is TaskState.FAILED
    run_sync(task)
    assert task.state is TaskState.SUCCEEDED


def test_a_definition_keeps_neither_results_nor_errors() -> None:
    class Big:
        pass

    made: list[weakref.ref[Any]] = []

    def give() -> Big:
        big = Big()
        made.append(weakref.ref(big))
        return big

    task = Task(give)
    run_sync(task)
    assert made[0]() is None


# --- events ---------------------------------------------------------------------------------------


def test_events_of_tasks_read_like_dicts(received: Received) -> None:
    task = Task(upper, "tea", name="shout")
    run_sync(task)
    first, last = received.events
    assert (first["type"], first["task"], first["state"]) == ("task", task, TaskState.RUNNING)
    assert "result" not in first
    assert (last["state"], last["result"]) == (TaskState.SUCCEEDED, "TEA")
    assert first.run_id == last.run_id is not None
    assert first.parent_id is None
    assert last.seconds >= 0


def test_tasks_run_without_a_listener() -> None:
    assert not event_bus.active
    assert run_sync(Task(upper, "tea")) == "TEA"


@pytest.mark.parametrize("failing", [True, False])
def test_a_subscriber_that_raises_unsubscribes_or_is_slow_affects_no_task(
    failing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    caught_events = []

    def listen(event: Any) -> None:
        caught_events.append(event)
        if failing:
            raise RuntimeError("no")
        subscription.cancel()

    async def slow(event: Any) -> None:
        await asyncio.sleep(0.01)
        slowly.append(event.state.name)

    slowly: list[str] = []

    async def main() -> str:
        with event_bus.subscribe(slow):
            result: str = await Task(upper, "tea").run()
            await event_bus.drain()
        return result

    with event_bus.subscribe(listen) as subscription:
        assert asyncio.run(main()) == "TEA"
    assert len(caught_events) == (2 if failing else 1)
    assert slowly == ["RUNNING", "SUCCEEDED"]
    assert ("RuntimeError: no" in capsys.readouterr().err) is failing


# --- options --------------------------------------------------------------------------------------


def test_nothing_is_cached_or_retried_unless_asked_for() -> None:
    calls = []
    task = Task(calls.append, 1, options={})
    run_sync(task)
    run_sync(task)
    assert calls == [1, 1]
    once = flaky("ok", failures=1)
    with pytest.raises(ConnectionError):
        run_sync(Task(once, options={"timeout": 5}))
    assert once.calls == 1  # type: ignore[attr-defined]  # of flaky functions


@pytest.mark.parametrize(
    "kind", ["options", "decorated", "decorated with options", "decorated async"]
)
def test_retries_are_sent_as_events(kind: str, received: Received) -> None:
    function = flaky("ok", failures=2)
    if kind == "decorated async":

        async def answer() -> str:
            return "ok"

        function = opero(cache=False, retries=2, min_delay=0)(flaky(answer, failures=2))
    elif kind.startswith("decorated"):
        retries = 0 if "options" in kind else 2
        function = opero(cache=False, retries=retries, min_delay=0)(function)
    options = {"retries": 2, "min_delay": 0} if "options" in kind else None
    assert run_sync(Task(function, options=options, name="fetch")) == "ok"
    assert received.states() == ["RUNNING", "RETRYING", "RETRYING", "SUCCEEDED"]
    assert [e.attempt for e in received.events] == [1, 2, 3, 3]
    assert [type(e.error) for e in received.events[1:3]] == [ConnectionError, ConnectionError]
    assert received.events[1]["delay"] == 0
    assert len({e.run_id for e in received.events}) == 1
    assert received.events[-1].error is None


def test_retries_of_concurrent_runs_are_sent_for_each_run() -> None:
    failed: set[int] = set()

    async def fetch(number: int) -> int:
        await asyncio.sleep(0)
        if number % 2 and number not in failed:
            failed.add(number)
            raise ConnectionError
        return number

    async def main() -> list[int]:
        task = Task(fetch, options={"retries": 1, "min_delay": 0})
        runs = [task.start(number) for number in range(20)]
        await asyncio.gather(*runs)
        return [one.attempt for one in runs]

    assert asyncio.run(main()) == [1, 2] * 10


def test_a_pause_of_a_synchronous_function_holds_no_thread(clock: FakeClock) -> None:
    threads = set()

    def fetch() -> str:
        threads.add(threading.current_thread())
        return flaked()

    flaked: Callable[[], str] = flaky("ok", failures=1)

    async def main() -> None:
        task = Task(fetch, options={"retries": 1, "min_delay": 60, "max_delay": 60})
        assert await task.run() == "ok"

    asyncio.run(main())
    assert clock.elapsed == 60
    assert threading.main_thread() not in threads


def test_a_timeout_leaves_a_synchronous_function_behind() -> None:
    let_go = threading.Event()
    with pytest.raises(CallTimeoutError):
        run_sync(Task(let_go.wait, 10, options={"timeout": 0.01}))
    let_go.set()


def test_options_of_a_decorated_function_are_kept_and_its_listeners_too() -> None:
    caught_events = []
    fetch = opero(retries=1, min_delay=0, on_event=caught_events.append)(flaky("ok", failures=1))
    task = Task(fetch)
    assert [run_sync(task), run_sync(Task(fetch))] == ["ok", "ok"]
    assert fetch.stats.hits == 1
    assert {type(event).__name__ for event in caught_events} >= {"RetryScheduled", "CacheHit"}


def test_a_decorated_function_without_retries_is_called_as_it_is() -> None:
    fetch = opero(retries=0)(upper)
    assert run_sync(Task(fetch, "tea")) == "TEA"
    assert fetch.call("tea").source == "hit"
    assert run_sync(Task(fetch, "tea", options={"cache": False})) == "TEA"


def test_retry_events_outside_of_a_run_change_no_state(received: Received) -> None:
    event = RetryScheduled(function="fetch", attempt=2, delay=0)
    _note_retry(event)
    run = TaskRun(Task(upper, "tea"))

    async def main() -> None:
        running_task.set(run)
        await carry_out(run)
        running_task.set(run)
        _note_retry(event)  # a refresh in the background, for example

    asyncio.run(main())
    assert run.state is TaskState.SUCCEEDED
    assert received.states() == ["RUNNING", "SUCCEEDED"]


def test_listeners_in_options_are_kept() -> None:
    caught_events: list[Any] = []
    options = {"retries": 1, "min_delay": 0, "on_event": [caught_events.append]}
    assert run_sync(Task(flaky("ok", failures=1), options=options)) == "ok"
    assert {type(event).__name__ for event in caught_events} >= {"AttemptFailed", "RetryScheduled"}


def test_equal_tasks_share_what_listens_to_their_function() -> None:
    fetch = opero(cache=False)(upper)
    assert (
        Task(fetch, "a")._call.args[0]
        is (  # type: ignore[attr-defined]  # white box
            Task(fetch, "b")._call.args[0]  # type: ignore[attr-defined]  # white box
        )
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"retrys": 1}, "retries"), ({"retries": -1}, "retries=-1"), ([1], "must be a dict")],
)
def test_wrong_options_are_refused_when_the_task_is_made(options: Any, message: str) -> None:
    with pytest.raises(OperoUsageError, match=message):
        Task(upper, "tea", options=options)


def test_keyword_arguments_are_the_functions() -> None:
    def get(url: str, timeout: float, retries: int) -> tuple[str, float, int]:
        return url, timeout, retries

    assert run_sync(Task(get, "u", timeout=5, retries=7)) == ("u", 5, 7)


def test_functions_are_not_kept_alive_by_what_is_known_of_them() -> None:
    def made() -> Callable[[], int]:
        return lambda: 1

    function = made()
    decorated = opero(cache=False)(made())
    run_sync(Task(function))
    run_sync(Task(decorated))
    gone = weakref.ref(function), weakref.ref(decorated)
    del function, decorated
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# --- a policy put in from outside -----------------------------------------------------------------


def test_a_policy_may_be_assigned(received: Received) -> None:
    task = Task(flaky(lambda text: text.upper(), failures=2), name="fetch")
    original = task._execute_with_policies

    async def three_times() -> Any:
        for _ in range(2):
            try:
                return await original()
            except ConnectionError as error:
                event_bus.emit(
                    {"type": "task", "task": task, "state": TaskState.RETRYING, "error": error}
                )
        return await original()

    task._execute_with_policies = three_times  # type: ignore[method-assign]  # that is the point
    assert run_sync(task, "tea") == "TEA"  # an input reaches the function through the policy
    assert received.states() == ["RUNNING", "RETRYING", "RETRYING", "SUCCEEDED"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {"retries": 1, "min_delay": 0}])
def test_an_error_leaves_no_reference_cycle(options: dict[str, Any] | None) -> None:
    class OopsError(Exception):
        pass

    async def fail() -> None:
        raise OopsError

    def sync_fail() -> None:
        raise OopsError

    async def main() -> list[weakref.ref[BaseException]]:
        seen = []
        for function in (fail, sync_fail):
            try:
                await Task(function, options=options).run()
            except OopsError as error:
                seen.append(weakref.ref(error))
        return seen

    gc.disable()
    try:
        assert [ref() for ref in asyncio.run(main())] == [None, None]
    finally:
        gc.enable()


def test_an_error_without_a_waiter_leaves_no_reference_cycle() -> None:
    class OopsError(Exception):
        pass

    let_go = threading.Event()
    seen: list[weakref.ref[BaseException]] = []

    def late() -> None:
        let_go.wait(10)
        try:
            raise OopsError
        except OopsError as error:
            seen.append(weakref.ref(error))
            raise

    async def main() -> None:
        started = Task(late).start()
        await asyncio.sleep(0)
        started.cancel()
        await asyncio.wait({started.carrier})
        let_go.set()
        await until(lambda: seen and seen[0]() is None)

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_the_deadline_of_a_block_ends_a_task_without_options() -> None:
    tasks = Task(asyncio.sleep, 60), Task(threading.Event().wait, 5)
    for task in tasks:
        with deadline("10ms"), pytest.raises(DeadlineError):
            run_sync(task)
