# this_file: src/opero/concurrency/recall.py
"""What a map need not compute: results in the cache, results that somebody computes just now, equal items.

It uses the store, keys and flights of the function's own cache stage. The workers have no cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
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
from opero.concurrency.claim import Follower, Lead
from opero.concurrency.engine import Outcome
from opero.concurrency.errand import InThread, Several, Steps
from opero.concurrency.known import Known
from opero.concurrency.landing import Landing
from opero.core.call import Call
from opero.errors import DeadlineError
from opero.utils import ambient
from opero.utils.matching import Rejected
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.caching.memory import Entry
    from opero.concurrency.abroad import Abroad
    from opero.concurrency.engine import Job
    from opero.concurrency.landing import Fresh
    from opero.concurrency.order import Batch
    from opero.core.cache import CacheStage

__all__ = ["Recall"]


_AHEAD: Final = 64
"""Most items that are looked up ahead: those that turn out not to be there must not be many more than fit."""


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
        ahead: How many items to look up at once, though there is room for fewer, because those before were in a
            store that takes its time, all of them.
        settle: Stores results, tells those who wait for them, and returns those of equal items.
    """

    def __init__(
        self,
        cache: CacheStage,
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
        self._flights = cache.single_flight
        self._led: dict[Hashable, Lead] = {}
        self._keys: dict[int, Hashable] = {}
        self._followers: set[Follower] = set()
        self._arrived: deque[Follower] = deque()
        self._renewals: list[tuple[Call, Entry]] = []
        self._slow: bool = cache.store.blocking
        self._awaits = awaits
        self.ahead: int = 0
        self._marker = Flight(None)
        deadline = job.options.deadline
        self._seconds = None if deadline is None else parse_seconds(deadline, "deadline")
        self._abroad = self._leases() if shares else None
        landing = Landing(
            cache, job, led=self._led, keys=self._keys, shares=shares, abroad=self._abroad
        )
        self.settle: Callable[[list[Batch], Fresh], Steps[list[Batch]]] = landing.settle
        context.run(become_leader, self._marker)

    def _leases(self) -> Abroad | None:
        """Return the map's leases; None if its store lends none, or if it must not wait for anybody."""
        leases = self._cache.leases
        if leases is None or leads_others(self._marker):
            return None
        from opero.concurrency.abroad import Abroad

        return Abroad(leases, awaits=self._awaits, limit=self._limit)

    def _limit(self) -> float | None:
        """Return the clock reading at which a wait for somebody else that begins now must end."""
        ends = [] if self._job.deadline is None else [self._job.deadline]
        if self._seconds is not None:
            ends.append(ambient.clock().monotonic() + self._seconds)
        return min(ends, default=None)

    @property
    def following(self) -> bool:
        """Whether items wait for somebody of this process, who will tell."""
        return bool(self._followers)

    @property
    def waiting(self) -> int:
        """How many items wait for somebody outside this map."""
        return len(self._followers) + (0 if self._abroad is None else self._abroad.waiting)

    def next_due(self) -> float | None:
        """Return the clock reading at which `arrivals` is to be asked although nobody has told anything."""
        dues = [follower.deadline or 0.0 for follower in self._timed()]
        if self._abroad is not None and (due := self._abroad.next_due()) is not None:
            dues.append(due)
        return min(dues, default=None)

    # --- before the dispatch -------------------------------------------------------------------------

    def sort(self, idx: Sequence[int], items: list[Any], fresh: Fresh) -> Steps[list[Batch]]:
        """Sort pulled items: return what is known, hand on what must be computed, keep what waits."""
        known = Known()
        claimed: list[Lead] = []
        for index, item in zip(idx, items, strict=True):
            self._sort_one(index, item, fresh, known, claimed)
        missing = yield from self._look_up(claimed, fresh, known)
        if claimed and self._shares:
            self.ahead = 0 if missing else min(2 * max(len(claimed), self.ahead), _AHEAD)
        return known.batches

    def _sort_one(
        self,
        index: int,
        item: Any,
        fresh: Fresh,
        known: Known,
        claimed: list[Lead],
    ) -> None:
        cache, job = self._cache, self._job
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        try:
            key = None if cache.off or ambient.disabled() else self._key(call)
        except Exception as error:  # noqa: BLE001 - what a user's `cache_key` raises is the item's error
            known.add("fresh", index, item, Outcome(error=error, attempts=0, calls=0))
            return
        if key is None:
            fresh([index], [item])
            return
        call.key = key
        lead = self._led.get(key)
        if lead is not None:
            lead.followers.append((index, item))
            if self._abroad is not None:
                self._abroad.follow(lead)
            return
        entry = None
        if not self._slow:
            entry = cache.reader.find(key)
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
        return self._cache.key(call)

    def _claim(self, index: int, item: Any, call: Call) -> Flight | None:
        """Return a flight to lead; None if the item waits for the one that somebody else leads."""
        key = call.key
        if not self._shares:
            return Flight(key)
        while (flight := self._flights.join(key, blocking=not self._awaits)) is None:
            follower = Follower(index, item, call, key, self._note, self._limit())
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
        if self._cache.freshness is None:
            self._cache.count_miss()
        self._cache.missed()
        fresh([lead.index], [lead.item])

    def _serve(self, index: int, item: Any, call: Call, entry: Entry, known: Known) -> bool:
        """Answer an item with what the cache has, if that will do."""
        cache = self._cache
        fresh = cache.answers(call.key, entry)
        if fresh:
            known.add("hit", index, item, cache.serve(call, entry))
            if cache.freshness is not None:
                self._renewals.append((call, entry))
        elif fresh is not None:
            known.add("stale", index, item, cache.serve_stale(call, entry))
        return fresh is not None

    def _renew(self) -> None:
        while self._renewals:
            call, entry = self._renewals.pop()
            self._cache.refresh_if_due(call, call.key, entry, blocking=not self._awaits)

    def _look_up(self, claimed: list[Lead], fresh: Fresh, known: Known) -> Steps[int]:
        """Look many claimed items up in a store that takes its time; begin those that nobody else computes.

        Returns:
            How many were not there.
        """
        missing = yield from self._found(claimed, known)
        unknown = len(missing)
        if missing and self._abroad is not None:
            late: list[Lead] = []
            free = yield from self._abroad.claim(missing, late)
            for lead in late:
                self._end_late(lead, known)
            # Who had the lease before may have stored the result between our look and our claim.
            missing = yield from self._found(free, known)
        for lead in missing:
            self._begin(lead, fresh)
        self._renew()
        return unknown

    def _found(self, leads: list[Lead], known: Known) -> Steps[list[Lead]]:
        """Answer claimed items with what the cache has; return the others."""
        if not leads:
            return leads
        reader = self._cache.reader
        keys = [lead.flight.key for lead in leads]
        entries: list[Entry | None] = yield (
            InThread(lambda: reader.find_many(keys))
            if reader.finds_many
            else Several(reader.find, reader.afind, [(key,) for key in keys])
        )
        missing: list[Lead] = []
        for lead, entry in zip(leads, entries, strict=True):
            if entry is None or not self._serve(lead.index, lead.item, lead.call, entry, known):
                lead.old = entry
                missing.append(lead)
                continue
            del self._led[lead.flight.key], self._keys[lead.index]
            self._share_entry(lead, entry, known)
        return missing

    def _share_entry(self, lead: Lead, entry: Entry, known: Known) -> None:
        """Give what the cache had to those who came while it was looked up."""
        if self._abroad is not None:
            self._abroad.give_back([lead])
        if self._shares:
            notify(self._flights.complete(lead.flight), SharedResult(entry))
        for index, item in lead.followers:
            self._serve(index, item, lead.call, entry, known)

    # --- while others compute ------------------------------------------------------------------------

    def _note(self, follower: Follower) -> None:
        self._arrived.append(follower)
        self._wake()

    def arrivals(self, fresh: Fresh) -> Steps[list[Batch]]:
        """Take what others have computed for this map, and look for what they may have computed elsewhere."""
        known = Known()
        claimed: list[Lead] = []
        if self._abroad is not None:
            yield from self._look_up(self._abroad.due(), fresh, known)
        self._leave_late(known)
        while self._arrived:
            follower = self._arrived.popleft()
            self._followers.discard(follower)
            index, item, verdict = follower.index, follower.item, follower.verdict
            if verdict is Instruction.LEAD:
                lead = self._lead(index, item, follower.call, follower.flight)
                if self._abroad is None:
                    self._begin(lead, fresh)
                else:  # whoever led it before has given its lease back
                    claimed.append(lead)
            elif verdict is Instruction.COMPUTE:
                fresh([index], [item])
            elif isinstance(verdict, Instruction):
                self._sort_one(index, item, fresh, known, claimed)
            else:
                stale = isinstance(verdict, SharedResult) and verdict.stale
                told = self._shared(follower)
                known.add("stale" if stale else "shared", index, item, told)
        yield from self._look_up(claimed, fresh, known)
        return known.batches

    def _leave_late(self, known: Known) -> None:
        """Let go of somebody else's results for which there is no more time."""
        for follower in self._timed():
            now = ambient.clock().monotonic()
            if (follower.deadline or 0.0) <= now and self._flights.leave(follower):
                self._followers.discard(follower)
                self._late(follower.index, follower.item, follower.call, None, known)

    def _timed(self) -> list[Follower]:
        """Return the items that wait for somebody of this process, and not for ever."""
        if self._job.deadline is None and self._seconds is None:
            return []
        return [follower for follower in self._followers if follower.deadline is not None]

    def _end_late(self, lead: Lead, known: Known) -> None:
        """Give up an item that another process computes for too long."""
        del self._led[lead.flight.key], self._keys[lead.index]
        self._flights.abandon(lead.flight)
        for index, item in ((lead.index, lead.item), *lead.followers):
            self._late(index, item, lead.call, lead.old, known)

    def _late(self, index: int, item: Any, call: Call, old: Entry | None, known: Known) -> None:
        try:
            told = self._cache.late(call, old)
        except DeadlineError as error:
            known.add("fresh", index, item, Outcome(error=error, attempts=0, calls=0))
        else:
            known.add("stale", index, item, told)

    def _shared(self, follower: Follower) -> Any:
        try:
            return self._cache.share(follower.call, take_verdict(follower))
        except Rejected as rejected:
            return Outcome(value=rejected.value, rejected=True, attempts=0, calls=0)
        except Exception as error:  # noqa: BLE001 - the other's failure is this item's as well
            return Outcome(error=error, attempts=0, calls=0)

    # --- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what was begun: others take over, nobody waits for this map any more."""
        self._marker.done = True
        if self._abroad is not None:
            self._abroad.give_back(self._led.values())
            self._abroad.close()
        for lead in self._led.values():
            if self._shares:
                self._flights.abandon(lead.flight)
        self._led.clear()
        self._keys.clear()
        for follower in list(self._followers):
            self._flights.leave(follower)
        self._followers.clear()
