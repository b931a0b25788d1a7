# this_file: benchmarks/durable/py_orchestrate_workflows.py
"""py-orchestrate, which knows synchronous workflows only and is asked how they are."""

from __future__ import annotations

import time
from pathlib import Path

from py_orchestrate import Orchestrator, activity, workflow


@activity("square")
def square(n: int) -> int:
    return n * n


@workflow("one")
def one(n: int) -> int:
    return square(n)


@workflow("loop")
def loop(n: int) -> int:
    return sum(square(i) for i in range(n))


class Engine:
    def __init__(self, folder: Path) -> None:
        self._orchestrator = Orchestrator(str(folder / "py_orchestrate.db"))
        self._orchestrator.start()

    def sequential(self, count: int) -> None:
        for n in range(count):
            self._wait(self._orchestrator.invoke_workflow("one", n=n))

    def sync_steps(self, count: int) -> None:
        self._wait(self._orchestrator.invoke_workflow("loop", n=count))

    def concurrent(self, count: int) -> None:
        """Twenty steps each."""
        invoke = self._orchestrator.invoke_workflow
        for found in [invoke("loop", n=20) for _ in range(count // 20)]:
            self._wait(found)

    def _wait(self, workflow_id: str) -> None:
        while self._orchestrator.get_workflow_status(workflow_id)["status"] == "processing":
            time.sleep(0.001)

    def stop(self) -> None:
        self._orchestrator.stop()
