# this_file: src/opero/events/types.py
"""One class for each kind of event in the life of a call.

They are loaded when the first event is sent, or asked for: a dataclass costs half a millisecond to define.
"""

from __future__ import annotations

from dataclasses import dataclass

from opero.events.event import Event

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
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStarted(Event):
    """A call enters the stages. Heard only by those who ask for it by name, as every call sends one."""

    quiet = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnded(Event):
    """A call has left the stages, whichever way. Heard only by those who ask for it by name.

    Attributes:
        source: "fresh", "hit", ... as on the receipt.
        attempts: Attempts made, 0 where the value was not computed by this call.
        calls: Real calls made.
        error: What it ended with, cancellation included; None if it returned.
        seconds: From `CallStarted` to here.
        slept: Seconds of pauses between attempts.
        waited: Seconds in the queues of rate and concurrency limits.
    """

    quiet = True

    source: str
    attempts: int
    calls: int
    error: BaseException | None
    seconds: float
    slept: float
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed(Event):
    """One real call of the function failed (or its result was rejected, then `error` is None).

    Attributes:
        attempt: Number of the attempt, from 1.
        value: Label of the fallback value it was made with, None without fallback.
        error: The function's own exception.
        seconds: How long the real call took; None if nobody listened when it began.
    """

    attempt: int
    value: str | None
    error: BaseException | None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(Event):
    """Another attempt will be made.

    Attributes:
        attempt: Number of the attempt to come.
        delay: Seconds of pause before it.
    """

    attempt: int
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriesNested(Event):
    """Another attempt will be made after another opero function, called by this one, has retried in vain.

    Attributes:
        inner: Name of that function.
    """

    inner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudgetSpent(Event):
    """A call fails for good, because the retry budget has no retry left.

    Attributes:
        budget: Its name.
    """

    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCooling(Event):
    """A service asked to wait, and the fallback value that was used with it is left alone for so long.

    Attributes:
        value: Its label.
        seconds: How long.
        source: The header or attribute that said so.
    """

    value: str
    seconds: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackUsed(Event):
    """The next value of the fallback parameter is tried.

    Attributes:
        value: Its label.
        index: Its place in the caller's list, from 0.
    """

    value: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterWaited(Event):
    """A call waited for its slot.

    Attributes:
        seconds: How long.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterPaused(Event):
    """A service asked this function to wait, and the limiter now lets nobody through for so long.

    Attributes:
        seconds: How long.
        source: The header or attribute that said so.
    """

    seconds: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHit(Event):
    """A stored result was served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMiss(Event):
    """No fresh result was stored; the function is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStale(Event):
    """An expired result was served, because the function failed.

    Attributes:
        expired: Seconds since its expiry.
        error: What the call failed with; None if it was not tried, because another one has just failed.
    """

    expired: float
    error: BaseException | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRefreshed(Event):
    """A result was computed anew behind the scenes (`cache_refresh`).

    Attributes:
        renewed: Whether there is a new result; if not, the old one stays.
        error: What the call failed with; None if it worked or its result was rejected.
    """

    renewed: bool
    error: BaseException | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSkipped(Event):
    """A result was not stored, or the cache could not be used.

    Attributes:
        reason: A sentence for people.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionEdited(Event):
    """A function's source differs from the one whose results lie on disk or on a server.

    They are served all the same; `cache_version` or `f.cache.clear()` starts afresh.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSucceeded(Event):
    """A call returned a value that was not in the cache.

    Attributes:
        attempts: Attempts it took.
        calls: Real calls it took.
        seconds: From the call's start; None if nobody listened then.
    """

    attempts: int
    calls: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTimedOut(Event):
    """A real call took longer than its `timeout`.

    Attributes:
        seconds: The limit.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinePassed(Event):
    """A call ends because of its deadline.

    Attributes:
        where: Where it was then: "during the call", "waiting for a permit", ...
    """

    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallGaveUp(Event):
    """A call failed for good.

    Attributes:
        attempts: Attempts made.
        calls: Real calls made.
        error: What the caller gets.
        seconds: From the call's start; None if nobody listened then.
    """

    attempts: int
    calls: int
    error: BaseException
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitChanged(Event):
    """A circuit breaker went from one state to another.

    `function` is the function that it guards, or the circuit's own name where it guards several or
    none.

    Attributes:
        circuit: Its name.
        old_state, new_state: "closed", "open", "half_open", "forced_open" or "disabled".
        retry_after: Seconds until it may let a call through again, where it has just opened; None
            otherwise.
    """

    type = "circuit"

    circuit: str
    old_state: str
    new_state: str
    retry_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerFailed(Event):
    """A listener raised. Heard only by those who ask for it by name; without any, stderr is told.

    Attributes:
        handler: The listener; `function` is its name.
        error: What it raised.
        event: The event that it was called with.
    """

    quiet = True

    handler: object
    error: Exception
    event: Event
