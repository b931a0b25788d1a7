# this_file: src/opero/core/map_options.py
"""The options of a map: those of a call, and how its items are run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from opero.core.options import Options, option
from opero.errors import OperoUsageError
from opero.utils.checks import (
    boolean,
    callable_or_none,
    chunks,
    error_bound,
    executor,
    none_or,
    one_of,
    path,
    progress,
    size,
    token,
    whole,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor  # noqa: TC004 - nobody looks it up at run time, and it is slow to load

__all__ = ["MODES", "MapOptions", "StopToken"]

MODES = ("auto", "process", "thread", "async", "async_process")
"""The modes of a map."""


class StopToken(Protocol):
    """What tells a map to stop: a `threading.Event`, an `asyncio.Event`, or anything else with `is_set`."""

    def is_set(self) -> bool:
        """Whether the map shall begin no further item."""
        ...


@dataclass(frozen=True, kw_only=True)
class MapOptions(Options):
    """The options of `@operomap`, as given, checked when they are made.

    Raises:
        OperoUsageError: A value or a combination cannot work; the message names the option, the
            value and the fix.
    """

    mode: Literal["auto", "process", "thread", "async", "async_process"] = option(
        "map",
        "auto",
        one_of(*MODES),
        'where items run: "process" (auto for a `def`), "thread", "async" (auto for an `async def`), "async_process"',
    )
    workers: int = option("map", 4, whole(1), "processes, threads, or coroutines in flight")
    ordered: bool = option(
        "map", True, boolean, "results in the order of the input, or as they come"
    )
    progress: bool | Literal["rich"] = option(
        "map",
        True,
        progress,
        "progress bar on stderr; silent where there is no terminal or notebook",
    )
    on_error: Literal["raise", "return", "skip"] = option(
        "map",
        "raise",
        one_of("raise", "return", "skip"),
        '"raise" the first failing item\'s own error at once, "return" the exception in its place, or "skip" the item',
    )
    max_errors: int | float | None = option(
        "map", None, error_bound, "stop the map after this many failed items, or this share of them"
    )
    chunksize: int | Literal["auto"] = option("map", "auto", chunks, "items per dispatch")
    executor: Executor | None = option(
        "map", None, executor, "any `concurrent.futures.Executor` instead of `mode`"
    )
    sequential: bool = option(
        "map", False, boolean, "run inline, for debugging with real stack traces"
    )
    item_key: Callable[[Any], object] | None = option(
        "map", None, callable_or_none, "what an item is in the checkpoint; None: the item itself"
    )
    checkpoint: str | os.PathLike[str] | None = option(
        "map", None, none_or(path), "file of results that a later run takes up; journal of the map"
    )
    worker_init: Callable[[], object] | None = option(
        "map", None, callable_or_none, "called once in each new worker process"
    )
    max_tasks_per_worker: int | None = option(
        "map", None, none_or(whole(1)), "items after which a worker process is replaced"
    )
    memory_limit: int | str | None = option(
        "map", None, none_or(size), 'most bytes that a worker process may take, such as "2GB"'
    )
    on_result: Callable[[Any], object] | None = option(
        "map", None, callable_or_none, "called with each finished item: an `ItemResult`"
    )
    stop_token: StopToken | None = option(
        "map",
        None,
        token,
        "a `threading.Event` or its like: when it is set, the map ends with what is done",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.executor is not None and self.mode != "auto":
            raise OperoUsageError(
                f"executor={self.executor!r} says where items run, and so does mode={self.mode!r}: leave one out."
            )
        if self.item_key is not None and self.checkpoint is None:
            raise OperoUsageError(
                f"item_key={self.item_key!r} says what an item is in the checkpoint: give "
                'checkpoint="run.db" as well, or leave it out.'
            )
