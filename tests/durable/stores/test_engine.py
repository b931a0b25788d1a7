# this_file: tests/durable/stores/test_engine.py
"""Workflows come out the same, whatever store is beneath the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opero.durable import Orchestrator, activity, get_registry, sleep, uuid, wait_for, workflow
from opero.errors import WorkflowEndedError


@pytest.fixture
def orchestrators(place: Any) -> Iterator[Callable[[], Orchestrator]]:
    made: list[Orchestrator] = []

    def start() -> Orchestrator:
        orchestrator = Orchestrator(store=place.store())
        orchestrator.start()
        made.append(orchestrator)
        return orchestrator

    yield start
    for orchestrator in made:
        orchestrator.stop()


@pytest.fixture(autouse=True)
def program() -> None:
    @activity
    def plus(n: int) -> int:
        return n + 1

    @activity
    async def aplus(n: int) -> int:
        await asyncio.sleep(0.001 * (n % 3))
        return n + 1

    @workflow
    def counted(n: int) -> tuple[int, ...]:
        return tuple(plus(i) for i in range(n))

    @workflow
    async def gathered(n: int) -> list[int]:
        return await asyncio.gather(*(aplus(i) for i in range(n)))

    @workflow
    def patient() -> Any:
        key = uuid()
        sleep(1.2)
        return key.version, wait_for("go")

    @workflow
    async def endless() -> None:
        await sleep(3600)


def test_workflows_run(orchestrators: Callable[[], Orchestrator]) -> None:
    one = orchestrators()
    assert one.result(one.invoke_workflow("counted", 30), 60) == tuple(range(1, 31))
    assert one.result(one.invoke_workflow("gathered", 30), 60) == list(range(1, 31))
    assert len(one.list_workflows(status="done")) == 2
    assert {w.state for w in one.store.find()} == {"done"}


def test_sleepers_and_signals(orchestrators: Callable[[], Orchestrator]) -> None:
    one, two = orchestrators(), orchestrators()
    found = one.invoke_workflow("patient")
    two.signal(found, "go", {"by": "two"})
    assert two.result(found, 60) == (4, {"by": "two"})


def test_cancelled_from_elsewhere(orchestrators: Callable[[], Orchestrator]) -> None:
    one, two = orchestrators(), orchestrators()
    found = one.invoke_workflow("endless")
    began = time.monotonic()
    two.cancel(found)
    with pytest.raises(WorkflowEndedError):
        two.result(found, 60)
    assert time.monotonic() - began < 30


def test_the_work_of_one_goes_on_in_another(
    orchestrators: Callable[[], Orchestrator], place: Any
) -> None:
    one = orchestrators()
    found = one.invoke_workflow("endless")
    assert "endless" in get_registry().workflows
    two = orchestrators()
    one.stop()
    until = time.monotonic() + 100
    while two.state(found) != "sleeping" or two.store.get(found).owner is None:  # type: ignore[union-attr]
        assert time.monotonic() < until
        time.sleep(0.01)
    assert two.cancel(found)
