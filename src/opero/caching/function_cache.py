# this_file: src/opero/caching/function_cache.py
"""Answer the calls of one function: from an entry, with another caller's outcome, or by letting the caller lead.

What is decided here is written once for threads and event loops; the adapters of `opero.core.cache`
only serve hits and compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import inf
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from opero import events
from opero.caching.entries import Entries
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SharedFailure,
    SharedResult,
    SingleFlight,
    become_leader,
    flights_led,
    forget_leadership,
    notify,
    stop_leading,
)
from opero.errors import Rejected, StoreError, UnkeyableError
from opero.utils import ambient
from opero.utils.exceptions import copy_error, set_directly
from opero.utils.lazy import NamedTuple
from opero.utils.steps import BlockingStep
from opero.utils.units import format_bytes, format_seconds, parse_seconds, parse_size

if TYPE_CHECKING:
    from opero.caching.entries import CachedCall
    from opero.caching.keys.function_keys import FunctionKeys
    from opero.caching.lease import Leases
    from opero.caching.memory import Entry, EntryStore
    from opero.caching.refresh import Freshness
    from opero.caching.single_flight import Verdict
    from opero.events.bus import Emitter
    from opero.utils.steps import StepLogic


class CacheInfo(NamedTuple):
    """What a function's cache holds and has done.

    Attributes:
        hits: Results served from the cache.
        misses: Calls that found nothing fresh.
        stale: Calls that got an expired result, because the function failed; neither hits nor misses.
        size: Entries; None if the store does not know.
        bytes: Their estimated bytes; None if the store does not know.
        maxsize: Most entries.
        max_bytes: Most bytes.
        ttl: Lifetime of an entry in seconds, None for ever.
        backend: Where they are.
        namespace: The `cache_namespace`.
    """

    hits: int = 0
    misses: int = 0
    stale: int = 0
    size: int | None = 0
    bytes: int | None = 0
    maxsize: int = 0
    max_bytes: int = 0
    ttl: float | None = None
    backend: str = "off"
    namespace: str = ""

    def __repr__(self) -> str:
        size = "?" if self.size is None else f"{self.size:,}"
        weight = "" if self.bytes is None else f", {format_bytes(self.bytes)}"
        looked = self.hits + self.misses + self.stale
        stale = f", {self.stale:,} stale" if self.stale else ""
        share = f" ({self.hits / looked:.0%})" if looked else ""
        lasts = "no expiry" if self.ttl is None else f"ttl {format_seconds(self.ttl)}"
        return (
            f"<CacheInfo {self.backend} {self.namespace!r}: {size} entries{weight}, "
            f"{self.hits:,} hits{share}, {self.misses:,} misses{stale}, {lasts}>"
        )


def _seconds(options: Any, name: str) -> float | None:
    value = getattr(options, name)
    return None if value is None else parse_seconds(value, name)


Answer: TypeAlias = Flight | tuple[Any] | Literal[Instruction.COMPUTE]
"""What a caller gets: a flight to lead and compute for, a result in a tuple, or the order not to share its own."""


class FunctionCache:
    """The cache of one function.

    Args:
        options: The function's options (`core.options.Options`).
        store: Where the entries are.
        keys: Makes the keys.
        single_flight: What is being computed.
        counters: The function's counters (`core.function.Stats`).
        emitter: Where its events go.
        overdue: Marks a call as ended by its deadline, and returns the error for it.

    Attributes:
        options, store, keys, single_flight: As above.
        namespace: The `cache_namespace`.
        asked: Whether any cache option was given. If not, an argument that cannot be keyed switches the
            cache off.
        ttl: Lifetime of an entry in seconds, None for ever.
        function: The function's name.
        off: Whether an argument that cannot be keyed has switched the cache off.
        entries: Finds, serves and stores entries.
        leases: Single-flight across processes; None for a store that they do not share.
        freshness: When entries are refreshed early and served late; None if neither was asked for.
        count_miss: Counts a miss.
    """

    def __init__(
        self,
        options: Any,
        store: EntryStore,
        keys: FunctionKeys,
        single_flight: SingleFlight,
        *,
        counters: Any,
        emitter: Emitter,
        overdue: Callable[[Any], Exception],
    ) -> None:
        self.function: str = keys.function.qualname
        self.options: Any = options
        self.namespace: str = options.cache_namespace
        self.store: EntryStore = store
        self.keys: FunctionKeys = keys
        self.single_flight: SingleFlight = single_flight
        self.asked: bool = any(name.startswith("cache") for name in options.given)
        self.ttl: float | None = _seconds(options, "cache_ttl")
        self.off: bool = False
        self._counters = counters
        self._emitter = emitter
        self._overdue = overdue
        self.count_miss: Callable[[], object] = counters.miss_counter.count
        self.freshness: Freshness | None = None
        self.leases: Leases | None = None
        # What few functions need is loaded where it is asked for: importing opero must stay cheap.
        stale_ttl = _seconds(options, "cache_stale_ttl")
        if stale_ttl is not None or options.cache_refresh is not None:
            from opero.caching.refresh import Freshness

            self.freshness = Freshness(self.ttl, stale_ttl or 0.0, options.cache_refresh)
        self.entries: Entries = Entries(
            store,
            copy=options.cache_copy,
            of_instance=keys.instances is not None,
            freshness=self.freshness,
            look_for_edits=keys.edit_detector(store) if store.lends else None,
            counters=counters,
            emitter=emitter,
        )
        if store.lends:
            from opero.caching.lease import Leases

            self.leases = Leases(store, self.entries)

    # --- keys -------------------------------------------------------------------------------------

    def key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Hashable | None:
        """Return the key of arguments; None if one has no content and the cache was not asked for.

        Raises:
            TypeError: The arguments do not fit the function.
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
        try:
            key = self.keys.key(args, kwargs)
        except UnkeyableError:
            if self.asked:
                raise
            return None
        if key is None:
            try:
                self.keys.function.declared.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self.function}() {error}") from None
        return key

    # --- refreshing -------------------------------------------------------------------------------

    def answers(self, key: Hashable, entry: Entry) -> bool | None:
        """Return how an entry answers a call: True fresh, False expired but served, None not at all."""
        if self.entries.is_fresh(key, entry):
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
        freshness = self.freshness
        if freshness is None or not freshness.due(key, entry):
            return
        flight = Flight(key)
        if self.single_flight.start(key, flight) is flight:
            from opero.caching.refresh import start_in_background

            work = self.refresh_work(call, flight, blocking)
            start_in_background(self._refresh(work, flight, freshness, blocking), blocking=blocking)

    def refresh_work(self, call: CachedCall, flight: Flight, blocking: bool, /) -> Any:
        """Return the call that refreshes an entry in the background and leads its flight.

        Its method `unchanged` returns whether its arguments, which may be mutable, still have the key of the
        entry; `compute` stores the result, and returns a coroutine if the function is asynchronous.
        """
        raise NotImplementedError

    def _refresh(
        self, work: Any, flight: Flight, freshness: Freshness, blocking: bool
    ) -> StepLogic[None]:
        forget_leadership()
        if not work.unchanged():
            return
        failure = None
        try:
            if self.leases is not None:
                found, flight.lease, late = yield from self.leases.take_turn(
                    flight, None, None, -inf, blocking=blocking, patient=False
                )
                if late:
                    freshness.leave_to_others(flight.key)
                    return
                if found is not None and not freshness.due(flight.key, found):
                    return
            yield BlockingStep(work.compute, work.compute)
        except Exception as error:  # noqa: BLE001 - the old result stays, and listeners are notified
            failure = error
        if self._emitter.active:
            name, renewed = self._emitter.function, failure is None and not work.rejected
            self._emitter.emit(events.CacheRefreshed(function=name, renewed=renewed, error=failure))
        del failure  # its traceback holds this frame

    # --- outcomes ---------------------------------------------------------------------------------

    def missed(self) -> None:
        """Notify listeners of a miss."""
        if self._emitter.active:
            self._emitter.emit(events.CacheMiss(function=self._emitter.function))

    def computed(self, call: CachedCall, key: Hashable) -> None:
        """Count a miss that might have ended with an expired entry, and did not."""
        if self.freshness is not None:
            if not call.renews:
                self.count_miss()
            self.freshness.recent_failures.forget(key)

    def verdict(self, value: Any, entry: Entry | None, *, rejected: bool = False) -> Verdict:
        """Return what waiters are handed of a result.

        Args:
            value: The result.
            entry: It as it was stored; None if it was not.
            rejected: Whether `retry_if_result` refused it.
        """
        try:
            return SharedResult(entry or self.entries.plain_entry((), value), rejected)
        except Exception:  # noqa: BLE001 - a result may refuse anything, and the waiters go on
            return Instruction.COMPUTE

    def late(self, call: CachedCall, expired: Entry | None, flight: Flight | None = None) -> Any:
        """End a call whose deadline comes before the outcome that it waits for.

        Args:
            call: The call.
            expired: An expired entry that it gets then, if it may be served.
            flight: What it leads; None if it waits for the leader.

        Raises:
            DeadlineError: There is none.
        """
        error, freshness = self._overdue(call), self.freshness
        try:
            if flight is not None:
                expired = self.failed(call, flight, error)
            elif expired is not None and not (
                freshness and freshness.usable(expired, ambient.clock().monotonic())
            ):
                expired = None
            if expired is None:
                raise error
            return self.entries.serve_stale(call, expired, error)
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del error

    def stand_in(
        self, call: CachedCall, flight: Flight, entry: Entry | None, error: Exception
    ) -> Entry | None:
        """Return the expired entry that callers get because a call failed; if none, count the miss."""
        if self.freshness is not None and entry is not None:
            excused = self.freshness.stands_in(flight.key, entry, error, call)
            # What was invalidated meanwhile is not wanted any more.
            if excused and not flight.invalidated:
                return entry
        if not call.renews:
            self.count_miss()
        return None

    # --- how a lead ends --------------------------------------------------------------------------

    def give_up(self, flight: Flight) -> None:
        """Let another caller lead, because this one does not go on."""
        self.single_flight.abandon(flight)
        stop_leading(flight)

    def drop(self, flight: object) -> None:
        """End the lead of a caller that goes on with an error, wherever it came from, if that has not ended.

        Args:
            flight: What it leads; anything else if it leads none.
        """
        if not isinstance(flight, Flight) or flight not in flights_led():
            return
        # Where a waiter leads by now, there is nothing left to do but to leave.
        if flight.done or flight.thread == get_ident():
            self.single_flight.abandon(flight)
        stop_leading(flight)

    def failed(self, call: CachedCall, flight: Flight, error: Exception) -> Entry | None:
        """End the lead of a call that failed; return the expired entry that its caller gets instead."""
        try:
            old = self._failed(call, flight, error)
        except BaseException:
            self.drop(flight)
            raise
        stop_leading(flight)
        return old

    def _failed(self, call: CachedCall, flight: Flight, error: Exception) -> Entry | None:
        flights, old = self.single_flight, None
        if self.freshness is not None:
            old = self.stand_in(call, flight, flight.expired, error)
        # A caller that was short of time says nothing about what the next one will achieve.
        flight.without_result = not call.overdue
        if call.overdue and flights.abandon_late(flight, call.deadline):
            pass
        elif old is not None:
            notify(flights.complete(flight), SharedResult(old, stale=True))
        elif waiters := flights.complete(flight):
            if isinstance(error, Rejected):
                notify(waiters, self.verdict(error.value, None, rejected=True))
            else:
                notify(waiters, SharedFailure(copy_error(error)))
        return None if call.renews else old

    def share(self, call: CachedCall, verdict: Any) -> Any:
        """Return or raise a waiter's own copy of the outcome that it was handed."""
        if isinstance(verdict, SharedResult) and verdict.stale:
            return self.entries.serve_stale(call, verdict.entry)
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
            set_directly(error, "__context__", context)
            del error, context, verdict

    # --- what threads and event loops do alike ----------------------------------------------------

    def begin(self, call: CachedCall, *, blocking: bool) -> StepLogic[Answer]:
        """Look for a result, wait for another caller's, or become the one that computes it.

        Args:
            call: The call, with its key.
            blocking: Whether waiting blocks the thread.
        """
        flights, entries, key = self.single_flight, self.entries, call.key
        completed, seen_at, expired, late = flights.completed, monotonic(), None, False
        # What this caller leads from now on, or may: no step is outside `try`, wherever Ctrl-C comes.
        flight: Flight | None = None
        try:
            if call.renews:
                flight = call.flight
                if flight is None:
                    flight = flights.replace(key)
            else:
                expired = yield entries.find_step(key)
                if expired is not None and (fresh := self.answers(key, expired)) is not None:
                    if not fresh:
                        return (entries.serve_stale(call, expired),)
                    self.refresh_if_due(call, key, expired, blocking=blocking)
                    return (entries.serve(call, expired),)
                flight = Flight(key)
                if flights.start(key, flight) is not flight:
                    flight = None
                    verdict = yield from flights.follow(key, call.deadline, blocking=blocking)
                    try:
                        flight = verdict if isinstance(verdict, Flight) else None
                        if verdict is Instruction.COMPUTE:
                            return verdict
                        if verdict is Instruction.LATE:
                            return (self.late(call, expired),)
                        if flight is None:
                            return (self.share(call, verdict),)
                    finally:
                        del verdict
            become_leader(flight)
            # Another caller may have stored the result between our look and our start.
            if flights.completed is not completed:
                seen_at = -inf
            if call.renews:
                if self.freshness is not None:
                    expired = yield entries.find_step(key)
            elif self.leases is not None and call.prior_outcome is None:
                expired, flight.lease, late = yield from self.leases.take_turn(
                    flight, call.deadline, expired, seen_at, blocking=blocking
                )
            elif seen_at == -inf:
                expired = yield entries.find_step(key)
            flight.expired = expired
            if not (call.renews or late):
                if expired is not None and entries.is_fresh(key, expired):
                    value = entries.serve(call, expired)
                    notify(flights.complete(flight), SharedResult(expired))
                    stop_leading(flight)
                    return (value,)
                if call.prior_outcome is None:
                    # One that may end with an expired entry is counted at its end.
                    if self.freshness is None:
                        self.count_miss()
                    self.missed()
            if not late:
                return flight
        except BaseException:
            if flight is not None:
                self.give_up(flight)
            raise
        return (self.late(call, expired, flight),)

    # --- management --------------------------------------------------------------------------------

    def clear(self) -> int:
        """Remove all entries and return how many there were.

        What is being computed now will not be stored.
        """
        self.single_flight.invalidate_all()
        if self.freshness is not None:
            self.freshness.recent_failures.clear()
        return self.store.clear()

    def invalidate(self, key: Hashable) -> bool:
        """Remove an entry and return whether there was one; a computation under way is not stored."""
        self._forget(key)
        return self.store.delete(key)

    def replacement(self, key: Hashable, value: Any, ttl: float | None, /) -> Entry:
        """Return the entry of a result that a user sets; a computation under way will not replace it.

        Raises:
            Uncopyable: It cannot be isolated, or cannot be encoded.
        """
        self._forget(key)
        return self.entries.entry(key, value, ttl)

    def _forget(self, key: Hashable) -> None:
        self.single_flight.invalidate(key)
        if self.freshness is not None:
            self.freshness.recent_failures.forget(key)

    def info(self) -> CacheInfo:
        """Return counters and bounds."""
        try:
            size, weight = self.store.measure()
        except StoreError:
            size = weight = None
        counters = self._counters
        return CacheInfo(
            hits=counters.hits,
            misses=counters.misses,
            stale=counters.stale,
            size=size,
            bytes=weight,
            maxsize=self.options.cache_maxsize,
            max_bytes=parse_size(self.options.cache_max_bytes, "cache_max_bytes"),
            ttl=self.ttl,
            backend=self.store.name,
            namespace=self.namespace,
        )
