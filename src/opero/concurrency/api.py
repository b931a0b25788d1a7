# this_file: src/opero/concurrency/api.py
"""Describe the functions that users call to map, and their decorators, to type checkers."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

from opero.core.decorated import Attributes, Resilient

if TYPE_CHECKING:
    from opero.concurrency.result import MapResult


P = ParamSpec("P")
Q = ParamSpec("Q")
O = ParamSpec("O")  # noqa: E741 - the options of a decorator; P and Q are the functions'
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
S_contra = TypeVar("S_contra", contravariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
U = TypeVar("U")
V = TypeVar("V")

Later = Coroutine[Any, Any, T]
"""What an asynchronous function returns."""
Items = Iterable[T] | AsyncIterable[T]
"""What an asynchronous map takes."""


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
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: _TakesItems[S, U, Q, list[V]], instance: S, owner: type[S] | None = None, /
    ) -> Mapped[U, Q, V]: ...
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
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: _TakesItems[S, U, Q, Later[list[V]]], instance: S, owner: type[S] | None = None, /
    ) -> AsyncMapped[U, Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class MapDecorate(Protocol):
    """A map decorator whose options are set."""

    # A coroutine function is a function too: the first overload that fits is meant.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # see above
        self, fn: Callable[Concatenate[T, P], Later[R]], /
    ) -> AsyncMapped[T, P, R]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[T, P], R], /) -> Mapped[T, P, R]: ...


class MapDecorator(Protocol[O]):
    """A map decorator that works bare and with options; `O` are the options."""

    # Options are keyword-only, so that a positional argument is always the function; of overloads
    # that fit, the first is meant.
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
