# this_file: src/opero/caching/answers.py
"""Answer calls: from an entry, with another caller's outcome, or by letting the caller lead.

What is decided here is written once for threads and event loops; the adapters of `opero.core.cache`
only compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import inf
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opero import events
from opero.caching.copying import Uncopyable
from opero.caching.entries import EntryReader, EntryWriter, SkipReporter
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SharedFailure,
    SharedResult,
    SingleFlight,
    copy_error,
    notify,
)
from opero.errors import Rejected
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.steps import BlockingStep

if TYPE_CHECKING:
    from opero.caching.function_cache import FunctionCache
    from opero.caching.lease import Lease, Leases
    from opero.caching.memory import Entry, EntryStore
    from opero.caching.refresh import BackgroundRefresh, Freshness, RefreshWork
    from opero.caching.single_flight import Verdict
    from opero.events.bus import Emitter
    from opero.utils.steps import StepLogic

__all__ = ["CacheAnswers", "CachedCall", "Counters", "Leadership"]


class CachedCall(Protocol):
    """A call as its cache sees it.

    Attributes:
        args, kwargs: Its arguments.
        source: Where its value came from: "fresh", "hit", "shared" or "stale".
        deadline: Clock reading by which it must be over, None if there is none.
        overdue: Whether its deadline ends it.
        renews: Whether its result is to be stored without a look in the cache.
        flight: What such a call leads already, None if nothing.
        prior_outcome: What a real call that is already made has given; None if none is.
        attempt_errors: Errors of its last attempt.
        hint: Seconds that the service asked to wait.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Any
    deadline: float | None
    overdue: bool
    renews: bool
    flight: Any
    prior_outcome: Any
    attempt_errors: list[Exception] | None
    hint: float


class Counters(Protocol):
    """The counters of a function."""

    @property
    def hit_counter(self) -> Any:
        """Counts results served from the cache."""
        ...

    @property
    def miss_counter(self) -> Any:
        """Counts calls that found nothing fresh."""
        ...

    def add(self, **amounts: float) -> None:
        """Add to other counters."""
        ...


class Leadership(NamedTuple):
    """What a caller that has to compute knows.

    Attributes:
        flight: The flight that it leads.
        expired: An expired entry that may stand in if it fails; None if there is none.
        lease: The lease that it has to release; None without one.
    """

    flight: Flight
    expired: Entry | None = None
    lease: Lease | None = None


class CacheAnswers:
    """Answers the calls of one function.

    Args:
        entries: The entries and what belongs to them.
        ttl: Lifetime of an entry in seconds, None for ever.
        stale_ttl: Seconds for which an expired entry may be served; None for not at all.
        share: Part of its lifetime after which an entry is refreshed; None if it is not.
        copy: Whether mutable results are isolated.
        counters: The function's counters.
        emitter: Where its events go.
        overdue: Marks a call as ended by its deadline, and returns the error for it.

    Attributes:
        entries: As above.
        ttl: As above.
        store: Where the entries are.
        single_flight: What is being computed.
        reader: Finds entries.
        writer: Stores results.
        skip_reporter: Reports what is not cached.
        leases: Single-flight across processes; None for a store that they do not share.
        freshness: When entries are refreshed early and served late; None if neither was asked for.
        count_miss: Counts a miss.
    """

    skip_reporter: SkipReporter

    def __init__(
        self,
        entries: FunctionCache,
        *,
        ttl: float | None,
        stale_ttl: float | None,
        share: float | None,
        copy: bool,
        counters: Counters,
        emitter: Emitter,
        overdue: Callable[[Any], Exception],
    ) -> None:
        self.entries: FunctionCache = entries
        self.ttl: float | None = ttl
        self.store: EntryStore = entries.store
        self.single_flight: SingleFlight = entries.single_flight
        self.skip_reporter = skip_reporter = SkipReporter(emitter)
        self._counters = counters
        self._emitter = emitter
        self._heard = bool(emitter.listeners)  # listeners of the whole program hold the switch
        self._overdue = overdue
        self._count_hit: Callable[[], object] = counters.hit_counter.count
        self.count_miss: Callable[[], object] = counters.miss_counter.count
        self.freshness: Freshness | None = None
        self._refresh: BackgroundRefresh | None = None
        self.leases: Leases | None = None
        usable = dated = None
        # What few functions need is loaded where it is asked for: importing opero must stay cheap.
        if stale_ttl is not None or share is not None:
            from opero.caching.refresh import Freshness

            self.freshness = Freshness(ttl, stale_ttl or 0.0, share)
            usable, dated = self.freshness.usable, self.freshness.dated
        self.reader: EntryReader = EntryReader(entries, emitter, skip_reporter, usable)
        self.writer: EntryWriter = EntryWriter(
            entries, copy=copy, skip_reporter=skip_reporter, dated=dated
        )
        if self.store.lends:
            from opero.caching.lease import Leases

            self.leases = Leases(self.store, self.reader, skip_reporter)
        if self.freshness is not None and share is not None:
            from opero.caching.refresh import BackgroundRefresh

            self._refresh = BackgroundRefresh(self.freshness, self.leases, self._refreshed)

    # --- serving ----------------------------------------------------------------------------------

    def serve(self, call: CachedCall, entry: Entry) -> Any:
        """Return the caller's own copy of what an entry holds."""
        entry.visited = True
        call.source = "hit"
        self._count_hit()
        if (self._heard or switch.on) and self._emitter.active:
            self._emitter.emit(events.CacheHit(function=self._emitter.function))
        return entry.open()

    def serve_stale(self, call: CachedCall, entry: Entry, error: Exception | None = None) -> Any:
        """Return the caller's own copy of what an expired entry holds.

        Args:
            call: The call.
            entry: The entry.
            error: What the call failed with; None if it was not tried, because another has just failed.
        """
        entry.visited = True
        call.source = "stale"
        self._counters.add(stale=1)
        if self._emitter.active:
            expired = ambient.clock().monotonic() - entry.expiry
            self._emitter.emit(
                events.CacheStale(function=self._emitter.function, expired=expired, error=error)
            )
        return entry.open()

    def answers(self, key: Hashable, entry: Entry) -> bool | None:
        """Return how an entry answers a call: True fresh, False expired but served, None not at all."""
        if self.reader.is_fresh(key, entry):
            return True
        freshness = self.freshness
        return False if freshness is not None and freshness.served_at_once(key, entry) else None

    def refresh_if_due(
        self, call: CachedCall, key: Hashable, entry: Entry, *, blocking: bool
    ) -> None:
        """Begin to compute a fresh entry anew in the background, if it is due and no caller is at it.

        Args:
            call: A call that was answered with it.
            key: Its key.
            entry: The entry.
            blocking: Whether on a thread; otherwise in a task of the running event loop.
        """
        freshness, refresh = self.freshness, self._refresh
        if refresh is None or freshness is None or not freshness.due(key, entry):
            return
        flight = Flight(key)
        if self.single_flight.start(key, flight) is flight:
            refresh.start(self.refresh_work(call, flight, blocking), blocking=blocking)

    def refresh_work(self, call: CachedCall, flight: Flight, blocking: bool, /) -> RefreshWork:
        """Return the call that refreshes an entry in the background and leads its flight."""
        raise NotImplementedError

    def _refreshed(self, work: Any, error: Exception | None) -> None:
        if self._emitter.active:
            renewed = error is None and not work.rejected
            name = self._emitter.function
            self._emitter.emit(events.CacheRefreshed(function=name, renewed=renewed, error=error))

    def late(self, call: CachedCall, expired: Entry | None) -> Any:
        """End a call whose deadline comes before the outcome that it waits for.

        Args:
            call: The call.
            expired: An expired entry that it gets then, if it may be served.

        Raises:
            DeadlineError: There is none.
        """
        error = self._overdue(call)
        try:
            now, freshness = ambient.clock().monotonic(), self.freshness
            if expired is None or freshness is None or not freshness.usable(expired, now):
                raise error
            return self.serve_stale(call, expired, error)
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del error

    # --- outcomes ---------------------------------------------------------------------------------

    def missed(self) -> None:
        """Notify listeners of a miss."""
        if self._emitter.active:
            self._emitter.emit(events.CacheMiss(function=self._emitter.function))

    def computed(self, call: CachedCall, key: Hashable) -> None:
        """Count a miss that might have ended with an expired entry, and did not."""
        if not call.renews:
            self.count_miss()
        if self.freshness is not None:
            self.freshness.recent_failures.forget(key)

    def verdict(self, value: Any, entry: Entry | None, *, rejected: bool) -> Verdict:
        """Return what waiters are handed of a result.

        Args:
            value: The result.
            entry: It as it was stored; None if it was not.
            rejected: Whether `retry_if_result` refused it.
        """
        try:
            return SharedResult(entry or self.writer.plain_entry((), value), rejected)
        except Uncopyable:
            return Instruction.COMPUTE

    def stand_in(
        self, call: CachedCall, flight: Flight, entry: Entry | None, error: Exception
    ) -> Entry | None:
        """Return the expired entry that callers get because a call failed; if none, count the miss."""
        if self.freshness is not None and entry is not None:
            excused = self.freshness.stands_in(
                flight.key,
                entry,
                error,
                attempt=call.attempt_errors or (),
                overdue=call.overdue,
                asked_pause=call.hint,
            )
            # What was invalidated meanwhile is not wanted any more.
            if excused and not flight.invalidated:
                return entry
        if not call.renews:
            self.count_miss()
        return None

    def failed(
        self, call: CachedCall, flight: Flight, entry: Entry | None, error: Exception
    ) -> Entry | None:
        """End the lead of a call that failed; return the expired entry that its caller gets instead."""
        old = None if self.freshness is None else self.stand_in(call, flight, entry, error)
        # A caller that was short of time says nothing about what the next one will achieve.
        flight.without_result = not call.overdue
        if call.overdue and self.single_flight.abandon_late(flight, call.deadline):
            pass
        elif old is not None:
            notify(self.single_flight.complete(flight), SharedResult(old, stale=True))
        elif waiters := self.single_flight.complete(flight):
            if isinstance(error, Rejected):
                notify(waiters, self.verdict(error.value, None, rejected=True))
            else:
                notify(waiters, SharedFailure(copy_error(error)))
        return None if call.renews else old

    def share(self, call: CachedCall, verdict: Any) -> Any:
        """Return or raise a waiter's own copy of the outcome that it was handed."""
        if isinstance(verdict, SharedResult) and verdict.stale:
            return self.serve_stale(call, verdict.entry)
        call.source = "shared"
        self._counters.add(shared=1)
        if isinstance(verdict, SharedResult):
            value = verdict.entry.open()
            if verdict.rejected:
                raise Rejected(value)
            return value
        error = copy_error(verdict.error)
        context = error.__context__
        try:
            raise error
        finally:
            # `raise` has put there what the caller is handling just now; what went before matters
            # more.
            error.__context__ = context
            del error, context, verdict

    # --- what threads and event loops do alike ----------------------------------------------------

    def begin(
        self, call: CachedCall, key: Hashable, *, looked: bool, blocking: bool
    ) -> StepLogic[Any]:
        """Look for a result, wait for another caller's, or become the one that computes it.

        Args:
            call: The call.
            key: Its key.
            looked: Whether it has looked in the store already, and found nothing fresh.
            blocking: Whether waiting blocks the thread.

        Returns:
            The result; a `Leadership` if it has to be computed and stored, `Instruction.COMPUTE` if it
            has to be computed and cannot be shared.
        """
        flights, reader, expired = self.single_flight, self.reader, None
        seen_at, completed = monotonic(), flights.completed
        if call.renews:
            flight = call.flight or flights.replace(key)
        else:
            if self.freshness is not None or not looked:
                expired = yield BlockingStep(reader.find, reader.afind, (key,))
                if expired is not None and (fresh := self.answers(key, expired)) is not None:
                    if not fresh:
                        return self.serve_stale(call, expired)
                    if self._refresh is not None:
                        self.refresh_if_due(call, key, expired, blocking=blocking)
                    return self.serve(call, expired)
            flight = Flight(key)
            if flights.start(key, flight) is not flight:
                verdict = yield from flights.follow(key, call.deadline, blocking=blocking)
                try:
                    if verdict is Instruction.COMPUTE:
                        return verdict
                    if verdict is Instruction.LATE:
                        return self.late(call, expired)
                    if not isinstance(verdict, Flight):
                        return self.share(call, verdict)
                    flight = verdict
                finally:
                    del verdict
        flight.thread, lease = get_ident(), None
        try:
            if call.renews:
                if self.freshness is not None:
                    expired = yield reader.find_step(key)
                return Leadership(flight, expired)
            # Another caller may have stored the result between our look and our start.
            if looked or flights.completed != completed:
                seen_at = -inf
            if self.leases is not None and call.prior_outcome is None:
                turn = yield from self.leases.take_turn(flight, call.deadline, expired, seen_at)
                expired, lease = turn.entry, turn.lease
                if turn.late:
                    return self._late_leader(call, flight, expired)
            elif seen_at == -inf:
                expired = yield reader.find_step(key)
            if expired is None or not reader.is_fresh(key, expired):
                return Leadership(flight, expired, lease)
            value = self.serve(call, expired)
            notify(flights.complete(flight), SharedResult(expired))
        except BaseException:
            flights.abandon(flight)
            if self.leases is not None:
                self.leases.release(lease, flight)
            raise
        if self.leases is not None:
            self.leases.release(lease, flight)
        return value

    def _late_leader(self, call: CachedCall, flight: Flight, expired: Entry | None) -> Any:
        error = self._overdue(call)
        try:
            old = self.failed(call, flight, expired, error)
            if old is None:
                raise error
            return self.serve_stale(call, old, error)
        finally:
            del error

    # --- removing ---------------------------------------------------------------------------------

    def clear(self) -> int:
        """Remove all entries and return how many there were.

        What is being computed now will not be stored.
        """
        self.single_flight.invalidate_all()
        if self.freshness is not None:
            self.freshness.recent_failures.clear()
        return self.store.clear()

    def remove(self, key: Hashable) -> bool:
        """Remove an entry and return whether there was one; a computation under way is not stored."""
        self._forget(key)
        return self.store.delete(key)

    def replacement(self, key: Hashable, value: Any, ttl: float | None, /) -> Entry:
        """Return the entry of a result that a user sets; a computation under way will not replace it.

        Raises:
            Uncopyable: It cannot be isolated, or cannot be encoded.
        """
        self._forget(key)
        return self.writer.entry(key, value, ttl)

    def _forget(self, key: Hashable) -> None:
        self.single_flight.invalidate(key)
        if self.freshness is not None:
            self.freshness.recent_failures.forget(key)

    def after_fork(self) -> None:
        """Forget what other threads of the parent process were doing."""
        self.entries.after_fork()
        if self.freshness is not None:
            self.freshness.recent_failures.after_fork()
