# this_file: benchmarks/durable/opero_workflows.py
"""opero.durable, as installed: `synchronous=FULL`, group commit."""

from __future__ import annotations

import asyncio
from pathlib import Path

from opero.durable import Orchestrator, activity, workflow


@activity
def square(n: int) -> int:
    return n * n


@activity
async def asquare(n: int) -> int:
    return n * n


@workflow
def one(n: int) -> int:
    return square(n)


@workflow
def loop(n: int) -> int:
    return sum(square(i) for i in range(n))


@workflow
async def aloop(n: int) -> int:
    return sum([await asquare(i) for i in range(n)])


@workflow
async def fan(n: int) -> int:
    return sum(await asyncio.gather(*(asquare(i) for i in range(n))))


class Engine:
    def __init__(self, folder: Path) -> None:
        self._orchestrator = Orchestrator(folder / "opero.db")
        self._orchestrator.start()

    def sequential(self, count: int) -> None:
        for n in range(count):
            self._run("one", n)

    def sync_steps(self, count: int) -> None:
        self._run("loop", count)

    def async_steps(self, count: int) -> None:
        self._run("aloop", count)

    def gather(self, count: int) -> None:
        self._run("fan", count)

    def concurrent(self, count: int) -> None:
        """Twenty steps each."""
        started = [self._orchestrator.invoke_workflow("aloop", 20) for _ in range(count // 20)]
        for found in started:
            self._orchestrator.result(found)

    def prepare_replay(self, count: int) -> None:
        self._recorded = [self._run(name, count) for name in ("loop", "aloop", "fan")]

    def replay(self, count: int, which: int) -> None:
        """A copy of a run, of which every step is recorded."""
        orchestrator = self._orchestrator
        orchestrator.result(orchestrator.fork(self._recorded[which], count + 1))

    def _run(self, name: str, n: int) -> str:
        found = self._orchestrator.invoke_workflow(name, n)
        self._orchestrator.result(found)
        return found

    def stop(self) -> None:
        self._orchestrator.stop()
