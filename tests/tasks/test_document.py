# this_file: tests/tasks/test_document.py
"""The programs that people wrote for async_orch run with another import line, and nothing else changed."""

from __future__ import annotations

import ast
import asyncio
import inspect
import random
from typing import Any

import pytest

from opero.errors import CircuitOpenError
from opero.events import CircuitChanged, event_bus

TASKS = """
from opero.tasks import Task
import asyncio

async def fetch_data(id):
    await asyncio.sleep(0.001)
    return f"data_{id}"

task_fetch = Task(fetch_data, 1)

def process_data(data):
    return data.upper()

task_process = Task(process_data, "some_data")

def save_data(data):
    return f"saved {data}"
"""

SEQUENCE = """
from opero.tasks import Task, Sequence, event_bus, TaskState

nested_pipeline = Sequence(
    Task(fetch_data, 1, name="Fetch1"),
    Task(process_data, name="Process1"),
    Task(save_data, name="Save1"),
    name="NestedPipeline"
)
saved = await nested_pipeline.run()
"""

PARALLEL = """
from opero.tasks import Task, Parallel

results = await Parallel(
    Task(fetch_data, 10),
    Task(fetch_data, 20),
    Task(fetch_data, 30),
    limit=2,
    name="SimpleParallel"
).run()
"""

RETRIES = """
from opero.tasks import Task, TaskState, event_bus
import backoff
import asyncio

task_flaky = Task(flaky_task, name="Flaky")

def retry_policy(fn_to_wrap, task_instance):
    async def on_backoff_handler(details):
        await event_bus.emit({
            "type": "task",
            "task": task_instance,
            "state": TaskState.RETRYING,
            **details
        })

    @backoff.on_exception(
        backoff.expo,
        Exception,
        max_tries=3,
        on_backoff=lambda details: asyncio.create_task(on_backoff_handler(details))
    )
    async def wrapped_execute_with_policies():
        return await fn_to_wrap()

    return wrapped_execute_with_policies

original_execute_policies = task_flaky._execute_with_policies
task_flaky._execute_with_policies = retry_policy(original_execute_policies, task_flaky)

try:
    result = await task_flaky.run()
except Exception as e:
    failed = e
"""

CIRCUIT = """
from opero.tasks import Task, CircuitGroup

breaker_group = CircuitGroup(
    Task(fetch_data, 2, name="Fetch2"),
    Task(process_data, name="Process2"),
    fail_max=2,
    reset_timeout=10,
    name="CircuitDemo"
)
"""

EVENTS = """
from opero.tasks import event_bus
import asyncio

async def log_event(event):
    print(f"EVENT: {event}")
    logged.append(event)

subscription = event_bus.subscribe(lambda e: asyncio.create_task(log_event(e)))
"""

RUNNER = """
import opero.tasks as async_orch

outcome = await async_orch.run(my_main_workflow)
"""


async def execute(program: str, names: dict[str, Any]) -> None:
    """Execute a program that may await at its top."""
    code = compile(program, "program", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, names)
    if inspect.iscoroutine(running):
        await running


def run(*programs: str, **names: Any) -> dict[str, Any]:
    """Execute programs one after the other on an event loop; return the names that they leave."""

    async def main() -> None:
        try:
            for program in programs:
                await execute(program, names)
            await event_bus.drain()
        finally:
            if "subscription" in names:
                names["subscription"].cancel()

    asyncio.run(main())
    return names


def test_tasks_are_made() -> None:
    made = run(TASKS)
    assert repr(made["task_fetch"]) == "<Task fetch_data>"
    assert asyncio.run(made["task_fetch"].run()) == "data_1"
    assert asyncio.run(made["task_process"].run()) == "SOME_DATA"


def test_a_sequence_hands_results_on_and_returns_them_in_order() -> None:
    assert run(TASKS, SEQUENCE)["saved"] == ["data_1", "DATA_1", "saved DATA_1"]


def test_a_parallel_keeps_the_order() -> None:
    assert run(TASKS, PARALLEL)["results"] == ["data_10", "data_20", "data_30"]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses of the backoff library are drawn at random, up to seconds."""
    monkeypatch.setattr(random, "uniform", lambda low, high: low)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("failures", [2, 9])
def test_a_retry_policy_is_put_in(failures: int) -> None:
    calls = 0

    def flaky_task() -> str:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise ConnectionError(calls)
        return "recovered"

    logged: list[Any] = []
    made = run(EVENTS, RETRIES, flaky_task=flaky_task, logged=logged)
    assert calls == 3
    if failures == 2:
        assert made["result"] == "recovered"
    else:
        assert isinstance(made["failed"], ConnectionError)
    last = "SUCCEEDED" if failures == 2 else "FAILED"
    assert [e["state"].name for e in logged] == ["RUNNING", "RETRYING", "RETRYING", last]
    assert [e["tries"] for e in logged[1:3]] == [1, 2]
    assert {e["task"] for e in logged} == {made["task_flaky"]}


def test_a_circuit_opens_and_sends_an_event() -> None:
    logged: list[Any] = []
    made = run(TASKS, EVENTS, CIRCUIT, logged=logged)
    group = made["breaker_group"]
    assert asyncio.run(group.run()) == ["data_2", "DATA_2"]

    async def broken() -> None:
        raise ConnectionError

    from opero.tasks import CircuitGroup, Task

    async def fail() -> list[str]:
        group = CircuitGroup(
            Task(broken, name="Fetch2"), fail_max=2, reset_timeout=10, name="CircuitDemo"
        )
        seen = []
        for _ in range(3):
            try:
                await group.run()
            except CircuitOpenError as e:
                seen.append(f"Circuit breaker triggered: {e}")
            except Exception as e:  # noqa: BLE001 - as the program does
                seen.append(f"Other error in breaker group: {type(e).__name__}")
        return seen

    changes: list[Any] = []
    with event_bus.subscribe(changes.append, types=[CircuitChanged]):
        seen = asyncio.run(fail())
    assert seen[:2] == ["Other error in breaker group: ConnectionError"] * 2
    assert seen[2].startswith("Circuit breaker triggered: circuit 'CircuitDemo' is open")
    assert [(e["type"], e["old_state"], e["new_state"]) for e in changes] == [
        ("circuit", "closed", "open")
    ]


def test_events_reach_a_handler_that_returns_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[Any] = []
    made = run(TASKS, EVENTS, SEQUENCE, logged=logged)
    assert capsys.readouterr().out.count("EVENT: ") == 8
    assert [(e["type"], e["task"].name, e["state"].name) for e in logged] == [
        ("task", "NestedPipeline", "RUNNING"),
        ("task", "Fetch1", "RUNNING"),
        ("task", "Fetch1", "SUCCEEDED"),
        ("task", "Process1", "RUNNING"),
        ("task", "Process1", "SUCCEEDED"),
        ("task", "Save1", "RUNNING"),
        ("task", "Save1", "SUCCEEDED"),
        ("task", "NestedPipeline", "SUCCEEDED"),
    ]
    assert logged[2]["result"] == "data_1"
    assert logged[-1]["result"] == made["saved"]


def test_whatever_runs_is_run_by_one_function() -> None:
    made = run(TASKS, SEQUENCE, CIRCUIT)
    for name, result in [
        ("task_fetch", "data_1"),
        ("nested_pipeline", ["data_1", "DATA_1", "saved DATA_1"]),
        ("breaker_group", ["data_2", "DATA_2"]),
    ]:
        assert run(RUNNER, my_main_workflow=made[name])["outcome"] == result
