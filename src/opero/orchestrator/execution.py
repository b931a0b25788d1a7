# this_file: src/opero/orchestrator/execution.py
"""Call functions as a configuration says: `Orchestrator`, and the decorator `@orchestrate`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar, overload

import opero.utils.checks as checks
from opero.concurrency.loop import run_map, run_map_async
from opero.concurrency.mapper import Mapper
from opero.core.decorate import decorate, explain
from opero.core.function import FunctionInfo
from opero.core.options import MapOptions, Options
from opero.core.pipeline import Pipeline
from opero.core.retry import is_retry_error, retry_error
from opero.core.wrapper import make_wrapper
from opero.errors import OperoUsageError, is_final, matches
from opero.events.messages import log_event
from opero.limits.limiter import limiter_of
from opero.limits.permits import ConcurrencyLimit
from opero.orchestrator.config import Configuration, OrchestratorConfig, functions
from opero.orchestrator.fallback_chain import FallbackChain, name_of
from opero.utils.async_utils import ensure_async, is_async_function, run_async

if TYPE_CHECKING:
    from opero.core.decorated import AcceptsFirst, Explanation
    from opero.events import Event, Handler
    from opero.orchestrator.config import (
        ConcurrencyConfig,
        MultiprocessConfig,
        RateLimitConfig,
        RetryConfig,
    )


P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
V = TypeVar("V")
R_co = TypeVar("R_co", covariant=True)

Function = Callable[..., Any]
Args = tuple[Any, ...]

_KEPT = 256
"""Functions whose pipelines are kept: to make one costs a hundred times a call."""


class Orchestrator:
    """Calls functions as its configuration says; rate and concurrency limits hold for all of them together.

    Args:
        config: The settings; none by default. A change of the configuration holds from the next call on.

    Attributes:
        config: The configuration.

    Raises:
        OperoUsageError: It is no configuration.

    Example:
        >>> from opero import Orchestrator, OrchestratorConfig, RetryConfig
        >>> from opero.testing import flaky
        >>> retry = RetryConfig(max_attempts=3, wait_min=0, wait_multiplier=0)
        >>> Orchestrator(OrchestratorConfig(retry_config=retry)).execute_sync(flaky("ok", failures=2))
        'ok'
    """

    def __init__(self, config: OrchestratorConfig | None = None) -> None:
        if not isinstance(config, OrchestratorConfig | None):
            raise OperoUsageError(
                f"config={config!r} must be an OrchestratorConfig: write "
                "Orchestrator(config=OrchestratorConfig(...))."
            )
        self.config: OrchestratorConfig = config or OrchestratorConfig()
        self._chains = Chains(_frozen(self.config))

    @property
    def chains(self) -> Chains:
        """The pipelines that the configuration, as it is now, makes of functions."""
        if self.config != self._chains.config:
            self._chains = Chains(_frozen(self.config))
        return self._chains

    async def execute(self, function: Function, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, synchronous (in a thread) or not, and its fallbacks if it fails.

        Raises:
            Exception: The last call's own error; `tenacity.RetryError` from it with `reraise=False`.
        """
        chains = self.chains
        with chains.errors():
            return await chains.chain(function, True).execute(*args, **kwargs)

    def execute_sync(self, function: Function, /, *args: Any, **kwargs: Any) -> Any:
        """Do what `execute` does, for callers without an event loop."""
        chains = self.chains
        with chains.errors():
            return chains.chain(function, False).execute_sync(*args, **kwargs)

    async def process(
        self, functions: Function | Iterable[Function], /, *items: Any, **kwargs: Any
    ) -> list[Any]:
        """Call each function with each item and return the results: all of the first function, then the next.

        A function that fails for good falls back on the fallbacks of the configuration. One item is processed
        after the other, unless the configuration has a concurrency limit or worker processes.

        Args:
            functions: A function or several.
            items: What they are called with, each the first argument of one call.
            kwargs: Keyword arguments of all calls.

        Raises:
            Exception: The error of the first item that failed for good; no further item is started then.

        Example:
            >>> Orchestrator().process_sync([min, max], [1, 2], [3, 4])
            [1, 3, 2, 4]
        """
        return await self.chains.process(functions, items, kwargs)

    def process_sync(
        self, functions: Function | Iterable[Function], /, *items: Any, **kwargs: Any
    ) -> list[Any]:
        """Do what `process` does, for callers without an event loop."""
        return self.chains.process_sync(functions, items, kwargs)

    def explain(self, function: Function) -> Explanation:
        """Describe what happens to a call of a function, stage by stage."""
        return explain(self.chains.made(function, is_async_function(function))[0])

    def __repr__(self) -> str:
        return f"Orchestrator({self.config!r})"


def _frozen(config: OrchestratorConfig) -> OrchestratorConfig:
    """Return a copy that later changes do not reach."""
    parts: dict[str, Any] = {
        name: copy.copy(value)
        for name, value in vars(config).items()
        if isinstance(value, Configuration | Mapping)
    }
    return replace(config, **parts)


# --- what a configuration makes of functions --------------------------------------------------------------------------


class Chains:
    """The pipelines and fallback chains that one configuration makes of functions; they share its limits.

    Args:
        config: The configuration.
        options: Options that another instance has made of it, with the limits to share; None to make them.

    Attributes:
        config: As above.
        options: Those of single calls.
    """

    def __init__(self, config: OrchestratorConfig, options: Options | None = None) -> None:
        self.config: OrchestratorConfig = config
        logger = config.logger
        self._listener = None if logger is None else functools.partial(log_event, logger)
        self.options: Options = options or _with_shared_limits(config, self._listener)
        self.made: Callable[..., Any] = _cached(self._make)
        self.chain: Callable[..., FallbackChain] = _cached(self._make_chain)

    async def process(
        self, given: Any, items: Args, kwargs: dict[str, Any], before: Args = ()
    ) -> list[Any]:
        """Return the results of a function, or of several, for each item.

        Args:
            given: A function, or several.
            items: What it is called with, item by item.
            kwargs: Keyword arguments of all calls.
            before: Arguments before each item: the instance or class of a method.
        """
        mapper, inputs = self._mapper(given, items, kwargs, before, on_loop=True)
        with self.errors():
            begin = functools.partial(mapper.begin, inputs, on_loop=True)
            results: list[Any] = await run_map_async(begin)
            return results

    def process_sync(
        self, given: Any, items: Args, kwargs: dict[str, Any], before: Args = ()
    ) -> list[Any]:
        """Do the same without an event loop."""
        mapper, inputs = self._mapper(given, items, kwargs, before, on_loop=False)
        if mapper.awaits:
            return run_async(self.process(given, items, kwargs, before))
        with self.errors():
            results: list[Any] = run_map(mapper.begin(inputs))
            return results

    def _mapper(
        self, given: Any, items: Args, kwargs: dict[str, Any], before: Args, *, on_loop: bool
    ) -> tuple[Mapper, Iterable[Any]]:
        """Return the map and its inputs; only workers are on, because the functions have their own pipelines."""
        several = functions("functions", given)
        if len(several) == 0:
            raise OperoUsageError("process() needs a function: write process([function], *items).")
        inputs = [(number, item) for number in range(len(several)) for item in items]
        workers = _workers(self.config)
        # Without workers, a synchronous function runs in a thread, so that the loop is free.
        awaits = on_loop and workers.get("sequential", False)
        awaits = awaits or any(self.chain(function, False).awaits for function in several)
        chains, own = self, f"{name_of(several[0])}.process"
        listeners: list[Handler] = []
        if "process" in workers["mode"]:
            # Events of the functions come back with the results; events of the map itself are not asked for.
            chains = self._for_workers()
            listeners = [_without(own, one) for one in self.options.listeners]
        call = _call_async if awaits else _call
        info = FunctionInfo(functools.partial(call, chains, several, before, kwargs))
        info.name, info.qualname = name_of(several[0]), own
        options = MapOptions.of(
            "process", cache=False, retries=0, progress=False, on_event=listeners or None, **workers
        )
        return Mapper(Pipeline(info, options), relays_all=bool(listeners)), inputs

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Replace the error of a block by a `tenacity.RetryError` where the configuration asks for that."""
        retry = self.config.retry_config
        try:
            yield
        except Exception as error:
            if (
                retry is None
                or retry.reraise
                or is_final(error)
                or is_retry_error(error)
                or not matches(retry.retry_exceptions, error)
            ):
                raise
            raise retry_error(error, retry.max_attempts) from error

    def _make_chain(self, function: Function, awaits: bool) -> FallbackChain:
        several = (function, *functions("fallbacks", self.config.fallbacks))
        awaits = awaits or any(is_async_function(each) for each in several)
        made = [self.made(each, awaits)[1] for each in several]
        return FallbackChain(made[0], made[1:], on_event=self._listener)

    def _make(self, function: Function, awaits: bool) -> tuple[Pipeline, Function]:
        checks.function("function", function)
        # The pauses and queues of a synchronous function are then the event loop's, and can be cancelled there.
        wanted = ensure_async(function) if awaits else function
        pipeline = Pipeline(FunctionInfo(wanted), self.options)
        return pipeline, make_wrapper(pipeline)

    def _for_workers(self) -> Chains:
        """Return an equivalent for worker processes, which shares the rate limit.

        It has no listeners, because they are called in the caller's process, and no permits: a concurrency limit sets
        the number of workers, with one item each.
        """
        options = self.options.replace("Orchestrator", on_event=None, concurrency=None)
        return Chains(replace(self.config, logger=None), options)

    def __reduce__(self) -> Any:
        return Chains, (self.config, self.options)


def _call(
    chains: Chains, several: tuple[Function, ...], before: Args, kwargs: Any, item: Any
) -> Any:
    """Call one function; an item of the map is a pair: the function's number, and its argument."""
    number, argument = item
    return chains.chain(several[number], False).execute_sync(*before, argument, **kwargs)


async def _call_async(
    chains: Chains, several: tuple[Function, ...], before: Args, kwargs: Any, item: Any
) -> Any:
    number, argument = item
    return await chains.chain(several[number], True).execute(*before, argument, **kwargs)


def _cached(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make` with its latest results cached, for arguments that can be hashed."""
    kept = functools.lru_cache(maxsize=_KEPT)(make)

    def cached(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return make(*args)
        return kept(*args)

    return cached


def _with_shared_limits(config: OrchestratorConfig, listener: Any) -> Options:
    """Return the options of single calls; limits that are numbers become objects that all functions share."""
    made = config.as_options()
    if made.get("rate_limit") is not None:
        made["rate_limit"] = limiter_of(made["rate_limit"])
    limit = made.get("concurrency")
    if limit is not None and not isinstance(limit, ConcurrencyLimit):
        made["concurrency"] = ConcurrencyLimit(limit)
    options = Options.of("Orchestrator", **made)
    if listener is not None:
        options = options.replace("Orchestrator", on_event=[*options.listeners, listener])
    return options


def _without(own: str, listener: Handler) -> Handler:
    def listen(event: Event) -> object:
        return None if event.function == own else listener(event)

    return listen


def _workers(config: OrchestratorConfig) -> dict[str, Any]:
    several, limited = config.multiprocess_config, config.concurrency_config
    limit = None if limited is None else limited.limit
    if several is not None:
        if limit is None:
            return several.as_options()
        # One item in each, so that the number of workers keeps the limit.
        return {"mode": "process", "workers": min(several.workers, limit)}
    if limit is not None:
        # Synchronous functions run in threads then.
        return {"mode": "async", "workers": limit}
    return {"mode": "async", "sequential": True}


# --- the decorator ----------------------------------------------------------------------------------------------------


# Each list of results is its receiver's own, so that a wider type does no harm.
class Orchestrated(Protocol[P, R_co]):  # type: ignore[misc]  # pyright: ignore[reportInvalidTypeVarUse]
    """A function decorated with `@orchestrate`: a coroutine function, with a `process` of this kind, if it was one."""

    __name__: str
    __qualname__: str
    __wrapped__: Callable[..., Any]
    orchestrator: Orchestrator

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function through its orchestrator."""
        ...

    @overload
    def process(
        self: Orchestrated[..., Coroutine[Any, Any, T]], *items: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, list[T]]: ...
    @overload
    def process(self, *items: Any, **kwargs: Any) -> list[R_co]: ...

    @overload
    def __get__(self, instance: None, owner: type, /) -> Self: ...
    @overload
    def __get__(
        self: AcceptsFirst[T, Q, V], instance: T, owner: type[T], /
    ) -> Orchestrated[Q, V]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None, /) -> Self: ...


class _OrchestrateDecorator(Protocol):
    """`@orchestrate` once its configuration is given."""

    def __call__(self, function: Callable[P, R], /) -> Orchestrated[P, R]: ...


@overload
def orchestrate(function: Callable[P, R], /) -> Orchestrated[P, R]: ...
@overload
def orchestrate(
    *,
    config: OrchestratorConfig | None = None,
    fallbacks: Callable[..., Any] | Iterable[Callable[..., Any]] | None = None,
    retry_config: RetryConfig | None = None,
    rate_limit_config: RateLimitConfig | None = None,
    concurrency_config: ConcurrencyConfig | None = None,
    multiprocess_config: MultiprocessConfig | None = None,
) -> _OrchestrateDecorator: ...
def orchestrate(
    function: Callable[..., Any] | None = None,
    /,
    *,
    config: OrchestratorConfig | None = None,
    **parts: Any,
) -> Any:
    """Run all calls of a function through an `Orchestrator` of its own.

    Args:
        function: The function, where it is written bare: `@orchestrate`.
        config: The configuration.
        parts: Instead of `config`, fields of an `OrchestratorConfig`: `fallbacks`, `retry_config`, ...

    Returns:
        A function of the same signature, asynchronous exactly if the original is, with `.process(*items)`,
        which calls it with many items (to be awaited, if the function is asynchronous), and `.orchestrator`.

    Raises:
        OperoUsageError: It is no function, the configuration does not fit it, or is given twice.

    Example:
        >>> @orchestrate(fallbacks=[float])
        ... def number(text):
        ...     return int(text)
        >>> number("2.5"), number.process("1", "1.5")
        (2.5, [1, 1.5])
    """
    if parts:
        if config is not None:
            raise OperoUsageError(
                f"config= and {next(iter(parts))}= exclude each other: give the part to the OrchestratorConfig."
            )
        config = OrchestratorConfig(**parts)
    put_around = functools.partial(_orchestrated, Orchestrator(config))
    return put_around if function is None else put_around(function)


def _orchestrated(orchestrator: Orchestrator, function: Any) -> Any:
    if not (callable(function) or isinstance(function, classmethod | staticmethod)):
        raise OperoUsageError(
            f"orchestrate() takes a function, not {type(function).__name__}: write @orchestrate(config=...)."
        )
    build = functools.partial(_build, orchestrator)
    # A configuration that does not fit is reported now, not at the first call.
    return decorate(function, orchestrator.chains.options, by="orchestrate", build=build)


def _build(orchestrator: Orchestrator, pipeline: Pipeline, _: str) -> Any:
    """Make the function that users call."""
    function, bound = pipeline.info.fn, pipeline.info.bound
    made: Any
    # Without the function's own attributes: `.call` or `.stats` of a decorated one would show only a part.
    wraps: Callable[..., Any] = functools.wraps(function, updated=())
    awaits = is_async_function(function)
    if awaits:

        @wraps
        async def acall(*args: Any, **kwargs: Any) -> Any:
            return await orchestrator.execute(function, *args, **kwargs)

        made = acall
    else:

        @wraps
        def call(*args: Any, **kwargs: Any) -> Any:
            return orchestrator.execute_sync(function, *args, **kwargs)

        made = call

    def process(*items: Any, **kwargs: Any) -> Any:
        """Call the function with each item and return the results in order; to be awaited if it is."""
        chains = orchestrator.chains
        run = chains.process if awaits else chains.process_sync
        return run(function, items[bound:], kwargs, items[:bound])

    made.process = process
    made.orchestrator = orchestrator
    return made
