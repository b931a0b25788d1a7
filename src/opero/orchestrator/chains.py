# this_file: src/opero/orchestrator/chains.py
"""What one configuration makes of functions: a pipeline around each, a chain of each and its fallbacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opero.core.function import describe_function
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.core.rate_limit import limiter_of
from opero.core.strategies import is_retry_error, retry_error
from opero.core.wrapper import make_wrapper
from opero.events.messages import log_event
from opero.limits.permits import ConcurrencyLimit
from opero.orchestrator.chain import FallbackChain
from opero.orchestrator.config import functions
from opero.utils.async_utils import ensure_async, is_async_function, run_async
from opero.utils.matching import is_final, matches

if TYPE_CHECKING:
    from opero.events import Handler
    from opero.orchestrator.config import OrchestratorConfig

__all__ = ["Chains", "Function"]

_KEPT = 256
"""Functions whose pipelines are kept: to make one costs a hundred times a call."""

Function = Callable[..., Any]


class Chains:
    """Runs functions by a configuration, whose rate and concurrency limits hold for all of them together.

    Args:
        config: What is switched on.
        options: What another instance has made of it, with the limits to share; None to make it.
    """

    def __init__(self, config: OrchestratorConfig, options: Options | None = None) -> None:
        self.config = config
        logger = config.logger
        self._listener = None if logger is None else functools.partial(log_event, logger)
        self._options = _with_shared_limits(config, self._listener) if options is None else options
        self.made: Callable[..., Any] = _remembering(self._make)
        self.chain: Callable[..., Any] = _remembering(self._make_chain)

    async def execute(
        self, first: tuple[Function, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the first of some functions that works, or a fallback, with the same arguments."""
        chain: FallbackChain = self.chain(first, True)
        try:
            return await chain.execute(*args, **kwargs)
        except Exception as error:
            if self.hides(error):
                raise self.instead_of(error) from error
            raise

    def execute_sync(
        self, first: tuple[Function, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do the same without an event loop."""
        chain: FallbackChain = self.chain(first, False)
        if chain.awaits:
            return run_async(self.execute(first, args, kwargs))
        try:
            return chain.execute_sync(*args, **kwargs)
        except Exception as error:
            if self.hides(error):
                raise self.instead_of(error) from error
            raise

    def hides(self, error: Exception) -> bool:
        """Tell whether the configuration wants another error in this one's place."""
        retry = self.config.retry_config
        if retry is None or retry.reraise or is_final(error) or is_retry_error(error):
            return False
        return matches(retry.retry_exceptions, error)

    def instead_of(self, error: Exception) -> Exception:
        """Return that other error."""
        retry = self.config.retry_config
        return retry_error(error, 1 if retry is None else retry.max_attempts)

    def _make_chain(self, first: tuple[Function, ...], awaits: bool) -> FallbackChain:
        several = (*first, *functions("fallbacks", self.config.fallbacks))
        awaits = awaits or any(is_async_function(function) for function in several)
        made = [self.made(function, awaits)[1] for function in several]
        return FallbackChain(made[0], made[1:], on_event=self._listener)

    def _make(self, function: Function, awaits: bool) -> tuple[Pipeline, Function]:
        # The pauses and queues of a synchronous function are then the event loop's, and can be cancelled there.
        wanted = ensure_async(function) if awaits else function
        pipeline = Pipeline(describe_function(wanted), self._options)
        return pipeline, make_wrapper(pipeline)

    @property
    def listeners(self) -> tuple[Handler, ...]:
        """Who hears what happens, of those that the configuration names."""
        given = self._options.on_event
        return () if given is None else tuple(given) if isinstance(given, Iterable) else (given,)

    def for_workers(self) -> Chains:
        """Return what does the same in worker processes, which share the rate limit.

        Listeners and the error that stands for others stay behind, and so do the permits: who has a concurrency
        limit gets as many workers, with one item each.
        """
        retry = self.config.retry_config
        config = replace(
            self.config,
            logger=None,
            retry_config=None if retry is None else replace(retry, reraise=True),
        )
        options = self._options.replace("Orchestrator", on_event=None, concurrency=None)
        return Chains(config, options)

    def __reduce__(self) -> Any:
        return Chains, (self.config, self._options)


def _remembering(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that knows its last results, where its arguments can be hashed."""
    kept = functools.lru_cache(maxsize=_KEPT)(make)

    def remembered(*args: Any) -> Any:
        try:
            return kept(*args)
        except TypeError:
            if _can_be_hashed(args):
                raise
            return make(*args)

    return remembered


def _can_be_hashed(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _with_shared_limits(config: OrchestratorConfig, listener: Any) -> Options:
    """Return the options for single calls; limits that are numbers become objects which all functions share."""
    made = config.as_options()
    if made.get("rate_limit") is not None:
        made["rate_limit"] = limiter_of(made["rate_limit"])
    limit = made.get("concurrency")
    if limit is not None and not isinstance(limit, ConcurrencyLimit):
        made["concurrency"] = ConcurrencyLimit(limit)
    if listener is not None:
        given = made.get("on_event")
        own = () if given is None else (given,) if callable(given) else tuple(given)
        made["on_event"] = [*own, listener]
    return Options.of("Orchestrator", **made)
