# this_file: src/opero/durable/twins.py
"""The asynchronous twins of what an operator does: the same, without blocking the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from opero.durable.invocation import MISSING
from opero.durable.operations import Operations

__all__ = ["Twins"]


class Twins(Operations):
    """Each looks at the journal in a thread; see the method without the "a" for arguments and errors."""

    async def aget_workflow_status(self, workflow_id: str) -> dict[str, Any]:
        """Do what `get_workflow_status` does."""
        return await asyncio.to_thread(self.get_workflow_status, workflow_id)

    async def alist_workflows(
        self, name: str | None = None, status: str | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Do what `list_workflows` does."""
        return await asyncio.to_thread(self.list_workflows, name, status, limit)

    async def asteps(self, workflow_id: str) -> list[dict[str, Any]]:
        """Do what `steps` does."""
        return await asyncio.to_thread(self.steps, workflow_id)

    async def astate(self, workflow_id: str) -> str:
        """Do what `state` does."""
        return await asyncio.to_thread(self.state, workflow_id)

    async def acancel(self, workflow_id: str) -> bool:
        """Do what `cancel` does."""
        return await asyncio.to_thread(self.cancel, workflow_id)

    async def aresume(self, workflow_id: str) -> bool:
        """Do what `resume` does."""
        return await asyncio.to_thread(self.resume, workflow_id)

    async def afork(
        self, workflow_id: str, from_step: int | str, *, workflow_id_new: str | None = None
    ) -> str:
        """Do what `fork` does."""
        return await asyncio.to_thread(
            self.fork, workflow_id, from_step, workflow_id_new=workflow_id_new
        )

    async def asignal(self, workflow_id: str, name: str, value: Any = None) -> None:
        """Do what `signal` does."""
        await asyncio.to_thread(self.signal, workflow_id, name, value)

    async def aresolve(
        self,
        workflow_id: str,
        path: str,
        *,
        result: Any = MISSING,
        error: Exception | None = None,
        again: bool = False,
    ) -> None:
        """Do what `resolve` does."""
        await asyncio.to_thread(
            self.resolve, workflow_id, path, result=result, error=error, again=again
        )
