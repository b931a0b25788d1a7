# this_file: tests/durable/test_promises.py
"""What the page promises and no other file here shows: changed programs, policies on replay, many sleepers."""

from __future__ import annotations

import _thread
import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from opero import CircuitBreaker, RateLimiter
from opero.durable import Orchestrator, activity, now, sleep, uuid, wait_for, workflow
from opero.durable.records import State, Wake
from opero.errors import IdConflictError, OperoUsageError

pytestmark = pytest.mark.internal


def until(true: Callable[[], object], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# --- decorators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [activity, workflow])
@pytest.mark.parametrize("given", [None, (), ("other",), {"name": "other"}, (None,)])
def test_decorators_come_with_and_without_parentheses_and_names(
    orchestrator: Orchestrator, make: Any, given: Any
) -> None:
    def plain(x: int) -> int:
        return x + 1

    if given is None:
        made = make(plain)
    elif isinstance(given, dict):
        made = make(**given)(plain)
    else:
        made = make(*given)(plain)
    assert made(1) == 2
    assert made.__name__ == "plain"
    named = "other" if given in (("other",), {"name": "other"}) else "plain"
    if make is workflow:
        assert orchestrator.result(orchestrator.invoke_workflow(named, 1), timeout=60) == 2
        return

    @workflow
    def caller() -> int:
        return int(made(x=1))

    found = orchestrator.invoke_workflow("caller")
    assert orchestrator.result(found, timeout=60) == 2
    assert orchestrator.steps(found)[0]["name"] == named


def test_results_of_activities_are_never_cached() -> None:
    with pytest.raises(OperoUsageError, match="takes no cache_ttl: results of activities are"):
        activity(cache_ttl=5)(lambda: 1)


# --- changed programs --------------------------------------------------------------------------------------------

OLD = """
@activity
def fetch(source):
    return [source, 1]

@workflow
def program(source):
    rows = fetch(source)
    sleep(3600)
    return rows + fetch("more")
"""

REFACTORED = '''
@activity
def fetch(source, mode="default", *, strict=False):
    """Gets rows; it has learned something since."""
    if strict:
        raise ValueError(mode)
    return [source, 2]

def pause():
    # A comment.
    sleep("1h")

@workflow
def program(source: str, limit: int | None = None) -> list:
    """The same, status differently."""
    found = fetch(source=source)   # by keyword now
    pause()
    more = fetch("more")
    return [*found, *more]
'''

CHANGED = OLD.replace("fetch(source)\n    sleep", 'fetch("other")\n    sleep')


def define(source: str) -> None:
    exec(source, {"activity": activity, "workflow": workflow, "sleep": sleep, "__name__": "shop"})


def wake(orchestrator: Orchestrator, id: str) -> None:
    """Let a workflow that sleeps for an hour go on."""
    until(lambda: orchestrator.state(id) == "sleeping")
    found = orchestrator.store.get(id)
    assert found is not None
    orchestrator.store.apply([Wake(id, found.epoch)])


def test_comments_refactoring_and_optional_parameters_change_nothing(journal: Path) -> None:
    define(OLD)
    with Orchestrator(journal) as one:
        found = one.invoke_workflow("program", "a")
        until(lambda: one.state(found) == "sleeping")
    wake(one, found)
    define(REFACTORED)
    with Orchestrator(journal) as two:
        # What was recorded stays; what comes now is done by the new code.
        assert two.result(found, timeout=60) == ["a", 1, "more", 2]
        # The same run, though the function has another parameter by now.
        assert two.invoke_workflow("program", source="a", workflow_id=found) == found


def test_a_changed_program_leaves_the_journal_untouched(journal: Path) -> None:
    define(OLD)
    with Orchestrator(journal) as one:
        found = one.invoke_workflow("program", "a")
        until(lambda: one.state(found) == "sleeping")
    wake(one, found)
    before = one.steps(found)
    define(CHANGED)
    with Orchestrator(journal) as two:
        status = two.wait(found, timeout=60)
        assert two.state(found) == "blocked"
        assert "step 1: the journal has fetch(" in status["error_message"]
        assert two.steps(found) == before
        copy = two.fork(found, 1)
        wake(two, copy)
        assert two.result(copy, timeout=60) == ["other", 1, "more", 1]
    define(OLD)
    with Orchestrator(journal) as three:
        assert three.result(found, timeout=60) == ["a", 1, "more", 1]


# --- policies ----------------------------------------------------------------------------------------------------


def test_a_replay_consumes_no_tokens_and_moves_no_breaker(orchestrator: Orchestrator) -> None:
    limiter = RateLimiter("1000/s")
    breaker = CircuitBreaker("spared", fail_max=3)
    calls: list[int] = []

    @activity(rate_limit=limiter, circuit_breaker=breaker, retries=1, min_delay=0, max_delay=0)
    def call(n: int) -> int:
        calls.append(n)
        if n == 2:
            raise ConnectionError("down")
        return n

    @workflow
    def calling() -> list[Any]:
        found: list[Any] = [call(0), call(1)]
        try:
            call(2)
        except ConnectionError:
            found.append("down")
        return found

    found = orchestrator.invoke_workflow("calling")
    assert orchestrator.result(found, timeout=60) == [0, 1, "down"]
    assert calls == [0, 1, 2, 2]
    breaker.open()
    limiter.pause(60)
    for _ in range(3):
        copy = orchestrator.fork(found, 4)
        assert orchestrator.result(copy, timeout=60) == [0, 1, "down"]
    assert calls == [0, 1, 2, 2]
    limiter.resume()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_key_is_durable_before_an_activity_gets_it(
    orchestrator: Orchestrator, blocking: bool
) -> None:
    recorded: list[str] = []

    def look() -> None:
        steps = orchestrator.steps("keyed")
        recorded.extend(step["name"] for step in steps if step["status"] == "done")

    @activity
    async def pay(key: str) -> None:
        look()

    @activity
    def pay_blocking(key: str) -> None:
        look()

    @workflow
    async def keyed() -> None:
        now()
        key = str(uuid())
        if blocking:
            pay_blocking(key)
        else:
            await pay(key)

    orchestrator.result(orchestrator.invoke_workflow("keyed", workflow_id="keyed"), timeout=60)
    assert recorded == ["now", "uuid"]


# --- timers and cancellation -------------------------------------------------------------------------------------


def test_a_thousand_sleepers_cost_few_threads(journal: Path) -> None:
    @workflow
    def dormant(n: int) -> None:
        sleep(3600)

    @workflow
    async def adormant(n: int) -> None:
        await sleep(3600)

    async def start(orchestrator: Orchestrator) -> None:
        for name in ("dormant", "adormant"):
            await asyncio.gather(*(orchestrator.ainvoke_workflow(name, n) for n in range(500)))

    before = threading.active_count()
    with Orchestrator(journal, max_workers=4) as orchestrator:
        asyncio.run(start(orchestrator))
        until(lambda: len(orchestrator.store.find(states=[State.SLEEPING])) == 1000, seconds=140)
        # The watch, the journal, the event loop, and the workers.
        assert threading.active_count() - before <= 3 + 4
        began = time.monotonic()
        assert orchestrator.stop()
        assert time.monotonic() - began < 60


def test_cancel_reaches_a_coroutine_within_a_second_and_its_finally_runs(
    journal: Path,
) -> None:
    cleaned: list[str] = []
    began = threading.Event()

    @activity
    async def endless() -> None:
        began.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append("activity")

    @activity
    async def tidy() -> None:
        await asyncio.sleep(0.01)
        cleaned.append("tidied")

    @workflow
    async def busy() -> None:
        try:
            await asyncio.gather(endless(), endless())
        finally:
            await tidy()

    # Another engine on the same journal wants it cancelled.
    with Orchestrator(journal) as runs, Orchestrator(journal) as wants:
        found = runs.invoke_workflow("busy")
        assert began.wait(60)
        asked = time.monotonic()
        assert wants.cancel(found)
        until(lambda: "tidied" in cleaned)
        assert time.monotonic() - asked < 60  # a second, on a machine that has one
        assert runs.wait(found, timeout=60)["error_message"] == "cancelled"
    assert cleaned == ["activity", "activity", "tidied"]


def test_blocking_activities_of_a_coroutine_may_run_in_threads(orchestrator: Orchestrator) -> None:
    @activity
    def blocking(n: int) -> tuple[int, bool]:
        time.sleep(0.01)
        return n, threading.current_thread() is threading.main_thread()

    @workflow
    async def threaded() -> Any:
        return await asyncio.gather(*(asyncio.to_thread(blocking, n) for n in range(5)))

    found = orchestrator.invoke_workflow("threaded")
    assert orchestrator.result(found, timeout=60) == [(n, False) for n in range(5)]
    copy = orchestrator.fork(found, 6)
    assert orchestrator.result(copy, timeout=60) == [(n, False) for n in range(5)]
    assert {s["path"] for s in orchestrator.steps(copy)} == {f"c{n}/1" for n in range(1, 6)}


# --- calls that could not be recorded -----------------------------------------------------------------------------


def in_pool(call: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, [1, 2]))


def in_thread(call: Callable[[int], object]) -> None:
    failures: list[BaseException] = []

    def target() -> None:
        try:
            in_pool(call)
        except BaseException as error:  # noqa: BLE001 - raised in the workflow
            failures.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    raise failures[0]


def in_bare_thread(call: Callable[[int], object]) -> None:
    """As `in_thread`, without the module `threading`."""
    failures: list[BaseException] = []
    over = _thread.allocate_lock()
    over.acquire()

    def target() -> None:
        try:
            call(1)
        except BaseException as error:  # noqa: BLE001 - raised in the workflow
            failures.append(error)
        over.release()

    _thread.start_new_thread(target, ())
    over.acquire(timeout=20)
    raise failures[0]


async def in_executor(call: Callable[[int], object]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, call, 1)


@pytest.mark.parametrize("how", [in_pool, in_thread, in_bare_thread, in_executor])
def test_activity_in_a_thread_that_the_workflow_has_made_is_refused(
    orchestrator: Orchestrator, how: Any
) -> None:
    ran: list[int] = []
    charge = activity("charge")(ran.append)

    if how is in_executor:

        @workflow
        async def paying() -> None:
            await how(charge)
    else:

        @workflow
        def paying() -> None:
            how(charge)

    with pytest.raises(OperoUsageError, match=r"activity charge\(\) was called in a thread"):
        orchestrator.result(orchestrator.invoke_workflow("paying"), timeout=60)
    assert ran == []


def test_activity_in_a_thread_that_outlives_its_workflow_is_refused(
    orchestrator: Orchestrator,
) -> None:
    ran: list[int] = []
    charge = activity("charge")(ran.append)
    ended = threading.Event()
    late: list[Future[None]] = []

    @workflow
    def leaving() -> None:
        pool = ThreadPoolExecutor(2)
        late.append(pool.submit(lambda: ended.wait(20) and charge(1)))
        # In the workflow's own context, which is over.
        late.append(pool.submit(copy_context().run, lambda: ended.wait(20) and charge(2)))
        pool.shutdown(wait=False)

    orchestrator.result(orchestrator.invoke_workflow("leaving"), timeout=60)
    ended.set()
    for one in late:
        assert isinstance(one.exception(timeout=60), OperoUsageError)
    assert ran == []


def test_activities_stay_plain_calls_in_threads_of_activities_and_of_the_program(
    orchestrator: Orchestrator,
) -> None:
    ran: list[int] = []
    charge = activity("charge")(ran.append)
    outer = activity("outer")(lambda: in_pool(charge))

    @workflow
    def nesting() -> None:
        outer()

    orchestrator.result(orchestrator.invoke_workflow("nesting"), timeout=60)
    in_pool(charge)
    assert ran == [1, 2, 1, 2]


@pytest.mark.parametrize("name", [*inspect.signature(Orchestrator.invoke_workflow).parameters])
def test_keywords_of_invoke_workflow_are_no_parameters_of_workflows(name: str) -> None:
    parameter = inspect.signature(Orchestrator.invoke_workflow).parameters[name]
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        made: dict[str, Any] = {}
        exec(f"def pay(amount, {name}=None): ...\ndef other(amount, {name}, /): ...", made)
        with pytest.raises(OperoUsageError, match=f"{name!r}.*another name.*by position"):
            workflow(made["pay"])
        workflow(made["other"])


def test_call_with_a_default_spelled_out_is_the_same_call(journal: Path) -> None:
    spelled = False
    calls: list[tuple[int, int]] = []

    @activity
    def charge(cents: int, tip: int = 5, *rest: int, note: str = "") -> int:
        calls.append((cents, tip))
        return cents

    @workflow
    def paying(cents: int, *, note: str = "") -> int:
        found = charge(cents, 5, note="") if spelled else charge(cents)
        wait_for("go")
        return found

    with Orchestrator(journal) as one:
        run = one.invoke_workflow("paying", 100, workflow_id="p")
        assert one.invoke_workflow("paying", cents=100, note="", workflow_id="p") == run
        with pytest.raises(IdConflictError):
            one.invoke_workflow("paying", 100, note="other", workflow_id="p")
        until(lambda: one.state(run) == "waiting")
    spelled = True
    with Orchestrator(journal) as two:
        two.signal(run, "go")
        assert two.result(run, timeout=60) == 100
    assert calls == [(100, 5)]


def test_sleepers_wake_in_time_when_a_wrong_clock_is_right_again(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opero.durable.authoring._GLANCE", 0.2)

    @workflow
    def plain() -> None:
        sleep(3)

    @workflow
    async def coroutine() -> None:
        await sleep(3)

    right = time.time
    runs = [orchestrator.invoke_workflow(name) for name in ("plain", "coroutine")]
    until(lambda: all(orchestrator.state(run) == "sleeping" for run in runs))
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: right() - 3e7)
        time.sleep(3.5)
    for run in runs:
        orchestrator.result(run, timeout=60)


def test_pause_that_began_on_a_clock_in_the_future_is_no_longer(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opero.durable.authoring._GLANCE", 0.1)

    @workflow
    async def coroutine() -> None:
        await sleep(3)

    @workflow
    def plain() -> None:
        sleep(3)

    @workflow
    def waiting() -> str:
        try:
            wait_for("answer", timeout=3)
        except TimeoutError:
            return "late"
        return "answered"

    right = time.time
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: right() + 3e7)
        runs = [orchestrator.invoke_workflow(name) for name in ("coroutine", "plain", "waiting")]
        until(lambda: all(orchestrator.state(run) in ("sleeping", "waiting") for run in runs))
    assert [orchestrator.result(run, timeout=60) for run in runs] == [None, None, "late"]
