# this_file: src/opero/core/cache/lookup.py
"""Looking in the store: what is found, whether it still counts, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core import ambient
from opero.core.cache.awaiting import read
from opero.core.cache.memory import MemoryStore
from opero.core.deadline import overdue
from opero.errors import StoreError

if TYPE_CHECKING:
    from opero.core.cache.edits import Edits
    from opero.core.cache.memory import Entry, EntryStore
    from opero.core.cache.skips import Skips
    from opero.core.call import Call
    from opero.core.stage import Emitter
    from opero.core.stats import Stats
    from opero.errors import DeadlineError

__all__ = ["Lookup"]


class Lookup:
    """Finds and serves the entries of one function.

    Args:
        store: Where they are.
        stats: The function's counters.
        emitter: Where its events go.
        skips: Who hears of a store that cannot be read.
        edits: Looks at the first lookup whether the function was edited; None if nobody would know.

    Attributes:
        find: Finds an entry by its key; never raises.
        count_miss: Counts a miss.
        heard: Whether the function has listeners of its own.
    """

    def __init__(
        self,
        store: EntryStore,
        stats: Stats,
        emitter: Emitter,
        skips: Skips,
        *,
        edits: Edits | None = None,
    ) -> None:
        self._store = store
        self._emitter = emitter
        self._skips = skips
        self._edits = edits
        self._count_hit = stats.hit_tally.count
        self.count_miss: Callable[[], object] = stats.miss_tally.count
        self.heard: bool = bool(emitter.listeners)
        # Memory is asked directly: it never fails.
        self.find: Callable[[Any], Entry | None] = (
            store.find if isinstance(store, MemoryStore) else self._read
        )

    def lives(self, key: Hashable, entry: Entry) -> bool:
        """Whether an entry may be served; one that has expired is dropped."""
        if entry.expires > ambient.clock().monotonic():
            return True
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

    def missed(self) -> None:
        """Tell listeners of a miss."""
        if self._emitter.active:
            self._emitter.emit(events.CacheMiss(function=self._emitter.function))

    def overdue(self, call: Call) -> DeadlineError:
        """Return the error for a caller whose deadline comes before the outcome that it waits for."""
        return overdue(call, self._emitter, "waiting for another caller's result")

    def _read(self, key: Hashable) -> Entry | None:
        edits = self._edits
        if edits is not None and not edits.looked:
            edits.look(self._emitter)
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
