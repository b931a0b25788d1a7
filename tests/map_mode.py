# this_file: tests/map_mode.py
"""One way to run a map, for tests that hold in every way: synchronous and asynchronous, and where items run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from opero import operomap


class MapMode:
    """Maps in one way.

    Args:
        kind: "sync" or "async": what is decorated, a function or a coroutine function.
        options: Of all its maps, where a test gives no others.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind = kind
        self.options: dict[str, Any] = {"cache": False, **options}

    @property
    def parallel(self) -> bool:
        return "sequential" not in self.options

    def of(self, body: Callable[..., Any], **options: Any) -> Any:
        """Decorate `body`, or a coroutine function that calls it."""
        decorator = operomap(**{**self.options, **options})
        if self.kind == "sync":
            return decorator(body)

        async def twin(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return body(*args, **kwargs)

        twin.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
        twin.__name__ = body.__name__
        return decorator(twin)

    def at_once(self, calls: int) -> dict[str, int]:
        """Return the limit of calls in flight, where one process keeps it."""
        return {} if "process" in self.options["mode"] else {"concurrency": calls}

    @staticmethod
    def run(begun: Any) -> Any:
        """Wait for a map, and consume a stream."""
        if hasattr(begun, "__anext__"):

            async def consume() -> list[Any]:
                return [value async for value in begun]

            return asyncio.run(consume())
        if inspect.isawaitable(begun):

            async def wait() -> Any:
                return await begun

            return asyncio.run(wait())
        return list(begun) if isinstance(begun, Iterator) else begun
