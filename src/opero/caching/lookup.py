# this_file: src/opero/caching/lookup.py
"""Looking in the store: what is found, whether it still counts, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from opero import events
from opero.caching.awaiting import read
from opero.caching.memory import MemoryStore
from opero.core.deadline import overdue
from opero.errors import StoreError
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.caching.aging import Aging
    from opero.caching.edits import Edits
    from opero.caching.flight import Flight
    from opero.caching.memory import Entry, EntryStore
    from opero.caching.skips import Skips
    from opero.core.call import Call
    from opero.core.stats import Stats
    from opero.events.bus import Emitter

__all__ = ["Lookup"]


class Lookup:
    """Finds and serves the entries of one function.

    Args:
        store: Where they are.
        stats: The function's counters.
        emitter: Where its events go.
        skips: Who hears of a store that cannot be read.
        edits: Looks at the first lookup whether the function was edited; None if nobody would know.
        aging: The ages of the entries; None if nothing depends on them.

    Attributes:
        find: Finds an entry by its key; never raises.
        count_miss: Counts a miss.
        heard: Whether the function has listeners of its own.
        many: Whether the store can be asked for many keys at once.
    """

    def __init__(
        self,
        store: EntryStore,
        stats: Stats,
        emitter: Emitter,
        skips: Skips,
        *,
        edits: Edits | None = None,
        aging: Aging | None = None,
    ) -> None:
        self._store = store
        self._stats = stats
        self._aging = aging
        self._emitter = emitter
        self._skips = skips
        self._edits = edits
        self._count_hit = stats.hit_tally.count
        self.count_miss: Callable[[], object] = stats.miss_tally.count
        self.heard: bool = bool(emitter.listeners)
        self.many: bool = hasattr(store, "find_many")
        # Memory is asked directly: it never fails.
        self.find: Callable[[Any], Entry | None] = (
            store.find if isinstance(store, MemoryStore) else self._read
        )

    def lives(self, key: Hashable, entry: Entry) -> bool:
        """Whether an entry is fresh; one that nobody will want any more is dropped."""
        now = ambient.clock().monotonic()
        if entry.expires > now or entry.expiry > now:
            return True
        if entry.keep <= now and not (self._aging is not None and self._aging.usable(entry, now)):
            self._store.discard(key, entry)
        return False

    def serve(self, call: Call, entry: Entry) -> Any:
        """Return the caller's own copy of what an entry holds."""
        entry.visited = True
        call.source = "hit"
        self._count_hit()
        if self._emitter.active:
            self._emitter.emit(events.CacheHit(function=self._emitter.function))
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
                events.CacheStale(function=self._emitter.function, expired=expired, error=error)
            )
        return entry.open()

    def computed(self, call: Call, key: Hashable) -> None:
        """Count a miss that might have ended with an expired entry, and did not."""
        if not call.renews:
            self.count_miss()
        if self._aging is not None:
            self._aging.lulls.end(key)

    def stand_in(
        self, call: Call, flight: Flight, entry: Entry | None, error: Exception
    ) -> Entry | None:
        """Return the expired entry that callers get because a call failed; if none, count the miss."""
        if self._aging is not None and entry is not None:
            excused = self._aging.fails(call, flight.key, entry, error)
            # What was invalidated meanwhile nobody wants any more.
            if excused and not flight.void:
                return entry
        if not call.renews:
            self.count_miss()
        return None

    def missed(self) -> None:
        """Tell listeners of a miss."""
        if self._emitter.active:
            self._emitter.emit(events.CacheMiss(function=self._emitter.function))

    def late(self, call: Call, old: Entry | None) -> Any:
        """End a call whose deadline comes before the outcome that it waits for.

        Args:
            call: The call.
            old: An expired entry that it gets then, if it may be served.

        Raises:
            DeadlineError: There is none.
        """
        error = overdue(call, self._emitter, "waiting for another caller's result")
        try:
            aging = self._aging
            if old is None or aging is None or not aging.usable(old, ambient.clock().monotonic()):
                raise error
            return self.serve_stale(call, old, error)
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del error

    def find_many(self, keys: Sequence[Any]) -> list[Entry | None]:
        """Find entries in a store that can be asked for many; never raises."""
        store: Any = self._store
        self._look()
        try:
            found: list[Entry | None] = store.find_many(keys, self._failed)
        except Exception as error:  # noqa: BLE001 - a broken store is a miss
            self._failed(error)
            return [None] * len(keys)
        return found

    def _look(self) -> None:
        edits = self._edits
        if edits is not None and not edits.looked:
            edits.look(self._emitter)

    def _read(self, key: Hashable) -> Entry | None:
        self._look()
        try:
            return self._store.find(key)
        except Exception as error:  # noqa: BLE001 - a broken store is a miss
            self._failed(error)
            return None

    async def afind(self, key: Hashable) -> Entry | None:
        """Find an entry without holding up the event loop; never raises."""
        edits = self._edits
        if edits is not None and not edits.looked:
            from asyncio import to_thread

            await to_thread(edits.look, self._emitter)
        try:
            return await read(self._store, key)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        why = f": {error}" if isinstance(error, StoreError) else f" ({type(error).__name__})"
        self._skips.tell(f"the store could not be read{why}")
