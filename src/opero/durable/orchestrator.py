# this_file: src/opero/durable/orchestrator.py
"""`Orchestrator`: starts workflows, tells how they are, and steps in where they need it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from opero.durable.engine import Engine
from opero.durable.invocation import new_run, same_run
from opero.durable.records import Create
from opero.durable.stores.sqlite import SqliteStore
from opero.durable.twins import Twins
from opero.durable.waiting import asettle, outcome, settle
from opero.errors import OperoUsageError
from opero.utils.units import Duration, parse_seconds

if TYPE_CHECKING:
    from opero.durable.store import Store

__all__ = ["Orchestrator"]


class Orchestrator(Twins):
    """Runs workflows, and goes on with them after a crash.

    Activities run at least once; a recorded result is never computed again.

    Args:
        db_path: The journal, an SQLite file; several orchestrators and processes of one host may
            share it.
        max_workers: Most synchronous workflows at once; each takes a thread while it runs.
            Coroutines take none.
        store: Another place for the journal, instead of `db_path`.
        max_recoveries: A workflow under which its process has died this many times in a row, without
            another step, is dead.

    Raises:
        OperoUsageError: A value cannot work.

    Example:
        >>> import tempfile, os
        >>> from opero.durable import Orchestrator, activity, workflow
        >>> @activity
        ... def double(x): return 2 * x
        >>> @workflow
        ... def quadruple(x): return double(double(x))
        >>> with tempfile.TemporaryDirectory() as folder, Orchestrator(os.path.join(folder, "w.db")) as o:
        ...     o.result(o.invoke_workflow("quadruple", 3))
        12
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] = "opero.db",
        max_workers: int = 5,
        *,
        store: Store | None = None,
        max_recoveries: int = 10,
    ) -> None:
        for name, value in (("max_workers", max_workers), ("max_recoveries", max_recoveries)):
            if type(value) is not int or value < 1:
                raise OperoUsageError(f"{name}={value!r} must be a whole number from 1.")
        super().__init__(SqliteStore(db_path) if store is None else store)
        self._max_workers = max_workers
        self._max_recoveries = max_recoveries

    # --- running ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run workflows: those that were interrupted, those that wait, and new ones.

        Raises:
            JournalError: The journal cannot be used.
        """
        with self._lock:
            if self._engine is None:
                self.store.open()
                self._engine = Engine(self.store, self._max_workers, self._max_recoveries)

    def stop(self, timeout: Duration | None = None) -> bool:
        """Wait for the steps that are running, and let go of everything else; others may go on with it.

        Args:
            timeout: Longest wait for them, as a duration; None waits as long as they take.

        Returns:
            Whether all have ended. What has not goes on in its thread until this process ends.
        """
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is None:
            self.store.close()
            return True
        clean = engine.stop(None if timeout is None else parse_seconds(timeout, "timeout"))
        if clean:
            self.store.close()
        return clean

    async def astart(self) -> None:
        """Do what `start` does, without blocking the event loop."""
        await asyncio.to_thread(self.start)

    async def astop(self, timeout: Duration | None = None) -> bool:  # noqa: ASYNC109 - as in the synchronous twin
        """Do what `stop` does, without blocking the event loop."""
        return await asyncio.to_thread(self.stop, timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.astop()

    def invoke_workflow(
        self, name: str, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Start a workflow and return its id, once it is written down.

        Args:
            name: Its name.
            args: Arguments of its function.
            workflow_id: Its identity; the same id with the same arguments is the same run, so that
                starting it again starts nothing. None draws one.
            kwargs: More arguments.

        Raises:
            UnknownWorkflowError: No such workflow is registered.
            TypeError: The arguments do not fit.
            UnserializableError: The journal cannot keep one of them.
            IdConflictError: The id belongs to a run with another name or other arguments.
            JournalError: It could not be written.
        """
        spec, record = new_run(name, args, kwargs, workflow_id)
        engine = self._engine
        found = self._apply(Create(record)) if engine is None else engine.create(record, spec)
        return same_run(record, found)

    async def ainvoke_workflow(
        self, name: str, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Do what `invoke_workflow` does, without blocking the event loop."""
        spec, record = new_run(name, args, kwargs, workflow_id)
        engine = self._engine
        if engine is None:
            found = await asyncio.to_thread(self._apply, Create(record))
        else:
            found = await engine.acreate(record, spec)
        return same_run(record, found)

    # --- waiting ----------------------------------------------------------------------------------------------------

    def wait(self, workflow_id: str, timeout: Duration | None = None) -> dict[str, Any]:
        """Wait until a workflow has ended, or can go on only with somebody's help; return its status.

        Args:
            workflow_id: Its id.
            timeout: Longest wait, as a duration; None waits as long as it takes.

        Returns:
            As `get_workflow_status`. A workflow that is blocked or in doubt is still "processing",
            and its `error_message` says what it needs.

        Raises:
            TimeoutError: It has not ended in time.
            UnknownWorkflowError: There is no such workflow.
        """
        return self._status(settle(workflow_id, timeout, self._record, self._listen))

    def result(self, workflow_id: str, timeout: Duration | None = None) -> Any:
        """Wait for a workflow's end and return its result, or raise the error that it has ended with.

        Raises:
            Exception: What its function raised.
            WorkflowEndedError: It was cancelled, or given up.
            DurableError: It can go on only with somebody's help; the message says which.
            TimeoutError: It has not ended in time.
            UnknownWorkflowError: There is no such workflow.
        """
        return outcome(settle(workflow_id, timeout, self._record, self._listen))

    async def await_workflow(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in the synchronous twin
    ) -> dict[str, Any]:
        """Do what `wait` does, without blocking the event loop."""
        return self._status(await asettle(workflow_id, timeout, self._record, self._listen))

    async def aresult(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in the synchronous twin
    ) -> Any:
        """Do what `result` does, without blocking the event loop."""
        return outcome(await asettle(workflow_id, timeout, self._record, self._listen))

    def _listen(self, workflow_id: str, tell: Callable[[], object]) -> bool:
        engine = self._engine
        return engine is not None and engine.on_end(workflow_id, tell)

    def __repr__(self) -> str:
        return f"<Orchestrator on {self.store!r}, {'running' if self._engine else 'stopped'}>"
