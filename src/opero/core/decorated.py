# this_file: src/opero/core/decorated.py
"""What users get of a decorated function: explanation, receipts, and its type for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    Never,
    ParamSpec,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    overload,
)

if TYPE_CHECKING:
    from opero.caching.handles import CacheHandle
    from opero.core.function import Stats
    from opero.core.options import Options
    from opero.limits.breaker import CircuitBreaker
    from opero.limits.limiter import RateLimiter
    from opero.limits.permits import ConcurrencyLimit


A = ParamSpec("A")
P = ParamSpec("P")
Q = ParamSpec("Q")
O = ParamSpec("O")  # noqa: E741 - the options of a decorator; P and Q are the functions'
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
S_contra = TypeVar("S_contra", contravariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
Bound_co = TypeVar("Bound_co", covariant=True)
Unbound_co = TypeVar("Unbound_co", covariant=True)
Function_co = TypeVar("Function_co", covariant=True)


Source = Literal["fresh", "hit", "shared", "stale"]
"""Where a value came from: this call computed it, the cache had it, another caller was just computing it, or the cache
had it and it has expired, but computing it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt(Generic[R_co]):
    """What `f.call(...)` returns: the value and how it came about.

    Attributes:
        value: The function's result.
        source: "fresh" (this call made it), "hit" (cache), "shared" (another caller was already computing it) or
            "stale" (expired, but computing it anew failed).
        attempts: Attempts made, 0 for a hit.
        calls: Real calls of the function, 0 for a hit.
        fallback: The fallback value that gave the result; None without `arg_fallback` or for a hit.
        label: How opero shows that value: itself, or `api_key[1]` if it is a secret.
        slept: Seconds of pauses between attempts.
        waited: Seconds in the rate limiter.
        seconds: Seconds from start to end.
        remaining: Seconds that were left of the deadline; None without one.
        rejected: Whether `retry_if_result` refused the value and all was spent.
        errors: The exceptions of the calls that failed on the way.
    """

    value: R_co
    source: Source = "fresh"
    attempts: int = 0
    calls: int = 0
    fallback: Any = None
    label: str | None = None
    slept: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    remaining: float | None = None
    rejected: bool = False
    errors: tuple[Exception, ...] = ()

    def __repr__(self) -> str:
        parts: list[str] = [self.source]
        if self.attempts:
            parts.append(f"{self.attempts} attempt{'s' * (self.attempts != 1)}")
            parts.append(f"{self.calls} call{'s' * (self.calls != 1)}")
        if self.label is not None:
            parts.append(f"with {self.label}")
        if self.slept or self.waited:
            parts.append(f"{self.slept + self.waited:.3f} s of waiting")
        if self.rejected:
            parts.append("rejected")
        return f"<Receipt {type(self.value).__name__}: {', '.join(parts)} in {self.seconds:.3f} s>"


class Explanation(str):
    """Text that shows itself as it is in a REPL and a notebook."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


# --- for type checkers ---


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


class _TakesSelf(Protocol[A, S_contra, P, R_co]):
    """A function whose first parameter is named `self`.

    `A` is Any: mypy keeps a function's own type variables only where no list of parameters stands first.
    """

    def __call__(_, self: S_contra, *args: P.args, **kwargs: P.kwargs) -> R_co: ...  # noqa: N805  # pyright: ignore[reportSelfClsParameterName]


class _TakesClass(Protocol[A, S_contra, P, R_co]):
    """A function whose first parameter is named `cls`."""

    def __call__(_, cls: S_contra, *args: P.args, **kwargs: P.kwargs) -> R_co: ...  # noqa: N805  # pyright: ignore[reportSelfClsParameterName]


# No one form keeps `Self` and type variables under mypy and lets pyright compare methods with those they override.
MYPY = False
"""True for mypy, whatever stands here."""

if MYPY:

    class _Descriptor(Attributes, Protocol[P, Bound_co, Unbound_co]):
        """A decorated method in its class; `P` are the parameters of `__get__`, so that they may bind `Self`."""

        def __call__(
            self: _Descriptor[Q, Resilient[A, R], Any], *args: Any, **kwargs: Any
        ) -> R: ...
        @overload
        def __get__(self, *args: P.args, **kwargs: P.kwargs) -> Bound_co: ...
        @overload
        def __get__(self, instance: None, owner: type, /) -> Unbound_co: ...

    class Decorator(Protocol[O]):  # pyright: ignore[reportRedeclaration]
        """A decorator that works bare and with options; `O` are the options."""

        @overload
        def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
            self, fn: _TakesSelf[Any, S, P, R], /
        ) -> _Descriptor[[S, type | None], Resilient[P, R], Resilient[Concatenate[Any, P], R]]: ...
        @overload
        def __call__(  # type: ignore[overload-overlap]
            self, fn: _TakesClass[Any, type[S], P, R], /
        ) -> _Descriptor[[S | None, type[S]], Resilient[P, R], Any]: ...
        @overload
        def __call__(  # type: ignore[overload-overlap]
            self, fn: Callable[P, R], /
        ) -> Resilient[P, R]: ...
        @overload
        def __call__(self, *args: O.args, **options: O.kwargs) -> Decorate: ...

else:

    class ResilientMethod(Attributes, Generic[Function_co]):
        """A decorated method in its class; in `Function_co` its `self` stands as a callable's parameter.

        There a subclass is as good as its base, so that one decorated method may override another.
        """

        # pyright asks here, not after `__get__`, what `property` and protocols get.
        def __call__(self: _Method[S, Q, R], *args: Any, **kwargs: Any) -> R: ...  # noqa: D102 - in its class

        @overload
        def __get__(
            self: _Method[S, Q, R], instance: None, owner: type[S], /
        ) -> Resilient[Concatenate[S, Q], R]: ...
        @overload
        def __get__(
            self: _Method[S, Q, R], instance: S, owner: type | None = None, /
        ) -> Resilient[Q, R]: ...
        def __get__(self, instance: object, owner: type | None = None, /) -> Any: ...

    class ResilientClassMethod(Attributes, Generic[P, R_co]):
        """A decorated class method in its class."""

        def __call__(self, *args: Any, **kwargs: Any) -> R_co: ...  # noqa: D102 - in its class
        def __get__(self, instance: object, owner: type | None = None, /) -> Resilient[P, R_co]: ...

    _Method: TypeAlias = ResilientMethod[Callable[Concatenate[Callable[[S], None], Q], R]]

    class Decorator(Protocol[O]):
        """A decorator that works bare and with options; `O` are the options."""

        # Options are keyword-only, so that a positional argument is always the function.
        @overload
        def __call__(  # pyright: ignore[reportOverlappingOverload]
            self, fn: _TakesSelf[Any, S, P, R], /
        ) -> _Method[S, P, R]: ...
        @overload
        def __call__(
            self, fn: _TakesClass[Any, type[S], P, R], /
        ) -> ResilientClassMethod[P, R]: ...
        @overload
        def __call__(self, fn: Callable[P, R], /) -> Resilient[P, R]: ...
        @overload
        def __call__(self, *args: O.args, **options: O.kwargs) -> Decorate: ...


Decorate: TypeAlias = Decorator[[Never]]
"""A decorator whose options are set: it takes a function and nothing else."""
