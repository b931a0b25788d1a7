# this_file: src/opero/concurrency/pool.py
"""Map without cache and retries: as a decorator, and as an executor for any function."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from opero.concurrency.mapper import build_map_function
from opero.core.decorate import decorate
from opero.core.options import MapOptions
from opero.errors import OperoUsageError

if TYPE_CHECKING:
    from opero.concurrency.api import Items, Later, MapDecorate
    from opero.concurrency.result import MapResult

__all__ = ["ParallelExecutor", "get_parallel_executor", "get_parallel_map_decorator"]

R = TypeVar("R")

_POSITIONAL = ("mode", "workers", "ordered", "progress")
"""Options that may be given by position, in this order."""


def _options(by: str, values: tuple[Any, ...], options: dict[str, Any]) -> MapOptions:
    if len(values) > len(_POSITIONAL):
        raise OperoUsageError(
            f"{by}() takes {', '.join(_POSITIONAL)} by position, and got {len(values)} values: name the others."
        )
    placed = dict(zip(_POSITIONAL, values, strict=False))
    if both := sorted(placed.keys() & options.keys()):
        raise OperoUsageError(f"{by}() got {both[0]}= twice, by position and by name.")
    return MapOptions.for_stage(by, "map", **placed, **options)


def get_parallel_map_decorator(*values: Any, **options: Any) -> MapDecorate:
    """Return a decorator that only maps.

    Args:
        values: mode, workers, ordered and progress, by position.
        options: Those of `operomap` that concern the map itself: mode, workers, ordered, on_error and so on; and
            timeout.

    Example:
        >>> @get_parallel_map_decorator(mode="thread", workers=2)
        ... def double(x):
        ...     return 2 * x
        >>> double([1, 2, 3])
        [2, 4, 6]
    """
    by = "get_parallel_map_decorator"
    made = _options(by, values, options)
    return cast(
        "MapDecorate", lambda function: decorate(function, made, by=by, build=build_map_function)
    )


def get_parallel_executor(*values: Any, **options: Any) -> ParallelExecutor:
    """Return an executor that runs any function over many items.

    Args:
        values: As for `get_parallel_map_decorator`.
        options: As above.

    Example:
        >>> run = get_parallel_executor(mode="thread", workers=2)
        >>> run(str.upper, ["a", "b"])
        ['A', 'B']
        >>> run.map(len, ["abc", 5]).failures[0].index
        1
    """
    return ParallelExecutor(_options("get_parallel_executor", values, options))


class ParallelExecutor:
    """Runs functions over many items; it holds no workers between two maps.

    Args:
        options: How.
    """

    def __init__(self, options: MapOptions) -> None:
        self.options = options

    def _of(self, fn: Callable[..., Any]) -> Any:
        return decorate(fn, self.options, by="get_parallel_executor", build=build_map_function)

    # A coroutine function is a function too: the first overload that fits is meant.
    @overload
    def __call__(
        self, fn: Callable[..., Later[R]], items: Items[Any], /, *more: Any, **named: Any
    ) -> Later[list[R]]: ...
    @overload
    def __call__(
        self, fn: Callable[..., R], items: Iterable[Any], /, *more: Any, **named: Any
    ) -> list[R]: ...
    def __call__(self, fn: Callable[..., Any], items: Any, /, *more: Any, **named: Any) -> Any:
        """Return the list of results; awaitable for a coroutine function."""
        return self._of(fn)(items, *more, **named)

    @overload
    def stream(
        self, fn: Callable[..., Later[R]], items: Items[Any], /, *more: Any, **named: Any
    ) -> AsyncIterator[R]: ...
    @overload
    def stream(
        self, fn: Callable[..., R], items: Iterable[Any], /, *more: Any, **named: Any
    ) -> Iterator[R]: ...
    def stream(self, fn: Callable[..., Any], items: Any, /, *more: Any, **named: Any) -> Any:
        """Return a lazy, closable iterator of results."""
        return self._of(fn).stream(items, *more, **named)

    @overload
    def map(
        self, fn: Callable[..., Later[R]], items: Items[Any], /, *more: Any, **named: Any
    ) -> Later[MapResult[R]]: ...
    @overload
    def map(
        self, fn: Callable[..., R], items: Iterable[Any], /, *more: Any, **named: Any
    ) -> MapResult[R]: ...
    def map(self, fn: Callable[..., Any], items: Any, /, *more: Any, **named: Any) -> Any:
        """Return what succeeded and what failed."""
        return self._of(fn).map(items, *more, **named)

    def __repr__(self) -> str:
        given = ", ".join(
            f"{name}={getattr(self.options, name)!r}"
            for name in sorted(self.options.given - {"cache", "retries"})
        )
        return f"<ParallelExecutor {given or 'with defaults'}>"
