# this_file: benchmarks/durable/dbos_workflows.py
"""DBOS on SQLite, as it comes: rollback journal, `synchronous=FULL`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from dbos import DBOS


@DBOS.step()
def square(n: int) -> int:
    return n * n


@DBOS.step()
async def asquare(n: int) -> int:
    return n * n


@DBOS.workflow()
def one(n: int) -> int:
    return square(n)


@DBOS.workflow()
def loop(n: int) -> int:
    return sum(square(i) for i in range(n))


@DBOS.workflow()
async def aloop(n: int) -> int:
    return sum([await asquare(i) for i in range(n)])


@DBOS.workflow()
async def fan(n: int) -> int:
    return sum(await asyncio.gather(*(asquare(i) for i in range(n))))


class Engine:
    def __init__(self, folder: Path) -> None:
        config: Any = {
            "name": "benchmark",
            "system_database_url": f"sqlite:///{folder / 'dbos.db'}",
            "run_admin_server": False,
        }
        logging.getLogger("dbos").setLevel(logging.ERROR)
        DBOS(config=config)
        DBOS.launch()
        logging.getLogger("dbos").setLevel(logging.ERROR)

    def sequential(self, count: int) -> None:
        for n in range(count):
            one(n)

    def sync_steps(self, count: int) -> None:
        loop(count)

    def async_steps(self, count: int) -> None:
        asyncio.run(aloop(count))

    def gather(self, count: int) -> None:
        asyncio.run(fan(count))

    def concurrent(self, count: int) -> None:
        """Twenty steps each."""

        async def all_of_them() -> None:
            started = [await DBOS.start_workflow_async(aloop, 20) for _ in range(count // 20)]
            for handle in started:
                await handle.get_result()

        asyncio.run(all_of_them())

    def prepare_replay(self, count: int) -> None:
        handle = DBOS.start_workflow(loop, count)
        handle.get_result()
        self._recorded = handle.workflow_id

    def replay(self, count: int, which: int) -> None:
        if which:
            raise NotImplementedError("only the synchronous loop")
        DBOS.fork_workflow(self._recorded, count + 1).get_result()

    def stop(self) -> None:
        DBOS.destroy()
