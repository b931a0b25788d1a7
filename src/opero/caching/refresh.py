# this_file: src/opero/caching/refresh.py
"""Decide when entries are refreshed before they expire or served afterwards; run refreshes in the background."""

from __future__ import annotations

import atexit
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from opero.caching.memory import Entry, Life
from opero.errors import (
    CircuitOpenError,
    DeadlineError,
    OperoUsageError,
    RateLimitPausedError,
    RefusalError,
    Rejected,
)
from opero.utils import ambient
from opero.utils.fork import reset_after_fork, run_after_fork
from opero.utils.steps import run_async, run_sync
from opero.utils.threads import ThreadCall, run_in_thread
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from asyncio import Task

    from opero.utils.steps import StepLogic


FRESH_FAILURE_SECONDS: Final = 5.0
"""Seconds for which a failure counts as fresh. The service's own request to wait may make it longer."""

_ELSEWHERE_SECONDS: Final = 1.0
"""Seconds for which this process leaves an entry to another one that is refreshing it."""


# --- failures -------------------------------------------------------------------------------------


def excuses(
    error: Exception, attempt: Sequence[Exception], retried: Callable[[Exception], bool]
) -> bool:
    """Return whether a failed call may be answered with an expired entry.

    Args:
        error: What the call ended with.
        attempt: Errors of its last attempt; one that is retried is enough, as it is for another
            attempt.
        retried: Whether an error is one that `retry_on` means.
    """
    # A paused limiter, like an open circuit, remembers what the service has answered another call.
    if isinstance(error, CircuitOpenError | DeadlineError | RateLimitPausedError):
        return True
    # A rejected result is a result: its caller gets it, as without an old one.
    if isinstance(error, OperoUsageError | Rejected):
        return False
    if isinstance(error, RefusalError) and all(error is not e for e in attempt):
        return False
    errors = attempt if any(e is error for e in attempt) else (*attempt, error)
    return any(retried(e) for e in errors)


class RecentFailures:
    """Keys whose last call has just failed: for a while they need not be tried again.

    Example:
        >>> failures = RecentFailures()
        >>> failures.add("key", now=100.0, seconds=5.0, excused=True)
        >>> [failures.fresh(key, now) for key, now in (("key", 104), ("key", 105), ("other", 104))]
        [True, False, False]
    """

    MOST: Final = 10_000
    """Keys that are remembered; beyond it the oldest are forgotten early."""

    def __init__(self) -> None:
        self._failures: dict[Hashable, tuple[float, bool]] = {}  # until when, and whether excused
        self._lock = Lock()
        reset_after_fork(self)

    def add(self, key: Hashable, now: float, seconds: float, *, excused: bool) -> None:
        """Remember a failure.

        Args:
            key: What could not be computed.
            now: Clock reading.
            seconds: How long the failure counts as fresh.
            excused: Whether it is one for which an expired entry may be served.
        """
        with self._lock:
            failures = self._failures
            failures.pop(key, None)
            failures[key] = now + seconds, excused
            # They stand in the order in which they were added, so those that are over come first.
            while failures:
                oldest = next(iter(failures))
                if len(failures) <= self.MOST and now < failures[oldest][0]:
                    break
                del failures[oldest]

    def fresh(self, key: Hashable, now: float, *, excused: bool = False) -> bool:
        """Return whether the last failure is still fresh, and perhaps whether an expired entry may be served for it."""
        until, is_excused = self._failures.get(key, (-math.inf, False))
        return now < until and (is_excused or not excused)

    def forget(self, key: Hashable) -> None:
        """Forget the failure of a key."""
        if key in self._failures:
            with self._lock:
                self._failures.pop(key, None)

    def clear(self) -> None:
        """Forget all failures."""
        with self._lock:
            self._failures.clear()

    def after_fork(self) -> None:
        """Replace the lock: the thread that held it may not exist in a forked child."""
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._failures)


# --- freshness ------------------------------------------------------------------------------------


class Freshness:
    """When the entries of one function are refreshed early, and for how long they are served late.

    Args:
        ttl: Lifetime of an entry in seconds.
        stale_ttl: Seconds for which an expired entry may be served.
        share: Part of its lifetime after which an entry is refreshed; None if it is not.

    Attributes:
        retried: Whether an error is one that `retry_on` means; without a retry stage, any is.
        recent_failures: Keys whose last call has just failed.
    """

    def __init__(
        self, ttl: float | None, stale_ttl: float = 0.0, share: float | None = None
    ) -> None:
        self.stale_ttl: Final = stale_ttl
        self.share: Final = share
        self.recent_failures: Final = RecentFailures()
        self._ttl = math.inf if ttl is None else ttl
        self.retried: Callable[[Exception], bool] = lambda error: True

    def entry(
        self,
        make: Callable[[Any, Any, float | None], Entry],
        key: Any,
        value: Any,
        ttl: float | None,
    ) -> Entry:
        """Return the entry that `make` makes of a result; it knows when it was stored.

        Its `expires` is the earliest time at which there is something to decide, so that wrappers
        do not serve it themselves from then on.
        """
        now, entry = ambient.clock().monotonic(), make(key, value, ttl)
        if ttl is None:
            return entry
        expiry = entry.expires
        entry.life = Life(now, expiry, expiry + self.stale_ttl)
        if self.share is not None:
            entry.expires = now + self.share * (expiry - now)
        return entry

    def due(self, key: Hashable, entry: Entry) -> bool:
        """Return whether a fresh entry is to be refreshed now."""
        if self.share is None or entry.expiry == math.inf:
            return False
        # The program that stored it may have had no need of that time.
        born = entry.expiry - self._ttl if entry.life is None else entry.life.born
        now = ambient.clock().monotonic()
        due = born + self.share * (entry.expiry - born) <= now
        return due and not self.recent_failures.fresh(key, now)

    def leave_to_others(self, key: Hashable) -> None:
        """Leave an entry for a moment to another process that is refreshing it."""
        now = ambient.clock().monotonic()
        self.recent_failures.add(key, now, _ELSEWHERE_SECONDS, excused=False)

    def usable(self, entry: Entry, now: float) -> bool:
        """Return whether an expired entry may still be served."""
        return now < entry.expiry + self.stale_ttl

    def served_at_once(self, key: Hashable, entry: Entry) -> bool:
        """Return whether an expired entry is served untried, because a call for it has just failed."""
        now = ambient.clock().monotonic()
        return self.usable(entry, now) and self.recent_failures.fresh(key, now, excused=True)

    def stands_in(self, key: Hashable, entry: Entry, error: Exception, call: Any) -> bool:
        """Remember a failed call; return whether its caller gets the expired entry instead.

        Args:
            key: What could not be computed.
            entry: The expired entry.
            error: What the call ended with.
            call: The call (`entries.CachedCall`).
        """
        excused = call.overdue or excuses(error, call.attempt_errors or (), self.retried)
        now = ambient.clock().monotonic()
        # A caller that was short of time says nothing about the service.
        if not (call.overdue or isinstance(error, DeadlineError)):
            seconds = max(FRESH_FAILURE_SECONDS, call.hint)
            self.recent_failures.add(key, now, seconds, excused=excused)
        return excused and self.usable(entry, now)

    def describe(self) -> list[str]:
        """Return the parts of the line for `explain()`."""
        parts = []
        if self.share is not None:
            parts.append(f"renewed behind the scenes after {self.share:.0%} of that")
        if self.stale_ttl:
            parts.append(f"{format_seconds(self.stale_ttl)} longer if the call fails")
        return parts


# --- threads and tasks that no caller waits for ---------------------------------------------------

_MOST_THREADS: Final = 8
"""Threads at work at the same time, of all functions together."""

_DRAIN_SECONDS: Final = 2.0
"""How long the interpreter waits at its exit for what is under way."""


_at_work: Final[set[ThreadCall]] = set()


def _start_thread(logic: StepLogic[None]) -> None:
    """Run logic on a daemon thread, unless all are busy or the system has no more.

    Nothing is queued, because what waits behind a call that hangs would hang as well.
    """
    _drain_at_exit()
    if len(_at_work) < _MOST_THREADS:
        call = ThreadCall(functools.partial(run_sync, logic))
        _at_work.add(call)
        call.then(functools.partial(_at_work.discard, call))
        try:
            run_in_thread(call)
        except RuntimeError:
            _at_work.discard(call)


def _drain(seconds: float = _DRAIN_SECONDS) -> bool:
    """Wait until no thread works any more; False if time ran out first."""
    ends = monotonic() + seconds
    for call in list(_at_work):
        if call.wait(max(0.0, ends - monotonic())):
            _at_work.discard(call)
    return not _at_work


@functools.cache
def _drain_at_exit() -> None:
    # With the first thread: what is registered last runs first, and stores are closed at the exit, too.
    atexit.register(_drain)


_tasks: set[Task[Any]] = set()
"""An event loop holds its tasks by weak references only."""


def start_in_background(logic: StepLogic[None], *, blocking: bool) -> None:
    """Run logic in a copy of the caller's context, if there is room.

    Args:
        logic: What to run; it must not raise.
        blocking: Whether on a thread; otherwise in a task of the running event loop, which is cancelled with
            the loop's other tasks when `asyncio.run` ends.
    """
    if blocking:
        _start_thread(logic)
        return
    from asyncio import get_running_loop

    task = get_running_loop().create_task(run_async(logic))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


run_after_fork(_at_work.clear)
