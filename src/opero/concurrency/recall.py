# this_file: src/opero/concurrency/recall.py
"""What a map need not compute: results in the cache, results that somebody computes just now, equal items.

It uses the store, keys and flights of the function's own cache stage. The workers have no cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextvars import Context
from threading import get_ident
from typing import TYPE_CHECKING, Any

from opero.concurrency.claim import Follower, Lead
from opero.concurrency.engine import Outcome
from opero.concurrency.errand import Several, Steps
from opero.concurrency.order import Batch, Origin
from opero.core import ambient
from opero.core.cache.flight import Flight, board
from opero.core.cache.waiter import Crashed, Landed, Order, tell
from opero.core.call import Call, Rejected
from opero.errors import UnkeyableError

if TYPE_CHECKING:
    from opero.concurrency.engine import Job
    from opero.core.cache import Cache
    from opero.core.cache.memory import Entry

__all__ = ["Recall"]

Fresh = Callable[[list[int], list[Any]], object]
"""Takes indices and items that must be computed."""


class Recall:
    """The map's side of a function's cache.

    Args:
        cache: The function's cache stage.
        job: How an item becomes a call.
        shares: Whether others may wait for items of this map. Only a map that is driven to its end by
            itself may promise that: a stream stands still when its consumer does.
        wake: Ends the map's wait for reports; called from any thread.
        context: Context in which the workers run: there, the map counts as leader, so that the
            function's own calls of itself do not wait for the map that waits for them.
        awaits: Whether the map runs in an event loop.

    Attributes:
        waiting: Items that wait for somebody outside this map.
    """

    def __init__(
        self,
        cache: Cache,
        job: Job,
        *,
        shares: bool,
        wake: Callable[[], object],
        context: Context,
        awaits: bool,
    ) -> None:
        self._cache = cache
        self._job = job
        self._shares = shares
        self._wake = wake
        self._flights = cache.shelf.flights
        self._led: dict[Hashable, Lead] = {}
        self._keys: dict[int, Hashable] = {}
        self._alone: dict[int, Call] = {}
        self._followers: set[Follower] = set()
        self._arrived: deque[Follower] = deque()
        self._renewals: list[Call] = []
        self._slow: bool = cache.store.blocking
        self._awaits = awaits
        self._marker = Flight(None)
        context.run(board, self._marker)

    @property
    def waiting(self) -> int:
        """Items that wait for somebody outside this map."""
        return len(self._followers)

    # --- before the dispatch -------------------------------------------------------------------------

    def sort(self, idx: Sequence[int], items: list[Any], fresh: Fresh) -> Steps[list[Batch]]:
        """Sort pulled items: return what is known, hand on what must be computed, keep what waits."""
        known: dict[Origin, Batch] = {}
        claimed: list[Lead] = []
        for index, item in zip(idx, items, strict=True):
            self._sort_one(index, item, fresh, known, claimed)
        yield from self._look_up(claimed, fresh, known)
        return list(known.values())

    def _sort_one(
        self,
        index: int,
        item: Any,
        fresh: Fresh,
        known: dict[Origin, Batch],
        claimed: list[Lead],
    ) -> None:
        cache, job = self._cache, self._job
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        try:
            key = None if cache.off or ambient.disabled() else self._key(call)
        except Exception as error:  # noqa: BLE001 - what a user's `cache_key` raises is the item's error
            _add(known, "fresh", index, item, Outcome(error=error, attempts=0, calls=0))
            return
        if key is None:
            fresh([index], [item])
            return
        call.key = key
        lead = self._led.get(key)
        if lead is not None:
            lead.followers.append((index, item))
            return
        entry = None
        if not self._slow:
            entry = cache.lookup.find(key)
            if entry is not None and self._serve(index, item, call, entry, known):
                return
        flight = self._claim(index, item, call)
        if flight is None:
            return
        lead = self._lead(index, item, call, flight)
        if self._slow:
            # Claimed first and looked up then: nobody can land between, and one look is enough.
            claimed.append(lead)
        else:
            lead.old = entry
            self._begin(lead, fresh)

    def _key(self, call: Call) -> Hashable | None:
        try:
            return self._cache.shelf.keying.key(call)
        except UnkeyableError as error:
            if self._cache.asked:
                raise
            self._cache.switch_off(str(error))
            return None

    def _claim(self, index: int, item: Any, call: Call) -> Flight | None:
        """Return a flight to lead; None if the item waits for the one that somebody else leads."""
        key = call.key
        if not self._shares:
            return Flight(key)
        while (flight := self._flights.join(key, blocking=False)) is None:
            follower = Follower(index, item, call, key, self._note)
            if self._flights.wait_for(key, follower):
                self._followers.add(follower)
                return None
        return flight

    def _lead(self, index: int, item: Any, call: Call, flight: Flight) -> Lead:
        # Who calls the function in this very thread, such as `on_result`, must not wait for this map.
        flight.thread = get_ident()
        lead = self._led[flight.key] = Lead(flight, call, index, item)
        self._keys[index] = flight.key
        return lead

    def _begin(self, lead: Lead, fresh: Fresh) -> None:
        """Let an item be computed."""
        lookup = self._cache.lookup
        if self._cache.aging is None:
            lookup.count_miss()
        lookup.missed()
        fresh([lead.index], [lead.item])

    def _serve(
        self, index: int, item: Any, call: Call, entry: Entry, known: dict[Origin, Batch]
    ) -> bool:
        """Answer an item with what the cache has, if that will do."""
        lookup, aging, renewal = self._cache.lookup, self._cache.aging, self._cache.renewal
        if lookup.lives(call.key, entry):
            _add(known, "hit", index, item, lookup.serve(call, entry))
            if renewal is not None and renewal.due(call.key, entry):
                self._renewals.append(call)
            return True
        if aging is not None and aging.spares(call.key, entry):
            _add(known, "stale", index, item, lookup.serve_stale(call, entry))
            return True
        return False

    def _renew(self) -> None:
        renewal = self._cache.renewal
        while self._renewals and renewal is not None:
            call = self._renewals.pop()
            begin = renewal.start_task if self._awaits else renewal.start_thread
            begin(call, call.key)

    def _look_up(
        self, claimed: list[Lead], fresh: Fresh, known: dict[Origin, Batch]
    ) -> Steps[None]:
        """Look many claimed items up in a store that takes its time."""
        if claimed:
            lookup = self._cache.lookup
            keys = [(lead.flight.key,) for lead in claimed]
            entries: list[Entry | None] = yield Several(lookup.find, lookup.afind, keys)
            for lead, entry in zip(claimed, entries, strict=True):
                if entry is None or not self._serve(lead.index, lead.item, lead.call, entry, known):
                    lead.old = entry
                    self._begin(lead, fresh)
                    continue
                del self._led[lead.flight.key], self._keys[lead.index]
                self._share_entry(lead, entry, known)
        self._renew()

    def _share_entry(self, lead: Lead, entry: Entry, known: dict[Origin, Batch]) -> None:
        """Give what the cache had to those who came while it was looked up."""
        if self._shares:
            tell(self._flights.land(lead.flight), Landed(entry))
        for index, item in lead.followers:
            self._serve(index, item, lead.call, entry, known)

    # --- while others compute ------------------------------------------------------------------------

    def _note(self, follower: Follower) -> None:
        self._arrived.append(follower)
        self._wake()

    def arrivals(self, fresh: Fresh) -> Steps[list[Batch]]:
        """Take what others have computed for this map."""
        known: dict[Origin, Batch] = {}
        claimed: list[Lead] = []
        while self._arrived:
            follower = self._arrived.popleft()
            self._followers.discard(follower)
            index, item, verdict = follower.index, follower.item, follower.verdict
            if verdict is Order.LEAD:
                self._begin(self._lead(index, item, follower.call, follower.flight), fresh)
            elif verdict is Order.ALONE:
                fresh([index], [item])
            elif isinstance(verdict, Order):
                self._sort_one(index, item, fresh, known, claimed)
            else:
                stale = isinstance(verdict, Landed) and verdict.stale
                told = self._shared(follower)
                _add(known, "stale" if stale else "shared", index, item, told)
        yield from self._look_up(claimed, fresh, known)
        return list(known.values())

    def _shared(self, follower: Follower) -> Any:
        try:
            return self._cache.sharing.share(follower.call, follower)
        except Rejected as rejected:
            return Outcome(value=rejected.value, rejected=True, attempts=0, calls=0)
        except Exception as error:  # noqa: BLE001 - the other's failure is this item's as well
            return Outcome(error=error, attempts=0, calls=0)

    # --- after the work ------------------------------------------------------------------------------

    def settle(self, batches: list[Batch], fresh: Fresh) -> Steps[list[Batch]]:
        """Store results, tell those who wait for them, and return those of equal items.

        An item that failed and gets an expired result instead moves from its batch to one of those.
        """
        known: dict[Origin, Batch] = {}
        landing: list[tuple[Lead, Any]] = []
        keeps: list[tuple[Call, Flight, Any, float]] = []
        moved: dict[int, set[int]] = {}
        for number, batch in enumerate(batches):
            for position, index in enumerate(batch.idx):
                key = self._keys.pop(index, None)
                lead = None if key is None else self._led.pop(key)
                if lead is None:
                    continue
                outcome = batch.odd.get(position)
                error = None if outcome is None else outcome.error
                if error is None:
                    value = batch.values[position]
                    landing.append((lead, value))
                    keeps.append((lead.call, lead.flight, value, _filled_in(lead.call, outcome)))
                elif isinstance(error, Exception):
                    if self._crash(lead, error, known):
                        moved.setdefault(number, set()).add(position)
                else:
                    self._flights.abandon(lead.flight)
                    for follower in lead.followers:
                        fresh([follower[0]], [follower[1]])
        for number, positions in moved.items():
            batches[number] = batches[number].without(positions)
        keeper = self._cache.keeper
        storing = Several(keeper.keep, keeper.akeep, keeps)
        entries: list[Entry | None] = (yield storing) if self._slow and keeps else storing.here()
        for (lead, value), entry in zip(landing, entries, strict=True):
            if self._cache.aging is not None:
                self._cache.lookup.computed(lead.call, lead.flight.key)
            self._land(lead, value, entry, fresh, known)
        return list(known.values())

    def _land(
        self,
        lead: Lead,
        value: Any,
        entry: Entry | None,
        fresh: Fresh,
        known: dict[Origin, Batch],
    ) -> None:
        call = lead.call
        waiters = self._flights.land(lead.flight) if self._shares else ()
        if not (waiters or lead.followers):
            return
        verdict = self._cache.sharing.landed(value, entry, rejected=call.rejected)
        tell(waiters, verdict)
        for index, item in lead.followers:
            if isinstance(verdict, Landed):
                copy = verdict.entry.open()
                self._job.pipeline.stats.add(shared=1)
                told = (
                    Outcome(value=copy, rejected=True, attempts=0, calls=0)
                    if call.rejected
                    else copy
                )
                _add(known, "shared", index, item, told)
            else:
                fresh([index], [item])

    def _crash(self, lead: Lead, error: Exception, known: dict[Origin, Batch]) -> bool:
        """Tell of a failure; True if everybody, the item itself too, gets an expired result instead."""
        from opero.core.cache.copy_error import copy_error

        cache, call = self._cache, lead.call
        old = None
        if cache.aging is not None:
            old = cache.lookup.stand_in(call, lead.flight, lead.old, error)
        waiters = self._flights.land(lead.flight) if self._shares else ()
        if old is not None:
            tell(waiters, Landed(old, stale=True))
            for index, item in ((lead.index, lead.item), *lead.followers):
                _add(known, "stale", index, item, cache.lookup.serve_stale(call, old, error))
            return True
        if waiters:
            tell(waiters, Crashed(copy_error(error)))
        for index, item in lead.followers:
            _add(
                known, "shared", index, item, Outcome(error=copy_error(error), attempts=0, calls=0)
            )
        return False

    def close(self) -> None:
        """Give back what was begun: others take over, nobody waits for this map any more."""
        self._marker.done = True
        for lead in self._led.values():
            if self._shares:
                self._flights.abandon(lead.flight)
        self._led.clear()
        self._keys.clear()
        for follower in list(self._followers):
            self._flights.leave(follower)
        self._followers.clear()


def _filled_in(call: Call, outcome: Outcome | None) -> float:
    """Note on a call how it went; return the clock reading at its start."""
    began = ambient.clock().monotonic()
    if outcome is None:
        call.calls = 1
        return began
    call.attempts, call.calls, call.rejected = outcome.attempts, outcome.calls, outcome.rejected
    call.label, call.value, call.slept = outcome.label, outcome.fallback, outcome.slept
    return began - outcome.seconds


def _add(known: dict[Origin, Batch], origin: Origin, index: int, item: Any, told: Any) -> None:
    batch = known.get(origin)
    if batch is None:
        batch = known[origin] = Batch([], [], [], {}, origin)
    idx: Any = batch.idx
    if isinstance(told, Outcome):
        batch.odd[len(batch.items)] = told
    idx.append(index)
    batch.items.append(item)
    batch.values.append(told.value if isinstance(told, Outcome) else told)
