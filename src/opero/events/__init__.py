# this_file: src/opero/events/__init__.py
"""Report what happens inside a call as typed events, delivered by a bus.

Without listeners no event is built or sent. Events carry no argument values, except
for the label of a fallback value, which is masked where the parameter looks like a secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.events.bus import EventBus as EventBus
    from opero.events.bus import Handler as Handler
    from opero.events.bus import Subscription as Subscription
    from opero.events.bus import event_bus as event_bus
    from opero.events.types import *  # noqa: F403 - all event classes
    from opero.utils.ambient import Run as Run
    from opero.utils.ambient import current_run as current_run

export_lazily(
    __name__,
    {
        "opero.events.bus": ("EventBus", "Handler", "Subscription", "event_bus"),
        "opero.utils.ambient": ("Run", "current_run"),
        "opero.events.types": (
            "AttemptFailed", "CacheHit", "CacheMiss", "CacheRefreshed", "CacheSkipped", "CacheStale",
            "CallEnded", "CallGaveUp", "CallStarted", "CallSucceeded", "CallTimedOut", "CircuitChanged",
            "CustomEvent", "DeadlinePassed", "Event", "FallbackUsed", "FunctionEdited", "HandlerFailed",
            "LimiterPaused", "LimiterWaited", "MapProgress", "MapWaiting", "RetriesNested",
            "RetryBudgetSpent", "RetryScheduled", "StepChanged", "TaskChanged", "ValueCooling",
            "WorkflowChanged",
        ),
    },
)  # fmt: skip
