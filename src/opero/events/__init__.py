# this_file: src/opero/events/__init__.py
"""What happens inside a call, as typed events, and the bus that carries them.

Nothing is built and nothing is sent while nobody listens. Events carry no argument values, except
for the label of a fallback value, which is masked where the parameter looks like a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.events.bus import EventBus, event_bus
from opero.events.subscription import Handler, Subscription
from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.events.event import Event
    from opero.events.run import Run, current_run
    from opero.events.types import (
        AttemptFailed,
        CacheHit,
        CacheMiss,
        CacheRefreshed,
        CacheSkipped,
        CacheStale,
        CallEnded,
        CallGaveUp,
        CallStarted,
        CallSucceeded,
        CallTimedOut,
        CircuitChanged,
        DeadlinePassed,
        FallbackUsed,
        FunctionEdited,
        HandlerFailed,
        LimiterPaused,
        LimiterWaited,
        RetriesNested,
        RetryBudgetSpent,
        RetryScheduled,
        ValueCooling,
    )
    from opero.events.work import (
        CustomEvent,
        MapProgress,
        StepChanged,
        TaskChanged,
        WorkflowChanged,
    )

__all__ = [
    "AttemptFailed",
    "CacheHit",
    "CacheMiss",
    "CacheRefreshed",
    "CacheSkipped",
    "CacheStale",
    "CallEnded",
    "CallGaveUp",
    "CallStarted",
    "CallSucceeded",
    "CallTimedOut",
    "CircuitChanged",
    "CustomEvent",
    "DeadlinePassed",
    "Event",
    "EventBus",
    "FallbackUsed",
    "FunctionEdited",
    "Handler",
    "HandlerFailed",
    "LimiterPaused",
    "LimiterWaited",
    "MapProgress",
    "RetriesNested",
    "RetryBudgetSpent",
    "RetryScheduled",
    "Run",
    "StepChanged",
    "Subscription",
    "TaskChanged",
    "ValueCooling",
    "WorkflowChanged",
    "current_run",
    "event_bus",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(
            (
                "AttemptFailed",
                "CacheHit",
                "CacheMiss",
                "CacheRefreshed",
                "CacheSkipped",
                "CacheStale",
                "CallEnded",
                "CallGaveUp",
                "CallStarted",
                "CallSucceeded",
                "CallTimedOut",
                "CircuitChanged",
                "DeadlinePassed",
                "FallbackUsed",
                "FunctionEdited",
                "HandlerFailed",
                "LimiterPaused",
                "LimiterWaited",
                "RetriesNested",
                "RetryBudgetSpent",
                "RetryScheduled",
                "ValueCooling",
            ),
            "opero.events.types",
        ),
        **dict.fromkeys(
            ("CustomEvent", "MapProgress", "StepChanged", "TaskChanged", "WorkflowChanged"),
            "opero.events.work",
        ),
        "Event": "opero.events.event",
        "Run": "opero.events.run",
        "current_run": "opero.events.run",
    },
)
