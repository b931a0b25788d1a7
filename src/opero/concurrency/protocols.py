# this_file: src/opero/concurrency/protocols.py
"""How type checkers see a function decorated with `@operomap`: items in, a list out, and its attributes."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

from opero.core.decorated import AsyncResilient, Attributes, Resilient

if TYPE_CHECKING:
    from opero.concurrency.result import MapResult

__all__ = ["AsyncMapped", "MapDecorate", "MapDecorator", "Mapped"]

P = ParamSpec("P")
Q = ParamSpec("Q")
O = ParamSpec("O")  # noqa: E741 - the options of a decorator; P and Q are the functions'
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
S_contra = TypeVar("S_contra", contravariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
U = TypeVar("U")
V = TypeVar("V")


class _Takes(Protocol[S_contra, T_contra, Q, R]):
    """A map whose function has two parameters: for a method, the instance and the item."""

    def __call__(
        self, items: Iterable[S_contra], second: T_contra, /, *args: Q.args, **kwargs: Q.kwargs
    ) -> list[R]: ...


class _AsyncTakes(Protocol[S_contra, T_contra, Q, R]):
    """The same for coroutine functions."""

    def __call__(
        self, items: Iterable[S_contra], second: T_contra, /, *args: Q.args, **kwargs: Q.kwargs
    ) -> Coroutine[Any, Any, list[R]]: ...


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
        self: _Takes[S, U, Q, V], instance: S, owner: type[S] | None = None, /
    ) -> Mapped[U, Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class AsyncMapped(Attributes, Protocol[T_contra, P, R]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A coroutine function over many items."""

    @property
    def one(self) -> AsyncResilient[Concatenate[T_contra, P], R]:
        """The function for a single item, through the same pipeline."""
        ...

    def __call__(
        self,
        items: Iterable[T_contra] | AsyncIterable[T_contra],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Coroutine[Any, Any, list[R]]:
        """Run all items and return their results."""
        ...

    def stream(
        self,
        items: Iterable[T_contra] | AsyncIterable[T_contra],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> AsyncIterator[R]:
        """Return a lazy asynchronous iterator of results."""
        ...

    def map(
        self,
        items: Iterable[T_contra] | AsyncIterable[T_contra],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Coroutine[Any, Any, MapResult[R]]:
        """Run all items and return what succeeded and what failed."""
        ...

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: _AsyncTakes[S, U, Q, V], instance: S, owner: type[S] | None = None, /
    ) -> AsyncMapped[U, Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class MapDecorate(Protocol):
    """A map decorator whose options are set."""

    # A coroutine function is a function too: the first overload that fits is meant.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # see above
        self, fn: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], /
    ) -> AsyncMapped[T, P, R]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[T, P], R], /) -> Mapped[T, P, R]: ...


class MapDecorator(Protocol[O]):
    """A map decorator that works bare and with options; `O` are the options."""

    # Options are keyword-only, so that a positional argument is always the function; of overloads
    # that fit, the first is meant.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # see above
        self, fn: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], /
    ) -> AsyncMapped[T, P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # see above
        self, fn: Callable[Concatenate[T, P], R], /
    ) -> Mapped[T, P, R]: ...
    @overload
    def __call__(self, *args: O.args, **options: O.kwargs) -> MapDecorate: ...
