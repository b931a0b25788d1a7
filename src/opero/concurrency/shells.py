# this_file: src/opero/concurrency/shells.py
"""The two shells around a map: what waits, once for threads and once for event loops.

Each turn pulls input, dispatches, hands out, and only then waits, so that nobody waits while there is
something to do.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero.concurrency.errand import arun_steps, run_steps
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.concurrency.engine import Chunk, Engine, Job, Report
    from opero.concurrency.errand import Steps
    from opero.concurrency.order import Batch
    from opero.concurrency.run import Run

__all__ = ["AsyncEngine", "abatches", "batches"]

_PULL_S: Final = 0.002
"""Seconds after which input that comes slowly has to let the rest of the map go on."""

_MOST: Final = 4096
_ASKED: Final = 256
"""Most items that a store which takes its time is asked about at once."""
_GRACE: Final = 5.0
"""Seconds that workers get to end by themselves after the last item."""


class AsyncEngine(Protocol):
    """An engine for an event loop."""

    def slots(self) -> int:
        """As in `Engine`."""
        ...

    def submit(self, chunk: Chunk) -> None:
        """As in `Engine`."""
        ...

    def open(self, job: Job) -> None:
        """As in `Engine`."""
        ...

    async def poll(self, wait: float | None) -> list[Report]:
        """As in `Engine`."""
        ...

    async def close(self, *, graceful: bool, grace: float) -> None:
        """As in `Engine`."""
        ...

    def wake(self) -> None:
        """As in `Engine`."""
        ...


class _Source:
    """Items of an iterable, in portions that do not hold up the map.

    Args:
        items: The input.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._step = 1

    def pull(self, run: Run) -> Steps[None]:
        """Pull as much as there is room for, but not for long."""
        while (room := run.room()) > 0:
            wanted = min(self._step, room)
            began = perf_counter()
            found = list(itertools.islice(self._items, wanted))
            slow = perf_counter() - began > _PULL_S
            if found:
                yield from run.admit(found)
            if len(found) < wanted:
                run.driver.ended = True
                return
            if slow:
                self._step = max(1, self._step // 4)
                return
            if perf_counter() - began > _PULL_S:
                # Not the input but a store is slow: it had better be asked about many at once.
                self._step = min(2 * self._step, _ASKED)
                return
            self._step = min(2 * self._step, _MOST)


def batches(run: Run, engine: Engine, items: Iterable[Any]) -> Iterator[Batch]:
    """Run a map and hand out what is finished; closing the iterator ends the map."""
    source = _Source(items)
    driver = run.driver
    graceful = False
    try:
        engine.open(run.plan.job)
        while True:
            run_steps(source.pull(run))
            run.dispatch()
            handed = False
            while (batch := driver.hand_out()) is not None:
                handed = True
                yield batch
            if driver.done and not handed:
                graceful = True
                return
            if handed:
                continue
            run_steps(run.absorb(_wait(run, engine)))
    finally:
        try:
            engine.close(graceful=graceful, timeout=_GRACE)
        finally:
            run_steps(run.close())


def _wait(run: Run, engine: Engine) -> list[Report]:
    if run.room() > 0:
        return engine.poll(0)
    patience = run.patience()
    if run.pausing and patience is not None:
        if patience > 0:
            ambient.clock().sleep(patience)
        return []
    return engine.poll(patience)


class _AsyncSource:
    """Items of an asynchronous iterable: a task of its own waits for them.

    Args:
        items: The input.
        engine: Whose wait ends when something has come.
    """

    def __init__(self, items: AsyncIterable[Any], engine: AsyncEngine) -> None:
        import asyncio

        self._items = items
        self._engine = engine
        self._found: list[Any] = []
        self._wanted = 0
        self._more = asyncio.Event()
        self._task = asyncio.ensure_future(self._fetch())

    async def _fetch(self) -> None:
        try:
            await self._more.wait()
            async for item in self._items:
                self._found.append(item)
                self._engine.wake()
                while len(self._found) >= self._wanted:
                    self._more.clear()
                    await self._more.wait()
        finally:
            self._engine.wake()

    def pull(self, run: Run) -> Steps[None]:
        """Take what has come; raise what the input has raised."""
        room = run.room()
        if self._found and room > 0:
            found, self._found = self._found[:room], self._found[room:]
            yield from run.admit(found)
            room -= len(found)
        self._wanted = max(room, 0)
        if self._wanted > len(self._found):
            self._more.set()
        if self._task.done() and not self._found:
            self._task.result()
            run.driver.ended = True

    async def close(self) -> None:
        """Wait for no more input."""
        import asyncio

        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # asked for, so that nobody complains that it was not


async def abatches(
    run: Run, engine: AsyncEngine, items: Iterable[Any] | AsyncIterable[Any]
) -> AsyncIterator[Batch]:
    """Run a map in an event loop, as `batches` does in a thread."""
    driver = run.driver
    graceful = False
    source: _Source | _AsyncSource | None = None
    try:
        engine.open(run.plan.job)
        later = isinstance(items, AsyncIterable)
        source = _AsyncSource(items, engine) if isinstance(items, AsyncIterable) else _Source(items)
        while True:
            await arun_steps(source.pull(run))
            run.dispatch()
            handed = False
            while (batch := driver.hand_out()) is not None:
                handed = True
                yield batch
            if driver.done and not handed:
                graceful = True
                return
            if handed:
                continue
            await arun_steps(run.absorb(await _await(run, engine, waits=later)))
    finally:
        try:
            if isinstance(source, _AsyncSource):
                await source.close()
        finally:
            try:
                await engine.close(graceful=graceful, grace=_GRACE)
            finally:
                await arun_steps(run.close())


async def _await(run: Run, engine: AsyncEngine, *, waits: bool) -> list[Report]:
    if waits:
        return await engine.poll(run.patience())
    if run.room() > 0:
        return await engine.poll(0)
    patience = run.patience()
    if run.pausing and patience is not None:
        if patience > 0:
            await ambient.clock().asleep(patience)
        return []
    return await engine.poll(patience)
