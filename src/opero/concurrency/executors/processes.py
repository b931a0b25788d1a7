# this_file: src/opero/concurrency/executors/processes.py
"""The engine of worker processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

from opero.concurrency.executors.base import Caps
from opero.concurrency.guest import multi_pool
from opero.concurrency.lanes import LanePool
from opero.errors import OperoError

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, MapJob, Report, Why
    from opero.concurrency.start import StartMethod

__all__ = ["ProcessEngine"]

_AHEAD: Final = 1
"""Chunks for each lane that are packed before it is free, so that it never waits for one."""


class ProcessEngine:
    """Worker processes: a dead one costs the item that it was on, and an item that takes too long its worker.

    Args:
        workers: Most processes at once.
        method: How they begin; None for what is safe now.
    """

    name = "process"
    caps = Caps(remote=True, kills=True, attributes_crash=True)

    def __init__(self, workers: int, *, method: StartMethod | None = None) -> None:
        self.workers = workers
        self._method: StartMethod | None = method
        self._block: AbstractContextManager[LanePool] | None = None
        self._pool: LanePool | None = None
        self._closed = False

    def slots(self) -> int:
        """Return how many chunks it wants to hold."""
        return self.workers * (1 + _AHEAD)

    def open(self, job: MapJob) -> None:
        """Begin the processes' nursery; they themselves begin when there are chunks."""
        pool = LanePool(self.workers, job=job, method=self._method)
        try:
            pool.open()
        except BaseException:
            pool.terminate()
            pool.join()
            raise
        self._pool = pool

    def submit(self, chunk: Chunk) -> None:
        """Take a chunk."""
        self._opened().submit(chunk)

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what was reported."""
        pool = self._opened()
        if self._block is None:
            # The processes are at work by now, while twat-mp is being imported.
            block: AbstractContextManager[LanePool] = multi_pool()(
                pool_class=lambda nodes: pool, nodes=pool.nodes, debug=False
            )
            block.__enter__()
            self._block = block
        return pool.poll(timeout)

    def kill(self, chunk_id: int, why: Why) -> bool:
        """Kill the process that has a chunk."""
        return self._opened().kill(chunk_id, why)

    def wake(self) -> None:
        """Let `poll` return."""
        pool = self._pool
        if pool is not None:
            pool.wake()

    def close(self, *, graceful: bool, timeout: float) -> None:
        """End all processes."""
        block, self._block = self._block, None
        pool = self._pool
        if pool is None or self._closed:
            return
        self._closed = True
        pool.graceful, pool.patience = graceful, timeout
        if block is None:
            pool.close()
            pool.join()
        else:
            # With any other argument MultiPool only logs more.
            block.__exit__(None, None, None)

    def _opened(self) -> LanePool:
        if self._pool is None or self._closed:
            raise OperoError("the engine is not open")
        return self._pool
