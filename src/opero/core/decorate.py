# this_file: src/opero/core/decorate.py
"""From a function and its options to the decorated function: wrapper, attributes, methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.core.explain import explain
from opero.core.function import ClassMethod, Method, describe_function
from opero.core.pipeline import Pipeline
from opero.core.wrapper import make_call, make_wrapper
from opero.errors import OperoUsageError

if TYPE_CHECKING:
    from opero.core.call import Explanation
    from opero.core.options import Options

__all__ = ["BuildFunction", "build_function", "decorate", "place_in_class", "with_changes"]


BuildFunction = Callable[[Pipeline, str], Any]
"""Makes the function that users call from its pipeline and the decorator's name."""


def decorate(
    fn: Any, options: Options, *, by: str = "opero", build: BuildFunction | None = None
) -> Any:
    """Put the pipeline that `options` describe around `fn`.

    Args:
        fn: Function, method, class method, static method, partial or callable object.
        options: What is switched on.
        by: Name of the decorator, for messages.
        build: Makes the function that users call; None for the one that makes single calls.

    Returns:
        A plain function of the same kind and signature; for a function defined in a class body a
        descriptor around it.

    Raises:
        OperoUsageError: The options do not fit the function.
    """
    if isinstance(fn, classmethod | staticmethod):
        # The other order of decorators: what is inside is decorated, what is outside stays.
        inner = (build or build_function)(Pipeline(describe_function(fn.__func__), options), by)
        return ClassMethod(inner) if isinstance(fn, classmethod) else staticmethod(inner)
    if isinstance(fn, property):
        raise OperoUsageError(f"@{by} cannot decorate a property: write @property above @{by}.")
    return place_in_class(Pipeline(describe_function(fn), options), by, build or build_function)


def place_in_class(pipeline: Pipeline, by: str, build: BuildFunction) -> Any:
    """Make what users call, and for a function from a class body the descriptor around it."""
    wrapper = build(pipeline, by)
    return Method(wrapper) if pipeline.info.in_class else wrapper


def with_changes(pipeline: Pipeline, by: str, changes: dict[str, Any]) -> Pipeline:
    """Return a pipeline of the same function with other options.

    Limiter, cache entries and counters are shared with the original, unless that very option changes.
    """
    options = pipeline.options.replace(by, **changes)
    return Pipeline(pipeline.info, options, origin=pipeline, changed=frozenset(changes))


def build_function(pipeline: Pipeline, by: str) -> Any:
    """Make the wrapper of a pipeline and hang on it what users ask a decorated function for."""
    wrapper: Any = make_wrapper(pipeline)

    def explanation() -> Explanation:
        """Describe what happens to a call, stage by stage."""
        return explain(pipeline)

    def with_options(**changes: Any) -> Any:
        """Return the same function with other options.

        Limiter, cache entries and counters are shared with the original, unless that very option
        changes.
        """
        return place_in_class(with_changes(pipeline, by, changes), by, build_function)

    wrapper.__opero__ = pipeline
    wrapper.call = make_call(pipeline)
    wrapper.explain = explanation
    wrapper.with_options = with_options
    wrapper.stats = pipeline.stats
    wrapper.options = pipeline.options
    wrapper.cache = pipeline.cache_handle()
    wrapper.rate_limit = pipeline.rate_limit and pipeline.rate_limit.limiter
    wrapper.concurrency = pipeline.concurrency and pipeline.concurrency.limit
    wrapper.circuit_breaker = pipeline.circuit and pipeline.circuit.breaker
    return wrapper
