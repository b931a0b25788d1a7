# this_file: src/opero/core/decorated.py
"""Describe decorated functions to type checkers: their parameters, results and attributes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar, overload

if TYPE_CHECKING:
    from opero.caching.handles import CacheHandle
    from opero.core.options import Options
    from opero.core.receipt import Explanation, Receipt
    from opero.core.stats import Stats
    from opero.limits.breaker import CircuitBreaker
    from opero.limits.limiter import RateLimiter
    from opero.limits.permits import ConcurrencyLimit

__all__ = [
    "AcceptsFirst",
    "Attributes",
    "Decorate",
    "Decorator",
    "Resilient",
]

P = ParamSpec("P")
Q = ParamSpec("Q")
O = ParamSpec("O")  # noqa: E741 - the options of a decorator; P and Q are the functions'
R = TypeVar("R")
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Attributes(Protocol):
    """What every decorated function carries."""

    __name__: str
    __qualname__: str
    __wrapped__: Callable[..., Any]
    options: Options
    stats: Stats
    cache: CacheHandle
    rate_limit: RateLimiter | None
    concurrency: ConcurrencyLimit | None
    circuit_breaker: CircuitBreaker | None

    def explain(self) -> Explanation:
        """Describe what happens to a call, stage by stage."""
        ...

    def with_options(self, **changes: Any) -> Self:
        """Return the same function with other options."""
        ...


class AcceptsFirst(Protocol[T_contra, Q, R_co]):
    """What has a first parameter of a certain type."""

    def __call__(self, first: T_contra, /, *args: Q.args, **kwargs: Q.kwargs) -> R_co:
        """Call it with its first argument and the others."""
        ...


class Resilient(Attributes, Protocol[P, R_co]):
    """A decorated function; one that is asynchronous returns a coroutine."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function through its pipeline."""
        ...

    @overload
    def call(  # type: ignore[overload-overlap]  # a coroutine is a result too
        self: Resilient[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Receipt[T]]: ...
    @overload
    def call(self, *args: P.args, **kwargs: P.kwargs) -> Receipt[R_co]: ...

    # As the interpreter does it: class methods get the class, methods the instance, others nothing.
    @overload
    def __get__(
        self: AcceptsFirst[type[T], Q, R], instance: T | None, owner: type[T], /
    ) -> Resilient[Q, R]: ...
    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(self: AcceptsFirst[T, Q, R], instance: T, owner: type[T], /) -> Resilient[Q, R]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class Decorate(Protocol):
    """A decorator whose options are set."""

    def __call__(self, fn: Callable[P, R], /) -> Resilient[P, R]:
        """Decorate a function."""
        ...


class Decorator(Protocol[O]):
    """A decorator that works bare and with options; `O` are the options."""

    # Options are keyword-only, so that a positional argument is always the function.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # as `O` is not known here
        self, fn: Callable[P, R], /
    ) -> Resilient[P, R]: ...
    @overload
    def __call__(self, *args: O.args, **options: O.kwargs) -> Decorate: ...
