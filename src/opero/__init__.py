# this_file: src/opero/__init__.py
"""opero: make calls to flaky, slow, rate-limited and costly services dependable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.caching.handles import clear_cache as clear_cache
    from opero.core.classify import add_classifier as add_classifier
    from opero.core.deadline import deadline as deadline
    from opero.core.deadline import remaining as remaining
    from opero.core.decorated import Receipt as Receipt
    from opero.core.failures import failures as failures
    from opero.core.rate_limit import RateLimiter as RateLimiter
    from opero.core.retry_budget import RetryBudget as RetryBudget
    from opero.decorators.opero import opero as opero
    from opero.decorators.operomap import operomap as operomap
    from opero.errors import OperoError as OperoError
    from opero.errors import OperoUsageError as OperoUsageError
    from opero.errors import OperoWarning as OperoWarning
    from opero.events import EventBus as EventBus
    from opero.events import event_bus as event_bus
    from opero.limits.breaker import CircuitBreaker as CircuitBreaker
    from opero.limits.breaker_state import CircuitState as CircuitState
    from opero.limits.permits import ConcurrencyLimit as ConcurrencyLimit
    from opero.orchestrator import FallbackChain as FallbackChain
    from opero.orchestrator import Orchestrator as Orchestrator
    from opero.orchestrator import orchestrate as orchestrate
    from opero.orchestrator.config import ConcurrencyConfig as ConcurrencyConfig
    from opero.orchestrator.config import MultiprocessConfig as MultiprocessConfig
    from opero.orchestrator.config import OrchestratorConfig as OrchestratorConfig
    from opero.orchestrator.config import RateLimitConfig as RateLimitConfig
    from opero.orchestrator.config import RetryConfig as RetryConfig
    from opero.tasks import CircuitGroup as CircuitGroup
    from opero.tasks import Parallel as Parallel
    from opero.tasks import Sequence as Sequence
    from opero.tasks import Task as Task
    from opero.tasks import TaskState as TaskState
    from opero.utils.logging import ContextAdapter as ContextAdapter
    from opero.utils.logging import get_logger as get_logger
    from opero.utils.logging import log_context as log_context


_EARLIER_ERROR = "a call that fails for good raises the last error itself; `opero.failures(error)` returns all errors"
_MOVED = {
    "concurrency": ("get_parallel_executor", "get_parallel_map_decorator"),
    "core": (
        "get_cache_context", "get_cache_decorator", "get_fallback_decorator", "get_rate_limit_decorator",
        "get_retry_decorator",
    ),
    "utils": ("configure_logging", "ensure_async", "is_async_function", "run_async"),
}  # fmt: skip
_GONE = {
    "AllFailedError": _EARLIER_ERROR,
    "CustomRetryError": "a call that fails for good raises the last error itself; "
    "`RetryConfig(reraise=False)` raises a `tenacity.RetryError`",
    "FallbackError": _EARLIER_ERROR,
    "exceptions": "errors are in `opero.errors`",
    "opmap": "write `from opero import operomap`",
    "logger": "write `opero.get_logger('opero')` for a logger, or `opero.utils.configure_logging()` for opero's lines",
    **{
        name: f"write `from opero.{package} import {name}`"
        for package, names in _MOVED.items()
        for name in names
    },
}
"""Names that former versions of opero had here, and what to write instead."""

_load = export_lazily(
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
            "ConcurrencyConfig", "MultiprocessConfig", "OrchestratorConfig", "RateLimitConfig", "RetryConfig",
        ),
        "opero.tasks.parallel": ("Parallel",),
        "opero.tasks.task": ("CircuitGroup", "Sequence", "Task", "TaskState"),
        "opero.utils.logging": ("ContextAdapter", "get_logger", "log_context"),
    },
    gone=_GONE,
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name, or the version, when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("opero")
        except PackageNotFoundError:
            raise AttributeError("opero is not installed, so it has no version") from None
    return _load(name)
