# this_file: src/opero/core/protocols.py
"""How type checkers see a decorated function: its parameters, result and attributes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

if TYPE_CHECKING:
    from opero.core.cache_handle import CacheHandle
    from opero.core.call import Receipt
    from opero.core.explain import Explanation
    from opero.core.options import Options
    from opero.core.stats import Stats

__all__ = ["AsyncResilient", "Decorate", "Decorator", "Resilient"]

P = ParamSpec("P")
Q = ParamSpec("Q")
O = ParamSpec("O")  # noqa: E741 - the options of a decorator; P and Q are the functions'
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class _Attributes(Protocol):
    """What every decorated function carries."""

    __name__: str
    __qualname__: str
    options: Options
    stats: Stats
    cache: CacheHandle

    def explain(self) -> Explanation:
        """Describe what happens to a call, stage by stage."""
        ...

    def with_options(self, **changes: Any) -> Self:
        """Return the same function with other options."""
        ...


class Resilient(_Attributes, Protocol[P, R_co]):
    """A decorated synchronous function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function through its pipeline."""
        ...

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Receipt[R_co]:
        """Call the function and return a receipt."""
        ...

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: Resilient[Concatenate[Any, Q], R], instance: object, owner: type | None = None, /
    ) -> Resilient[Q, R]: ...


class AsyncResilient(_Attributes, Protocol[P, R_co]):
    """A decorated coroutine function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Call the function through its pipeline."""
        ...

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Receipt[R_co]]:
        """Call the function and return a receipt."""
        ...

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: AsyncResilient[Concatenate[Any, Q], R], instance: object, owner: type | None = None, /
    ) -> AsyncResilient[Q, R]: ...


class Decorate(Protocol):
    """A decorator whose options are set."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncResilient[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Resilient[P, R]: ...


class Decorator(Protocol[O]):
    """A decorator that works bare and with options; `O` are the options."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncResilient[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Resilient[P, R]: ...
    @overload
    def __call__(self, *args: O.args, **options: O.kwargs) -> Decorate: ...
