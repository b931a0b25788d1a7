# this_file: src/opero/concurrency/dress.py
"""What users call: the function that maps, with its attributes."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from opero.core.decorate import changed, decorate, placed, single
from opero.core.explain import explain
from opero.utils import ambient

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.mapper import Mapper
    from opero.core.call import Explanation
    from opero.core.options import MapOptions
    from opero.core.pipeline import Pipeline

__all__ = ["map_again", "mapped"]


def mapped(pipeline: Pipeline, by: str) -> Any:
    """Make the function that maps, and hang on it what users ask it for."""
    from opero.concurrency.mapper import Mapper

    mapper = Mapper(pipeline)
    one = single(pipeline, by)
    wrapper: Any = _caller(mapper)
    functools.update_wrapper(wrapper, one)
    vars(wrapper).update(vars(one))
    wrapper.__signature__ = _signature(pipeline)

    def told() -> Explanation:
        """Describe what happens to each item, stage by stage."""
        return explain(pipeline, outside=(("map", mapper.describe()),))

    def with_options(**changes: Any) -> Any:
        """Return the same map with other options.

        Limiter, cache entries and counters are shared with the original, unless that very option
        changes.
        """
        return placed(changed(pipeline, by, changes), by, mapped)

    wrapper.__opero_map__ = True
    wrapper.explain = told
    wrapper.with_options = with_options
    wrapper.one = one
    wrapper.stream = _streamer(mapper)
    wrapper.map = _reporter(mapper)
    return wrapper


def map_again(fn: Callable[..., Any], options: MapOptions) -> Any:
    """Make the map of a function again, in the process that it has travelled to."""
    return decorate(fn, options, by="operomap", dress=mapped)


def _in_force(mapper: Mapper) -> Mapper:
    """Return the mapper, or one whose items all pass the tape while calls are recorded or replayed."""
    if ambient.tape() is None:
        return mapper
    from opero.core.pipeline import Pipeline

    # A process of its own would have no tape, and what a map finds in a cache it does not call.
    pipeline = mapper.pipeline
    changes: dict[str, Any] = {"sequential": True}
    if pipeline.options.cache_backend != "memory":
        changes["cache_backend"] = "memory"
    options = pipeline.options.replace("operomap", **changes)
    afresh = frozenset({"sequential", "cache_backend"})
    return type(mapper)(Pipeline(pipeline.info, options, origin=pipeline, changed=afresh))


def _caller(mapper: Mapper) -> Callable[..., Any]:
    split = _splitter(mapper)
    if mapper.awaits:

        async def acollected(*args: Any, **kwargs: Any) -> list[Any]:
            return await _in_force(mapper).acollect(*split(args, kwargs))

        return acollected

    def collected(*args: Any, **kwargs: Any) -> list[Any]:
        return _in_force(mapper).collect(*split(args, kwargs))

    return collected


def _streamer(mapper: Mapper) -> Callable[..., Any]:
    split = _splitter(mapper)

    def stream(*args: Any, **kwargs: Any) -> Any:
        """Return a lazy, closable iterator of results; it reads the input only as far as it must."""
        found, now = split(args, kwargs), _in_force(mapper)
        return now.astream(*found) if now.awaits else now.stream(*found)

    return stream


def _reporter(mapper: Mapper) -> Callable[..., Any]:
    split = _splitter(mapper)

    def report(*args: Any, **kwargs: Any) -> Any:
        """Run all items and return a `MapResult`: what succeeded, what failed, and whether that is all."""
        found, now = split(args, kwargs), _in_force(mapper)
        return now.areport(*found) if now.awaits else now.report(*found)

    report.__name__ = "map"
    return report


def _splitter(mapper: Mapper) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]:
    """Return what tells items, the instance before them and further arguments apart."""
    from opero.concurrency.mapper import Arguments

    info = mapper.pipeline.info
    first = info.bound

    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if len(args) <= first:
            name = info.name
            raise TypeError(f"{name}() maps over items and got none: write {name}([…])")
        return args[first], Arguments(args[:first], args[first + 1 :], kwargs)

    return split


def _signature(pipeline: Pipeline) -> inspect.Signature:
    """The function's own signature, with the items in the item's place."""
    info = pipeline.info
    found = list(info.declared.parameters.values())
    place = info.bound
    fits = len(found) > place and found[place].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD
    items = inspect.Parameter("items", inspect.Parameter.POSITIONAL_ONLY)
    before = [p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for p in found[:place]]
    rest = found[place + 1 :] if fits else found[place:]
    return info.declared.replace(
        parameters=[*before, items, *rest], return_annotation=inspect.Signature.empty
    )
