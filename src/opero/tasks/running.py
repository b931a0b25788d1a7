# this_file: src/opero/tasks/running.py
"""Running whatever runs: from a coroutine, and from synchronous code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opero.tasks.runnable import Runnable, as_runnable
from opero.tasks.task_run import NOTHING
from opero.utils.async_utils import run_async

__all__ = ["run", "run_sync"]


async def run(what: Runnable | Callable[..., Any], value: Any = NOTHING, /) -> Any:
    """Run a task, or something composed of tasks, and return its result.

    Args:
        what: What to run; a function is run as a task.
        value: What to begin with, for what takes an input.

    Example:
        >>> import asyncio
        >>> asyncio.run(run(len, "tea"))
        3
    """
    return await as_runnable(what).run(value)


def run_sync(what: Runnable | Callable[..., Any], value: Any = NOTHING, /) -> Any:
    """Do the same from synchronous code, also where an event loop runs (a notebook): it gets one of its own.

    Args:
        what: As for `run`.
        value: As for `run`.

    Example:
        >>> run_sync(len, "tea")
        3
    """
    return run_async(run(what, value))
