# this_file: src/opero/orchestrator/items.py
"""Many items: `process` is a map whose options the configuration tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.concurrency.mapper import Arguments, Mapper
from opero.core.function import describe_function
from opero.core.options import MapOptions
from opero.core.pipeline import Pipeline
from opero.errors import OperoUsageError
from opero.orchestrator.chain import name_of
from opero.orchestrator.config import functions
from opero.utils.async_utils import run_async

if TYPE_CHECKING:
    from opero.events import Event, Handler
    from opero.orchestrator.chains import Chains, Function
    from opero.orchestrator.config import OrchestratorConfig

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
    mapper = _mapper(chains, _several(given), before, on_a_loop=True)
    try:
        return await mapper.acollect(items, Arguments())
    except Exception as error:
        if chains.hides(error):
            raise chains.instead_of(error) from error
        raise


def process_sync(
    chains: Chains, given: Any, items: tuple[Any, ...], *, before: tuple[Any, ...] = ()
) -> list[Any]:
    """Do the same without an event loop."""
    mapper = _mapper(chains, _several(given), before)
    if mapper.awaits:
        return run_async(process(chains, given, items, before=before))
    try:
        return mapper.collect(items, Arguments())
    except Exception as error:
        if chains.hides(error):
            raise chains.instead_of(error) from error
        raise


def _several(given: Any) -> tuple[Function, ...]:
    several = functions("functions", given)
    if not several:
        raise OperoUsageError("process() needs a function: write process([function], *items).")
    return several


class _Item:
    """The work on one item. An object, and no closure, so that it can be sent elsewhere."""

    def __init__(
        self, chains: Chains, several: tuple[Function, ...], before: tuple[Any, ...]
    ) -> None:
        self.__name__ = name_of(several[0])
        self.__qualname__ = f"{self.__name__}.process"
        self.chains = chains
        self.several = several
        self.before = before

    def __call__(self, item: Any) -> Any:
        return self.chains.execute_sync(self.several, (*self.before, item), {})


class _AsyncItem(_Item):
    """The same where something asynchronous may be called."""

    async def __call__(self, item: Any) -> Any:
        return await self.chains.execute(self.several, (*self.before, item), {})


def _mapper(
    chains: Chains,
    several: tuple[Function, ...],
    before: tuple[Any, ...],
    *,
    on_a_loop: bool = False,
) -> Mapper:
    """Return the map; everything but its workers is off, because the functions have their own pipelines."""
    workers = _workers(chains.config)
    # Without workers, a synchronous function goes to a thread by itself, so that the loop goes on.
    awaits = on_a_loop and workers.get("sequential", False)
    kind = _AsyncItem if awaits or chains.chain(several, False).awaits else _Item
    off: dict[str, Any] = {"cache": False, "retries": 0, "progress": False}
    if "process" not in workers["mode"]:
        work = kind(chains, several, before)
        options = MapOptions.of("process", **off, **workers)
        return Mapper(Pipeline(describe_function(work), options))
    work = kind(chains.for_workers(), several, before)
    # What the functions tell comes back with the results; what the map itself tells nobody has asked for.
    heard = [_without(work.__qualname__, listener) for listener in chains.listeners]
    options = MapOptions.of("process", **off, **workers, on_event=heard or None)
    return Mapper(Pipeline(describe_function(work), options), tells_all=bool(heard))


def _without(own: str, listener: Handler) -> Handler:
    def hear(event: Event) -> object:
        return None if event.function == own else listener(event)

    return hear


def _workers(config: OrchestratorConfig) -> dict[str, Any]:
    several, limit = config.multiprocess_config, config.concurrency_config
    if several is not None:
        made = several.as_options()
        if limit is None:
            return made
        # One item in each, so that it is the number of workers which keeps the limit.
        return {"mode": "process", "workers": min(several.max_workers, limit.limit)}
    if limit is not None:
        # Synchronous functions run in threads then.
        return {"mode": "async", "workers": limit.limit}
    return {"mode": "async", "sequential": True}
