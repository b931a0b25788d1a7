# this_file: src/opero/orchestrator/decorator.py
"""`@orchestrate`: an orchestrator around one function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from opero.core.function import ClassMethod, Method, describe_function
from opero.errors import OperoUsageError
from opero.orchestrator.items import process, process_sync
from opero.orchestrator.orchestrator import Orchestrator
from opero.utils.async_utils import is_async_function

if TYPE_CHECKING:
    from opero.orchestrator.config import OrchestratorConfig
    from opero.orchestrator.protocols import AsyncOrchestrated, Orchestrate, Orchestrated

__all__ = ["orchestrate"]

P = ParamSpec("P")
R = TypeVar("R")


# A coroutine function is a function too: the first overload that fits is meant.
@overload
def orchestrate(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
    function: Callable[P, Coroutine[Any, Any, R]], /
) -> AsyncOrchestrated[P, R]: ...
@overload
def orchestrate(function: Callable[P, R], /) -> Orchestrated[P, R]: ...
@overload
def orchestrate(*, config: OrchestratorConfig | None = None) -> Orchestrate: ...
def orchestrate(
    function: Callable[..., Any] | None = None, /, *, config: OrchestratorConfig | None = None
) -> Any:
    """Run all calls of a function through an `Orchestrator` of its own.

    Args:
        function: The function, where it is written bare: `@orchestrate`.
        config: What is switched on.

    Returns:
        A function of the same signature, asynchronous exactly if the original is, with `.process(*items)`,
        which works on many items (to be awaited, if the function is), and `.orchestrator`.

    Raises:
        OperoUsageError: It is no function, or the configuration does not fit it.

    Example:
        >>> from opero import OrchestratorConfig
        >>> @orchestrate(config=OrchestratorConfig(fallbacks=[float]))
        ... def number(text):
        ...     return int(text)
        >>> number("2.5"), number.process("1", "1.5")
        (2.5, [1, 1.5])
    """
    if function is None:
        return lambda given: _orchestrated(given, Orchestrator(config))
    return _orchestrated(function, Orchestrator(config))


def _orchestrated(function: Any, orchestrator: Orchestrator) -> Any:
    if isinstance(function, classmethod | staticmethod):
        # The other order of decorators: what is inside is decorated, what is outside stays.
        inner = _wrapped(function.__func__, orchestrator)
        return ClassMethod(inner) if isinstance(function, classmethod) else staticmethod(inner)
    if not callable(function):
        raise OperoUsageError(
            f"orchestrate() takes a function, not {type(function).__name__}: write @orchestrate(config=...)."
        )
    made = _wrapped(function, orchestrator)
    return Method(made) if describe_function(function).in_class else made


def _wrapped(function: Callable[..., Any], orchestrator: Orchestrator) -> Any:
    orchestrator.explain(
        function
    )  # a configuration that does not fit is told now, not at the first call
    chains, bound = orchestrator.chains, describe_function(function).bound
    made: Any
    # Without the function's own attributes: `.call` or `.stats` of a decorated one would tell of half of it.
    wraps = functools.wraps(function, updated=())
    if is_async_function(function):

        @wraps
        async def acall(*args: Any, **kwargs: Any) -> Any:
            return await orchestrator.execute(function, *args, **kwargs)

        async def aprocess(*items: Any) -> list[Any]:
            """Call the function with each item and return the results in order."""
            return await process(chains, function, items[bound:], before=items[:bound])

        made, made.process = acall, aprocess
    else:

        @wraps
        def call(*args: Any, **kwargs: Any) -> Any:
            return orchestrator.execute_sync(function, *args, **kwargs)

        def sprocess(*items: Any) -> list[Any]:
            """Call the function with each item and return the results in order."""
            return process_sync(chains, function, items[bound:], before=items[:bound])

        made, made.process = call, sprocess
    made.process.__name__ = "process"
    made.orchestrator = orchestrator
    return made
