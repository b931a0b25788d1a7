# this_file: src/opero/caching/aging.py
"""How entries age: when one is renewed before its expiry, and when it is served after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Final

from opero.caching.lulls import Lulls
from opero.caching.memory import AgingEntry, Entry, Life
from opero.errors import (
    CircuitOpenError,
    DeadlineError,
    OperoUsageError,
    RateLimitPausedError,
    RefusalError,
)
from opero.utils import ambient
from opero.utils.matching import Rejected
from opero.utils.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from opero.core.call import Call
    from opero.core.options import Options

__all__ = ["Aging", "excuses", "renewal_due"]

FAILURE_LULL: Final = 5.0
"""Seconds for which a failure counts as fresh. The service's own request to wait may make it longer."""


def renewal_due(born: float, expiry: float, share: float) -> float:
    """Return the time from which an entry is to be renewed.

    Example:
        >>> renewal_due(born=100.0, expiry=200.0, share=0.8)
        180.0
    """
    return born + share * (expiry - born)


def excuses(
    error: Exception, walk: Sequence[Exception], retried: Callable[[Exception], bool]
) -> bool:
    """Tell whether a failed call may be answered with an expired entry.

    Args:
        error: What the call ended with.
        walk: Errors of its last attempt; one that is retried is enough, as it is for another
            attempt.
        retried: Whether an error is one that `retry_on` means.
    """
    # A paused limiter, like an open circuit, remembers what the service has told another call.
    if isinstance(error, CircuitOpenError | DeadlineError | RateLimitPausedError):
        return True
    # A rejected result is a result: its caller gets it, as without an old one.
    if isinstance(error, OperoUsageError | Rejected):
        return False
    if isinstance(error, RefusalError) and all(error is not e for e in walk):
        return False
    errors = walk if any(e is error for e in walk) else (*walk, error)
    return any(retried(e) for e in errors)


class Aging:
    """The ages of one function's entries.

    Args:
        options: `cache_ttl`, `cache_stale_ttl` and `cache_refresh`.

    Attributes:
        retried: Whether an error is one that `retry_on` means; without a retry stage, any is.
        stale_ttl: Seconds for which an expired entry may be served.
        share: Part of its lifetime after which an entry is renewed; None if it is not.
        lulls: Keys whose last call has just failed.
    """

    def __init__(self, options: Options) -> None:
        wanted = options.cache_stale_ttl
        self.stale_ttl: Final = 0.0 if wanted is None else parse_seconds(wanted, "cache_stale_ttl")
        self.share: Final = options.cache_refresh
        self.lulls: Final = Lulls()
        # Options without a lifetime are refused when they are made.
        self._ttl = (
            math.inf if options.cache_ttl is None else parse_seconds(options.cache_ttl, "cache_ttl")
        )
        self.retried: Callable[[Exception], bool] = lambda error: True

    def aged(self, entry: Entry, now: float) -> Entry:
        """Return an entry that remembers when it was born.

        Its `expires` is the earliest time at which there is something to decide, so that express
        lanes let it alone from then on.
        """
        expiry = entry.expires
        soft = expiry if self.share is None else renewal_due(now, expiry, self.share)
        return AgingEntry(entry, Life(now, expiry, expiry + self.stale_ttl), soft)

    def due(self, key: Hashable, entry: Entry) -> bool:
        """Whether a live entry is to be renewed now."""
        if self.share is None or entry.expiry == math.inf:
            return False
        # Who stored it may have had no need of its birth.
        born = entry.expiry - self._ttl if entry.life is None else entry.life.born
        now = ambient.clock().monotonic()
        return renewal_due(born, entry.expiry, self.share) <= now and not self.lulls.lasts(key, now)

    def usable(self, entry: Entry, now: float) -> bool:
        """Whether an expired entry may still be served."""
        return now < entry.expiry + self.stale_ttl

    def spares(self, key: Hashable, entry: Entry) -> bool:
        """Whether an expired entry is served at once, because a call for it has just failed."""
        now = ambient.clock().monotonic()
        return self.usable(entry, now) and self.lulls.excused(key, now)

    def fails(self, call: Call, key: Hashable, entry: Entry, error: Exception) -> bool:
        """Take note of a failed call; tell whether its caller gets the expired entry instead."""
        excused = call.overdue or excuses(error, call.attempt_errors or (), self.retried)
        now = ambient.clock().monotonic()
        # A caller that was short of time says nothing about the service.
        if not (call.overdue or isinstance(error, DeadlineError)):
            self.lulls.begin(key, now, max(FAILURE_LULL, call.hint), excused=excused)
        return excused and self.usable(entry, now)

    def describe(self) -> list[str]:
        """Return what `explain()` tells."""
        told = []
        if self.share is not None:
            told.append(f"renewed behind the scenes after {self.share:.0%} of that")
        if self.stale_ttl:
            told.append(f"{format_seconds(self.stale_ttl)} longer if the call fails")
        return told
