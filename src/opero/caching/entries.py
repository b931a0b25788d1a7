# this_file: src/opero/caching/entries.py
"""Find and store the entries of one function, and report what is not cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from sys import getsizeof
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero import events
from opero.caching.copying import ATOMS, Uncopyable, freeze
from opero.caching.handle import format_bytes
from opero.caching.memory import Entry, MemoryStore, weigh
from opero.errors import StoreError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.steps import BlockingStep

if TYPE_CHECKING:
    from opero.caching.function_cache import FunctionCache
    from opero.caching.memory import EntryStore
    from opero.caching.single_flight import Flight
    from opero.events.bus import Emitter

__all__ = ["EntryReader", "EntryWriter", "SkipReporter", "Stored", "afind", "aput"]


class SkipReporter:
    """Notifies listeners that a result is not cached, and why.

    Args:
        emitter: Where the events go.
    """

    __slots__ = ("_emitter", "_reported")

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._reported: set[str] = set()

    def report(self, reason: str, *, once: bool = False) -> None:
        """Emit a `CacheSkipped`.

        Args:
            reason: Why.
            once: Whether the same reason is reported only once.
        """
        if not self._emitter.active or reason in self._reported:
            return
        if once:
            self._reported.add(reason)
        self._emitter.emit(events.CacheSkipped(function=self._emitter.function, reason=reason))


# --- stores and event loops -----------------------------------------------------------------------


async def afind(store: EntryStore, key: Any) -> Entry | None:
    """Return the entry of `key`, even if it has expired, without holding up the event loop."""
    if getattr(store, "native", False):
        native: Any = store
        found: Entry | None = await native.afind(key)
        return found
    from asyncio import to_thread

    return await to_thread(store.find, key)


async def aput(
    store: EntryStore, key: Any, make: Callable[[], Entry], *, unless: Callable[[], bool]
) -> tuple[Entry, bool]:
    """Make an entry and store it, without holding up the event loop.

    Args:
        store: Where.
        key: Its key.
        make: Makes the entry, which may take as long as storing it.
        unless: Whether it must not be stored after all.

    Returns:
        The entry, and whether all is well: False if it was too heavy.
    """
    if getattr(store, "native", False):
        native: Any = store
        entry = make()
        return entry, unless() or await native.aput(key, entry)
    from asyncio import to_thread

    def work() -> tuple[Entry, bool]:
        made = make()
        return made, unless() or store.put(key, made)

    return await to_thread(work)


# --- reading --------------------------------------------------------------------------------------


class EntryReader:
    """Finds the entries of one function; a store that fails is a miss and an event.

    Args:
        function_cache: Where they are.
        emitter: Where an event of an edited function goes.
        skip_reporter: Reports a store that cannot be read.
        usable: Returns whether an expired entry may still be served; None if it never is.

    Attributes:
        find: Finds an entry by its key; never raises.
        finds_many: Whether the store can be asked for many keys at once.
    """

    def __init__(
        self,
        function_cache: FunctionCache,
        emitter: Emitter,
        skip_reporter: SkipReporter,
        usable: Callable[[Entry, float], bool] | None = None,
    ) -> None:
        self._store = store = function_cache.store
        self._source_change = function_cache.source_change
        self._emitter = emitter
        self._skip_reporter = skip_reporter
        self._usable = usable
        self.finds_many: bool = hasattr(store, "find_many")
        # Memory is asked directly: it never fails.
        self.find: Callable[[Any], Entry | None] = (
            store.find if isinstance(store, MemoryStore) else self._find
        )

    def is_fresh(self, key: Hashable, entry: Entry) -> bool:
        """Return whether an entry has not expired; one that is of no use any more is dropped."""
        now = ambient.clock().monotonic() if switch.on else monotonic()
        if entry.expires > now or entry.expiry > now:
            return True
        usable = self._usable
        if entry.keep <= now and not (usable is not None and usable(entry, now)):
            self._store.discard(key, entry)
        return False

    def find_step(self, key: Hashable) -> BlockingStep:
        """Return the step that finds an entry."""
        return BlockingStep(self.find, self.afind, (key,))

    def find_many(self, keys: Sequence[Any]) -> list[Entry | None]:
        """Find entries in a store that can be asked for many; never raises."""
        store: Any = self._store
        change = self._source_change
        try:
            if change is not None and not change.looked:
                change.look(self._emitter)
            found: list[Entry | None] = store.find_many(keys, self._failed)
        except Exception as error:  # noqa: BLE001 - a broken store is a miss
            self._failed(error)
            return [None] * len(keys)
        return found

    def _find(self, key: Hashable) -> Entry | None:
        change = self._source_change
        try:
            if change is not None and not change.looked:
                change.look(self._emitter)
            return self._store.find(key)
        except Exception as error:  # noqa: BLE001 - a broken store is a miss
            self._failed(error)
            return None

    async def afind(self, key: Hashable) -> Entry | None:
        """Find an entry without holding up the event loop; never raises."""
        if not self._store.blocking:
            return self.find(key)
        change = self._source_change
        try:
            if change is not None and not change.looked:
                from asyncio import to_thread

                await to_thread(change.look, self._emitter)
            return await afind(self._store, key)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        why = f": {error}" if isinstance(error, StoreError) else f" ({type(error).__name__})"
        self._skip_reporter.report(f"the store could not be read{why}")


# --- writing --------------------------------------------------------------------------------------

_ENTRY_BYTES: Final = 250
"""What an entry costs beside its value and the arguments in its key."""


class Stored(NamedTuple):
    """What came of storing a result.

    Attributes:
        entry: It as it would be stored; None if it is not to be, or cannot be.
        error: Why it was not stored, if it failed.
        fits: Whether it is light enough.
    """

    entry: Entry | None
    error: Exception | None = None
    fits: bool = True


class EntryWriter:
    """Stores the results of one function; whatever happens here, the caller gets the result.

    Args:
        function_cache: Where to.
        copy: Whether mutable results are isolated.
        skip_reporter: Reports what is not stored.
        dated: Returns an entry that remembers when it was stored; None if nothing depends on that.

    Attributes:
        stores_many: Whether the store takes many results at once.
    """

    def __init__(
        self,
        function_cache: FunctionCache,
        *,
        copy: bool,
        skip_reporter: SkipReporter,
        dated: Callable[[Entry, float], Entry] | None = None,
    ) -> None:
        self._store = store = function_cache.store
        self._of_instance = function_cache.keys.of_instance
        self._copy = copy
        self._skip_reporter = skip_reporter
        self._dated = dated
        self._encode: Callable[[Any, Any, float], Entry] | None = getattr(store, "entry", None)
        self.stores_many: bool = hasattr(store, "put_many")

    def store(self, flight: Flight, value: Any, ttl: float | None) -> Entry | None:
        """Store the result of a flight, and return its entry.

        Args:
            flight: What was computed.
            value: The result.
            ttl: Its lifetime in seconds: 0 for not to be stored, None for ever.
        """
        entry = None
        if ttl != 0:
            try:
                entry = self.entry(flight.key, value, ttl)
                if flight.invalidated or self._store.put(flight.key, entry):
                    return entry
                self._too_heavy(entry)
            except Exception as error:  # noqa: BLE001 - as above
                self._failed(error)
        flight.without_result = True
        return entry

    async def astore(self, flight: Flight, value: Any, ttl: float | None) -> Entry | None:
        """Do the same without holding up the event loop."""
        entry = None
        if ttl != 0:
            try:
                entry, well = await aput(
                    self._store,
                    flight.key,
                    lambda: self.entry(flight.key, value, ttl),
                    unless=lambda: flight.invalidated,
                )
                if well:
                    return entry
                self._too_heavy(entry)
            except Exception as error:  # noqa: BLE001 - as above
                self._failed(error)
        flight.without_result = True
        return entry

    def store_many(self, wanted: Sequence[tuple[Flight, Any, float | None]]) -> list[Stored]:
        """Store results, in whatever thread; `report` has to be called with each outcome."""
        stored: list[Stored] = []
        entries: list[tuple[Any, Entry]] = []
        places: list[int] = []
        for place, (flight, value, ttl) in enumerate(wanted):
            entry = trouble = None
            try:
                if ttl != 0:
                    entry = self.entry(flight.key, value, ttl)
                    if not flight.invalidated:
                        entries.append((flight.key, entry))
                        places.append(place)
            except Exception as error:  # noqa: BLE001 - as above
                trouble = error
            stored.append(Stored(entry, trouble))
        store: Any = self._store
        try:
            fits: list[bool] = store.put_many(entries) if entries else []
        except Exception as error:  # noqa: BLE001 - as above
            for place in places:
                stored[place] = Stored(stored[place].entry, error)
        else:
            for place, well in zip(places, fits, strict=True):
                if not well:
                    stored[place] = Stored(stored[place].entry, fits=False)
        return stored

    def report(self, flight: Flight, stored: Stored) -> Entry | None:
        """Report a result that was not stored, and return the entry."""
        if stored.error is not None:
            self._failed(stored.error)
        elif stored.entry is not None and not stored.fits:
            self._too_heavy(stored.entry)
        elif stored.entry is not None:
            return stored.entry
        flight.without_result = True
        return stored.entry

    def _too_heavy(self, entry: Entry) -> None:
        size = format_bytes(entry.weight)
        self._skip_reporter.report(f"a result of {size} is heavier than cache_max_bytes")

    def _failed(self, error: Exception) -> None:
        if isinstance(error, Uncopyable):
            self._skip_reporter.report(str(error), once=True)
            return
        why = f": {error}" if isinstance(error, StoreError) else f" ({type(error).__name__})"
        self._skip_reporter.report(f"its result could not be stored{why}")

    # --- making entries ---------------------------------------------------------------------------

    def entry(self, key: Any, value: Any, ttl: float | None) -> Entry:
        """Return a result in the form in which the store takes it.

        Args:
            key: Its key.
            value: The result.
            ttl: Its lifetime in seconds, None for ever.

        Raises:
            Uncopyable: It cannot be isolated, or cannot be encoded.
        """
        # An installed clock holds the switch; otherwise the machine's is read without a detour.
        now = ambient.clock().monotonic() if switch.on else monotonic()
        expires = math.inf if ttl is None else now + ttl
        encode = self._encode or self.plain_entry
        entry = encode(key, value, expires)
        return entry if self._dated is None or ttl is None else self._dated(entry, now)

    def plain_entry(self, key: Any, value: Any, expires: float = math.inf) -> Entry:
        """Return a result in a form in memory from which several callers can be served.

        Raises:
            Uncopyable: It cannot be isolated.
        """
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
        stored, copier = freeze(value, copy=self._copy)
        return Entry(stored, expires, copier, weight + weigh(stored), group)
