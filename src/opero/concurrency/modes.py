# this_file: src/opero/concurrency/modes.py
"""Where the items of a map run: the choice, and the engine for it."""

from __future__ import annotations

import os
from contextvars import Context
from typing import TYPE_CHECKING, Final, Literal

from opero.errors import OperoUsageError

if TYPE_CHECKING:
    from opero.concurrency.engine import Engine
    from opero.concurrency.shells import AsyncEngine
    from opero.core.options import MapOptions

__all__ = [
    "IN_FLIGHT", "Mode", "check_mode", "choose_mode", "describe_mode", "make_async_engine", "make_engine",
]  # fmt: skip

Mode = Literal["sequential", "thread", "async", "process", "async_process", "executor"]

IN_FLIGHT: Final = 32
"""Coroutines that each worker process of `mode="async_process"` has under way at once."""

_CARE: Final = ("worker_init", "max_tasks_per_worker", "memory_limit")
_FORKS: Final = hasattr(os, "fork")
"""Worker processes begin as forks, of this process or of a fresh one."""


# --- the choice -----------------------------------------------------------------------------------


def choose_mode(options: MapOptions, *, awaits: bool, recorded: bool = False) -> Mode:
    """Choose where items run.

    Args:
        options: The map's options.
        awaits: Whether its function is a coroutine function.
        recorded: Whether somebody records what items do in this process.

    Example:
        >>> from opero.core.options import MapOptions
        >>> choose_mode(MapOptions(), awaits=True), choose_mode(MapOptions(mode="async"), awaits=False)
        ('async', 'thread')
    """
    if options.sequential:
        return "sequential"
    here: Mode = "async" if awaits else "thread"
    if options.executor is not None and not recorded:
        return "executor"
    if recorded or options.mode == "async":
        # A synchronous function would hold up the loop.
        return here
    if options.mode == "thread":
        return "thread"
    if options.mode == "auto" and (awaits or not _FORKS):
        return here
    # Without coroutines there is nothing to have in flight.
    return "async_process" if options.mode == "async_process" and awaits else "process"


def check_mode(options: MapOptions, mode: Mode, name: str) -> None:
    """Refuse options that could not mean anything where items run.

    Raises:
        OperoUsageError: One of them; the message names it and the fix.
    """
    if mode in ("process", "async_process"):
        if not _FORKS:
            raise OperoUsageError(
                f'mode={options.mode!r} needs a system that can fork: write mode="thread" for {name}().'
            )
        return
    if mode == "sequential":
        return
    for option in _CARE:
        value = getattr(options, option)
        if value is not None:
            where = {"thread": "threads", "async": "an event loop"}.get(mode, "your executor")
            raise OperoUsageError(
                f"{option}={value!r} is about worker processes, and {name}() runs in {where}: "
                'write mode="process" or mode="async_process", or leave it out.'
            )


def describe_mode(mode: Mode, options: MapOptions) -> str:
    """Return how items run, in a few words."""
    workers = options.workers
    several = "es" * (workers != 1)
    return {
        "executor": f"in a {type(options.executor).__name__}",
        "async": f"{workers} at once on the event loop",
        "thread": f"{workers} thread{'s' * (workers != 1)}",
        "process": f"{workers} process{several}",
        "async_process": f"{workers} process{several} with {IN_FLIGHT} at once on the event loop of each",
        "sequential": "one after the other, in the caller's thread",
    }[mode]


# --- the engine -----------------------------------------------------------------------------------


def make_engine(mode: Mode, options: MapOptions, context: Context) -> Engine:
    """Return the engine for a map that may wait."""
    if mode == "sequential":
        from opero.concurrency.executors.inline import Inline

        return Inline()
    if mode == "thread":
        from opero.concurrency.executors.threads import Threads

        return Threads(options.workers, context)
    if options.executor is not None and mode == "executor":
        from opero.concurrency.executors.futures import Futures

        return Futures(options.executor, _workers_of(options), context)
    from opero.concurrency.executors.processes import ProcessEngine

    return ProcessEngine(options.workers)


def _workers_of(options: MapOptions) -> int:
    """Return how many workers the user's executor has; nobody but itself knows, and not every one tells."""
    found = getattr(options.executor, "_max_workers", None)
    told = isinstance(found, int) and "workers" not in options.given
    return found if told and found is not None else options.workers


def make_async_engine(mode: Mode, options: MapOptions, context: Context) -> AsyncEngine:
    """Return the engine for a map in an event loop."""
    if mode == "sequential":
        from opero.concurrency.executors.inline import AsyncInline

        return AsyncInline()
    if mode == "async":
        from opero.concurrency.executors.loop import Loop

        return Loop(options.workers, context)
    from opero.concurrency.executors.bridge import Bridge

    return Bridge(make_engine(mode, options, context))
