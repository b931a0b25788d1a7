# this_file: src/opero/concurrency/lookup.py
"""Look items up before they are computed: in the cache, among calls under way, and among equal items.

The map uses the store, keys and flights of the function's own cache stage. The workers have no cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from opero.caching.single_flight import (
    Flight,
    Instruction,
    SharedResult,
    become_leader,
    leads_others,
    notify,
    take_verdict,
)
from opero.concurrency.dedupe import (
    InFlightElsewhere,
    LeadItem,
    RemoteLeases,
    ResultStore,
    uncalled,
)
from opero.core.call import Call
from opero.errors import DeadlineError, Rejected
from opero.utils import ambient
from opero.utils.steps import for_each, in_thread
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.caching.memory import Entry
    from opero.concurrency.dedupe import Compute
    from opero.concurrency.executors.base import Batch, MapJob
    from opero.core.cache import CacheStage
    from opero.utils.steps import StepLogic

__all__ = ["CacheLookup"]

_AHEAD: Final = 64
"""Most items that are looked up ahead: those that turn out not to be there must not be many more than fit."""


class CacheLookup(ResultStore):
    """The map's side of a function's cache.

    Args:
        cache: The function's cache stage.
        job: How an item becomes a call.
        shares: Whether other callers may wait for items of this map. Only a map that runs to its end by
            itself may promise that: a stream pauses when its consumer does.
        compute: Queues items that must be computed.
        wake: Ends the map's wait for reports; called from any thread.
        context: Context in which the workers run: there, the map counts as leader, so that the
            function's own calls of itself do not wait for the map that waits for them.

    Attributes:
        ahead: How many items to look up at once, though there is room for fewer, because those before were in a
            store that takes its time, all of them.
    """

    def __init__(
        self,
        cache: CacheStage,
        job: MapJob,
        *,
        shares: bool,
        compute: Compute,
        wake: Callable[[], object],
        context: Context,
    ) -> None:
        super().__init__(cache, job, shares=shares, compute=compute)
        self._wake = wake
        self._followers: set[InFlightElsewhere] = set()
        self._arrived: deque[InFlightElsewhere] = deque()
        self._new: list[LeadItem] = []
        self._refreshes: list[tuple[Call, Entry]] = []
        self._awaits = job.pipeline.awaits
        self.ahead: int = 0
        self._marker = Flight(None)
        deadline = job.pipeline.options.deadline
        self._seconds = None if deadline is None else parse_seconds(deadline, "deadline")
        # A map that leads others must not wait for another caller.
        if shares and cache.leases is not None and not leads_others(self._marker):
            self._remote = RemoteLeases(cache.leases, awaits=self._awaits, limit=self._limit)
        context.run(become_leader, self._marker)

    def _limit(self) -> float | None:
        """Return the clock reading at which a wait for another caller that begins now must end."""
        ends = [] if self._job.deadline is None else [self._job.deadline]
        if self._seconds is not None:
            ends.append(ambient.clock().monotonic() + self._seconds)
        return min(ends, default=None)

    @property
    def following(self) -> bool:
        """Whether items wait for a caller of this process, which will notify the map."""
        return bool(self._followers)

    @property
    def waiting(self) -> int:
        """How many items wait for a caller outside this map."""
        return len(self._followers) + (0 if self._remote is None else self._remote.waiting)

    def next_due(self) -> float | None:
        """Return the clock reading at which to call `arrivals` without a notification."""
        dues = [follower.deadline or 0.0 for follower in self._timed()]
        if self._remote is not None and (due := self._remote.next_due()) is not None:
            dues.append(due)
        return min(dues, default=None)

    # --- before the dispatch -------------------------------------------------------------------------

    def sort(self, idx: Sequence[int], items: list[Any]) -> StepLogic[list[Batch]]:
        """Sort pulled items: return what is known, hand on what must be computed, keep what waits."""
        for index, item in zip(idx, items, strict=True):
            self._sort_one(index, item)
        leads, self._new = self._new, []
        missing = yield from self._look_up(leads)
        if leads and self._shares:
            self.ahead = 0 if missing else min(2 * max(len(leads), self.ahead), _AHEAD)
        return self._known.take()

    def _sort_one(self, index: int, item: Any) -> None:
        cache, job = self._cache, self._job
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        try:
            key = None if cache.off or ambient.disabled() else cache.key(call)
        except Exception as error:  # noqa: BLE001 - what a user's `cache_key` raises is the item's error
            self._known.add("fresh", index, item, uncalled(error=error))
            return
        if key is None:
            self._compute([index], [item])
            return
        call.key = key
        lead = self._led.get(key)
        if lead is not None:
            lead.followers.append((index, item))
            if self._remote is not None:
                self._remote.follow(lead)
            return
        entry = None
        if not self._slow:
            entry = cache.entries.find(key)
            if entry is not None and self._serve(index, item, call, entry):
                return
        flight = self._join(index, item, call)
        if flight is None:
            return
        lead = self._lead(index, item, call, flight)
        if self._slow:
            # Led first and looked up then: no result can come between, and one look is enough.
            self._new.append(lead)
        else:
            lead.old = entry
            self._begin(lead)

    def _join(self, index: int, item: Any, call: Call) -> Flight | None:
        """Return a flight to lead; None if the item waits for the one of another caller."""
        key = call.key
        if not self._shares:
            return Flight(key)
        while (flight := self._flights.join(key, blocking=not self._awaits)) is None:
            follower = InFlightElsewhere(index, item, call, key, self._note, self._limit())
            if self._flights.wait_for(key, follower):
                self._followers.add(follower)
                return None
        return flight

    def _lead(self, index: int, item: Any, call: Call, flight: Flight) -> LeadItem:
        # A call in this very thread, from `on_result` for instance, must not wait for this map.
        flight.thread = get_ident()
        lead = self._led[flight.key] = LeadItem(flight, call, index, item)
        self._keys[index] = flight.key
        return lead

    def _begin(self, lead: LeadItem) -> None:
        """Let an item be computed."""
        if self._cache.freshness is None:
            self._cache.count_miss()
        self._cache.missed()
        self._compute([lead.index], [lead.item])

    def _serve(self, index: int, item: Any, call: Call, entry: Entry) -> bool:
        """Answer an item with what the cache has, if that will do."""
        cache = self._cache
        fresh = cache.answers(call.key, entry)
        if fresh:
            self._known.add("hit", index, item, cache.entries.serve(call, entry))
            if cache.freshness is not None:
                self._refreshes.append((call, entry))
        elif fresh is not None:
            self._known.add("stale", index, item, cache.entries.serve_stale(call, entry))
        return fresh is not None

    def _look_up(self, leads: list[LeadItem]) -> StepLogic[int]:
        """Look many items up in a store that takes its time; begin those that no other caller computes.

        Returns:
            How many were not there.
        """
        missing = yield from self._found(leads)
        unknown = len(missing)
        if missing and self._remote is not None:
            late: list[LeadItem] = []
            free = yield from self._remote.acquire(missing, late)
            for lead in late:
                self._end_late(lead)
            # The previous holder of a lease may have stored the result before this one was acquired.
            missing = yield from self._found(free)
        for lead in missing:
            self._begin(lead)
        while self._refreshes:
            call, entry = self._refreshes.pop()
            self._cache.refresh_if_due(call, call.key, entry, blocking=not self._awaits)
        return unknown

    def _found(self, leads: list[LeadItem]) -> StepLogic[list[LeadItem]]:
        """Answer items with what the cache has; return the others."""
        if not leads:
            return leads
        cached = self._cache.entries
        keys = [lead.flight.key for lead in leads]
        entries: list[Entry | None] = yield (
            in_thread(lambda: cached.find_many(keys))
            if cached.takes_many
            else for_each(cached.find, cached.afind, [(key,) for key in keys])
        )
        missing: list[LeadItem] = []
        for lead, entry in zip(leads, entries, strict=True):
            if entry is None or not self._serve(lead.index, lead.item, lead.call, entry):
                lead.old = entry
                missing.append(lead)
                continue
            del self._led[lead.flight.key], self._keys[lead.index]
            self._share_entry(lead, entry)
        return missing

    def _share_entry(self, lead: LeadItem, entry: Entry) -> None:
        """Give the cached result to those that came while it was looked up."""
        if self._remote is not None:
            self._remote.give_back([lead])
        if self._shares:
            notify(self._flights.complete(lead.flight), SharedResult(entry))
        for index, item in lead.followers:
            self._serve(index, item, lead.call, entry)

    # --- while others compute ------------------------------------------------------------------------

    def _note(self, follower: InFlightElsewhere) -> None:
        self._arrived.append(follower)
        self._wake()

    def arrivals(self) -> StepLogic[list[Batch]]:
        """Take what other callers have computed for this map, here or in other processes."""
        if self._remote is not None:
            yield from self._look_up(self._remote.due())
        self._leave_late()
        while self._arrived:
            follower = self._arrived.popleft()
            self._followers.discard(follower)
            index, item, verdict = follower.index, follower.item, follower.verdict
            if verdict is Instruction.LEAD:
                lead = self._lead(index, item, follower.call, follower.flight)
                if self._remote is None:
                    self._begin(lead)
                else:  # its leader has given the lease back
                    self._new.append(lead)
            elif verdict is Instruction.COMPUTE:
                self._compute([index], [item])
            elif isinstance(verdict, Instruction):
                self._sort_one(index, item)
            else:
                stale = isinstance(verdict, SharedResult) and verdict.stale
                result = self._shared(follower)
                self._known.add("stale" if stale else "shared", index, item, result)
        leads, self._new = self._new, []
        yield from self._look_up(leads)
        return self._known.take()

    def _leave_late(self) -> None:
        """Give up results of other callers for which there is no more time."""
        for follower in self._timed():
            now = ambient.clock().monotonic()
            if (follower.deadline or 0.0) <= now and self._flights.leave(follower):
                self._followers.discard(follower)
                self._late(follower.index, follower.item, follower.call, None)

    def _timed(self) -> list[InFlightElsewhere]:
        """Return the items that wait for a caller of this process, and not for ever."""
        if self._job.deadline is None and self._seconds is None:
            return []
        return [follower for follower in self._followers if follower.deadline is not None]

    def _end_late(self, lead: LeadItem) -> None:
        """Give up an item that another process computes for too long."""
        del self._led[lead.flight.key], self._keys[lead.index]
        self._flights.abandon(lead.flight)
        for index, item in ((lead.index, lead.item), *lead.followers):
            self._late(index, item, lead.call, lead.old)

    def _late(self, index: int, item: Any, call: Call, old: Entry | None) -> None:
        try:
            result = self._cache.late(call, old)
        except DeadlineError as error:
            self._known.add("fresh", index, item, uncalled(error=error))
        else:
            self._known.add("stale", index, item, result)

    def _shared(self, follower: InFlightElsewhere) -> Any:
        try:
            return self._cache.share(follower.call, take_verdict(follower))
        except Rejected as rejected:
            return uncalled(value=rejected.value, rejected=True)
        except Exception as error:  # noqa: BLE001 - the other's failure is this item's as well
            return uncalled(error=error)

    # --- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what was begun: other callers take over, and none waits for this map any more."""
        self._marker.done = True
        if self._remote is not None:
            self._remote.give_back(self._led.values())
            self._remote.close()
        for lead in self._led.values():
            if self._shares:
                self._flights.abandon(lead.flight)
        self._led.clear()
        self._keys.clear()
        for follower in list(self._followers):
            self._flights.leave(follower)
        self._followers.clear()
