# this_file: src/opero/concurrency/dedupe.py
"""Compute equal items once: store results and notify waiters, here and in other processes.

An item that the cache does not have is computed by the process that has its lease. Leases are acquired for many items
at once, when these are about to be dispatched, and given back when their results are stored. Items that another process
has leased are parked: they are looked up again after growing pauses, and neither reach a worker nor take the place of
others. The map computes the items whose leases it has, whatever it waits for, so that two maps never wait for each
other.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from opero.caching.memory import Entry
from opero.caching.single_flight import Flight, SharedFailure, SharedResult, copy_error, notify
from opero.concurrency.executors.base import Batch, ItemOutcome, Origin
from opero.core.call import Call
from opero.errors import DeadlineError
from opero.utils import ambient
from opero.utils.steps import for_each, in_thread

if TYPE_CHECKING:
    from opero.caching.entries import Stored
    from opero.caching.lease import (  # noqa: TC004 - loaded with the first store that lends leases
        Lease,
        Leases,
        LeaseWait,
    )
    from opero.caching.single_flight import Verdict  # noqa: TC004 - not read at run time
    from opero.concurrency.executors.base import MapJob
    from opero.core.cache import CacheStage
    from opero.utils.steps import StepLogic

__all__ = ["Compute", "InFlightElsewhere", "LeadItem", "RemoteLeases", "ResultStore", "uncalled"]

Compute = Callable[[list[int], list[Any]], object]
"""Queues indices and items that must be computed."""


@dataclass(slots=True, eq=False)
class LeadItem:
    """An item that this map computes, and the equal ones that wait for it."""

    flight: Flight
    call: Call
    index: int
    item: Any
    followers: list[tuple[int, Any]] = field(default_factory=list)
    old: Entry | None = None
    """What the cache had, if it has expired."""
    lease: Lease | None = None
    """What keeps other processes from computing it, once that is acquired."""
    wait: LeaseWait | None = None
    """The wait for the process that computes it, while one does or after one did."""
    parked: bool = False
    """Whether it waits for that now."""


@dataclass(slots=True, eq=False)
class InFlightElsewhere:
    """An item that another caller of this process computes now: a waiter of that flight."""

    index: int
    item: Any
    call: Call
    key: Hashable
    arrived: Callable[[InFlightElsewhere], None]
    """Takes the verdict to the map; called from any thread."""
    deadline: float | None = None
    flight: Flight = field(default_factory=lambda: Flight(None))
    verdict: Verdict | None = None

    @property
    def ready(self) -> bool:
        """Return True: a map can always take over."""
        return True

    def wake(self) -> bool:
        """Pass the verdict to the map."""
        self.arrived(self)
        return True


class BatchesByOrigin:
    """Finished items that the map did not compute for themselves, in a batch for each origin.

    Example:
        >>> found = BatchesByOrigin()
        >>> found.add("hit", 3, "item", "result")
        >>> found.take()
        [Batch(idx=[3], items=['item'], values=['result'], odd={}, origin='hit')]
    """

    def __init__(self) -> None:
        self._batches: dict[Origin, Batch] = {}

    def take(self) -> list[Batch]:
        """Take out the batches so far."""
        batches, self._batches = list(self._batches.values()), {}
        return batches

    def add(self, origin: Origin, index: int, item: Any, result: Any) -> None:
        """Add a finished item.

        Args:
            origin: Where its result came from.
            index: Its place in the input.
            item: The item.
            result: Its result, or an `ItemOutcome`.
        """
        batch = self._batches.setdefault(origin, Batch([], [], [], {}, origin))
        idx: Any = batch.idx
        if isinstance(result, ItemOutcome):
            batch.odd[len(batch.items)] = result
        idx.append(index)
        batch.items.append(item)
        batch.values.append(result.value if isinstance(result, ItemOutcome) else result)


# --- other processes ------------------------------------------------------------------------------

_TOGETHER: Final = 0.005
"""Items that are due so many seconds later are looked up with those that are due now."""


class RemoteLeases:
    """The leases of a map's items, and the items that other processes compute.

    Args:
        leases: The leases of the function's keys.
        awaits: Whether the map runs in an event loop.
        limit: Returns the clock reading at which a wait that begins now must end, None for never.

    Attributes:
        waiting: How many items are parked, equal ones included.
    """

    def __init__(self, leases: Leases, *, awaits: bool, limit: Callable[[], float | None]) -> None:
        self._leases = leases
        self._awaits = awaits
        self._limit = limit
        self._parked: list[tuple[float, int, LeadItem]] = []
        self._serial = itertools.count()
        self.waiting: int = 0

    def acquire(self, leads: Sequence[LeadItem], late: list[LeadItem]) -> StepLogic[list[LeadItem]]:
        """Acquire the leases of items and return those that may be computed now; park the others.

        Args:
            leads: The items, all of them new, or all of them parked before.
            late: Takes those whose deadline has come.
        """
        new = self._leases.new
        for lead in leads:
            lead.lease = lead.lease or new(lead.flight.key)
        wanted = [(lead, lead.lease) for lead in leads if lead.lease is not None]
        if not wanted:
            return list(leads)
        leases = [lease for _, lease in wanted]
        again, blocking = wanted[0][0].wait is not None, not self._awaits
        granted = yield from self._leases.acquire(leases, again=again, blocking=blocking)
        for (lead, _), mine in zip(wanted, granted, strict=True):
            if mine is None:
                lead.lease = None
            elif not mine:
                self._park(lead, late)
        return [lead for lead in leads if not lead.parked and lead not in late]

    def _park(self, lead: LeadItem, late: list[LeadItem]) -> None:
        from opero.caching.lease import LeaseWait

        lead.wait = wait = lead.wait or LeaseWait(self._limit())
        pause = wait.next()
        if pause is not None:
            lead.parked = True
            self.waiting += 1 + len(lead.followers)
            due = ambient.clock().monotonic() + pause
            heapq.heappush(self._parked, (due, next(self._serial), lead))
            return
        lead.lease = None  # it was never ours
        if wait.late:
            late.append(lead)

    def follow(self, lead: LeadItem) -> None:
        """Count an item that is equal to another one."""
        if lead.parked:
            self.waiting += 1

    def next_due(self) -> float | None:
        """Return the clock reading at which parked items are to be looked up, None without any."""
        return self._parked[0][0] if self._parked else None

    def due(self) -> list[LeadItem]:
        """Take out the items that are to be looked up now."""
        found: list[LeadItem] = []
        if self._parked and self._parked[0][0] <= (now := ambient.clock().monotonic()):
            while self._parked and self._parked[0][0] <= now + _TOGETHER:
                lead = heapq.heappop(self._parked)[2]
                lead.parked = False
                self.waiting -= 1 + len(lead.followers)
                found.append(lead)
        return found

    def give_back(self, leads: Iterable[LeadItem]) -> None:
        """End the leases of items, without waiting for the store."""
        for lead in leads:
            lease, lead.lease = lead.lease, None
            if lease is not None:
                lease.release(lead.flight)

    def close(self) -> None:
        """Wait for no item any more."""
        self._parked.clear()
        self.waiting = 0


# --- results --------------------------------------------------------------------------------------


class ResultStore:
    """Stores the results of the items that a map computes, and notifies those that wait for them.

    Args:
        cache: The function's cache stage.
        job: How an item becomes a call.
        shares: Whether other callers may wait for these items.
        compute: Queues items that must be computed after all.
    """

    def __init__(self, cache: CacheStage, job: MapJob, *, shares: bool, compute: Compute) -> None:
        self._cache = cache
        self._job = job
        self._shares = shares
        self._compute = compute
        self._known = BatchesByOrigin()
        self._flights = cache.single_flight
        self._slow: bool = cache.store.blocking
        # What is computed, by its key, and the keys of these items by index; taken out when they end.
        self._led: dict[Hashable, LeadItem] = {}
        self._keys: dict[int, Hashable] = {}
        self._remote: RemoteLeases | None = None

    def settle(self, batches: list[Batch]) -> StepLogic[list[Batch]]:
        """Store results, notify waiters, and return the results of equal items.

        An item that failed and gets an expired result instead moves from its batch to one of those.
        """
        landed: list[tuple[LeadItem, Any, float]] = []
        ended: list[LeadItem] = []
        for number, batch in enumerate(batches):
            stale: set[int] = set()
            for position, index in enumerate(batch.idx):
                key = self._keys.pop(index, None)
                if key is None:
                    continue
                lead = self._led.pop(key)
                ended.append(lead)
                outcome = batch.odd.get(position)
                error = None if outcome is None else outcome.error
                if error is None:
                    landed.append((lead, batch.values[position], _fill_in(lead.call, outcome)))
                elif isinstance(error, Exception):
                    if self._crash(lead, error):
                        stale.add(position)
                else:
                    self._flights.abandon(lead.flight)
                    for follower, item in lead.followers:
                        self._compute([follower], [item])
            if stale:
                batches[number] = batch.without(stale)
        try:
            yield from self._store(landed)
        finally:
            if self._remote is not None:
                self._remote.give_back(ended)
        return self._known.take()

    def _store(self, landed: list[tuple[LeadItem, Any, float]]) -> StepLogic[None]:
        """Store results, then notify those that wait for them."""
        cache, entries = self._cache, self._cache.entries
        try:
            wanted = [
                (lead.flight, value, cache.lifetime(lead.call, value, began))
                for lead, value, began in landed
            ]
            kept: list[Entry | None]
            if self._slow and entries.takes_many and wanted:
                stored: list[Stored] = yield in_thread(lambda: entries.store_many(wanted))
                kept = [
                    entries.report(lead.flight, one)
                    for (lead, _, _), one in zip(landed, stored, strict=True)
                ]
            else:
                storing = for_each(entries.store, entries.astore, wanted)
                kept = (yield storing) if self._slow and wanted else storing.block()
        except BaseException:
            # The map is cancelled, and nothing else will end these flights.
            for lead, _, _ in landed:
                self._flights.abandon(lead.flight)
            raise
        for (lead, value, _), entry in zip(landed, kept, strict=True):
            if cache.freshness is not None:
                cache.computed(lead.call, lead.flight.key)
            self._share(lead, value, entry)

    def _share(self, lead: LeadItem, value: Any, entry: Entry | None) -> None:
        call = lead.call
        waiters = self._flights.complete(lead.flight) if self._shares else ()
        if not (waiters or lead.followers):
            return
        verdict = self._cache.verdict(value, entry, rejected=call.rejected)
        notify(waiters, verdict)
        for index, item in lead.followers:
            if isinstance(verdict, SharedResult):
                copy = verdict.entry.open()
                self._job.pipeline.stats.add(shared=1)
                result = uncalled(value=copy, rejected=True) if call.rejected else copy
                self._known.add("shared", index, item, result)
            else:
                self._compute([index], [item])

    def _crash(self, lead: LeadItem, error: Exception) -> bool:
        """Share a failure; True if all, the item itself too, get an expired result instead."""
        cache, call = self._cache, lead.call
        # A caller short of time says nothing about what the next one will achieve.
        lead.flight.without_result = not isinstance(error, DeadlineError)
        old = None
        if cache.freshness is not None:
            old = cache.stand_in(call, lead.flight, lead.old, error)
        waiters = self._flights.complete(lead.flight) if self._shares else ()
        if old is not None:
            notify(waiters, SharedResult(old, stale=True))
            for index, item in ((lead.index, lead.item), *lead.followers):
                self._known.add("stale", index, item, cache.entries.serve_stale(call, old, error))
            return True
        if waiters:
            notify(waiters, SharedFailure(copy_error(error)))
        for index, item in lead.followers:
            self._known.add("shared", index, item, uncalled(error=copy_error(error)))
        return False


def uncalled(**made: Any) -> ItemOutcome:
    """Return the outcome of an item for which nothing was called."""
    return ItemOutcome(attempts=0, calls=0, **made)


def _fill_in(call: Call, outcome: ItemOutcome | None) -> float:
    """Write on a call how it went; return the clock reading at its start."""
    began = ambient.clock().monotonic()
    if outcome is None:
        call.calls = 1
        return began
    call.attempts, call.calls, call.rejected = outcome.attempts, outcome.calls, outcome.rejected
    call.label, call.value, call.slept = outcome.label, outcome.fallback, outcome.slept
    return began - outcome.seconds
