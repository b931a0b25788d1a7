# this_file: tests/durable/test_groups.py
"""Maps and parallel groups within workflows: items and branches are recorded, and done once."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opero import operomap
from opero.durable import Orchestrator, activity, uuid, workflow
from opero.errors import UnserializableError
from opero.testing import flaky
from opero.utils.ambient import fork

pytestmark = pytest.mark.internal

Start = Callable[..., subprocess.Popen[str]]


def replayed(orchestrator: Orchestrator, name: str, *args: Any) -> tuple[Any, Any]:
    """Run a workflow, then a copy of which every step is recorded; return both results."""
    found = orchestrator.invoke_workflow(name, *args)
    first = orchestrator.result(found, timeout=60)
    copy = orchestrator.fork(found, len(orchestrator.steps(found)) + 1)
    return first, orchestrator.result(copy, timeout=60)


# --- maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "thread", "process"])
def test_items_of_a_map_are_steps(orchestrator: Orchestrator, mode: Any) -> None:
    calls: list[int] = []

    @operomap(cache=False, mode=mode, workers=3)
    def double(n: int) -> tuple[int]:
        calls.append(n)
        return (2 * n,)

    @workflow
    def mapped(n: int) -> list[tuple[int]]:
        return double(range(n))

    assert replayed(orchestrator, "mapped", 50) == ([(2 * n,) for n in range(50)],) * 2
    assert sorted(calls) == list(range(50))
    (_, found) = orchestrator.list_workflows()
    steps = orchestrator.steps(found["id"])
    assert {step["path"] for step in steps} == {f"1/{n}" for n in range(50)}
    assert {step["status"] for step in steps} == {"done"}


def test_items_of_an_asynchronous_map_are_steps(orchestrator: Orchestrator) -> None:
    calls: list[int] = []

    @operomap(cache=False, workers=10, progress=False)
    async def double(n: int) -> int:
        calls.append(n)
        await asyncio.sleep(0.001 * (n % 3))
        return 2 * n

    @workflow
    async def amapped(n: int) -> list[Any]:
        both = await asyncio.gather(double(range(n)), double(range(n, 2 * n)))
        return [*both, [one async for one in double.stream(range(3))]]

    right = [[2 * i for i in range(30)], [2 * i for i in range(30, 60)], [0, 2, 4]]
    assert replayed(orchestrator, "amapped", 30) == (right, right)
    assert len(calls) == 63


def test_steps_within_items_are_recorded_too(orchestrator: Orchestrator) -> None:
    calls: Counter[str] = Counter()

    @activity
    def fetch(n: int) -> str:
        calls["fetch"] += 1
        return f"{n}-{calls['fetch']}"

    shaky = flaky("ok", failures=3)

    @operomap(cache=False, retries=5, min_delay=0, max_delay=0)
    def both(n: int) -> tuple[Any, ...]:
        return fetch(n), uuid(), shaky()

    @workflow
    def nested() -> list[Any]:
        return both([1, 2, 3])

    first, again = replayed(orchestrator, "nested")
    assert first == again
    assert calls["fetch"] == 6


def test_failed_item_ends_the_workflow_and_is_done_again_when_that_is_resumed(
    orchestrator: Orchestrator,
) -> None:
    down = True
    calls: list[int] = []

    @operomap(cache=False, retries=0, workers=1)
    def odd(n: int) -> int:
        calls.append(n)
        if n == 3 and down:
            raise ConnectionError("down")
        return n

    @workflow
    def failing() -> list[int]:
        return odd(range(6))

    found = orchestrator.invoke_workflow("failing")
    with pytest.raises(ConnectionError, match="down"):
        orchestrator.result(found, timeout=60)
    down = False
    assert orchestrator.resume(found)
    assert orchestrator.result(found, timeout=60) == list(range(6))
    assert Counter(calls)[3] == 2
    assert {calls.count(n) for n in (0, 1, 2)} == {1}


def test_errors_that_a_map_returns_are_recorded(orchestrator: Orchestrator) -> None:
    @operomap(cache=False, retries=0, on_error="return")
    def risky(n: int) -> int:
        return 10 // n

    @workflow
    def returned() -> list[str]:
        return [type(found).__name__ for found in risky([1, 0])]

    assert replayed(orchestrator, "returned") == (["int", "ZeroDivisionError"],) * 2


def test_changed_items_block_the_workflow(orchestrator: Orchestrator) -> None:
    extra = 0

    @operomap(cache=False)
    def same(n: int) -> int:
        return n

    @workflow
    def changing() -> list[int]:
        return same([1, 2 + extra])

    found = orchestrator.invoke_workflow("changing")
    orchestrator.result(found, timeout=60)
    extra = 1
    copy = orchestrator.fork(found, 3)
    status = orchestrator.wait(copy, timeout=60)
    assert orchestrator.state(copy) == "blocked"
    assert "step 1/1" in status["error_message"]


def test_result_of_an_item_that_cannot_be_kept_is_refused(orchestrator: Orchestrator) -> None:
    @operomap(cache=False)
    def handle(n: int) -> Any:
        return object()

    @workflow
    def handles() -> None:
        handle([1])

    with pytest.raises(UnserializableError, match="for item 0"):
        orchestrator.result(orchestrator.invoke_workflow("handles"), timeout=60)


def test_map_within_an_activity_is_no_part_of_the_workflow(orchestrator: Orchestrator) -> None:
    @operomap(cache=False, mode="thread")
    def double(n: int) -> int:
        return 2 * n

    @activity
    def total(n: int) -> int:
        return sum(double(range(n)))

    @workflow
    def outer() -> int:
        return total(4)

    found = orchestrator.invoke_workflow("outer")
    assert orchestrator.result(found, timeout=60) == 12
    assert [step["name"] for step in orchestrator.steps(found)] == ["total"]


def test_a_stop_ends_a_map_and_the_next_start_goes_on_with_it(journal: Path) -> None:
    calls: Counter[int] = Counter()

    @operomap(cache=False, workers=2, mode="thread")
    def slow(n: int) -> int:
        calls[n] += 1
        time.sleep(0.02)
        return n

    @workflow
    def long_map() -> list[int]:
        return slow(range(300))

    with Orchestrator(journal) as one:
        found = one.invoke_workflow("long_map")
        while len(calls) < 10:
            time.sleep(0.01)
    assert len(calls) < 300
    with Orchestrator(journal) as two:
        assert two.result(found, timeout=60) == list(range(300))
    assert sum(calls.values()) <= 300 + 8


DURABLE_MAP = """
import os, sys, time
from opero import operomap
from opero.durable import Orchestrator, workflow

notes = os.open("notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@operomap(cache=False, workers=4)
def work(n):
    os.write(notes, b"%d\\n" % n)
    if n % 10 == 0:
        time.sleep(0.002)
    return n + 1

@workflow
def everything(n):
    return sum(work(range(n)))

if __name__ == "__main__":
    with Orchestrator("journal.db") as orchestrator:
        print(orchestrator.result(orchestrator.invoke_workflow("everything", 3000, workflow_id="w")), flush=True)
"""


def test_a_killed_map_goes_on_where_it_stopped(program: Start, tmp_path: Path) -> None:
    def count() -> int:
        notes = tmp_path / "notes"
        return len(notes.read_text().split()) if notes.exists() else 0

    for reached in (300, 1500):
        process = program(DURABLE_MAP)
        while count() < reached:
            time.sleep(0.005)
        process.kill()
        process.wait()
    printed, _ = program(DURABLE_MAP).communicate(timeout=100)
    assert printed == f"{sum(range(1, 3001))}\n"
    ran = Counter((tmp_path / "notes").read_text().split())
    assert len(ran) == 3000
    # What a kill finds under way, or done and not yet written down, is done again: never all of it.
    assert sum(ran.values()) < 3000 + 1500


# --- parallel groups ---------------------------------------------------------------------------------------------


async def side_by_side(*jobs: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run jobs as branches of a group, as `opero.tasks.Parallel` does."""
    begin = fork.get()
    assert begin is not None
    branches = begin()

    async def run(job: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return await job()

    tasks = []
    for index, job in enumerate(jobs):
        context = copy_context()
        context.run(branches.enter, index)
        tasks.append(asyncio.get_running_loop().create_task(run(job), context=context))
    return await asyncio.gather(*tasks)


def test_branches_of_a_group_have_lines_of_their_own(orchestrator: Orchestrator) -> None:
    calls: list[str] = []

    @activity
    async def step(name: str, n: int) -> str:
        calls.append(f"{name}{n}")
        await asyncio.sleep(0.001 * (3 - n))
        return f"{name}{n}"

    @activity
    async def inner() -> int:
        return sum(await side_by_side(one, two))

    async def one() -> int:
        return 1

    async def two() -> int:
        return 2

    async def two_steps(n: int) -> list[str]:
        return [await step("a", n), await step("b", n)]

    @workflow
    async def grouped() -> Any:
        first = await side_by_side(*(partial(two_steps, n) for n in range(3)))
        return first, await inner(), await step("c", 0)

    right = ([[f"a{n}", f"b{n}"] for n in range(3)], 3, "c0")
    assert replayed(orchestrator, "grouped") == (right, right)
    assert len(calls) == 7
    found = orchestrator.list_workflows()[-1]
    paths = {step["path"] for step in orchestrator.steps(found["id"])}
    # The group is the first step of its line, a branch's task the first child of the branch.
    assert paths == {f"1/{n}/c1/{s}" for n in range(3) for s in (1, 2)} | {"2", "3"}
