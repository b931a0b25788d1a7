# this_file: src/opero/__init__.py
"""opero: make calls to flaky, slow, rate-limited and costly services dependable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.caching.handles import clear_cache
    from opero.core.classify import add_classifier
    from opero.core.deadline import deadline, remaining
    from opero.core.decorated import Receipt
    from opero.core.failures import failures
    from opero.core.rate_limit import RateLimiter
    from opero.core.retry_budget import RetryBudget
    from opero.decorators.opero import opero
    from opero.decorators.operomap import operomap
    from opero.errors import OperoError, OperoUsageError, OperoWarning
    from opero.events import EventBus, event_bus
    from opero.limits.breaker import CircuitBreaker
    from opero.limits.breaker_state import CircuitState
    from opero.limits.permits import ConcurrencyLimit
    from opero.orchestrator import FallbackChain, Orchestrator, orchestrate
    from opero.orchestrator.config import (
        ConcurrencyConfig,
        MultiprocessConfig,
        OrchestratorConfig,
        RateLimitConfig,
        RetryConfig,
    )
    from opero.tasks import CircuitGroup, Parallel, Sequence, Task, TaskState
    from opero.utils.logging import ContextAdapter, get_logger, log_context

__all__ = [
    "CircuitBreaker",
    "CircuitGroup",
    "CircuitState",
    "ConcurrencyConfig",
    "ConcurrencyLimit",
    "ContextAdapter",
    "EventBus",
    "FallbackChain",
    "MultiprocessConfig",
    "OperoError",
    "OperoUsageError",
    "OperoWarning",
    "Orchestrator",
    "OrchestratorConfig",
    "Parallel",
    "RateLimitConfig",
    "RateLimiter",
    "Receipt",
    "RetryBudget",
    "RetryConfig",
    "Sequence",
    "Task",
    "TaskState",
    "add_classifier",
    "clear_cache",
    "deadline",
    "event_bus",
    "failures",
    "get_logger",
    "log_context",
    "opero",
    "operomap",
    "orchestrate",
    "remaining",
]

_IN_CORE = "write `from opero.core import {}`"
_IN_UTILS = "write `from opero.utils import {}`"
_GONE = {
    "AllFailedError": "a call that fails for good raises the last error itself; "
    "`opero.failures(error)` returns all errors",
    "CustomRetryError": "a call that fails for good raises the last error itself; "
    "`RetryConfig(reraise=False)` raises a `tenacity.RetryError`",
    "FallbackError": "a call that fails for good raises the last error itself; "
    "`opero.failures(error)` returns all errors",
    "exceptions": "errors are in `opero.errors`",
    "opmap": "write `from opero import operomap`",
    "logger": "write `opero.get_logger('opero')` for a logger, or `opero.utils.configure_logging()` for opero's lines",
    **{
        name: _IN_CORE.format(name)
        for name in (
            "get_cache_context",
            "get_cache_decorator",
            "get_fallback_decorator",
            "get_rate_limit_decorator",
            "get_retry_decorator",
        )
    },
    **{
        name: _IN_UTILS.format(name)
        for name in ("configure_logging", "ensure_async", "is_async_function", "run_async")
    },
    "get_parallel_executor": "write `from opero.concurrency import get_parallel_executor`",
    "get_parallel_map_decorator": "write `from opero.concurrency import get_parallel_map_decorator`",
}
"""Names that former versions of opero had here, and what to write instead."""

__dir__: Callable[[], list[str]]
_lazy, __dir__ = lazy_exports(
    __name__,
    {
        "opero.caching.handles": ("clear_cache",),
        "opero.core.classify": ("add_classifier",),
        "opero.core.deadline": ("deadline", "remaining"),
        "opero.core.failures": ("failures",),
        "opero.core.rate_limit": ("RateLimiter",),
        "opero.core.decorated": ("Receipt",),
        "opero.core.retry_budget": ("RetryBudget",),
        "opero.decorators.opero": ("opero",),
        "opero.decorators.operomap": ("operomap",),
        "opero.errors": ("OperoError", "OperoUsageError", "OperoWarning"),
        "opero.events": ("EventBus", "event_bus"),
        "opero.limits.breaker": ("CircuitBreaker",),
        "opero.limits.breaker_state": ("CircuitState",),
        "opero.limits.permits": ("ConcurrencyLimit",),
        "opero.orchestrator": ("FallbackChain", "Orchestrator", "orchestrate"),
        "opero.orchestrator.config": (
            "ConcurrencyConfig",
            "MultiprocessConfig",
            "OrchestratorConfig",
            "RateLimitConfig",
            "RetryConfig",
        ),
        "opero.tasks.parallel": ("Parallel",),
        "opero.tasks.task": ("CircuitGroup", "Sequence", "Task", "TaskState"),
        "opero.utils.logging": ("ContextAdapter", "get_logger", "log_context"),
    },
    gone=_GONE,
)


def __getattr__(name: str) -> Any:
    """Load a public name, or the version, when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("opero")
        except PackageNotFoundError:
            raise AttributeError("opero is not installed, so it has no version") from None
    return _lazy(name)
