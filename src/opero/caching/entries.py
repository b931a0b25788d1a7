# this_file: src/opero/caching/entries.py
"""Find, serve and store the entries of one function, and report what is not cached."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero import events
from opero.caching.copying import ATOMS, Uncopyable, freeze
from opero.caching.memory import Entry, MemoryStore, weigh
from opero.errors import StoreError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.steps import BlockingStep, in_thread, run_sync
from opero.utils.units import format_bytes

if TYPE_CHECKING:
    from opero.caching.memory import EntryStore
    from opero.caching.refresh import Freshness
    from opero.caching.single_flight import Flight
    from opero.events.bus import Emitter
    from opero.utils.steps import StepLogic


_ENTRY_BYTES: Final = 250
"""What an entry costs beside its value and the arguments in its key."""


class CachedCall(Protocol):
    """A call as its cache sees it.

    Attributes:
        args, kwargs: Its arguments.
        key: Its key once it is known.
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
    key: Any
    source: Any
    deadline: float | None
    overdue: bool
    renews: bool
    flight: Any
    prior_outcome: Any
    attempt_errors: list[Exception] | None
    hint: float


class Entries:
    """The entries of one function.

    A store that fails is a miss and an event; whatever happens while a result is stored, the caller gets it.

    Args:
        store: Where they are.
        copy: Whether mutable results are isolated.
        of_instance: Whether keys may begin with the token of an instance, which the entry must not outlive.
        freshness: When entries are refreshed early and served late; None if neither was asked for.
        look_for_edits: Returns whether the function was edited since its results were stored; None not to.
        counters: The function's counters (`core.function.Stats`); None where no calls are served.
        emitter: Where its events go.

    Attributes:
        find: Finds an entry by its key, even if it has expired; never raises.
        entry: `entry(key, value, ttl)` returns a result in the form in which the store takes it, for so many seconds,
            None for ever; raises `Uncopyable` if it cannot be isolated, or cannot be encoded.
    """

    def __init__(
        self,
        store: EntryStore,
        *,
        copy: bool = True,
        of_instance: bool = False,
        freshness: Freshness | None = None,
        look_for_edits: Callable[[], bool] | None = None,
        counters: Any = None,
        emitter: Emitter,
    ) -> None:
        self._store = store
        self._copy = copy
        self._of_instance = of_instance
        self._freshness = freshness
        self._look_for_edits = look_for_edits
        self._count_hit: Callable[[], object] = counters and counters.hit_counter.count
        self._counters = counters
        self._emitter = emitter
        self._heard = bool(emitter.listeners)  # listeners of the whole program hold the switch
        self._reported: set[str] = set()
        self._weighed: tuple[object, int] = None, 0
        self.entry: Callable[[Any, Any, float | None], Entry]
        self.entry = getattr(store, "entry", self.plain_entry)
        if freshness is not None:
            self.entry = functools.partial(freshness.entry, self.entry)
        # Memory is asked directly: it never fails.
        in_memory = isinstance(store, MemoryStore)
        self.find: Callable[[Any], Entry | None] = store.find if in_memory else self._find

    # --- finding ----------------------------------------------------------------------------------

    def is_fresh(self, key: Hashable, entry: Entry) -> bool:
        """Return whether an entry has not expired; one that is of no use any more is dropped."""
        now = ambient.clock().monotonic() if switch.on else monotonic()
        if entry.expires > now or entry.expiry > now:
            return True
        freshness = self._freshness
        if entry.keep <= now and (freshness is None or not freshness.usable(entry, now)):
            self._store.discard(key, entry)
        return False

    def find_step(self, key: Hashable) -> BlockingStep:
        """Return the step that finds an entry."""
        return BlockingStep(self.find, self.afind, (key,))

    def find_many(self, keys: Sequence[Any]) -> list[Entry | None]:
        """Find the entries of many keys, in as few trips as the store can; never raises."""
        store: Any = self._store
        if not hasattr(store, "find_many"):
            return [self._find(key) for key in keys]
        try:
            self._look()
            found: list[Entry | None] = store.find_many(keys, self._unreadable)
        except Exception as error:  # noqa: BLE001 - a broken store is a miss
            self._unreadable(error)
            return [None] * len(keys)
        return found

    def _find(self, key: Hashable) -> Entry | None:
        try:
            if self._look_for_edits is not None:
                self._look()
            return self._store.find(key)
        except Exception as error:  # noqa: BLE001 - as above
            self._unreadable(error)
            return None

    async def afind(self, key: Hashable) -> Entry | None:
        """Find an entry without holding up the event loop; never raises."""
        store: Any = self._store
        if not store.blocking:
            return self.find(key)
        ambient.require_loop("use a cache that blocks")
        try:
            if self._look_for_edits is not None:
                await in_thread(self._look).wait()
            native = getattr(store, "native", False)
            finding = store.afind(key) if native else in_thread(lambda: store.find(key)).wait()
            found: Entry | None = await finding
        except Exception as error:  # noqa: BLE001 - as above
            self._unreadable(error)
            return None
        return found

    def _look(self) -> None:
        look, self._look_for_edits = self._look_for_edits, None
        if look is not None and look() and self._emitter.active:
            self._emitter.emit(events.FunctionEdited(function=self._emitter.function))

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
            name, expired = self._emitter.function, ambient.clock().monotonic() - entry.expiry
            self._emitter.emit(events.CacheStale(function=name, expired=expired, error=error))
        return entry.open()

    # --- storing ----------------------------------------------------------------------------------

    def store(self, flight: Flight, value: Any, ttl: float | None) -> Entry | None:
        """Store the result of a flight, and return its entry; None if it was not stored.

        Args:
            flight: What was computed.
            value: The result.
            ttl: Its lifetime in seconds: 0 for not to be stored, None for ever.
        """
        try:
            if ttl != 0:
                entry = self.entry(flight.key, value, ttl)
                outdated = flight.invalidated
                if outdated or self._store.put(flight.key, entry):
                    if flight.invalidated and not outdated:
                        self._withdraw(flight, entry)
                    return entry
                self._not_stored(_too_heavy(entry))
        except Exception as error:  # noqa: BLE001 - as above
            self._not_stored(error)
        flight.without_result = True
        return None

    def storing(
        self, wanted: Sequence[tuple[Flight, Any, float | None]]
    ) -> StepLogic[list[Entry | None]]:
        """Store results in as few trips as the store can; an event loop goes on meanwhile.

        Args:
            wanted: The arguments of `store`, for each.

        Returns:
            The entry of each; None if it was not stored.
        """
        logic = self._storing(wanted)
        # Encoding many results would hold up the loop of a store that needs no thread.
        native = len(wanted) == 1 and getattr(self._store, "native", False)
        outcomes = (yield from logic) if native else (yield in_thread(lambda: run_sync(logic)))
        for (flight, _, _), outcome in zip(wanted, outcomes, strict=True):
            if not isinstance(outcome, Entry):
                flight.without_result = True
                if outcome is not None:
                    self._not_stored(outcome)
        return [outcome if isinstance(outcome, Entry) else None for outcome in outcomes]

    def _storing(
        self, wanted: Sequence[tuple[Flight, Any, float | None]]
    ) -> StepLogic[list[Entry | Exception | None]]:
        """Store results; return their entries, or why they were not stored, None if they were not to be."""
        outcomes = [self._made(*one) for one in wanted]
        kept = {
            place: (flight, outcome)
            for place, ((flight, _, _), outcome) in enumerate(zip(wanted, outcomes, strict=True))
            if isinstance(outcome, Entry) and not flight.invalidated
        }
        rows = [(flight.key, entry) for flight, entry in kept.values()]
        store: Any = self._store
        try:
            put_many: Any = getattr(
                store, "put_many", lambda rows: [store.put(*row) for row in rows]
            )
            fits = yield BlockingStep(put_many, getattr(store, "aput_many", put_many), (rows,))
            for (place, (flight, entry)), well in zip(kept.items(), fits, strict=True):
                if flight.invalidated:
                    yield in_thread(functools.partial(self._withdraw, flight, entry))
                elif not well:
                    outcomes[place] = _too_heavy(entry)
        except Exception as error:  # noqa: BLE001 - as above
            outcomes = [error if place in kept else o for place, o in enumerate(outcomes)]
        return outcomes

    def _made(self, flight: Flight, value: Any, ttl: float | None) -> Entry | Exception | None:
        """Return the entry of a result, or why there is none."""
        try:
            return None if ttl == 0 else self.entry(flight.key, value, ttl)
        except Exception as error:  # noqa: BLE001 - as above
            return error

    def _withdraw(self, flight: Flight, entry: Entry) -> None:
        """Remove a result whose key was invalidated while it was stored."""
        if isinstance(self._store, MemoryStore):
            self._store.discard(flight.key, entry)
        else:
            self._store.delete(flight.key)

    def skipped(self, reason: str, *, once: bool = False) -> None:
        """Notify listeners that a result is not cached; perhaps only once for the same reason."""
        if self._emitter.active and reason not in self._reported:
            if once:
                self._reported.add(reason)
            self._emitter.emit(events.CacheSkipped(function=self._emitter.function, reason=reason))

    def _unreadable(self, error: Exception) -> None:
        self.skipped(f"the store could not be read{_why(error)}")

    def _not_stored(self, error: Exception) -> None:
        if isinstance(error, Uncopyable):
            self.skipped(str(error), once=True)
        else:
            self.skipped(f"its result could not be stored{_why(error)}")

    # --- making entries ---------------------------------------------------------------------------

    def plain_entry(self, key: Any, value: Any, ttl: float | None = None) -> Entry:
        """Return a result in a form in memory from which several callers can be served, as `entry` does."""
        # An installed clock holds the switch; otherwise the machine's is read without a detour.
        expires = math.inf
        if ttl is not None:
            expires = ttl + (ambient.clock().monotonic() if switch.on else monotonic())
        weight, group, first = _ENTRY_BYTES, None, 1
        if type(key) is tuple:
            if self._of_instance and key and type(key[0]) is int:
                group, first = key[0], 2
            for part in key[first::2]:  # between them stand their types
                kind = type(part)
                if kind is str or kind is bytes:
                    weight += len(part)
                elif kind is tuple:  # types and values of a short list, which often is a default
                    weighed = self._weighed
                    if weighed[0] is not part:
                        weighed = self._weighed = part, sum(map(_item_weight, part[1]))
                    weight += weighed[1]
        of_value: Any = type(value)
        if of_value in ATOMS:  # `sys.getsizeof` costs twice as much
            return Entry(value, expires, None, weight + of_value.__sizeof__(value), group)
        stored, copier = freeze(value, copy=self._copy)
        return Entry(stored, expires, copier, weight + weigh(stored), group)


def _item_weight(item: object) -> int:
    return len(item) if isinstance(item, str | bytes) else 16


def _too_heavy(entry: Entry) -> Uncopyable:
    return Uncopyable(f"a result of {format_bytes(entry.weight)} is heavier than cache_max_bytes")


def _why(error: Exception) -> str:
    return f": {error}" if isinstance(error, StoreError) else f" ({type(error).__name__})"
