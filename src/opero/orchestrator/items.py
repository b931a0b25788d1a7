# this_file: src/opero/orchestrator/items.py
"""Many items: `process` is a map whose options the configuration tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.concurrency.mapper import Arguments, Mapper
from opero.config import functions
from opero.core.function import describe_function
from opero.core.map_options import MapOptions
from opero.core.pipeline import Pipeline
from opero.errors import OperoUsageError
from opero.orchestrator.chain import name_of
from opero.utils.async_utils import is_async_function, run_async

if TYPE_CHECKING:
    from opero.config import OrchestratorConfig
    from opero.orchestrator.chains import Chains, Function

__all__ = ["process", "process_sync"]


async def process(
    chains: Chains, given: Any, items: tuple[Any, ...], *, before: tuple[Any, ...] = ()
) -> list[Any]:
    """Return the result of some functions for each item, in order.

    Args:
        chains: What runs the functions.
        given: A function or several.
        items: The items.
        before: Arguments before each item: the instance or class of a method.
    """
    # Without workers, a synchronous function goes to a thread by itself, so that the loop goes on.
    work = _work(chains, given, before, awaits=not _workers(chains.config))
    return await _mapper(work, chains.config).acollect(items, Arguments())


def process_sync(
    chains: Chains, given: Any, items: tuple[Any, ...], *, before: tuple[Any, ...] = ()
) -> list[Any]:
    """Do the same without an event loop."""
    work = _work(chains, given, before)
    mapper = _mapper(work, chains.config)
    if is_async_function(work):
        return run_async(mapper.acollect(items, Arguments()))
    return mapper.collect(items, Arguments())


def _work(chains: Chains, given: Any, before: tuple[Any, ...], *, awaits: bool = False) -> _Item:
    """Return what works on one item: synchronous if all that may be called is, and nobody wants it otherwise."""
    several = functions("functions", given)
    if not several:
        raise OperoUsageError("process() needs a function: write process([function], *items).")
    awaits = awaits or chains.chain(several, False).awaits
    return (_AsyncItem if awaits else _Item)(chains, several, before)


class _Item:
    """The work on one item. An object, and no closure, so that it can be sent elsewhere."""

    def __init__(
        self, chains: Chains, several: tuple[Function, ...], before: tuple[Any, ...]
    ) -> None:
        self.__name__ = self.__qualname__ = name_of(several[0])
        self.chains = chains
        self.several = several
        self.before = before

    def __call__(self, item: Any) -> Any:
        return self.chains.execute_sync(self.several, (*self.before, item), {})


class _AsyncItem(_Item):
    """The same where something asynchronous may be called."""

    async def __call__(self, item: Any) -> Any:
        return await self.chains.execute(self.several, (*self.before, item), {})


def _mapper(work: _Item, config: OrchestratorConfig) -> Mapper:
    """Return the map; everything but its workers is off, because the functions have their own pipelines."""
    off: dict[str, Any] = {"cache": False, "retries": 0, "progress": False}
    workers = _workers(config) or {"sequential": True}
    options = MapOptions.of("process", **off, **workers)
    return Mapper(Pipeline(describe_function(work), options))


def _workers(config: OrchestratorConfig) -> dict[str, Any]:
    if config.concurrency_config is not None:
        # Synchronous functions run in threads then: they share the limits, and items are many waits and little work.
        return {"mode": "async", "workers": config.concurrency_config.limit}
    return {}
