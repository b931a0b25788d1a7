# this_file: tests/durable/test_orchestrator.py
"""Workflows run, are reported about, cancelled, resumed, forked."""

from __future__ import annotations

import asyncio
import datetime as dt
import pickle
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opero.durable import (
    Orchestrator,
    WorkflowStatus,
    activity,
    get_registry,
    now,
    random,
    sleep,
    uuid,
    wait_for,
    workflow,
)
from opero.errors import (
    DurableError,
    IdConflictError,
    OperoUsageError,
    UnknownWorkflowError,
    UnserializableError,
    WorkflowEndedError,
)
from opero.testing import capture_events, flaky

pytestmark = pytest.mark.internal


def until(true: Callable[[], object]) -> None:
    """Wait for something that other threads bring about."""
    end = time.monotonic() + 100
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# --- running -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_", [SystemExit(4), KeyboardInterrupt()], ids=repr)
def test_an_exit_in_a_coroutine_ends_its_workflow_alone(
    orchestrator: Orchestrator, exit_: BaseException
) -> None:
    @activity
    async def leave() -> None:
        raise exit_

    @workflow("leaving")
    async def leaving() -> None:
        await asyncio.gather(leave(), asyncio.sleep(0.01))

    @workflow("waiting")
    async def waiting() -> Any:
        return await wait_for("go")

    other = orchestrator.invoke_workflow("waiting")
    ended = orchestrator.wait(orchestrator.invoke_workflow("leaving"), timeout=60)
    assert type(exit_).__name__ in ended["error_message"]
    orchestrator.signal(other, "go", 7)
    assert orchestrator.result(other, timeout=60) == 7


def test_workflow_gives_its_result(orchestrator: Orchestrator) -> None:
    @activity
    def double(x: int) -> int:
        return 2 * x

    @workflow("quadruple")
    def quadruple(x: int) -> tuple[int, str]:
        return double(double(x)), "done"

    assert orchestrator.result(orchestrator.invoke_workflow("quadruple", x=3)) == (12, "done")


def test_coroutine_workflow_gives_its_result(orchestrator: Orchestrator) -> None:
    @activity("adouble")
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    @workflow()
    async def all_doubled(n: int) -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(double(i)) for i in range(n)]
        return [t.result() for t in tasks] + list(
            await asyncio.gather(*(double(i) for i in range(n)))
        )

    assert orchestrator.result(orchestrator.invoke_workflow("all_doubled", 3)) == [0, 2, 4] * 2


def test_status_has_the_keys_of_the_document(orchestrator: Orchestrator) -> None:
    @workflow("plain")
    def plain() -> dict[str, int]:
        return {"n": 1}

    found = orchestrator.wait(orchestrator.invoke_workflow("plain", workflow_id="w1"))
    assert list(found) == [
        "id", "name", "status", "current_activity", "error_message", "output", "created_at", "updated_at"
    ]  # fmt: skip
    assert (found["id"], found["name"], found["status"], found["output"]) == (
        "w1",
        "plain",
        "done",
        {"n": 1},
    )
    assert dt.datetime.fromisoformat(found["created_at"]) <= dt.datetime.fromisoformat(
        found["updated_at"]
    )


def test_running_activity_is_shown(orchestrator: Orchestrator) -> None:
    go = threading.Event()

    @activity("hold still")
    def hold() -> None:
        go.wait(60)

    @workflow
    def holding() -> None:
        hold()

    found = orchestrator.invoke_workflow("holding")
    until(lambda: orchestrator.get_workflow_status(found)["current_activity"] == "hold still")
    assert orchestrator.get_workflow_status(found)["status"] == "processing"
    go.set()
    assert orchestrator.wait(found)["status"] == "done"


def test_activity_outside_a_workflow_is_a_plain_call() -> None:
    @activity(retries=2, min_delay=0)
    def often() -> str:
        return answer()

    answer = flaky("ok", failures=2)
    assert often() == "ok"


def test_options_surround_an_activity(orchestrator: Orchestrator) -> None:
    answer = flaky("ok", failures=2)

    @activity("often", retries=3, min_delay=0)
    def often() -> Any:
        return answer()

    @workflow
    def retrying() -> Any:
        return often()

    found = orchestrator.invoke_workflow("retrying")
    assert orchestrator.result(found) == "ok"
    assert orchestrator.steps(found)[0]["attempts"] == 3


def test_what_an_activity_calls_is_no_step(orchestrator: Orchestrator) -> None:
    @activity
    def inner() -> int:
        return 1

    @activity
    def outer() -> int:
        return inner() + 1

    @workflow
    def nested() -> int:
        return outer()

    found = orchestrator.invoke_workflow("nested")
    assert orchestrator.result(found) == 2
    assert [step["name"] for step in orchestrator.steps(found)] == ["outer"]


def test_error_of_an_activity_can_be_handled(orchestrator: Orchestrator) -> None:
    @activity
    def breaks() -> None:
        raise KeyError("gone")

    @workflow
    def handling() -> str:
        try:
            breaks()
        except KeyError as error:
            return f"handled {error}"
        return "?"

    assert orchestrator.result(orchestrator.invoke_workflow("handling")) == "handled 'gone'"


def test_error_that_ends_a_workflow_keeps_its_type(orchestrator: Orchestrator) -> None:
    @activity
    def fails() -> None:
        raise FileNotFoundError(2, "no such thing")

    @workflow
    def failing() -> None:
        fails()

    found = orchestrator.invoke_workflow("failing")
    with pytest.raises(FileNotFoundError, match="no such thing") as caught:
        orchestrator.result(found)
    assert caught.value.errno == 2
    status = orchestrator.get_workflow_status(found)
    assert (status["status"], status["error_message"]) == (
        "failed", "FileNotFoundError: [Errno 2] no such thing"
    )  # fmt: skip


def test_value_that_cannot_be_kept_is_refused_in_the_first_run(orchestrator: Orchestrator) -> None:
    @activity
    def opens() -> Any:
        return {"handle": threading.Lock()}

    @workflow
    def opening() -> None:
        opens()

    found = orchestrator.invoke_workflow("opening")
    with pytest.raises(
        UnserializableError, match=r"result of opens\(\)\['handle'\] is a _thread.lock"
    ):
        orchestrator.result(found)


def test_argument_without_content_is_refused_by_name(orchestrator: Orchestrator) -> None:
    @activity
    def takes(thing: object) -> None: ...

    @workflow
    def giving() -> None:
        takes(threading.Lock())

    with pytest.raises(UnserializableError, match=r"activity takes\(\)"):
        orchestrator.result(orchestrator.invoke_workflow("giving"))


def test_no_more_synchronous_workflows_at_once_than_workers(journal: Path) -> None:
    most = 0
    running = 0
    lock = threading.Lock()

    @activity
    def crowd() -> None:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.03)
        with lock:
            running -= 1

    @workflow
    def crowded() -> None:
        crowd()

    with Orchestrator(journal, max_workers=2) as orchestrator:
        for found in [orchestrator.invoke_workflow("crowded") for _ in range(6)]:
            orchestrator.result(found)
    assert most == 2


# --- ids ---------------------------------------------------------------------------------------------------------


def test_same_id_and_arguments_are_the_same_run(orchestrator: Orchestrator) -> None:
    calls = []

    @activity
    def once(x: int) -> None:
        calls.append(x)

    @workflow
    def single(x: int) -> None:
        once(x)

    for _ in range(3):
        orchestrator.result(orchestrator.invoke_workflow("single", 1, workflow_id="one"))
    assert calls == [1]
    with pytest.raises(IdConflictError, match="other arguments"):
        orchestrator.invoke_workflow("single", 2, workflow_id="one")


def test_name_of_the_workflow_may_be_a_keyword(orchestrator: Orchestrator) -> None:
    @workflow
    def greet(name: str = "Bob") -> str:
        return f"Hello, {name}"

    assert orchestrator.result(orchestrator.invoke_workflow(name="greet"), 10) == "Hello, Bob"
    assert orchestrator.result(orchestrator.invoke_workflow("greet", name="Al"), 10) == "Hello, Al"
    with pytest.raises(TypeError, match="the name of a workflow"):
        orchestrator.invoke_workflow()


def test_unknown_names_and_ids_are_errors(orchestrator: Orchestrator) -> None:
    @workflow("billing")
    def billing() -> None: ...

    with pytest.raises(UnknownWorkflowError, match="Did you mean 'billing'"):
        orchestrator.invoke_workflow("biling")
    with pytest.raises(ValueError, match="no workflow 'biling' is registered"):
        orchestrator.invoke_workflow("biling")
    with pytest.raises(UnknownWorkflowError, match="no workflow with the id 'unknown'"):
        orchestrator.wait("unknown")
    assert orchestrator.get_workflow_status("unknown") is None


def test_registry_names_what_is_decorated_and_can_be_cleared(orchestrator: Orchestrator) -> None:
    @activity("post")
    def post() -> None: ...

    @workflow("mailing")
    def mailing() -> None: ...

    registry = get_registry()
    assert registry.activities["post"] is post
    assert registry.latest("mailing").fn is mailing
    registry.workflows.clear()
    registry.activities.clear()
    with pytest.raises(UnknownWorkflowError):
        orchestrator.invoke_workflow("mailing")


def test_status_words_are_those_of_a_status(orchestrator: Orchestrator) -> None:
    @workflow
    def quick() -> None: ...

    found = orchestrator.wait(orchestrator.invoke_workflow("quick"), 10)
    assert found["status"] == WorkflowStatus.DONE == WorkflowStatus.DONE.value == "done"
    assert type(found["status"]) is str
    assert len(orchestrator.list_workflows(status=WorkflowStatus.DONE)) == 1


def test_class_keeps_its_public_name() -> None:
    assert repr(Orchestrator("x.db")).startswith("<Orchestrator on ")
    assert pickle.loads(pickle.dumps(Orchestrator)) is Orchestrator


def test_arguments_that_do_not_fit_are_an_error_at_once(orchestrator: Orchestrator) -> None:
    @workflow("fitting")
    def fitting(x: int) -> None: ...

    with pytest.raises(TypeError, match="too many positional"):
        orchestrator.invoke_workflow("fitting", 1, 2)


def test_one_name_for_two_functions_is_an_error() -> None:
    @workflow("taken")
    def one() -> None: ...

    with pytest.raises(OperoUsageError, match="give one of them another name"):

        @workflow("taken")
        def two() -> None: ...


def test_list_can_be_narrowed(orchestrator: Orchestrator) -> None:
    @workflow("good")
    def good() -> None: ...

    @workflow("bad")
    def bad() -> None:
        raise ValueError

    for name in ("good", "bad", "good"):
        orchestrator.wait(orchestrator.invoke_workflow(name))
    assert [w["name"] for w in orchestrator.list_workflows()] == ["good", "bad", "good"]
    assert len(orchestrator.list_workflows("good")) == 2
    assert [w["name"] for w in orchestrator.list_workflows(status="failed")] == ["bad"]
    assert len(orchestrator.list_workflows(limit=1)) == 1
    with pytest.raises(OperoUsageError, match="Did you mean 'failed'"):
        orchestrator.list_workflows(status="faild")


# --- time, chance, signals ---------------------------------------------------------------------------------------


def test_facts_of_the_outside_world_are_steps(orchestrator: Orchestrator) -> None:
    @workflow
    def facts() -> Any:
        return now(), random(), uuid()

    found = orchestrator.invoke_workflow("facts")
    when, chance, drawn = orchestrator.result(found)
    assert when.tzinfo is dt.UTC
    assert 0 <= chance < 1
    assert drawn.version == 4
    assert [step["name"] for step in orchestrator.steps(found)] == ["now", "random", "uuid"]


@pytest.mark.parametrize("name", ["asks", "aasks"])
def test_signal_reaches_a_workflow_that_waits(orchestrator: Orchestrator, name: str) -> None:
    @workflow("asks")
    def asks() -> Any:
        return wait_for("answer")

    @workflow("aasks")
    async def aasks() -> Any:
        return await wait_for("answer")

    found = orchestrator.invoke_workflow(name)
    until(lambda: orchestrator.state(found) == "waiting")
    orchestrator.signal(found, "other", 1)
    orchestrator.signal(found, "answer", (4, 2))
    assert orchestrator.result(found, timeout=60) == (4, 2)


@pytest.mark.parametrize("name", ["early", "aearly"])
def test_signals_are_kept_in_order_until_they_are_asked_for(
    orchestrator: Orchestrator, name: str
) -> None:
    @workflow("early")
    def early() -> Any:
        sleep(0.05)
        return [wait_for("s"), wait_for("s")]

    @workflow("aearly")
    async def aearly() -> Any:
        await sleep(0.05)
        return [await wait_for("s"), await wait_for("s")]

    found = orchestrator.invoke_workflow(name)
    orchestrator.signal(found, "s", 1)
    orchestrator.signal(found, "s", 2)
    assert orchestrator.result(found, timeout=60) == [1, 2]


@pytest.mark.parametrize("name", ["bored", "abored"])
def test_wait_for_a_signal_can_end(orchestrator: Orchestrator, name: str) -> None:
    @workflow("bored")
    def bored() -> Any:
        try:
            wait_for("never", timeout=0.05)
        except TimeoutError as error:
            return str(error)

    @workflow("abored")
    async def abored() -> Any:
        try:
            await wait_for("never", timeout=0.05)
        except TimeoutError as error:
            return str(error)

    found = orchestrator.invoke_workflow(name)
    assert orchestrator.result(found, timeout=60) == "signal 'never' has not come in time"


def test_workflow_that_has_ended_gets_no_signal(orchestrator: Orchestrator) -> None:
    @workflow
    def brief() -> None: ...

    found = orchestrator.invoke_workflow("brief")
    orchestrator.wait(found)
    with pytest.raises(WorkflowEndedError):
        orchestrator.signal(found, "late")


def test_sleeping_workflows_take_no_threads(orchestrator: Orchestrator) -> None:
    @workflow
    def naps(seconds: float) -> str:
        sleep(seconds)
        return "up"

    before = threading.active_count()
    found = [orchestrator.invoke_workflow("naps", 3600) for _ in range(40)]
    until(lambda: len(orchestrator.list_workflows(status="sleeping")) == 40)
    assert threading.active_count() <= before + 5
    brief = [orchestrator.invoke_workflow("naps", 0.2) for _ in range(10)]
    assert {orchestrator.result(f, timeout=60) for f in brief} == {"up"}
    assert all(orchestrator.cancel(f) for f in found)


# --- stepping in -------------------------------------------------------------------------------------------------


def test_cancelled_coroutine_ends_at_once_and_cleans_up(orchestrator: Orchestrator) -> None:
    cleaned: list[str] = []

    @activity
    async def cleanup() -> None:
        cleaned.append("clean")

    @workflow
    async def endless() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await cleanup()

    found = orchestrator.invoke_workflow("endless")
    until(lambda: orchestrator.state(found) == "running")
    time.sleep(0.05)
    assert orchestrator.cancel(found)
    assert orchestrator.wait(found, timeout=60)["status"] == "failed"
    assert (orchestrator.state(found), cleaned) == ("cancelled", ["clean"])
    with pytest.raises(WorkflowEndedError, match="cancelled"):
        orchestrator.result(found)


def test_cancelled_function_ends_at_its_next_step(orchestrator: Orchestrator) -> None:
    seen: list[int] = []

    @activity
    def count(n: int) -> None:
        seen.append(n)
        time.sleep(0.01)

    @workflow
    def counting() -> None:
        for n in range(100_000):
            count(n)

    found = orchestrator.invoke_workflow("counting")
    until(lambda: len(seen) > 3)
    orchestrator.cancel(found)
    assert orchestrator.wait(found, timeout=60)["error_message"] == "cancelled"
    assert len(seen) < 10_000


def test_sleeping_workflow_can_be_cancelled(orchestrator: Orchestrator) -> None:
    @workflow
    def dormant() -> None:
        sleep(3600)

    found = orchestrator.invoke_workflow("dormant")
    until(lambda: orchestrator.state(found) == "sleeping")
    orchestrator.cancel(found)
    assert orchestrator.state(found) == "cancelled"
    assert not orchestrator.cancel(found)


def test_resumed_workflow_repeats_only_what_failed(orchestrator: Orchestrator) -> None:
    calls: list[str] = []
    shaky = flaky("ok", failures=1)

    @activity
    def first() -> None:
        calls.append("first")

    @activity
    def second() -> Any:
        calls.append("second")
        return shaky()

    @workflow
    def two_steps() -> Any:
        first()
        return second()

    found = orchestrator.invoke_workflow("two_steps")
    assert orchestrator.wait(found)["status"] == "failed"
    assert orchestrator.resume(found)
    assert orchestrator.result(found, timeout=60) == "ok"
    assert calls == ["first", "second", "second"]
    assert not orchestrator.resume(found)


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


def test_a_recorded_error_has_its_context_again_whatever_its_class_refuses(
    orchestrator: Orchestrator,
) -> None:
    caught: list[Any] = []
    shaky = activity(flaky("ok", failures=1))

    @activity
    def refuse() -> None:
        try:
            raise KeyError("behind")
        except KeyError:
            raise FrozenError(7)  # noqa: B904 - the context is what is tested

    @workflow
    def refused() -> Any:
        try:
            refuse()
        except FrozenError as error:
            caught.append((error.code, repr(error.__context__)))
        return shaky()

    found = orchestrator.invoke_workflow("refused")
    orchestrator.wait(found)
    orchestrator.resume(found)
    assert orchestrator.result(found, timeout=60) == "ok"
    assert caught == [(7, "KeyError('behind')")] * 2


def test_fork_keeps_the_steps_before(orchestrator: Orchestrator) -> None:
    calls: list[int] = []

    @activity
    def note(n: int) -> int:
        calls.append(n)
        return n

    @workflow
    def notes() -> list[int]:
        return [note(n) for n in range(4)]

    found = orchestrator.invoke_workflow("notes")
    orchestrator.wait(found)
    copy = orchestrator.fork(found, 3)
    assert orchestrator.result(copy, timeout=60) == [0, 1, 2, 3]
    assert calls == [0, 1, 2, 3, 2, 3]
    with pytest.raises(OperoUsageError, match="has steps 1 to 4"):
        orchestrator.fork(found, 9)


# --- changed programs --------------------------------------------------------------------------------------------


def test_changed_program_blocks_and_the_old_one_goes_on(journal: Path) -> None:
    changed = False
    gate = threading.Event()
    calls: list[str] = []

    @activity
    def old(n: int) -> str:
        calls.append(f"old {n}")
        return f"old {n}"

    @activity
    def wait_a_bit() -> None:
        gate.wait(60)

    @workflow
    def program() -> list[Any]:
        return [old(2 if changed else 1), wait_for("go")]

    with Orchestrator(journal) as one:
        found = one.invoke_workflow("program")
        until(lambda: one.state(found) == "waiting")
    changed = True
    with Orchestrator(journal) as two:
        two.signal(found, "go")
        status = two.wait(found, timeout=60)
        assert status["status"] == "processing"
        assert two.state(found) == "blocked"
        assert "step 1: the journal has old(" in status["error_message"]
        with pytest.raises(DurableError, match="is blocked"):
            two.result(found)
    changed = False
    with Orchestrator(journal) as three:
        assert three.result(found, timeout=60) == ["old 1", None]
    assert calls == ["old 1"]


def test_error_of_a_changed_program_cannot_be_swallowed(journal: Path) -> None:
    changed = False

    @activity
    def step(n: int) -> int:
        return n

    @workflow
    def swallowing() -> None:
        try:
            step(2 if changed else 1)
        except Exception:  # noqa: BLE001 - code that one should not write
            pass
        wait_for("go")

    with Orchestrator(journal) as one:
        found = one.invoke_workflow("swallowing")
        until(lambda: one.state(found) == "waiting")
    changed = True
    with Orchestrator(journal) as two:
        two.signal(found, "go")
        two.wait(found, timeout=60)
        assert two.state(found) == "blocked"


def test_new_optional_parameter_changes_nothing(journal: Path) -> None:
    from inspect import signature

    from opero.durable.values import Parameters

    def before(data: str) -> None: ...

    def after(data: str, mode: str = "default") -> None: ...

    then = Parameters(signature(before), "f").digest(("x",), {})
    now = Parameters(signature(after), "f")
    assert then == now.digest((), {"data": "x"})
    assert then == now.digest(("x",), {})
    assert then != now.digest(("x", "default"), {})
    assert now.matches(then, ("x", "default"), {})
    assert not now.matches(then, ("x", "other"), {})


def test_runs_are_finished_by_the_version_that_started_them(journal: Path) -> None:
    def define(version: str) -> None:
        @workflow("versioned", version=version)
        def versioned() -> str:
            wait_for("go")
            return version

    define("1")
    with Orchestrator(journal) as one:
        found = one.invoke_workflow("versioned")
        until(lambda: one.state(found) == "waiting")
        define("2")
        other = one.invoke_workflow("versioned")
        for run in (found, other):
            one.signal(run, "go")
        assert one.result(other, timeout=60) == "2"
        assert one.result(found, timeout=60) == "1"


# --- stopping ----------------------------------------------------------------------------------------------------


def test_stop_waits_for_steps_and_not_for_sleepers(journal: Path) -> None:
    done: list[str] = []
    began = threading.Event()

    @activity
    async def slow() -> None:
        began.set()
        await asyncio.sleep(0.2)
        done.append("slow")

    @workflow
    async def working() -> str:
        await slow()
        await sleep(3600)
        return "never"

    @workflow
    async def sleeping() -> None:
        await sleep(3600)

    orchestrator = Orchestrator(journal)
    orchestrator.start()
    orchestrator.invoke_workflow("sleeping")
    found = orchestrator.invoke_workflow("working")
    began.wait(60)
    assert orchestrator.stop(timeout=60)
    assert done == ["slow"]
    assert [s["status"] for s in orchestrator.steps(found)] == ["done"]
    assert orchestrator.state(found) == "queued"


def test_invoked_before_the_start_runs_after_it(journal: Path) -> None:
    @workflow
    def patient() -> str:
        return "ran"

    orchestrator = Orchestrator(journal)
    found = orchestrator.invoke_workflow("patient")
    assert orchestrator.state(found) == "queued"
    with orchestrator:
        assert orchestrator.result(found, timeout=60) == "ran"


def test_stop_leaves_no_thread_and_no_file(journal: Path) -> None:
    @workflow
    async def trace() -> None: ...

    before = threading.active_count()
    with Orchestrator(journal) as orchestrator:
        orchestrator.result(orchestrator.invoke_workflow("trace"))
    assert threading.active_count() <= before
    assert [path.name for path in journal.parent.iterdir()] == ["journal.db"]


def test_stop_ends_an_orchestrator_that_has_just_started(journal: Path) -> None:
    interval = sys.getswitchinterval()
    # Threads take turns as often as can be, so that each moment of the start meets the stop once.
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            with Orchestrator(journal):
                pass
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.asyncio
async def test_async_variants_of_invoke_and_wait(journal: Path) -> None:
    @workflow
    def increment(x: int) -> int:
        return x + 1

    @workflow
    async def slow() -> None:
        await asyncio.sleep(3600)

    async with Orchestrator(journal) as orchestrator:
        found = await asyncio.gather(
            *(orchestrator.ainvoke_workflow("increment", n) for n in range(10))
        )
        assert await asyncio.gather(*map(orchestrator.aresult, found)) == list(range(1, 11))
        assert (await orchestrator.await_workflow(found[0]))["status"] == "done"
        slow = await orchestrator.ainvoke_workflow("slow")
        with pytest.raises(TimeoutError):
            await orchestrator.aresult(slow, 0.05)


@pytest.mark.asyncio
async def test_async_variants_of_operations(journal: Path) -> None:
    @workflow
    async def asking() -> Any:
        return await wait_for("answer")

    orchestrator = Orchestrator(journal)
    await orchestrator.astart()
    found = await orchestrator.ainvoke_workflow("asking")
    assert (await orchestrator.aget_workflow_status(found))["status"] == "processing"
    assert len(await orchestrator.alist_workflows("asking", "processing", 5)) == 1
    await orchestrator.asignal(found, "answer", 42)
    assert await orchestrator.aresult(found, 10) == 42
    assert await orchestrator.astate(found) == "done"
    assert [s["status"] for s in await orchestrator.asteps(found)] == ["done"]
    again = await orchestrator.afork(found, 1, workflow_id_new="again")
    assert await orchestrator.acancel(again)
    assert (await orchestrator.await_workflow(again, 10))["error_message"] == "cancelled"
    assert await orchestrator.aresume(again)
    with pytest.raises(OperoUsageError, match="not in doubt"):
        await orchestrator.aresolve(again, "1", again=True)
    assert await orchestrator.astop(10)


@pytest.mark.asyncio
async def test_cancelled_invocation_leaves_a_workflow_that_runs_or_none(journal: Path) -> None:
    @workflow
    def short(n: int) -> int:
        return n

    async with Orchestrator(journal) as orchestrator:
        for n in range(20):
            invoking = asyncio.ensure_future(
                orchestrator.ainvoke_workflow("short", n, workflow_id=str(n))
            )
            for _ in range(n % 3):
                await asyncio.sleep(0)
            invoking.cancel()
            await asyncio.wait([invoking])
        await orchestrator.ainvoke_workflow("short", 20, workflow_id="20")
        for found in await orchestrator.alist_workflows():
            assert await orchestrator.aresult(found["id"], 20) == int(found["id"])


def test_each_operation_has_an_async_variant() -> None:
    plain = {name for name in dir(Orchestrator) if not name.startswith(("_", "a"))}
    plain -= {"await_workflow", "store"}
    twins = {"await_workflow" if name == "wait" else f"a{name}" for name in plain}
    assert twins - set(dir(Orchestrator)) == set()


# --- events ------------------------------------------------------------------------------------------------------


def test_listeners_get_events_of_workflows_and_steps(orchestrator: Orchestrator) -> None:
    @activity("step one")
    def one() -> int:
        return 1

    @workflow("watched")
    def watched() -> int:
        return one()

    with capture_events() as received:
        found = orchestrator.invoke_workflow("watched")
        orchestrator.wait(found)
        until(
            lambda: str(received[-1].get("state")) == "done" and received[-1]["type"] == "workflow"
        )
    reported = [(e["type"], e.name, str(e["state"])) for e in received if "workflow_id" in e]
    assert reported == [
        ("workflow", "watched", "running"),
        ("step", "step one", "started"),
        ("step", "step one", "done"),
        ("workflow", "watched", "done"),
    ]
    assert {e["workflow_id"] for e in received if "workflow_id" in e} == {found}
