# this_file: tests/durable/test_races.py
"""Which of several steps was first is the same in a replay."""

from __future__ import annotations

import asyncio
import random as chance
from pathlib import Path
from typing import Any

import pytest

from opero.durable import Orchestrator, activity, sleep, wait_for, workflow


@pytest.fixture
def draw() -> chance.Random:
    return chance.Random(3)


def replayed(orchestrator: Orchestrator, name: str, *args: Any) -> tuple[Any, Any]:
    """Run a workflow, then a copy of which every step is recorded; return both results."""
    found = orchestrator.invoke_workflow(name, *args)
    first = orchestrator.result(found, timeout=60)
    steps = orchestrator.steps(found)
    copy = orchestrator.fork(found, len(steps) + 1)
    return first, orchestrator.result(copy, timeout=60)


@pytest.fixture
def racers(draw: chance.Random) -> None:
    @activity
    async def run(name: str) -> str:
        if draw.random() < 0.7:
            await asyncio.sleep(draw.uniform(0, 0.004))
        return name

    @workflow
    async def first_wins(n: int) -> list[Any]:
        tasks = {asyncio.create_task(run(f"r{i}"), name=f"r{i}") for i in range(n)}
        seen = []
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            seen.append(sorted(task.get_name() for task in done))
        return seen

    @workflow
    async def as_completed(n: int) -> list[str]:
        async def branch(i: int) -> str:
            one = await run(f"{i}a")
            if i % 3 == 0:
                await sleep(0.001)
            return f"{one} {await run(f'{i}b')}"

        tasks = [asyncio.create_task(branch(i)) for i in range(n)]
        return [await found for found in asyncio.as_completed(tasks)]

    @workflow
    async def shared_list(n: int) -> list[str]:
        order: list[str] = []

        async def branch(i: int) -> None:
            order.append(await run(f"{i}"))

        await asyncio.gather(*(branch(i) for i in range(n)))
        return order


@pytest.mark.usefixtures("racers")
@pytest.mark.parametrize("name", ["first_wins", "as_completed", "shared_list"])
def test_replay_keeps_the_order_of_a_race(orchestrator: Orchestrator, name: str) -> None:
    for _ in range(10):
        first, again = replayed(orchestrator, name, 12)
        assert again == first


@pytest.mark.usefixtures("racers")
def test_races_of_workflows_beside_each_other_keep_their_order(orchestrator: Orchestrator) -> None:
    found = [orchestrator.invoke_workflow("first_wins", 12) for _ in range(20)]
    first = [orchestrator.result(f, timeout=60) for f in found]
    copies = [orchestrator.fork(f, 13) for f in found]
    assert [orchestrator.result(copy, timeout=60) for copy in copies] == first


def test_winner_stays_the_winner_though_the_loser_was_recorded_too(journal: Path) -> None:
    decided = asyncio.Event()

    @activity
    async def quick() -> str:
        await asyncio.sleep(0.01)
        return "quick"

    @activity
    async def slow() -> str:
        await decided.wait()
        return "slow"

    @workflow
    async def race() -> list[str]:
        # The slow one comes first in the program.
        tasks = [asyncio.create_task(slow()), asyncio.create_task(quick())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        winners = [task.result() for task in done]
        decided.set()
        await asyncio.wait(tasks)
        await wait_for("go")
        return winners

    with Orchestrator(journal) as one:
        found = one.invoke_workflow("race")
        while one.state(found) != "waiting":
            pass
    with Orchestrator(journal) as two:
        two.signal(found, "go")
        assert two.result(found, timeout=60) == ["quick"]


def test_tasks_that_a_workflow_leaves_behind_are_ended(orchestrator: Orchestrator) -> None:
    cleaned: list[str] = []

    @workflow
    async def careless() -> str:
        async def forgotten() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                cleaned.append("clean")

        forgetting = asyncio.create_task(forgotten())
        await asyncio.sleep(0)
        return "done" if not forgetting.done() else "?"

    found = orchestrator.invoke_workflow("careless")
    assert orchestrator.result(found, timeout=60) == "done"
    assert cleaned == ["clean"]
