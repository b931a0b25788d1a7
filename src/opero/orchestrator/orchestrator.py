# this_file: src/opero/orchestrator/orchestrator.py
"""The orchestrator: one configuration, and the limits in it, for any functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from opero.core.explain import explain
from opero.errors import OperoUsageError
from opero.orchestrator.chains import Chains, Function
from opero.orchestrator.config import OrchestratorConfig
from opero.orchestrator.items import process, process_sync
from opero.utils.async_utils import is_async_function

if TYPE_CHECKING:
    from opero.core.call import Explanation

__all__ = ["Orchestrator"]


class Orchestrator:
    """Calls functions as its configuration says; rate and concurrency limits hold for all of them together.

    Args:
        config: What is switched on; nothing by default.

    Attributes:
        config: The configuration.
        chains: What it makes of functions.

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
        self.chains: Chains = Chains(self.config)

    async def execute(self, function: Function, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, synchronous (in a thread) or not, and what it falls back on.

        Raises:
            Exception: The last call's own error; `tenacity.RetryError` from it with `reraise=False`.
        """
        return await self.chains.execute((function,), args, kwargs)

    def execute_sync(self, function: Function, /, *args: Any, **kwargs: Any) -> Any:
        """Do what `execute` does, for callers without an event loop."""
        return self.chains.execute_sync((function,), args, kwargs)

    async def process(self, functions: Function | Iterable[Function], /, *items: Any) -> list[Any]:
        """Call functions with each item and return the results in order.

        Each item goes to the first function; if that fails for good to the second, and so on, then to the
        fallbacks of the configuration. One item is worked on after the other, unless the configuration has
        a concurrency limit or worker processes.

        Args:
            functions: A function or several.
            items: What they are called with, each the single argument of one call.

        Raises:
            Exception: The error of the first item that failed for good; no further item is begun then.
        """
        return await process(self.chains, functions, items)

    def process_sync(self, functions: Function | Iterable[Function], /, *items: Any) -> list[Any]:
        """Do what `process` does, for callers without an event loop."""
        return process_sync(self.chains, functions, items)

    def explain(self, function: Function) -> Explanation:
        """Describe what happens to a call of a function, stage by stage."""
        return explain(self.chains.made(function, is_async_function(function))[0])

    def __repr__(self) -> str:
        return f"Orchestrator({self.config!r})"
