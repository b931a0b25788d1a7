# this_file: src/opero/concurrency/alone.py
"""The map alone: no cache, no retries, the same engine; as a decorator, and as an executor for any function."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from opero.concurrency.dress import mapped
from opero.core.decorate import decorate
from opero.core.options import MapOptions

if TYPE_CHECKING:
    from opero.concurrency.protocols import MapDecorate
    from opero.concurrency.result import MapResult

__all__ = ["ParallelExecutor", "get_parallel_executor", "get_parallel_map_decorator"]

R = TypeVar("R")


def get_parallel_map_decorator(**options: Any) -> MapDecorate:
    """Return a decorator that only maps.

    Args:
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
    made = MapOptions.for_stage(by, "map", **options)
    return cast("MapDecorate", lambda function: decorate(function, made, by=by, dress=mapped))


def get_parallel_executor(**options: Any) -> ParallelExecutor:
    """Return what runs any function over many items.

    Args:
        options: As for `get_parallel_map_decorator`.

    Example:
        >>> run = get_parallel_executor(mode="thread", workers=2)
        >>> run(str.upper, ["a", "b"])
        ['A', 'B']
        >>> run.map(len, ["abc", 5]).failures[0].index
        1
    """
    return ParallelExecutor(MapOptions.for_stage("get_parallel_executor", "map", **options))


class ParallelExecutor:
    """Runs functions over many items, in one way; it holds no workers between two maps.

    Args:
        options: The way.
    """

    def __init__(self, options: MapOptions) -> None:
        self.options = options

    def _of(self, fn: Callable[..., Any]) -> Any:
        return decorate(fn, self.options, by="get_parallel_executor", dress=mapped)

    # A coroutine function is a function too: the first overload that fits is meant.
    @overload
    def __call__(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *more: Any,
        **named: Any,
    ) -> Coroutine[Any, Any, list[R]]: ...
    @overload
    def __call__(
        self, fn: Callable[..., R], items: Iterable[Any], /, *more: Any, **named: Any
    ) -> list[R]: ...
    def __call__(self, fn: Callable[..., Any], items: Any, /, *more: Any, **named: Any) -> Any:
        """Return the list of results; awaitable for a coroutine function."""
        return self._of(fn)(items, *more, **named)

    @overload
    def stream(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *more: Any,
        **named: Any,
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
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *more: Any,
        **named: Any,
    ) -> Coroutine[Any, Any, MapResult[R]]: ...
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
