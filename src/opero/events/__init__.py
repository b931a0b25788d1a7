# this_file: src/opero/events/__init__.py
"""What happens inside a call, as typed events, and the bus that carries them.

Nothing is built and nothing is sent while nobody listens. Events carry no argument values, except
for the label of a fallback value, which is masked where the parameter looks like a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.events.bus import EventBus, Handler, Subscription, deliver, event_bus
from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.events.kinds import (
        AttemptFailed,
        CacheHit,
        CacheMiss,
        CacheSkipped,
        CallGaveUp,
        CallSucceeded,
        CallTimedOut,
        CircuitChanged,
        DeadlinePassed,
        Event,
        FallbackUsed,
        LimiterPaused,
        LimiterWaited,
        RetryScheduled,
    )

__all__ = [
    "AttemptFailed",
    "CacheHit",
    "CacheMiss",
    "CacheSkipped",
    "CallGaveUp",
    "CallSucceeded",
    "CallTimedOut",
    "CircuitChanged",
    "DeadlinePassed",
    "Event",
    "EventBus",
    "FallbackUsed",
    "Handler",
    "LimiterPaused",
    "LimiterWaited",
    "RetryScheduled",
    "Subscription",
    "deliver",
    "event_bus",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    dict.fromkeys(
        (
            "AttemptFailed",
            "CacheHit",
            "CacheMiss",
            "CacheSkipped",
            "CallGaveUp",
            "CallSucceeded",
            "CallTimedOut",
            "CircuitChanged",
            "DeadlinePassed",
            "Event",
            "FallbackUsed",
            "LimiterPaused",
            "LimiterWaited",
            "RetryScheduled",
        ),
        "opero.events.kinds",
    ),
)
