# this_file: src/opero/concurrency/pool.py
"""Map without cache and retries, as a decorator or as an executor for any function; the types of functions that map."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Never, Protocol, Self, TypeVar, cast, overload

from opero.concurrency.mapper import build_map_function
from opero.core.decorate import decorate
from opero.core.decorated import Attributes, O, P, Q, R, R_co, Resilient, S, S_contra, T, T_contra
from opero.core.options import MapOptions
from opero.errors import OperoUsageError

if TYPE_CHECKING:
    from opero.concurrency.report import MapResult

__all__ = ["ParallelExecutor", "get_parallel_executor", "get_parallel_map_decorator"]

V = TypeVar("V")

Later = Coroutine[Any, Any, T]
"""What an asynchronous function returns."""
Items = Iterable[T] | AsyncIterable[T]
"""What an asynchronous map takes."""

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


# --- for type checkers ----------------------------------------------------------------------------


class _TakesItems(Protocol[S_contra, T_contra, Q, R_co]):
    """A map whose function has two parameters: for a method, the instance and the item."""

    def __call__(
        self, items: Iterable[S_contra], second: T_contra, /, *args: Q.args, **kwargs: Q.kwargs
    ) -> R_co: ...


# pyright takes the `Self` of `__get__` for a use of the parameter as a result.
class Mapped(Attributes, Protocol[T_contra, P, R]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A synchronous function over many items."""

    @property
    def one(self) -> Resilient[Concatenate[T_contra, P], R]:
        """The function for a single item, through the same pipeline."""
        ...

    def __call__(self, items: Iterable[T_contra], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Run all items and return their results."""
        ...

    def stream(
        self, items: Iterable[T_contra], /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[R]:
        """Return a lazy iterator of results."""
        ...

    def map(self, items: Iterable[T_contra], /, *args: P.args, **kwargs: P.kwargs) -> MapResult[R]:
        """Run all items and return what succeeded and what failed."""
        ...

    @overload
    def __get__(
        self: _TakesItems[type[S], T, Q, list[V]], instance: S | None, owner: type[S], /
    ) -> Mapped[T, Q, V]: ...
    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: _TakesItems[S, T, Q, list[V]], instance: S, owner: type[S] | None = None, /
    ) -> Mapped[T, Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class AsyncMapped(Attributes, Protocol[T_contra, P, R]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A coroutine function over many items."""

    @property
    def one(self) -> Resilient[Concatenate[T_contra, P], Later[R]]:
        """The function for a single item, through the same pipeline."""
        ...

    def __call__(
        self, items: Items[T_contra], /, *args: P.args, **kwargs: P.kwargs
    ) -> Later[list[R]]:
        """Run all items and return their results."""
        ...

    def stream(
        self, items: Items[T_contra], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[R]:
        """Return a lazy asynchronous iterator of results."""
        ...

    def map(
        self, items: Items[T_contra], /, *args: P.args, **kwargs: P.kwargs
    ) -> Later[MapResult[R]]:
        """Run all items and return what succeeded and what failed."""
        ...

    @overload
    def __get__(
        self: _TakesItems[type[S], T, Q, Later[list[V]]], instance: S | None, owner: type[S], /
    ) -> AsyncMapped[T, Q, V]: ...
    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: _TakesItems[S, T, Q, Later[list[V]]], instance: S, owner: type[S] | None = None, /
    ) -> AsyncMapped[T, Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class MapDecorator(Protocol[O]):
    """A map decorator that works bare and with options; `O` are the options."""

    # Options are keyword-only, so that a positional argument is always the function. A coroutine function is a function
    # too: the first overload that fits is meant.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # see above
        self, fn: Callable[Concatenate[T, P], Later[R]], /
    ) -> AsyncMapped[T, P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # see above
        self, fn: Callable[Concatenate[T, P], R], /
    ) -> Mapped[T, P, R]: ...
    @overload
    def __call__(self, *args: O.args, **options: O.kwargs) -> MapDecorate: ...


MapDecorate = MapDecorator[[Never]]
"""A map decorator whose options are set: it takes a function and nothing else."""
