# this_file: src/opero/core/cache.py
"""Serve results from the cache, and compute what it does not have once for all callers that want it.

look in the store → hit
→ miss → first caller: compute → store → notify waiters
→ others: wait for its outcome
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta
from types import CoroutineType, MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from opero.caching.answers import CacheAnswers, Leadership
from opero.caching.context import clear_cache, get_cache_context, register
from opero.caching.copying import Uncopyable, isolated
from opero.caching.function_cache import FunctionCache, make_function_cache
from opero.caching.handle import CacheHandle, CacheInfo, format_bytes
from opero.caching.memory import Entry, MemoryStore
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SharedResult,
    become_leader,
    notify,
    stop_leading,
)
from opero.core.call import Call
from opero.core.deadline import forget_deadlines, overdue
from opero.core.options import standalone
from opero.errors import OperoWarning, StoreError, UnkeyableError, warn_user
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.steps import run_async, run_sync
from opero.utils.units import format_seconds, parse_seconds, parse_size

if TYPE_CHECKING:
    from opero.caching.answers import CachedCall
    from opero.caching.memory import Store
    from opero.caching.refresh import RefreshWork
    from opero.core.call import AsyncProceed, Proceed
    from opero.core.function import FunctionInfo
    from opero.core.options import Options
    from opero.core.receipt import Receipt
    from opero.core.stats import Stats
    from opero.events.bus import Emitter
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


def _seconds(options: Options, name: str) -> float | None:
    value = getattr(options, name)
    return None if value is None else parse_seconds(value, name)


def _entries(info: FunctionInfo, options: Options, max_bytes: int) -> FunctionCache:
    return make_function_cache(
        info,
        backend=options.cache_backend,
        namespace=options.cache_namespace,
        version=options.cache_version,
        ignore=options.cache_ignore,
        user_key=options.cache_key,
        maxsize=options.cache_maxsize,
        max_bytes=max_bytes,
        codec=options.cache_codec,
    )


class CacheStage(CacheAnswers):
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
        self.function: str = info.qualname
        self.namespace: str = options.cache_namespace
        self.asked: bool = any(name.startswith("cache") for name in options.given)
        self.off: bool = False
        self._info = info
        self._options = options
        self._stats = stats
        self._max_bytes = parse_size(options.cache_max_bytes, "cache_max_bytes")
        self.condition: Callable[[Any, Receipt[Any]], object] | None = options.cache_if
        self.rerun: Callable[[Call], Any] = lambda call: None
        super().__init__(
            _entries(info, options, self._max_bytes) if origin is None else origin.entries,
            ttl=_seconds(options, "cache_ttl"),
            stale_ttl=_seconds(options, "cache_stale_ttl"),
            share=options.cache_refresh,
            copy=options.cache_copy,
            counters=stats,
            emitter=emitter,
            overdue=lambda call: overdue(call, emitter, "waiting for another caller's result"),
        )
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

    def refresh_work(self, call: CachedCall, flight: Flight, blocking: bool, /) -> RefreshWork:
        """Return the call that refreshes an entry in the background and leads its flight."""
        return _BackgroundCall(self, call, flight, blocking)

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
        self.skip_reporter.report(reason)
        warn_user(f"{reason} Until then its results are not cached.")
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
            return allowed_ttl(self.condition(value, call.receipt(value, seconds)), self.ttl)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the result goes first
            reason = f"cache_if raised {type(error).__name__} and was taken as False"
            with contextlib.suppress(OperoWarning):  # where warnings are errors
                warn_user(reason)
            self.skip_reporter.report(reason)
            return 0

    # --- adapters ---------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        flights, find, is_fresh = self.single_flight, self.reader.find, self.reader.is_fresh
        begin, make_key = self.begin, self.entries.keys.key
        start, complete, leases = flights.start, flights.complete, self.leases
        store, ttl, freshness = self.writer.store, self.ttl, self.freshness
        plain, heard = self.condition is None, bool(self._emitter.listeners)
        # Memory takes no waiting, so only what has to wait for another caller runs as steps.
        direct = isinstance(self.store, MemoryStore) and freshness is None

        def run(call: Call) -> Any:
            key = call.key
            looked = key is not None
            if self.off or switch.on:
                key = self.key(call)
            elif not looked:
                try:
                    key = make_key(call)
                except UnkeyableError:
                    key = self.key(call)  # raises, or switches the cache off
            if not looked or key is None:
                if key is None:
                    return proceed(call)
                call.key = key
                if direct and not call.renews:
                    looked, entry = True, find(key)
                    if entry is not None and is_fresh(key, entry):
                        return self.serve(call, entry)
            flight, expired, lease = None, None, None
            if direct and not call.renews:
                flight = Flight(key)
                if start(key, flight) is not flight:
                    flight = None
            if flight is None:
                found = run_sync(begin(call, key, looked=looked, blocking=True))
                if type(found) is not Leadership:
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
        begin, make_key = self.begin, self.entries.keys.key
        start, complete, leases = flights.start, flights.complete, self.leases
        store, ttl, freshness = self.writer.store, self.ttl, self.freshness
        plain, heard = self.condition is None, bool(self._emitter.listeners)
        astore = self.writer.astore if self.store.blocking else None
        direct = isinstance(self.store, MemoryStore) and freshness is None

        async def run(call: Call) -> Any:
            key = call.key
            looked = key is not None
            if self.off or switch.on:
                key = self.key(call)
            elif not looked:
                try:
                    key = make_key(call)
                except UnkeyableError:
                    key = self.key(call)  # raises, or switches the cache off
            if not looked or key is None:
                if key is None:
                    return await proceed(call)
                call.key = key
                if direct and not call.renews:
                    looked, entry = True, find(key)
                    if entry is not None and is_fresh(key, entry):
                        return self.serve(call, entry)
            flight, expired, lease = None, None, None
            if direct and not call.renews:
                flight = Flight(key)
                if start(key, flight) is not flight:
                    flight = None
            if flight is None:
                found = await run_async(begin(call, key, looked=looked, blocking=False))
                if type(found) is not Leadership:
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

    def invalidate(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> bool:
        """Remove the entry of a call and return whether there was one."""
        key = self.key_of(args, kwargs)
        return key is not None and self.remove(key)

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
