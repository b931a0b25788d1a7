# this_file: src/opero/orchestrator/protocols.py
"""How type checkers see a function decorated with `@orchestrate`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar, overload

if TYPE_CHECKING:
    from opero.orchestrator.orchestrator import Orchestrator

__all__ = ["AsyncOrchestrated", "Orchestrate", "Orchestrated"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
V = TypeVar("V")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class _Takes(Protocol[T_contra, Q, R_co]):
    """What has a first parameter of a certain type."""

    def __call__(self, first: T_contra, /, *args: Q.args, **kwargs: Q.kwargs) -> R_co: ...


class _Named(Protocol):
    """What both kinds carry."""

    __name__: str
    __qualname__: str
    __wrapped__: Callable[..., Any]
    orchestrator: Orchestrator


class Orchestrated(_Named, Protocol[P, R]):
    """A synchronous function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function through its orchestrator."""
        ...

    def process(self, *items: Any) -> list[R]:
        """Call it with each item and return the results in order."""
        ...

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(self: _Takes[T, Q, V], instance: T, owner: type[T], /) -> Orchestrated[Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class AsyncOrchestrated(_Named, Protocol[P, R]):
    """A coroutine function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function through its orchestrator."""
        ...

    def process(self, *items: Any) -> Coroutine[Any, Any, list[R]]:
        """Call it with each item and return the results in order."""
        ...

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: _Takes[T, Q, Coroutine[Any, Any, V]], instance: T, owner: type[T], /
    ) -> AsyncOrchestrated[Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class Orchestrate(Protocol):
    """The decorator once its configuration is given."""

    # A coroutine function is a function too: the first overload that fits is meant.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncOrchestrated[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Orchestrated[P, R]: ...
