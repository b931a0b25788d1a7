# this_file: src/opero/events/__init__.py
# ruff: noqa: F405 - the event classes are loaded at their first use
"""Report what happens inside a call as typed events, delivered by a bus.

Without listeners no event is built or sent. Events carry no argument values, except
for the label of a fallback value, which is masked where the parameter looks like a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.events.bus import EventBus, Handler, Subscription, event_bus
from opero.events.runs import Run, current_run
from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.events.types import *  # noqa: F403 - the classes, for type checkers; `__all__` names them

__all__ = [
    "AttemptFailed", "CacheHit", "CacheMiss", "CacheRefreshed", "CacheSkipped", "CacheStale", "CallEnded",
    "CallGaveUp", "CallStarted", "CallSucceeded", "CallTimedOut", "CircuitChanged", "CustomEvent",
    "DeadlinePassed", "Event", "EventBus", "FallbackUsed", "FunctionEdited", "Handler", "HandlerFailed",
    "LimiterPaused", "LimiterWaited", "MapProgress", "MapWaiting", "RetriesNested", "RetryBudgetSpent",
    "RetryScheduled", "Run", "StepChanged", "Subscription", "TaskChanged", "ValueCooling", "WorkflowChanged",
    "current_run", "event_bus",
]  # fmt: skip

# Names that are imported above are never looked up here.
__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(__name__, {"opero.events.types": __all__})
