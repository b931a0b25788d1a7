# this_file: src/opero/concurrency/api.py
"""Build the functions that users call to map, and describe them to type checkers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

from opero.concurrency.loop import run_map, run_map_async, stream_map, stream_map_async
from opero.concurrency.mapper import ItemArguments, Mapper
from opero.core.decorate import build_function, decorate, explain, place_in_class, with_changes
from opero.core.decorated import Attributes, Resilient
from opero.core.pipeline import Pipeline
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.concurrency.loop import MapRun, Returns
    from opero.concurrency.result import MapResult
    from opero.core.options import MapOptions
    from opero.core.receipt import Explanation

__all__ = [
    "AsyncMapped",
    "MapDecorate",
    "MapDecorator",
    "Mapped",
    "build_map_function",
    "rebuild_map",
]

# --- the function ---------------------------------------------------------------------------------


def build_map_function(pipeline: Pipeline, by: str) -> Any:
    """Build the function that maps, with its attributes."""
    mapper = Mapper(pipeline)
    one = build_function(pipeline, by)
    first, name = pipeline.info.bound, pipeline.info.name

    def begin(
        returns: Returns, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], MapRun]:
        """Return what begins a run for the arguments of a call."""
        if len(args) <= first:
            raise TypeError(f"{name}() maps over items and got none: write {name}([…])")
        now = mapper if ambient.tape() is None else _under_replay(mapper)
        given = ItemArguments(args[:first], args[first + 1 :], kwargs)
        return partial(now.begin, args[first], given, returns, on_loop=mapper.awaits)

    def collected(*args: Any, **kwargs: Any) -> list[Any]:
        found: list[Any] = run_map(begin("list", args, kwargs)())
        return found

    async def acollected(*args: Any, **kwargs: Any) -> list[Any]:
        found: list[Any] = await run_map_async(begin("list", args, kwargs))
        return found

    def stream(*args: Any, **kwargs: Any) -> Any:
        """Return a lazy, closable iterator of results; it reads the input only as far as it must."""
        start = begin("stream", args, kwargs)
        return stream_map_async(start) if mapper.awaits else stream_map(start())

    def report(*args: Any, **kwargs: Any) -> Any:
        """Run all items and return a `MapResult`: what succeeded, what failed, and whether that is all."""
        start = begin("report", args, kwargs)
        return run_map_async(start) if mapper.awaits else run_map(start())

    def explain_map() -> Explanation:
        """Describe what happens to each item, stage by stage."""
        return explain(pipeline, outside=(("map", mapper.describe()),))

    def with_options(**changes: Any) -> Any:
        """Return the same map with other options.

        Limiter, cache entries and counters are shared with the original, unless that very option
        changes.
        """
        return place_in_class(with_changes(pipeline, by, changes), by, build_map_function)

    report.__name__ = "map"
    wrapper: Any = acollected if mapper.awaits else collected
    functools.update_wrapper(wrapper, one)
    vars(wrapper).update(vars(one))
    wrapper.__signature__ = _signature(pipeline)
    # Also how a copy is made in another process.
    wrapper.__opero_map__ = rebuild_map
    wrapper.explain = explain_map
    wrapper.with_options = with_options
    wrapper.one, wrapper.stream, wrapper.map = one, stream, report
    return wrapper


def rebuild_map(fn: Callable[..., Any], options: MapOptions) -> Any:
    """Build the map of a function again, in the process that it was sent to."""
    return decorate(fn, options, by="operomap", build=build_map_function)


def _under_replay(mapper: Mapper) -> Mapper:
    """Return the mapper for calls that are recorded or replayed: inline, so that all items pass the tape."""
    # A process of its own would have no tape, and what a map finds in a cache it does not call.
    pipeline = mapper.pipeline
    changes: dict[str, Any] = {"sequential": True, "cache_backend": "memory"}
    if pipeline.options.cache_backend == "memory":
        del changes["cache_backend"]
    options = pipeline.options.replace("operomap", **changes)
    replaced = frozenset({"sequential", "cache_backend"})
    return Mapper(Pipeline(pipeline.info, options, origin=pipeline, changed=replaced))


def _signature(pipeline: Pipeline) -> inspect.Signature:
    """The function's own signature, with the items in the item's place."""
    info = pipeline.info
    found = list(info.declared.parameters.values())
    place = info.bound
    fits = len(found) > place and found[place].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD
    items = inspect.Parameter("items", inspect.Parameter.POSITIONAL_ONLY)
    before = [p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for p in found[:place]]
    others = found[place + 1 :] if fits else found[place:]
    return info.declared.replace(
        parameters=[*before, items, *others], return_annotation=inspect.Signature.empty
    )


# --- as type checkers see it ----------------------------------------------------------------------

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


class _TakesItems(Protocol[S_contra, T_contra, Q, R]):
    """A map whose function has two parameters: for a method, the instance and the item."""

    def __call__(
        self, items: Iterable[S_contra], second: T_contra, /, *args: Q.args, **kwargs: Q.kwargs
    ) -> list[R]: ...


class _AsyncTakesItems(Protocol[S_contra, T_contra, Q, R]):
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
        self: _TakesItems[S, U, Q, V], instance: S, owner: type[S] | None = None, /
    ) -> Mapped[U, Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class AsyncMapped(Attributes, Protocol[T_contra, P, R]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A coroutine function over many items."""

    @property
    def one(self) -> Resilient[Concatenate[T_contra, P], Coroutine[Any, Any, R]]:
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
        self: _AsyncTakesItems[S, U, Q, V], instance: S, owner: type[S] | None = None, /
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
