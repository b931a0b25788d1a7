# this_file: src/opero/core/cache.py
"""The cache: what was computed once is not computed again, and never by two callers at once.

look in the store → hit
                  → miss → first caller: look again → compute → store → tell those who wait
                         → others: wait for the first one's outcome
"""

from __future__ import annotations

import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from datetime import timedelta
from sys import _getframe, getsizeof
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from opero import events
from opero.core import ambient
from opero.core.cache_context import context_stores
from opero.core.cache_handle import CacheHandle, CacheInfo, RefreshCall, format_bytes
from opero.core.call import Receipt, Rejected
from opero.core.copy_error import copy_error
from opero.core.flight import (
    Crashed,
    Flight,
    Landed,
    Order,
    TaskWaiter,
    ThreadWaiter,
    Waiter,
    board,
    tell,
    unboard,
    verdict_of,
)
from opero.core.isolate import ATOMS, Uncopyable, freeze
from opero.core.memory import Entry, MemoryStore
from opero.core.shelf import Shelf, make_shelf
from opero.core.units import format_seconds, parse_seconds, parse_size
from opero.core.weight import weigh
from opero.errors import OperoWarning, UnkeyableError
from opero.utils.switch import switch

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.function import FunctionInfo
    from opero.core.memory import EntryStore
    from opero.core.options import Options
    from opero.core.stage import Emitter
    from opero.core.stats import Stats

__all__ = ["Cache", "clear_cache"]

_ENTRY_BYTES: Final = 250
"""What an entry costs beside its value and the arguments in its key."""

_NO_ENTRIES: Final[Mapping[Any, Entry]] = MappingProxyType({})
_NO_TOKENS: Final[Mapping[int, int]] = MappingProxyType({})


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


# --- the stage ------------------------------------------------------------------------------------


class Cache:
    """The stage around one function.

    Args:
        info: The function.
        options: What was asked for.
        stats: The function's counters.
        emitter: Where its events go.
        origin: A cache of the same function, with the same cache options except for ttl and
            condition, whose store it shares.

    Attributes:
        asked: Whether any cache option was given. If not, an argument that cannot be keyed switches
            the cache off.
        shelf: The entries and what belongs to them.
        store: Where the entries are.
        express_get: Finds an entry by its key in memory, at C speed; finds nothing in other stores.
        express_parameters: Names of the parameters from whose values a wrapper may build the key
            itself; empty if it may not.
        of_instance: Whether that key begins with `token_get(id(first argument))`.
        token_get: Finds the token of an instance by its id, at C speed.

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
        origin: Cache | None = None,
    ) -> None:
        self.function: str = info.qualname
        self.namespace: str = options.cache_namespace
        self.asked: bool = any(name.startswith("cache") for name in options.given)
        self._info = info
        self._options = options
        self._stats = stats
        self._emitter = emitter
        self._ttl = (
            None if options.cache_ttl is None else parse_seconds(options.cache_ttl, "cache_ttl")
        )
        self._max_bytes = parse_size(options.cache_max_bytes, "cache_max_bytes")
        self._condition = options.cache_if
        self._copy = options.cache_copy
        self._off = False
        self._told: set[str] = set()
        self.shelf: Shelf = make_shelf(info, options) if origin is None else origin.shelf
        self.store: EntryStore = self.shelf.store
        self._keying = self.shelf.keying
        self._flights = self.shelf.flights
        self._of_instance = self._keying.of_instance
        # Memory is asked directly: it never fails.
        self._get = self.store.find if isinstance(self.store, MemoryStore) else self._read
        self._heard = bool(emitter.listeners)
        self._count_hit = stats.hit_tally.count
        self._count_miss = stats.miss_tally.count
        with _registry_lock:
            _registry.add(self)

    # --- for the express lane ---------------------------------------------------------------------

    @property
    def express_get(self) -> Callable[[Any], Entry | None]:
        """Find an entry by its key in memory."""
        return self.store.entries.get if isinstance(self.store, MemoryStore) else _NO_ENTRIES.get

    @property
    def express_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that make up a key that a wrapper can build."""
        return self._keying.express_parameters

    @property
    def of_instance(self) -> bool:
        """Whether such a key begins with the token of an instance."""
        return self._keying.of_instance

    @property
    def tokens(self) -> dict[int, int] | None:
        """Tokens of instances by id; None if the function is no method."""
        return self.shelf.instances.tokens if self.shelf.instances is not None else None

    @property
    def token_get(self) -> Callable[[int], int | None]:
        """Find the token of an instance."""
        return _NO_TOKENS.get if self.tokens is None else self.tokens.get

    # --- keys -------------------------------------------------------------------------------------

    def key_of(self, call: Call) -> Hashable | None:
        """Return the key of a call, None if it is not cached.

        Raises:
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
        if self._off or ambient.disabled():
            return None
        try:
            return self._keying.key(call)
        except UnkeyableError as error:
            if self.asked:
                raise
            self._switch_off(str(error))
            return None

    def _switch_off(self, reason: str) -> None:
        """Stop caching, and say so once."""
        if self._off:
            return
        self._off = True
        self._skipped(reason)
        warnings.warn(
            f"{reason} Until then its results are not cached.", OperoWarning, stacklevel=_caller()
        )

    # --- looking, storing, sharing ----------------------------------------------------------------

    def _read(self, key: Hashable) -> Entry | None:
        try:
            return self.store.find(key)
        except Exception as error:  # noqa: BLE001 - a broken store is a miss
            self._skipped(f"the store could not be read ({type(error).__name__})")
            return None

    def _lives(self, key: Hashable, entry: Entry) -> bool:
        """Whether an entry may be served; one that has expired is dropped."""
        if entry.expires > ambient.clock().monotonic():
            return True
        self.store.discard(key, entry)
        return False

    def _serve(self, call: Call, entry: Entry) -> Any:
        entry.visited = True
        call.source = "hit"
        self._count_hit()
        if self._emitter.active:
            self._emitter.emit(events.CacheHit(function=self._emitter.function))
        return entry.open()

    def _missed(self) -> None:
        """Tell listeners of a miss."""
        if self._emitter.active:
            self._emitter.emit(events.CacheMiss(function=self._emitter.function))

    def _keep(self, call: Call, flight: Flight, value: Any, began: float) -> Entry | None:
        """Store a result if it may be stored; whatever happens here, the caller gets it."""
        if call.rejected:
            return None
        try:
            ttl = self._ttl
            if self._condition is not None:
                seconds = ambient.clock().monotonic() - began
                ttl = allowed_ttl(self._condition(value, Receipt.of(call, value, seconds)), ttl)
                if ttl == 0:
                    return None
            entry = self._entry(flight.key, value, ttl)
            if not (flight.void or self.store.put(flight.key, entry)):
                size = format_bytes(entry.weight)
                self._skipped(f"a result of {size} is heavier than cache_max_bytes")
            return entry
        except Uncopyable as signal:
            self._skipped(str(signal), once=True)
        except Exception as error:  # noqa: BLE001 - the caller gets the result, come what may
            self._skipped(f"its result could not be stored ({type(error).__name__})")
        return None

    def _entry(self, key: Any, value: Any, ttl: float | None) -> Entry:
        # An installed clock holds the switch; otherwise the machine's is read without a detour.
        now = ambient.clock().monotonic() if switch.on else monotonic()
        expires = math.inf if ttl is None else now + ttl
        weight, group = _ENTRY_BYTES, None
        if type(key) is tuple:
            for part in key:
                if type(part) is str or type(part) is bytes:
                    weight += len(part)
                elif type(part) is tuple:  # types and values of a short list
                    for item in part[1]:
                        weight += len(item) if type(item) is str or type(item) is bytes else 16
            if self._of_instance and key and type(key[0]) is int:
                group = key[0]
        if type(value) in ATOMS:
            return Entry(value, expires, None, weight + getsizeof(value), group)
        stored, thaw = freeze(value, copy=self._copy)
        return Entry(stored, expires, thaw, weight + weigh(stored), group)

    def _landed(self, value: Any, entry: Entry | None, *, rejected: bool) -> Landed | Order:
        try:
            return Landed(entry or self._entry((), value, None), rejected)
        except Uncopyable:
            return Order.ALONE

    def _crash(self, flight: Flight, error: Exception) -> None:
        """End a flight with a failure."""
        waiters = self._flights.land(flight)
        if not waiters:
            return
        if isinstance(error, Rejected):
            tell(waiters, self._landed(error.value, None, rejected=True))
        else:
            tell(waiters, Crashed(copy_error(error)))

    def _share(self, call: Call, waiter: Waiter) -> Any:
        """Return or raise a follower's own copy of the outcome."""
        call.source = "shared"
        self._stats.add(shared=1)
        verdict = verdict_of(waiter)
        if isinstance(verdict, Landed):
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

    def _skipped(self, reason: str, *, once: bool = False) -> None:
        if not self._emitter.active or reason in self._told:
            return
        if once:
            self._told.add(reason)
        self._emitter.emit(events.CacheSkipped(function=self._emitter.function, reason=reason))

    # --- management -------------------------------------------------------------------------------

    def handle(self, run: Callable[[Call], Any]) -> CacheHandle:
        """Return what users get as `f.cache`.

        Args:
            run: Runs a call through the whole pipeline, this stage included; gives a coroutine if
                the function is asynchronous.
        """
        return CacheHandle(self, run)

    def clear(self) -> int:
        """Remove all entries and return how many there were.

        What is being computed now will not be stored.
        """
        self._flights.void_all()
        return self.store.clear()

    def invalidate(self, call: Call) -> bool:
        """Remove the entry of a call and tell whether there was one."""
        key = self._key_for_owner(call)
        if key is None:
            return False
        self._flights.void(key)
        return self.store.delete(key)

    def _key_for_owner(self, call: Call) -> Hashable | None:
        try:
            key = self._keying.key(call)
        except UnkeyableError:
            if self.asked:
                raise
            return None
        if key is None:
            self._info.declared.bind(*call.args, **call.kwargs)  # raises: they do not fit
        return key

    def info(self) -> CacheInfo:
        """Return counters and bounds."""
        size, weight = self.store.measure()
        return CacheInfo(
            hits=self._stats.hits,
            misses=self._stats.misses,
            size=size,
            bytes=weight,
            maxsize=self._options.cache_maxsize,
            max_bytes=self._max_bytes,
            ttl=self._ttl,
            backend=self.store.name,
            namespace=self.namespace,
        )

    def describe(self) -> str:
        """One line for `explain()`."""
        lasts = "for ever" if self._ttl is None else f"for {format_seconds(self._ttl)}"
        told = [f"{self.store.name}, {lasts}"]
        if isinstance(self.store, MemoryStore):
            told.append(
                f"at most {self._options.cache_maxsize:,} entries, {format_bytes(self._max_bytes)}"
            )
        if self._options.cache_ignore:
            told.append(f"without {', '.join(self._options.cache_ignore)}")
        if self._condition is not None:
            told.append("if cache_if says so")
        if not self._copy:
            told.append("results shared, not copied")
        return "; ".join(told)

    def __repr__(self) -> str:
        return f"<Cache of {self.function}: {self.describe()}>"

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        flights, get, heard = self._flights, self._get, self._heard
        lives, serve, keep = self._lives, self._serve, self._keep
        make_key = self._keying.key
        claim, land, count_miss = flights.claim, flights.land, self._count_miss
        timed = self._condition is not None

        def run(call: Call) -> Any:
            # `key_of` once more, without its frame; who switches caches off holds the switch.
            # A wrapper whose arguments are plain has built the key, and found nothing.
            key, looked = call.key, call.key is not None
            if self._off or (switch.on and ambient.disabled()):
                key = None
            elif not looked:
                try:
                    key = make_key(call)
                except UnkeyableError as error:
                    if self.asked:
                        raise
                    self._switch_off(str(error))
            if key is None:
                return proceed(call)
            call.key = key
            if type(call) is RefreshCall:
                return lead(call, flights.replace(key))
            entry = None if looked else get(key)
            if entry is not None and lives(key, entry):
                return serve(call, entry)
            flight = Flight(key)
            return lead(call, flight) if claim(key, flight) is flight else follow(call, key)

        def lead(call: Call, flight: Flight) -> Any:
            boarded = board(flight)
            key = flight.key
            try:
                # The leader before may have landed between our look and our join.
                entry = get(key)
                if entry is None or type(call) is RefreshCall or not lives(key, entry):
                    if type(call) is not RefreshCall:
                        count_miss()
                        if heard or switch.on:
                            self._missed()
                    began = ambient.clock().monotonic() if timed else 0.0
                    value = proceed(call)
                    entry = keep(call, flight, value, began)
                else:
                    value = serve(call, entry)
                waiters = land(flight)
                if waiters:
                    tell(waiters, self._landed(value, entry, rejected=call.rejected))
            except Exception as error:
                self._crash(flight, error)
                raise
            except BaseException:
                flights.abandon(flight)
                raise
            finally:
                unboard(boarded)
            return value

        def follow(call: Call, key: Hashable) -> Any:
            while (flight := flights.join(key)) is None:
                waiter = ThreadWaiter()
                if not flights.wait_for(key, waiter):
                    continue
                try:
                    waiter.wait()
                except BaseException:
                    flights.leave(waiter)
                    raise
                if waiter.verdict is Order.LEAD:
                    flight = waiter.flight
                    break
                if waiter.verdict is Order.ALONE:
                    return proceed(call)
                if waiter.verdict is not Order.AGAIN:
                    return self._share(call, waiter)
            return lead(call, flight)

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        flights, get, heard = self._flights, self._get, self._heard
        lives, serve, keep = self._lives, self._serve, self._keep
        make_key = self._keying.key
        claim, land, count_miss = flights.claim, flights.land, self._count_miss
        timed = self._condition is not None

        async def run(call: Call) -> Any:
            # A wrapper whose arguments are plain has built the key, and found nothing.
            key, looked = call.key, call.key is not None
            if self._off or (switch.on and ambient.disabled()):
                key = None
            elif not looked:
                try:
                    key = make_key(call)
                except UnkeyableError as error:
                    if self.asked:
                        raise
                    self._switch_off(str(error))
            if key is None:
                return await proceed(call)
            call.key = key
            if type(call) is RefreshCall:
                return await lead(call, flights.replace(key))
            entry = None if looked else get(key)
            if entry is not None and lives(key, entry):
                return serve(call, entry)
            flight = Flight(key)
            if claim(key, flight) is flight:
                return await lead(call, flight)
            return await follow(call, key)

        async def lead(call: Call, flight: Flight) -> Any:
            boarded = board(flight)
            key = flight.key
            try:
                # The leader before may have landed between our look and our join.
                entry = get(key)
                if entry is None or type(call) is RefreshCall or not lives(key, entry):
                    # A call that is already made (`Call.begun`) was counted before it was made.
                    if type(call) is not RefreshCall and call.begun is None:
                        count_miss()
                        if heard or switch.on:
                            self._missed()
                    began = ambient.clock().monotonic() if timed else 0.0
                    value = await proceed(call)
                    entry = keep(call, flight, value, began)
                else:
                    value = serve(call, entry)
                waiters = land(flight)
                if waiters:
                    tell(waiters, self._landed(value, entry, rejected=call.rejected))
            except Exception as error:
                self._crash(flight, error)
                raise
            except BaseException:
                flights.abandon(flight)
                raise
            finally:
                unboard(boarded)
            return value

        async def follow(call: Call, key: Hashable) -> Any:
            while (flight := flights.join(key, blocking=False)) is None:
                waiter = TaskWaiter()
                if not flights.wait_for(key, waiter):
                    continue
                try:
                    await waiter.wait()
                except BaseException:
                    flights.leave(waiter)
                    raise
                if waiter.verdict is Order.LEAD:
                    flight = waiter.flight
                    break
                if waiter.verdict is Order.ALONE:
                    return await proceed(call)
                if waiter.verdict is not Order.AGAIN:
                    return self._share(call, waiter)
            return await lead(call, flight)

        return run


def _caller() -> int:
    """Return the `stacklevel` of the user's own line: the first frame outside opero."""
    level, frame = 1, _getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("opero."):
        level, frame = level + 1, frame.f_back
    return level


# --- all caches -----------------------------------------------------------------------------------

_registry: Final[weakref.WeakSet[Cache]] = weakref.WeakSet()
_registry_lock = threading.RLock()


def clear_cache(namespace: str | None = None, backend: str | None = None) -> int:
    """Empty the caches of decorated functions and the contexts of `get_cache_context`.

    Args:
        namespace: Only those with this `cache_namespace`; None for all.
        backend: Only those of this backend ("memory", or the class name of a store object); None
            for all.

    Returns:
        The number of entries removed, as far as the stores know.

    Example:
        >>> from opero import clear_cache, opero
        >>> @opero(cache_namespace="geo")
        ... def locate(city):
        ...     return len(city)
        >>> locate("Rome"), clear_cache("geo")
        (4, 1)
    """
    removed = sum(
        cache.clear()
        for cache in _caches()
        if namespace in (None, cache.namespace) and backend in (None, cache.store.name)
    )
    if backend in (None, "memory"):
        removed += sum(store.clear() for store in context_stores(namespace))
    return removed


def _caches() -> Iterable[Cache]:
    with _registry_lock:
        return list(_registry)


def _after_fork() -> None:
    """Let go of what other threads of the parent were doing: they do not exist in the child."""
    global _registry_lock  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _registry_lock = threading.RLock()
    for cache in _caches():
        cache.shelf.renew()
    for store in context_stores(None):
        store.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
