# this_file: src/opero/core/cache.py
"""Serve results from the cache, and compute what it does not have once for all callers that want it.

look in the store → hit
→ miss → first caller: compute → store → notify waiters
→ others: wait for its outcome
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta
from math import inf
from threading import get_ident
from time import monotonic
from types import CoroutineType, MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero.caching.context import clear_cache, get_cache_context, register
from opero.caching.copying import Uncopyable, isolated
from opero.caching.entries import EntryReader, EntryWriter, SkipReporter
from opero.caching.function_cache import FunctionCache, make_function_cache
from opero.caching.handle import CacheHandle, CacheInfo, format_bytes
from opero.caching.memory import Entry, EntryStore, MemoryStore
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SharedFailure,
    SharedResult,
    SingleFlight,
    become_leader,
    copy_error,
    notify,
    stop_leading,
)
from opero.core.call import Call, Receipt
from opero.core.deadline import forget_deadlines, overdue
from opero.core.options import standalone
from opero.errors import OperoWarning, StoreError, UnkeyableError
from opero.events import CacheHit, CacheMiss, CacheRefreshed, CacheStale
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.matching import Rejected
from opero.utils.stack import users_stacklevel
from opero.utils.steps import run_async, run_sync
from opero.utils.units import format_seconds, parse_seconds, parse_size

if TYPE_CHECKING:
    from opero.caching.lease import Lease, Leases
    from opero.caching.memory import Store
    from opero.caching.refresh import BackgroundRefresh, Freshness
    from opero.caching.single_flight import Verdict
    from opero.core.call import AsyncProceed, Proceed
    from opero.core.function import FunctionInfo
    from opero.core.options import Options
    from opero.core.stats import Stats
    from opero.events.bus import Emitter
    from opero.utils.steps import StepLogic
    from opero.utils.units import Duration

__all__ = [
    "CacheStage", "RefreshCall", "allowed_ttl", "clear_cache", "get_cache_context", "get_cache_decorator",
    "make_handle",
]  # fmt: skip


# --- decisions ------------------------------------------------------------------------------------


def allowed_ttl(answer: object, ttl: float | None) -> float | None:
    """Translate the answer of `cache_if` into the lifetime of an entry.

    Args:
        answer: False, None or 0 refuse; a number or a duration shortens the lifetime; anything else
            true stores.
        ttl: The lifetime without it, None for ever.

    Returns:
        Seconds, 0 for "do not store", None for ever. Never more than `ttl`.

    Raises:
        OperoUsageError: The answer looks like a duration and is none.

    Example:
        >>> [allowed_ttl(answer, 3600) for answer in ("1m", 7200, True, None)]
        [60.0, 3600, 3600, 0]
    """
    if not answer:
        return 0
    if isinstance(answer, bool) or not isinstance(answer, int | float | str | timedelta):
        return ttl
    wanted = parse_seconds(answer, "cache_if")
    return wanted if ttl is None else min(wanted, ttl)


class _Leadership(NamedTuple):
    """What a caller that has to compute knows.

    Attributes:
        flight: The flight that it leads.
        expired: An expired entry that may stand in if it fails; None if there is none.
        lease: The lease that it has to release; None without one.
    """

    flight: Flight
    expired: Entry | None = None
    lease: Lease | None = None


_MISS: Final = object()
_NO_ENTRIES: Final[Mapping[Any, Entry]] = MappingProxyType({})
_NO_TOKENS: Final[Mapping[int, int]] = MappingProxyType({})


class RefreshCall(Call):
    """A call that does not look in the cache, but whose result is stored."""

    renews = True


class _BackgroundCall(RefreshCall):
    """A call that refreshes an entry, for no caller in particular.

    If it is dropped before it has begun, because its event loop was closed, a waiter takes over its
    flight.
    """

    def __init__(self, stage: CacheStage, call: Call, flight: Flight, *, blocking: bool) -> None:
        super().__init__(
            tuple(_own(value) for value in call.args),
            {name: _own(value) for name, value in call.kwargs.items()},
        )
        self.flight = flight
        self._stage = stage
        self._blocking = blocking

    def unchanged(self) -> bool:
        """Return whether the arguments still have the key of the entry."""
        self.key = self._stage.entries.keys.key(self)
        return bool(self.key == self.flight.key)

    def compute(self) -> Any:
        """Compute and store the result; return a coroutine if the function is asynchronous."""
        forget_deadlines()  # the deadlines are those of the caller that did not wait
        running = self._stage.rerun(self)
        if self._blocking and isinstance(running, CoroutineType):
            # The first call ever: only now is it known that the function returns awaitables.
            running.close()
            prior = self.take_prior_outcome()
            if isinstance(prior, CoroutineType):
                prior.close()
        return running

    def __del__(self) -> None:
        if not self.flight.done:
            self._stage.single_flight.abandon(self.flight)


def _own(value: Any) -> Any:
    """Copy an argument that its owner is likely to change after the call."""
    if type(value) in (list, dict, set, bytearray):
        try:
            return isolated(value)
        except Uncopyable:
            return value
    return value


# --- the stage ------------------------------------------------------------------------------------


class CacheStage:
    """The cache around one function.

    Args:
        info: The function.
        options: Its options.
        stats: The function's counters.
        emitter: Where its events go.
        origin: A cache of the same function, with the same cache options except for ttl and
            condition, whose entries it shares.

    Attributes:
        asked: Whether any cache option was given. If not, an argument that cannot be keyed switches
            the cache off.
        off: Whether that has happened.
        entries: The entries and what belongs to them.
        store: Where the entries are.
        single_flight: What is being computed.
        reader: Finds entries.
        writer: Stores results.
        leases: Single-flight across processes; None for a store that they do not share.
        freshness: When entries are refreshed early and served late; None if neither was asked for.
        ttl: Lifetime of an entry in seconds, None for ever.
        condition: The option `cache_if`.
        count_miss: Counts a miss.
        rerun: Runs a call through the whole pipeline, this stage included; returns a coroutine if the
            function is asynchronous.

    Raises:
        OperoUsageError: `cache_ignore` names no parameter, or the store does not fit.
    """

    name = "cache"

    def __init__(
        self,
        info: FunctionInfo,
        options: Options,
        *,
        stats: Stats,
        emitter: Emitter,
        origin: CacheStage | None = None,
    ) -> None:
        self.function: str = info.qualname
        self.namespace: str = options.cache_namespace
        self.asked: bool = any(name.startswith("cache") for name in options.given)
        self.off: bool = False
        self._info = info
        self._options = options
        self._stats = stats
        self._emitter = emitter
        self._skips = skips = SkipReporter(emitter)
        self._max_bytes = parse_size(options.cache_max_bytes, "cache_max_bytes")
        seconds = options.cache_ttl
        self.ttl: float | None = None if seconds is None else parse_seconds(seconds, "cache_ttl")
        self.condition: Callable[[Any, Receipt[Any]], object] | None = options.cache_if
        self.entries: FunctionCache = origin.entries if origin is not None else self._entries()
        self.store: EntryStore = self.entries.store
        self.single_flight: SingleFlight = self.entries.single_flight
        self.freshness: Freshness | None = self._freshness()
        usable, dated = (
            (self.freshness.usable, self.freshness.dated) if self.freshness else (None, None)
        )
        self.reader = EntryReader(self.entries, emitter, skips, usable)
        self.writer = EntryWriter(self.entries, copy=options.cache_copy, skips=skips, dated=dated)
        self.leases: Leases | None = None
        if self.store.lends:
            from opero.caching.lease import Leases

            self.leases = Leases(self.store, self.reader, skips)
        self._refresh: BackgroundRefresh | None = self._background_refresh()
        self._count_hit = stats.hit_counter.count
        self.count_miss: Callable[[], object] = stats.miss_counter.count
        self.rerun: Callable[[Call], Any] = lambda call: None
        register(self)

    def connect(self, retried: Callable[[Exception], bool], rerun: Callable[[Call], Any]) -> None:
        """Take what the stage needs of the stages behind, without knowing them.

        Args:
            retried: Whether an error is one that `retry_on` means.
            rerun: Runs a call through the whole pipeline; see the attribute.
        """
        self.rerun = rerun
        if self.freshness is not None:
            self.freshness.retried = retried

    # What few functions need is loaded where it is asked for: importing opero must stay cheap.

    def _entries(self) -> FunctionCache:
        options = self._options
        return make_function_cache(
            self._info,
            backend=options.cache_backend,
            namespace=options.cache_namespace,
            version=options.cache_version,
            ignore=options.cache_ignore,
            user_key=options.cache_key,
            maxsize=options.cache_maxsize,
            max_bytes=self._max_bytes,
            codec=options.cache_codec,
        )

    def _freshness(self) -> Freshness | None:
        stale, share = self._options.cache_stale_ttl, self._options.cache_refresh
        if stale is None and share is None:
            return None
        from opero.caching.refresh import Freshness

        stale_ttl = 0.0 if stale is None else parse_seconds(stale, "cache_stale_ttl")
        return Freshness(self.ttl, stale_ttl, share)

    def _background_refresh(self) -> BackgroundRefresh | None:
        if self.freshness is None or self.freshness.share is None:
            return None
        from opero.caching.refresh import BackgroundRefresh

        return BackgroundRefresh(self.freshness, self.leases, self._refreshed)

    # --- for wrappers -----------------------------------------------------------------------------

    @property
    def fast_get(self) -> Callable[[Any], Entry | None]:
        """Find an entry by its key in memory, at C speed; find nothing in other stores."""
        return self.store.entries.get if isinstance(self.store, MemoryStore) else _NO_ENTRIES.get

    @property
    def fast_parameters(self) -> tuple[str, ...]:
        """Names of the parameters from whose values a wrapper may build the key; empty if it may not."""
        return self.entries.keys.fast_parameters

    @property
    def of_instance(self) -> bool:
        """Whether such a key begins with the token of an instance."""
        return self.entries.keys.of_instance

    @property
    def token_get(self) -> Callable[[int], int | None]:
        """Find the token of an instance by its id, at C speed."""
        instances = self.entries.instances
        return _NO_TOKENS.get if instances is None else instances.tokens.get

    # --- keys -------------------------------------------------------------------------------------

    def key(self, call: Call) -> Hashable | None:
        """Return the key of a call that is made; None if it is not to be cached.

        Raises:
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
        if self.off or (switch.on and ambient.disabled()):
            return None
        try:
            return call.key or self.entries.keys.key(call)
        except UnkeyableError as error:
            if self.asked:
                raise
            self.off = True
            reason = str(error)
        self._skips.report(reason)
        warnings.warn(
            f"{reason} Until then its results are not cached.",
            OperoWarning,
            stacklevel=users_stacklevel(),
        )
        return None

    def key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Hashable | None:
        """Return the key of arguments; None if one has no content and the cache was not asked for.

        Raises:
            TypeError: The arguments do not fit the function.
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
        try:
            key = self.entries.keys.key(Call(args, kwargs))
        except UnkeyableError:
            if self.asked:
                raise
            return None
        if key is None:
            self._info.declared.bind(*args, **kwargs)  # raises: they do not fit
        return key

    # --- serving ----------------------------------------------------------------------------------

    def serve(self, call: Call, entry: Entry) -> Any:
        """Return the caller's own copy of what an entry holds."""
        entry.visited = True
        call.source = "hit"
        self._count_hit()
        if self._emitter.active:
            self._emitter.emit(CacheHit(function=self._emitter.function))
        return entry.open()

    def serve_stale(self, call: Call, entry: Entry, error: Exception | None = None) -> Any:
        """Return the caller's own copy of what an expired entry holds.

        Args:
            call: The call.
            entry: The entry.
            error: What the call failed with; None if it was not tried, because another has just failed.
        """
        entry.visited = True
        call.source = "stale"
        self._stats.add(stale=1)
        if self._emitter.active:
            expired = ambient.clock().monotonic() - entry.expiry
            self._emitter.emit(
                CacheStale(function=self._emitter.function, expired=expired, error=error)
            )
        return entry.open()

    def answers(self, key: Hashable, entry: Entry) -> bool | None:
        """Return how an entry answers a call: True fresh, False expired but served, None not at all."""
        if self.reader.is_fresh(key, entry):
            return True
        freshness = self.freshness
        return False if freshness is not None and freshness.served_at_once(key, entry) else None

    def refresh_if_due(self, call: Call, key: Hashable, entry: Entry, *, blocking: bool) -> None:
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
        if self.single_flight.claim(key, flight) is flight:
            refresh.start(_BackgroundCall(self, call, flight, blocking=blocking), blocking=blocking)

    def _refreshed(self, work: Any, error: Exception | None) -> None:
        if self._emitter.active:
            renewed = error is None and not work.rejected
            name = self._emitter.function
            self._emitter.emit(CacheRefreshed(function=name, renewed=renewed, error=error))

    def late(self, call: Call, expired: Entry | None) -> Any:
        """End a call whose deadline comes before the outcome that it waits for.

        Args:
            call: The call.
            expired: An expired entry that it gets then, if it may be served.

        Raises:
            DeadlineError: There is none.
        """
        error = overdue(call, self._emitter, "waiting for another caller's result")
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
            self._emitter.emit(CacheMiss(function=self._emitter.function))

    def computed(self, call: Call, key: Hashable) -> None:
        """Count a miss that might have ended with an expired entry, and did not."""
        if not call.renews:
            self.count_miss()
        if self.freshness is not None:
            self.freshness.recent_failures.forget(key)

    def lifetime(self, call: Call, value: Any, began: float) -> float | None:
        """Return for how long to store a result: 0 for not at all, None for ever.

        A `cache_if` that raises warns and refuses, and never costs the caller the result.
        """
        if call.rejected:
            return 0
        if self.condition is None:
            return self.ttl
        try:
            seconds = ambient.clock().monotonic() - began
            return allowed_ttl(self.condition(value, Receipt.of(call, value, seconds)), self.ttl)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the result goes first
            reason = f"cache_if raised {type(error).__name__} and was taken as False"
            with contextlib.suppress(OperoWarning):  # where warnings are errors
                warnings.warn(reason, OperoWarning, stacklevel=users_stacklevel())
            self._skips.report(reason)
            return 0

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
        self, call: Call, flight: Flight, entry: Entry | None, error: Exception
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
        self, call: Call, flight: Flight, entry: Entry | None, error: Exception
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

    def share(self, call: Call, verdict: Any) -> Any:
        """Return or raise a waiter's own copy of the outcome that it was handed."""
        if isinstance(verdict, SharedResult) and verdict.stale:
            return self.serve_stale(call, verdict.entry)
        call.source = "shared"
        self._stats.add(shared=1)
        if isinstance(verdict, SharedResult):
            value = verdict.entry.open()
            if verdict.rejected:
                raise Rejected(value)
            return value
        error = copy_error(verdict.error)
        behind = error.__context__
        try:
            raise error
        finally:
            # `raise` has put there what the caller is handling just now; what went before matters
            # more.
            error.__context__ = behind
            del error, behind, verdict

    # --- what threads and event loops do alike ----------------------------------------------------

    def _begin(self, call: Call, key: Hashable, *, looked: bool, blocking: bool) -> StepLogic[Any]:
        """Look for a result, wait for another caller's, or become the one that computes it.

        Args:
            call: The call.
            key: Its key.
            looked: Whether it has looked in the store already, and found nothing fresh.
            blocking: Whether waiting blocks the thread.

        Returns:
            The result; a `_Leadership` if it has to be computed and stored, `Instruction.COMPUTE` if it
            has to be computed and cannot be shared.
        """
        flights, find, expired = self.single_flight, self.reader.find_step, None
        seen_at, completed = monotonic(), flights.completed
        if call.renews:
            flight = call.flight or flights.replace(key)
        else:
            if self.freshness is not None or not looked:
                expired = yield find(key)
                if expired is not None and (fresh := self.answers(key, expired)) is not None:
                    if not fresh:
                        return self.serve_stale(call, expired)
                    self.refresh_if_due(call, key, expired, blocking=blocking)
                    return self.serve(call, expired)
            flight = Flight(key)
            if flights.claim(key, flight) is not flight:
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
                    expired = yield find(key)
                return _Leadership(flight, expired)
            # Another caller may have stored the result between our look and our claim.
            if looked or flights.completed != completed:
                seen_at = -inf
            if self.leases is not None and call.prior_outcome is None:
                turn = yield from self.leases.take_turn(flight, call.deadline, expired, seen_at)
                expired, lease = turn.entry, turn.lease
                if turn.late:
                    return self._late_leader(call, flight, expired)
            elif seen_at == -inf:
                expired = yield find(key)
            if expired is None or not self.reader.is_fresh(key, expired):
                return _Leadership(flight, expired, lease)
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

    def _late_leader(self, call: Call, flight: Flight, expired: Entry | None) -> Any:
        error = overdue(call, self._emitter, "waiting for another caller's result")
        try:
            old = self.failed(call, flight, expired, error)
            if old is None:
                raise error
            return self.serve_stale(call, old, error)
        finally:
            del error

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        flights, find, is_fresh = self.single_flight, self.reader.find, self.reader.is_fresh
        claim, complete, leases = flights.claim, flights.complete, self.leases
        store, ttl, freshness = self.writer.store, self.ttl, self.freshness
        plain, heard = self.condition is None, bool(self._emitter.listeners)
        # Memory takes no waiting, so only what has to wait for another caller runs as steps.
        direct = isinstance(self.store, MemoryStore) and freshness is None

        def run(call: Call) -> Any:
            key = call.key
            looked = key is not None
            if not looked or self.off or switch.on:
                key = self.key(call)
                if key is None:
                    return proceed(call)
                call.key = key
                if direct and not call.renews:
                    looked, entry = True, find(key)
                    if entry is not None and is_fresh(key, entry):
                        return self.serve(call, entry)
            flight, expired, lease = Flight(key), None, None
            if not direct or call.renews or claim(key, flight) is not flight:
                found = run_sync(self._begin(call, key, looked=looked, blocking=True))
                if type(found) is not _Leadership:
                    return proceed(call) if found is Instruction.COMPUTE else found
                flight, expired, lease = found
            token = become_leader(flight)
            try:
                if direct and not call.renews:
                    expired = find(key)
                    if expired is not None and is_fresh(key, expired):
                        value = self.serve(call, expired)
                        notify(complete(flight), SharedResult(expired))
                        return value
                if call.prior_outcome is None and not call.renews:
                    if freshness is None:
                        self.count_miss()
                    if heard or switch.on:
                        self.missed()
                began = 0.0 if plain else ambient.clock().monotonic()
                value = proceed(call)
                if freshness is not None:
                    self.computed(call, key)
                lasts = ttl if plain and not call.rejected else self.lifetime(call, value, began)
                entry = store(flight, value, lasts)
                if waiters := complete(flight):
                    notify(waiters, self.verdict(value, entry, rejected=call.rejected))
                return value
            except Exception as error:
                old = self.failed(call, flight, expired, error)
                if old is None:
                    raise
                return self.serve_stale(call, old, error)
            except BaseException:
                flights.abandon(flight)
                raise
            finally:
                stop_leading(token)
                if leases is not None:
                    leases.release(lease, flight)

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        flights, find, is_fresh = self.single_flight, self.reader.find, self.reader.is_fresh
        claim, complete, leases = flights.claim, flights.complete, self.leases
        store, ttl, freshness = self.writer.store, self.ttl, self.freshness
        plain, heard = self.condition is None, bool(self._emitter.listeners)
        astore = self.writer.astore if self.store.blocking else None
        direct = isinstance(self.store, MemoryStore) and freshness is None

        async def run(call: Call) -> Any:
            key = call.key
            looked = key is not None
            if not looked or self.off or switch.on:
                key = self.key(call)
                if key is None:
                    return await proceed(call)
                call.key = key
                if direct and not call.renews:
                    looked, entry = True, find(key)
                    if entry is not None and is_fresh(key, entry):
                        return self.serve(call, entry)
            flight, expired, lease = Flight(key), None, None
            if not direct or call.renews or claim(key, flight) is not flight:
                found = await run_async(self._begin(call, key, looked=looked, blocking=False))
                if type(found) is not _Leadership:
                    return await proceed(call) if found is Instruction.COMPUTE else found
                flight, expired, lease = found
            token = become_leader(flight)
            try:
                if direct and not call.renews:
                    expired = find(key)
                    if expired is not None and is_fresh(key, expired):
                        value = self.serve(call, expired)
                        notify(complete(flight), SharedResult(expired))
                        return value
                # A call that is already made (`Call.prior_outcome`) was counted before it was made.
                if call.prior_outcome is None and not call.renews:
                    if freshness is None:
                        self.count_miss()
                    if heard or switch.on:
                        self.missed()
                began = 0.0 if plain else ambient.clock().monotonic()
                value = await proceed(call)
                if freshness is not None:
                    self.computed(call, key)
                lasts = ttl if plain and not call.rejected else self.lifetime(call, value, began)
                entry = (
                    await astore(flight, value, lasts) if astore else store(flight, value, lasts)
                )
                if waiters := complete(flight):
                    notify(waiters, self.verdict(value, entry, rejected=call.rejected))
                return value
            except Exception as error:
                old = self.failed(call, flight, expired, error)
                if old is None:
                    raise
                return self.serve_stale(call, old, error)
            except BaseException:
                flights.abandon(flight)
                raise
            finally:
                stop_leading(token)
                if leases is not None:
                    leases.release(lease, flight)

        return run

    # --- management -------------------------------------------------------------------------------

    def clear(self) -> int:
        """Remove all entries and return how many there were.

        What is being computed now will not be stored.
        """
        self.single_flight.invalidate_all()
        if self.freshness is not None:
            self.freshness.recent_failures.clear()
        return self.store.clear()

    def invalidate(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> bool:
        """Remove the entry of a call and return whether there was one."""
        key = self.key_of(args, kwargs)
        if key is None:
            return False
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

    def info(self) -> CacheInfo:
        """Return counters and bounds."""
        try:
            size, weight = self.store.measure()
        except StoreError:
            size = weight = None
        return CacheInfo(
            hits=self._stats.hits,
            misses=self._stats.misses,
            stale=self._stats.stale,
            size=size,
            bytes=weight,
            maxsize=self._options.cache_maxsize,
            max_bytes=self._max_bytes,
            ttl=self.ttl,
            backend=self.store.name,
            namespace=self.namespace,
        )

    def describe(self) -> str:
        """Return the line for `explain()`."""
        options = self._options
        lasts = "for ever" if self.ttl is None else f"for {format_seconds(self.ttl)}"
        parts = [f"{self.store.name}, {lasts}"]
        if self.freshness is not None:
            parts += self.freshness.describe()
        if isinstance(self.store, MemoryStore):
            most = f"at most {options.cache_maxsize:,} entries, {format_bytes(self._max_bytes)}"
            parts.append(most)
        if options.cache_ignore:
            parts.append(f"without {', '.join(options.cache_ignore)}")
        if self.condition is not None:
            parts.append("if cache_if says so")
        if options.cache_codec == "plain":
            parts.append("plain data only")
        if not options.cache_copy:
            parts.append("results shared, not copied")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"<CacheStage of {self.function}: {self.describe()}>"


def make_handle(stage: CacheStage | None, run: Callable[[Call], Any]) -> CacheHandle:
    """Return what users get as `f.cache`.

    Args:
        stage: The cache of a function; None if it has none.
        run: Runs a call through the whole pipeline.
    """
    return CacheHandle(stage, lambda args, kwargs: run(RefreshCall(args, kwargs)))


# --- the stage as a decorator ---------------------------------------------------------------------


def get_cache_decorator(
    cache: bool = True,
    cache_ttl: Duration | None = 3600,
    cache_backend: str | Store = "memory",
    cache_key: Callable[..., object] | None = None,
    cache_namespace: str = "opero",
    **options: Any,
) -> Callable[[Any], Any]:
    """Return a decorator that only caches.

    Args:
        cache: False for a decorator that gives the function itself back.
        cache_ttl: Lifetime of an entry; None never expires.
        cache_backend: "memory", "disk", "disk:PATH", "redis", "redis://…", or a store object.
        cache_key: Callable that gets the call's arguments and returns the key.
        cache_namespace: Prefix shared by functions, cleared together.
        options: Any other of the `cache…` options.

    Example:
        >>> @get_cache_decorator(cache_ttl="15m")
        ... def double(x):
        ...     return 2 * x
        >>> double(2), double(2), double.stats.calls
        (4, 4, 1)
    """
    decorator = standalone(
        "get_cache_decorator",
        "cache",
        cache=cache,
        cache_ttl=cache_ttl,
        cache_backend=cache_backend,
        cache_key=cache_key,
        cache_namespace=cache_namespace,
        **options,
    )
    return decorator if cache else lambda function: function
