# this_file: src/opero/core/cache.py
"""Serve results from the cache, and compute what it does not have once for all callers that want it.

look in the store → hit
→ miss → first caller: compute → store → notify waiters
→ others: wait for its outcome
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from datetime import timedelta
from math import inf
from time import monotonic
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

from opero.caching.copying import Uncopyable, isolated
from opero.caching.function_cache import FunctionCache
from opero.caching.handles import CacheContext, clear_cache, context_stores, register
from opero.caching.keys.function_keys import (
    FunctionKeys,
    InstanceTokens,
    function_id,
    namespace_prefix,
)
from opero.caching.memory import Entry, MemoryStore
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SingleFlight,
    become_leader,
    notify,
)
from opero.core.call import Call
from opero.core.deadline import forget_deadlines, overdue
from opero.core.options import Options, standalone
from opero.errors import OperoUsageError, OperoWarning, UnkeyableError, did_you_mean, warn_user
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.steps import run_async, run_sync
from opero.utils.units import format_bytes, format_seconds, parse_seconds, parse_size

if TYPE_CHECKING:
    from opero.caching.entries import CachedCall
    from opero.caching.function_cache import Answer
    from opero.caching.memory import EntryStore, Store
    from opero.core.call import AsyncProceed, Proceed
    from opero.core.decorated import Receipt
    from opero.core.function import FunctionInfo, Stats
    from opero.events.bus import Emitter
    from opero.utils.units import Duration

__all__ = [
    "CacheStage", "RefreshCall", "allowed_ttl", "clear_cache", "get_cache_context", "get_cache_decorator",
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


class RefreshCall(Call):
    """A call that does not look in the cache, but whose result is stored."""

    renews = True


class _BackgroundCall(RefreshCall):
    """A call that refreshes an entry, for no caller in particular.

    If it is dropped before it has begun, because its event loop was closed, a waiter takes over its
    flight.
    """

    def __init__(self, stage: CacheStage, call: CachedCall, flight: Flight, blocking: bool) -> None:
        super().__init__(
            tuple(_own(value) for value in call.args),
            {name: _own(value) for name, value in call.kwargs.items()},
        )
        self.flight = flight
        self._stage = stage
        self._blocking = blocking

    def unchanged(self) -> bool:
        """Return whether the arguments still have the key of the entry."""
        self.key: Any = self._stage.keys.key(self.args, self.kwargs)
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


def _open(info: FunctionInfo, options: Options) -> tuple[EntryStore, FunctionKeys]:
    """Return where a function's entries are, and what makes their keys."""
    given: dict[str, Any] = {"ignore": options.cache_ignore, "user_key": options.cache_key}
    if options.cache_backend == "memory":
        memory = _memory(options)
        instances = InstanceTokens(forget=memory.drop_group) if info.in_class else None
        return memory, FunctionKeys(info, instances=instances, **given)
    # Made at the first call, because closures are complete only then.
    prefix = functools.cache(
        lambda: (
            f"{namespace_prefix(options.cache_namespace)}{function_id(info, options.cache_version)}:"
        )
    )
    return _shared(options, prefix), FunctionKeys(info, prefix=prefix, **given)


def _memory(options: Options) -> MemoryStore:
    return MemoryStore(
        options.cache_maxsize, parse_size(options.cache_max_bytes, "cache_max_bytes")
    )


def _shared(options: Options, prefix: Callable[[], str]) -> EntryStore:
    """Return the entries whose keys begin with a prefix, in a store that functions share."""
    # Loaded where it is asked for: importing opero must stay cheap.
    from opero.caching.stores.base import open_entries

    max_bytes = parse_size(options.cache_max_bytes, "cache_max_bytes")
    return open_entries(options.cache_backend, prefix, max_bytes, options.cache_codec)


class CacheStage(FunctionCache):
    """The cache around one function.

    Args:
        info: The function.
        options: Its options.
        stats: The function's counters.
        emitter: Where its events go.
        origin: A cache of the same function, with the same cache options except for ttl and
            condition, whose entries it shares.

    Attributes:
        condition: The option `cache_if`.
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
        store, keys = _open(info, options) if origin is None else (origin.store, origin.keys)
        super().__init__(
            options,
            store,
            keys,
            SingleFlight() if origin is None else origin.single_flight,
            counters=stats,
            emitter=emitter,
            overdue=lambda call: overdue(call, emitter, "waiting for another caller's result"),
        )
        self.in_memory: bool = isinstance(store, MemoryStore)
        self.condition: Callable[[Any, Receipt[Any]], object] | None = options.cache_if
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

    # --- for wrappers -----------------------------------------------------------------------------

    @property
    def leads_fast(self) -> bool:
        """Whether a wrapper may lead flights: results need no more than to be stored."""
        return self.condition is None and self.freshness is None

    def find_or_lead(self, key: Hashable | None) -> Entry | Flight | None:
        """Find a fresh entry, or become the leader for its key; the thread may wait for the store.

        Returns:
            None where `begin` has to decide: without a key, and where another caller computes the same.
        """
        if key is None or self.off:
            return None
        completed, looked_at = self.single_flight.completed, monotonic()
        entry = self.entries.find(key)
        if entry is not None and self.entries.is_fresh(key, entry):
            return entry
        return self.lead(key, completed, looked_at)

    def lead(
        self, key: Hashable | None, completed: object = -1, looked_at: float = -inf
    ) -> Flight | None:
        """Become the leader for a key that was not found, with a lease if there are leases.

        Args:
            key: The key.
            completed: That of the flights before the store was looked at; -1 for a look that does not count.
            looked_at: Machine time at which it was looked at.

        Returns:
            None where `begin` has to decide, as above.
        """
        if key is None or self.off:
            return None
        flights, leases, flight = self.single_flight, self.leases, Flight(key)
        try:
            if flights.start(key, flight) is not flight:
                return None
            become_leader(flight)
            recent = leases is None or leases.acquire_at_once(flight, looked_at)
            # Another caller may have stored the result between the look and the start.
            if (recent and flights.completed is completed) or (
                recent is not None and self.entries.find(key) is None
            ):
                self.count_miss()
                return flight
        except BaseException:
            self.give_up(flight)
            raise
        self.give_up(flight)
        return None

    def land(self, flight: Flight, value: Any, entry: Entry | None) -> None:
        """Share a result that was computed, and stored as `entry`."""
        if waiters := self.single_flight.complete(flight):
            notify(waiters, self.verdict(value, entry))

    def refresh_work(self, call: CachedCall, flight: Flight, blocking: bool, /) -> _BackgroundCall:
        """Return the call that refreshes an entry in the background and leads its flight."""
        return _BackgroundCall(self, call, flight, blocking)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
        """Return the key of a call that is made; None if it is not to be cached.

        Raises:
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
        if self.off or (switch.on and ambient.disabled()):
            return None
        try:
            return self.keys.key(args, kwargs)
        except UnkeyableError as error:
            if self.asked:
                raise
            self.off = True
            self.clear()  # what it holds would be served without a look at that
            reason = str(error)
        self.entries.skipped(reason)
        warn_user(f"{reason} Until then its results are not cached.")
        return None

    def lifetime(self, call: Call, value: Any, began: float) -> float | None:
        """Count a result that was computed; return for how long to store it: 0 for not at all, None for ever.

        A `cache_if` that raises warns and refuses, and never costs the caller the result.
        """
        self.computed(call, call.key)
        if call.rejected:
            return 0
        if self.condition is None:
            return self.ttl
        try:
            seconds = ambient.clock().monotonic() - began
            return allowed_ttl(self.condition(value, call.receipt(value, seconds)), self.ttl)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the result goes first
            reason = f"cache_if raised {type(error).__name__} and was taken as False"
            with contextlib.suppress(OperoWarning):  # where warnings are errors
                warn_user(reason)
            self.entries.skipped(reason)
            return 0

    def at_once(self, call: Call, *, waits: bool) -> Answer | None:
        """Answer a call as `begin` does; None where that has to.

        Args:
            call: The call; it gets its key.
            waits: Whether a look in the store is to be awaited, which only `begin` can.
        """
        if call.flight is None:
            if call.key is None or self.off or switch.on:
                call.key = self.key(call.args, call.kwargs)
                if call.key is None:
                    return Instruction.COMPUTE
            plain = not (waits or call.renews) and call.prior_outcome is None
            if not plain or self.freshness is not None:
                return None
            found: Entry | Flight | None = None
            try:
                found = self.find_or_lead(call.key)
                if isinstance(found, Entry):
                    return (self.entries.serve(call, found),)
                if found is not None:
                    self.missed()
            except BaseException:
                # Ctrl-C comes at any place, also right after a caller has become the leader.
                self.drop(found)
                raise
            return found
        return None if call.renews else call.flight

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        entries, store = self.entries, self.entries.store
        ttl, plain = self.ttl, self.leads_fast

        def run(call: Call) -> Any:
            found: Answer | None = None
            try:
                found = self.at_once(call, waits=False) or run_sync(self.begin(call, blocking=True))
                if not isinstance(found, Flight):
                    return found[0] if isinstance(found, tuple) else proceed(call)
                try:
                    began = 0.0 if plain else ambient.clock().monotonic()
                    value = proceed(call)
                    lasts = ttl if plain else self.lifetime(call, value, began)
                    self.land(found, value, store(found, value, lasts))
                    return value
                except Exception as error:
                    old = self.failed(call, found, error)
                    if old is None:
                        raise
                    return entries.serve_stale(call, old, error)
            except BaseException:
                # Cancelled, or Ctrl-C at whatever instruction.
                self.drop(found)
                raise

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        entries, store, waits = self.entries, self.entries.store, self.store.blocking
        ttl, plain = self.ttl, self.leads_fast

        async def run(call: Call) -> Any:
            found: Answer | None = None
            try:
                found = self.at_once(call, waits=waits)
                if found is None:
                    found = await run_async(self.begin(call, blocking=False))
                if not isinstance(found, Flight):
                    return found[0] if isinstance(found, tuple) else await proceed(call)
                try:
                    began = 0.0 if plain else ambient.clock().monotonic()
                    value = await proceed(call)
                    lasts = ttl if plain else self.lifetime(call, value, began)
                    if waits:
                        (entry,) = await run_async(entries.storing([(found, value, lasts)]))
                    else:
                        entry = store(found, value, lasts)
                    self.land(found, value, entry)
                    return value
                except Exception as error:
                    old = self.failed(call, found, error)
                    if old is None:
                        raise
                    return entries.serve_stale(call, old, error)
            except BaseException:
                # As above.
                self.drop(found)
                raise

        return run

    # --- management -------------------------------------------------------------------------------

    def describe(self) -> str:
        """Return the line for `explain()`."""
        options = self.options
        lasts = "for ever" if self.ttl is None else f"for {format_seconds(self.ttl)}"
        parts = [f"{self.store.name}, {lasts}"]
        if self.freshness is not None:
            parts += self.freshness.describe()
        if isinstance(self.store, MemoryStore):
            most = f"at most {self.store.maxsize:,} entries, {format_bytes(self.store.max_bytes)}"
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


# --- caches used by hand, and the stage as a decorator ---------------------------------------------


_OF_CONTEXT: Final = ("cache_ttl", "cache_maxsize", "cache_max_bytes", "cache_copy", "cache_codec")


def get_cache_context(
    cache_backend: str | Store = "memory", cache_namespace: str = "opero", **options: Any
) -> CacheContext:
    """Return a cache to be used by hand.

    Args:
        cache_backend: "memory", "disk", "disk:PATH", "redis", "redis://…", or a store object.
        cache_namespace: Contexts of one namespace see the same values; `clear_cache(namespace)`
            empties them, too.
        options: Further cache options: `cache_ttl`, `cache_maxsize`, `cache_max_bytes`,
            `cache_copy`, `cache_codec`. The first context of a namespace in memory decides its bounds.

    Raises:
        OperoUsageError: An option is unknown or wrong.

    Example:
        >>> with get_cache_context(cache_namespace="prices", cache_ttl="1h") as cache:
        ...     cache.set(("EUR", "USD"), 1.08)
        ...     cache.get(("EUR", "USD"))
        1.08
    """
    by = "get_cache_context"
    for name in options:
        if name not in _OF_CONTEXT:
            raise OperoUsageError(
                f"{by}() has no option {name!r}.{did_you_mean(name, _OF_CONTEXT)} "
                f"It takes cache_backend, cache_namespace, {', '.join(_OF_CONTEXT)}."
            )
    options |= {"cache_backend": cache_backend, "cache_namespace": cache_namespace}
    given = Options.of(by, **options)
    store: EntryStore
    prefix = None
    if cache_backend == "memory":
        store = context_stores.setdefault(cache_namespace, _memory(given))
    else:
        # Functions have a name between the colons.
        prefix = f"{namespace_prefix(cache_namespace)}:"
        store = _shared(given, lambda: prefix)
    return CacheContext(store, given, prefix)


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
