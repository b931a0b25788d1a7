# this_file: src/opero/caching/refresh.py
"""Decide when entries are refreshed before they expire or served afterwards, and refresh them in the background."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Coroutine, Hashable, Sequence
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from opero.caching.memory import AgingEntry, Entry, Life
from opero.caching.single_flight import Flight, forget_leadership
from opero.errors import (
    CircuitOpenError,
    DeadlineError,
    OperoUsageError,
    RateLimitPausedError,
    RefusalError,
    Rejected,
)
from opero.utils import ambient
from opero.utils.fork import run_after_fork
from opero.utils.steps import BlockingStep, run_async, run_sync
from opero.utils.threads import ThreadCall, run_in_thread
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from asyncio import Task

    from opero.caching.lease import Leases
    from opero.utils.steps import StepLogic

__all__ = [
    "FRESH_FAILURE_SECONDS", "BackgroundRefresh", "Freshness", "RecentFailures", "RefreshWork", "excuses",
    "refresh_time", "start_task", "start_thread",
]  # fmt: skip

FRESH_FAILURE_SECONDS: Final = 5.0
"""Seconds for which a failure counts as fresh. The service's own request to wait may make it longer."""


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


class _RecentFailure(NamedTuple):
    until: float
    excused: bool


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
        self._failures: dict[Hashable, _RecentFailure] = {}
        self._lock = Lock()

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
            failures[key] = _RecentFailure(now + seconds, excused)
            # They stand in the order in which they were added, so those that are over come first.
            while failures:
                oldest = next(iter(failures))
                if len(failures) <= self.MOST and now < failures[oldest].until:
                    break
                del failures[oldest]

    def fresh(self, key: Hashable, now: float) -> bool:
        """Return whether the last failure is still fresh."""
        return self._current(key, now) is not None

    def excused(self, key: Hashable, now: float) -> bool:
        """Return whether it is, and an expired entry may be served for it."""
        failure = self._current(key, now)
        return failure is not None and failure.excused

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

    def _current(self, key: Hashable, now: float) -> _RecentFailure | None:
        failure = self._failures.get(key)
        return failure if failure is not None and now < failure.until else None


# --- freshness ------------------------------------------------------------------------------------


def refresh_time(born: float, expiry: float, share: float) -> float:
    """Return the time from which an entry is to be refreshed.

    Example:
        >>> refresh_time(born=100.0, expiry=200.0, share=0.8)
        180.0
    """
    return born + share * (expiry - born)


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

    def dated(self, entry: Entry, now: float) -> Entry:
        """Return an entry that remembers when it was stored.

        Its `expires` is the earliest time at which there is something to decide, so that wrappers
        do not serve it themselves from then on.
        """
        expiry = entry.expires
        soft = expiry if self.share is None else refresh_time(now, expiry, self.share)
        return AgingEntry(entry, Life(now, expiry, expiry + self.stale_ttl), soft)

    def due(self, key: Hashable, entry: Entry) -> bool:
        """Return whether a fresh entry is to be refreshed now."""
        if self.share is None or entry.expiry == math.inf:
            return False
        # The program that stored it may have had no need of that time.
        born = entry.expiry - self._ttl if entry.life is None else entry.life.born
        now = ambient.clock().monotonic()
        due = refresh_time(born, entry.expiry, self.share) <= now
        return due and not self.recent_failures.fresh(key, now)

    def usable(self, entry: Entry, now: float) -> bool:
        """Return whether an expired entry may still be served."""
        return now < entry.expiry + self.stale_ttl

    def served_at_once(self, key: Hashable, entry: Entry) -> bool:
        """Return whether an expired entry is served untried, because a call for it has just failed."""
        now = ambient.clock().monotonic()
        return self.usable(entry, now) and self.recent_failures.excused(key, now)

    def stands_in(
        self,
        key: Hashable,
        entry: Entry,
        error: Exception,
        *,
        attempt: Sequence[Exception],
        overdue: bool,
        asked_pause: float,
    ) -> bool:
        """Remember a failed call; return whether its caller gets the expired entry instead.

        Args:
            key: What could not be computed.
            entry: The expired entry.
            error: What the call ended with.
            attempt: Errors of its last attempt.
            overdue: Whether its deadline ended it.
            asked_pause: Seconds that the service asked to wait.
        """
        excused = overdue or excuses(error, attempt, self.retried)
        now = ambient.clock().monotonic()
        # A caller that was short of time says nothing about the service.
        if not (overdue or isinstance(error, DeadlineError)):
            seconds = max(FRESH_FAILURE_SECONDS, asked_pause)
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


# --- refreshing in the background -----------------------------------------------------------------

_ELSEWHERE_SECONDS: Final = 1.0
"""Seconds for which this process leaves an entry to another one that is refreshing it."""


class RefreshWork(Protocol):
    """A call that refreshes an entry, for no caller in particular.

    Attributes:
        flight: What it leads.
        rejected: Whether `retry_if_result` refused its result.
    """

    flight: Flight
    rejected: bool

    def unchanged(self) -> bool:
        """Return whether its arguments, which may be mutable, still have the key of the entry."""
        ...

    def compute(self) -> Any:
        """Compute and store the result; return a coroutine if the function is asynchronous."""
        ...


class BackgroundRefresh:
    """Refreshes the entries of one function, each by one call at a time.

    Args:
        freshness: When entries are due.
        leases: Single-flight across processes; None for a store that they do not share.
        report: Called with each refresh that has ended, and its error.
    """

    def __init__(
        self,
        freshness: Freshness,
        leases: Leases | None,
        report: Callable[[RefreshWork, Exception | None], object],
    ) -> None:
        self._freshness = freshness
        self._leases = leases
        self._report = report

    def start(self, work: RefreshWork, *, blocking: bool) -> None:
        """Begin on another thread, or in another task of the running event loop."""
        if blocking:
            start_thread(lambda: self._run(work))
        else:
            start_task(self._arun(work))

    def _run(self, work: RefreshWork) -> None:
        try:
            run_sync(self._logic(work))
        except Exception as error:  # noqa: BLE001 - the old result stays, and listeners are notified
            self._report(work, error)

    async def _arun(self, work: RefreshWork) -> None:
        try:
            await run_async(self._logic(work))
        except Exception as error:  # noqa: BLE001 - as above
            self._report(work, error)

    def _logic(self, work: RefreshWork) -> StepLogic[None]:
        forget_leadership()
        if not work.unchanged():
            return
        flight, leases, turn = work.flight, self._leases, None
        try:
            if leases is not None:
                turn = yield from leases.try_turn(flight)
                if turn is None:
                    # Another process is at it: for a moment there is no need to ask again.
                    now, failures = ambient.clock().monotonic(), self._freshness.recent_failures
                    failures.add(flight.key, now, _ELSEWHERE_SECONDS, excused=False)
                    return
                if turn.entry is not None and not self._freshness.due(flight.key, turn.entry):
                    return
            yield BlockingStep(work.compute, work.compute)
            self._report(work, None)
        finally:
            if leases is not None and turn is not None:
                leases.release(turn.lease, flight)


# --- threads and tasks that no caller waits for ---------------------------------------------------

_MOST_THREADS: Final = 8
"""Threads at work at the same time, of all functions together."""

_DRAIN_SECONDS: Final = 2.0
"""How long the interpreter waits at its exit for what is under way."""


class _BackgroundThreads:
    """Counts the threads at work; they never keep the interpreter alive for longer than it drains."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._working = 0
        self._drains = False

    def enter(self) -> bool:
        """Take a place; False if all are taken."""
        with self._changed:
            if not self._drains:
                self._drains = True
                atexit.register(self.drain)
            if self._working >= _MOST_THREADS:
                return False
            self._working += 1
        return True

    def leave(self) -> None:
        """Give the place back."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def drain(self, seconds: float = _DRAIN_SECONDS) -> bool:
        """Wait until no thread works any more; False if time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._working, seconds)

    def after_fork(self) -> None:
        """Start afresh: the threads of the parent do not exist here."""
        self._changed = Condition()
        self._working = 0


_threads = _BackgroundThreads()
_tasks: set[Task[Any]] = set()
"""An event loop holds its tasks by weak references only."""


def start_thread(work: Callable[[], object]) -> bool:
    """Run `work` in a copy of the caller's context, on a daemon thread.

    Nothing is queued, because what waits behind a call that hangs would hang as well.

    Args:
        work: What to run; it must not raise.

    Returns:
        False if all threads are busy or the system has no more: then nothing runs.
    """
    if not _threads.enter():
        return False

    def run() -> None:
        try:
            work()
        finally:
            _threads.leave()

    try:
        run_in_thread(ThreadCall(run))
    except RuntimeError:
        _threads.leave()
        return False
    return True


def start_task(work: Coroutine[Any, Any, object]) -> None:
    """Run `work` as a task of the running event loop, in a copy of the caller's context.

    It is cancelled with the loop's other tasks when `asyncio.run` ends.

    Args:
        work: A coroutine that does not raise.
    """
    from asyncio import get_running_loop

    task = get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


run_after_fork(_threads.after_fork)
