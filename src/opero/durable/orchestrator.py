# this_file: src/opero/durable/orchestrator.py
"""Start workflows, run them, and wait for their ends: what users know as `opero.durable.Orchestrator`."""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
import warnings
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self

from opero.durable.decorators import get_registry
from opero.durable.engine import Engine
from opero.durable.operations import SETTLED, Operations, in_thread_of, outcome_of
from opero.durable.records import Create, JournalStore, WorkflowRecord
from opero.durable.sqlite_store import SqliteStore
from opero.durable.values import encode
from opero.errors import IdConflictError, OperoUsageError, OperoWarning
from opero.utils.steps import BlockingStep, StepLogic, in_thread, run_async, run_sync
from opero.utils.units import Duration, parse_seconds

_GLANCE: Final = 0.25
"""Longest pause between two looks at a workflow that another process runs."""


class DurableOrchestrator(Operations):
    """Run workflows, and go on with them after a crash.

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
        store: JournalStore | None = None,
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
        """Start to run workflows: those that were interrupted, those that are due, and new ones.

        Raises:
            JournalError: The journal cannot be used.
        """
        with self._lock:
            if self._engine is None:
                self.store.open()
                self._engine = Engine(self.store, self._max_workers, self._max_recoveries)

    def stop(self, timeout: Duration | None = None) -> bool:
        """Wait for the steps that are running, and free all workflows, so that other engines can take them over.

        Args:
            timeout: Longest wait for them, as a duration; None waits as long as they take.

        Returns:
            Whether all have ended. Steps that have not go on in their threads until this process ends.
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

    astart: Final = in_thread_of(start)
    astop: Final = in_thread_of(stop)

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
        self, name: str | None = None, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Start a workflow and return its id, once it is recorded.

        Args:
            name: Its name, which may also be given as `name=` if no argument is given by position.
            args: Arguments of its function.
            workflow_id: Its identity; the same id with the same arguments is the same run, so that
                starting it again starts nothing. None draws one at random.
            kwargs: More arguments.

        Raises:
            UnknownWorkflowError: No such workflow is registered.
            TypeError: The arguments do not fit.
            UnserializableError: The journal cannot keep one of them.
            IdConflictError: The id belongs to a run with another name or other arguments.
            JournalError: It could not be written.
        """
        return run_sync(self._invoke(name, args, kwargs, workflow_id))

    async def ainvoke_workflow(
        self, name: str | None = None, /, *args: Any, workflow_id: str | None = None, **kwargs: Any
    ) -> str:
        """Do what `invoke_workflow` does, without blocking the event loop."""
        return await run_async(self._invoke(name, args, kwargs, workflow_id))

    def _invoke(
        self,
        name: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        workflow_id: str | None,
    ) -> StepLogic[str]:
        if name is None:
            name = kwargs.pop("name", None)
        if not isinstance(name, str):
            raise TypeError(f"invoke_workflow(): the name of a workflow is a str, not {name!r}.")
        spec = get_registry().latest(name)
        record = WorkflowRecord(
            id=workflow_id or str(uuid.uuid4()),
            name=name,
            version=spec.version,
            args=encode((args, kwargs), f"arguments of workflow {name}()"),
            hash=spec.parameters.digest(args, kwargs),
        )
        engine = self._engine
        if engine is None:
            found = yield in_thread(partial(self._apply, Create(record)))
        else:
            found = yield from engine.create(record, spec)
        if found.name != name or (
            found.hash != record.hash and not spec.parameters.matches(found.hash, args, kwargs)
        ):
            raise IdConflictError(
                f"workflow id {record.id!r} belongs to a run of {found.name!r}"
                f"{'' if found.name != name else ' with other arguments'}."
            )
        return record.id

    # --- waiting ----------------------------------------------------------------------------------------------------

    def wait(self, workflow_id: str, timeout: Duration | None = None) -> dict[str, Any]:
        """Wait until a workflow has ended, or can go on only with help from outside; return its status.

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
        return self._status(run_sync(self._settle(workflow_id, timeout)))

    def result(self, workflow_id: str, timeout: Duration | None = None) -> Any:
        """Wait for a workflow's end and return its result, or raise the error that it has ended with.

        Raises:
            Exception: What its function raised.
            WorkflowEndedError: It was cancelled, or given up.
            DurableError: It can go on only with help from outside; the message says which.
            TimeoutError: It has not ended in time.
            UnknownWorkflowError: There is no such workflow.
        """
        return outcome_of(run_sync(self._settle(workflow_id, timeout)))

    async def await_workflow(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `wait`
    ) -> dict[str, Any]:
        """Do what `wait` does, without blocking the event loop."""
        return self._status(await run_async(self._settle(workflow_id, timeout)))

    async def aresult(
        self,
        workflow_id: str,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `result`
    ) -> Any:
        """Do what `result` does, without blocking the event loop."""
        return outcome_of(await run_async(self._settle(workflow_id, timeout)))

    def _settle(self, workflow_id: str, timeout: Duration | None) -> StepLogic[WorkflowRecord]:
        """Return a workflow's record once it is settled."""
        until = (
            math.inf if timeout is None else time.monotonic() + parse_seconds(timeout, "timeout")
        )
        pause, warned = 0.01, False
        while True:
            ended: Future[None] = Future()
            engine = self._engine
            here = engine is not None and engine.on_end(
                workflow_id, partial(ended.set_result, None)
            )
            record: WorkflowRecord = yield in_thread(partial(self._record, workflow_id))
            if record.state in SETTLED:
                return record
            if record.error and not warned:
                warned = True
                warnings.warn(
                    f"workflow {workflow_id!r} waits: {record.error}", OperoWarning, stacklevel=4
                )
            left = until - time.monotonic()
            if left <= 0:
                reason = f": {record.error}" if record.error else ""
                raise TimeoutError(f"workflow {workflow_id!r} has not ended in time{reason}")
            # Its end is notified where it runs here; else it has to be looked for.
            limit = left if here else min(left, pause)
            pause = min(2 * pause, _GLANCE)
            yield BlockingStep(_wait, _await, (ended, None if limit == math.inf else limit))

    def __repr__(self) -> str:
        return f"<Orchestrator on {self.store!r}, {'running' if self._engine else 'stopped'}>"


Orchestrator = DurableOrchestrator
"""Its public name, which the `Orchestrator` of resilient calls has too."""


def _wait(ended: Future[None], limit: float | None) -> None:
    with suppress(TimeoutError):
        ended.result(limit)


async def _await(ended: Future[None], limit: float | None) -> None:
    await asyncio.wait([asyncio.wrap_future(ended)], timeout=limit)
