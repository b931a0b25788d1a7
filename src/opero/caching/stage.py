# this_file: src/opero/caching/stage.py
"""The stage: what was computed once is not computed again, and never by two callers at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from opero.caching.adapters import async_adapter, sync_adapter
from opero.caching.handle import CacheHandle, CacheInfo, format_bytes
from opero.caching.keeper import Keeper
from opero.caching.lookup import Lookup
from opero.caching.memory import MemoryStore
from opero.caching.registry import register
from opero.caching.sharing import Sharing
from opero.caching.shelf import Shelf, make_shelf
from opero.caching.skips import Skips
from opero.errors import OperoWarning, StoreError, UnkeyableError
from opero.utils.stack import users_stacklevel
from opero.utils.units import format_seconds, parse_size

if TYPE_CHECKING:
    from opero.caching.aging import Aging
    from opero.caching.lease import Leases
    from opero.caching.memory import Entry, EntryStore
    from opero.caching.renewal import Renewal
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.function import FunctionInfo
    from opero.core.options import Options
    from opero.core.stats import Stats
    from opero.events.bus import Emitter

__all__ = ["Cache"]

_NO_ENTRIES: Final[Mapping[Any, Entry]] = MappingProxyType({})
_NO_TOKENS: Final[Mapping[int, int]] = MappingProxyType({})


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
        off: Whether that has happened.
        lookup: Finds and serves entries.
        keeper: Stores results.
        leases: Single-flight across processes; None for a store that they do not share.
        sharing: Brings outcomes to those who waited.
        aging: When entries are renewed early and served late; None if neither was asked for.
        renewal: Renews entries behind the scenes; None if that was not asked for.
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
        self.off: bool = False
        self._info = info
        self._options = options
        self._stats = stats
        self._max_bytes = parse_size(options.cache_max_bytes, "cache_max_bytes")
        self._skips = skips = Skips(emitter)
        self.shelf: Shelf = make_shelf(info, options) if origin is None else origin.shelf
        self.store: EntryStore = self.shelf.store
        self._keying = self.shelf.keying
        self.aging: Aging | None = _aging(options)
        self.lookup: Lookup = Lookup(
            self.store, stats, emitter, skips, edits=self.shelf.edits, aging=self.aging
        )
        self.keeper: Keeper = Keeper(self.shelf, options, skips, self.aging)
        self.leases: Leases | None = None
        if self.store.lends:
            from opero.caching.lease import Leases

            self.leases = Leases(self.store, self.lookup, skips)
        self.sharing: Sharing = Sharing(self.shelf.flights, self.keeper, self.lookup, stats)
        self.renewal: Renewal | None = self._renewal(emitter)
        register(self)

    def connect(self, retried: Callable[[Exception], bool], rerun: Callable[[Call], Any]) -> None:
        """Learn of the stages behind, without knowing them.

        Args:
            retried: Whether an error is one that `retry_on` means.
            rerun: Runs a call through the whole pipeline, this stage included; gives a coroutine if
                the function is asynchronous.
        """
        if self.aging is not None:
            self.aging.retried = retried
        if self.renewal is not None:
            self.renewal.rerun = rerun

    def _renewal(self, emitter: Emitter) -> Renewal | None:
        if self.aging is None or self.aging.share is None:
            return None
        from opero.caching.renewal import Renewal

        return Renewal(self.shelf, self.aging, emitter, self.leases)

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

    # --- as a stage -------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        return sync_adapter(self, proceed)

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        return async_adapter(self, proceed)

    def switch_off(self, reason: str) -> None:
        """Stop caching, and say so once."""
        if self.off:
            return
        self.off = True
        self._skips.tell(reason)
        warnings.warn(
            f"{reason} Until then its results are not cached.",
            OperoWarning,
            stacklevel=users_stacklevel(),
        )

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
        self.shelf.flights.void_all()
        if self.aging is not None:
            self.aging.lulls.clear()
        return self.store.clear()

    def invalidate(self, call: Call) -> bool:
        """Remove the entry of a call and tell whether there was one."""
        key = self.key(call)
        if key is None:
            return False
        self.shelf.flights.void(key)
        if self.aging is not None:
            self.aging.lulls.end(key)
        return self.store.delete(key)

    def renew(self) -> None:
        """After a fork: forget what the parent's other threads were doing."""
        self.shelf.renew()
        if self.aging is not None:
            self.aging.lulls.renew_lock()

    def plant(self, key: Hashable, value: Any, ttl: float | None) -> Entry:
        """Return the entry of a result that a user sets; what is being computed will not replace it.

        Raises:
            Uncopyable: It cannot be isolated, or cannot be encoded.
        """
        self.shelf.flights.void(key)
        if self.aging is not None:
            self.aging.lulls.end(key)
        return self.keeper.made(key, value, ttl)

    def key(self, call: Call) -> Hashable | None:
        """Return the key of a call; None if an argument has no content and nobody asked for the cache.

        Raises:
            TypeError: The arguments do not fit the function.
            UnkeyableError: The cache was asked for, and an argument has no content.
        """
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
            ttl=self.keeper.ttl,
            backend=self.store.name,
            namespace=self.namespace,
        )

    def describe(self) -> str:
        """One line for `explain()`."""
        lasts = "for ever" if self.keeper.ttl is None else f"for {format_seconds(self.keeper.ttl)}"
        told = [f"{self.store.name}, {lasts}"]
        if self.aging is not None:
            told += self.aging.describe()
        if isinstance(self.store, MemoryStore):
            told.append(
                f"at most {self._options.cache_maxsize:,} entries, {format_bytes(self._max_bytes)}"
            )
        if self._options.cache_ignore:
            told.append(f"without {', '.join(self._options.cache_ignore)}")
        if self.keeper.condition is not None:
            told.append("if cache_if says so")
        if self._options.cache_codec == "plain":
            told.append("plain data only")
        if not self._options.cache_copy:
            told.append("results shared, not copied")
        return "; ".join(told)

    def __repr__(self) -> str:
        return f"<Cache of {self.function}: {self.describe()}>"


# Loaded where it is asked for, because importing opero must stay cheap.


def _aging(options: Options) -> Aging | None:
    """Return the ages of a function's entries, None if nothing depends on them."""
    if options.cache_stale_ttl is None and options.cache_refresh is None:
        return None
    from opero.caching.aging import Aging

    return Aging(options)
