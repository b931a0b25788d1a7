# this_file: src/opero/concurrency/lookup.py
"""Look items up before they are computed: in the cache, among calls under way, and among equal items.

The map uses the store, keys and flights of the function's own cache stage. The workers have no cache.

An item that the cache does not have is computed by the process that has its lease. Leases are acquired for many items
at once, when these are about to be dispatched, and given back when their results are stored. Items that another process
has leased are parked: they are looked up again after growing pauses, and neither reach a worker nor take the place of
others. The map computes the items whose leases it has, whatever it waits for, so that two maps never wait for each
other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from opero.caching.memory import Entry
from opero.caching.single_flight import (
    Flight,
    Instruction,
    SharedFailure,
    SharedResult,
    become_leader,
    leads_others,
    notify,
    take_verdict,
)
from opero.concurrency.executors.base import Batch, ItemOutcome, Origin
from opero.core.call import Call
from opero.errors import DeadlineError, Rejected
from opero.utils import ambient
from opero.utils.exceptions import copy_error
from opero.utils.steps import in_thread
from opero.utils.units import parse_seconds
from opero.utils.waiters import Waiter

if TYPE_CHECKING:
    from opero.caching.lease import (  # noqa: TC004 - loaded with the first store that lends leases
        Leases,
        LeaseWait,
    )
    from opero.caching.single_flight import Verdict  # noqa: TC004 - not read at run time
    from opero.concurrency.executors.base import MapJob
    from opero.core.cache import CacheStage
    from opero.utils.steps import StepLogic


_AHEAD: Final = 64
"""Most items that are looked up ahead: those that turn out not to be there must not be many more than fit."""
_TOGETHER: Final = 0.005
"""Parked items that are due so many seconds later are looked up with those that are due now."""


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
    wait: LeaseWait | None = None
    """The wait for the process that computes it, while one does or after one did."""


@dataclass(slots=True, eq=False)
class InFlightElsewhere(Waiter):
    """An item that another caller of this process computes now: a waiter of that flight."""

    index: int
    item: Any
    call: Call
    arrived: Callable[[InFlightElsewhere], None]
    """Takes the verdict to the map; called from any thread."""
    request: float | None = None
    flight: Flight = field(default_factory=lambda: Flight(None))
    value: Verdict | None = None

    @property
    def ready(self) -> bool:
        """A map can always take over."""
        return True

    def wake(self, value: Any = True) -> bool:
        """Pass the verdict to the map."""
        self.value = value
        self.arrived(self)
        return True


class CacheLookup:
    """The map's side of a function's cache.

    Args:
        cache: The function's cache stage.
        job: How an item becomes a call.
        shares: Whether other callers may wait for items of this map. Only a map that runs to its end by
            itself may promise that: a stream pauses when its consumer does.
        compute: Queues indices and items that must be computed.
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
        compute: Callable[[list[int], list[Any]], object],
        wake: Callable[[], object],
        context: Context,
    ) -> None:
        self._cache = cache
        self._job = job
        self._shares = shares
        self._compute = compute
        self._wake = wake
        self._awaits = job.pipeline.awaits
        self._flights = cache.single_flight
        self._slow: bool = cache.store.blocking
        # Finished items that the map did not compute for themselves.
        self._known: dict[Origin, Batch] = {}
        # What is computed, by key and by index; taken out when it ends.
        self._led: dict[Hashable, LeadItem] = {}
        self._leads: dict[int, LeadItem] = {}
        self._new: list[LeadItem] = []
        self._refreshes: list[tuple[Call, Entry]] = []
        self._followers: set[InFlightElsewhere] = set()
        self._arrived: deque[InFlightElsewhere] = deque()
        # Items that other processes compute, and when to look for their results.
        self._parked: dict[LeadItem, float] = {}
        self.ahead: int = 0
        self._marker = Flight(None)
        deadline = job.pipeline.options.deadline
        self._seconds = None if deadline is None else parse_seconds(deadline, "deadline")
        # A map that leads others must not wait for another caller.
        self._leases = cache.leases if shares and not leads_others(self._marker) else None
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
        parked = sum([1 + len(lead.followers) for lead in self._parked])
        return len(self._followers) + parked

    def next_due(self) -> float | None:
        """Return the clock reading at which to call `arrivals` without a notification."""
        dues = [one.request for one in self._followers if one.request is not None]
        return min([*dues, *self._parked.values()], default=None)

    # --- before the dispatch -------------------------------------------------------------------------

    def sort(self, idx: Sequence[int], items: list[Any]) -> StepLogic[list[Batch]]:
        """Sort pulled items: return what is known, hand on what must be computed, keep what waits."""
        for index, item in zip(idx, items, strict=True):
            self._sort_one(index, item)
        leads, self._new = self._new, []
        missing = yield from self._look_up(leads)
        if leads and self._shares:
            self.ahead = 0 if missing else min(2 * max(len(leads), self.ahead), _AHEAD)
        return self._take_known()

    def _sort_one(self, index: int, item: Any) -> None:
        cache, job = self._cache, self._job
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        try:
            key = cache.key(call.args, call.kwargs)
        except Exception as error:  # noqa: BLE001 - what a user's `cache_key` raises is the item's error
            self._add("fresh", index, item, _uncalled(error=error))
            return
        if key is None:
            self._compute([index], [item])
            return
        call.key = key
        lead = self._led.get(key)
        if lead is not None:
            lead.followers.append((index, item))
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
            follower = InFlightElsewhere(index, item, call, self._note, self._limit())
            if (found := self._flights.wait_for(key, follower)) is not None:
                follower.flight = found
                self._followers.add(follower)
                return None
        return flight

    def _lead(self, index: int, item: Any, call: Call, flight: Flight) -> LeadItem:
        # A call in this very thread, from `on_result` for instance, must not wait for this map.
        flight.thread = get_ident()
        lead = LeadItem(flight, call, index, item)
        self._led[flight.key] = self._leads[index] = lead
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
            self._add("hit", index, item, cache.entries.serve(call, entry))
            if cache.freshness is not None:
                self._refreshes.append((call, entry))
        elif fresh is not None:
            self._add("stale", index, item, cache.entries.serve_stale(call, entry))
        return fresh is not None

    def _look_up(self, leads: list[LeadItem]) -> StepLogic[int]:
        """Look many items up in a store that takes its time; begin those that no other caller computes.

        Returns:
            How many were not there.
        """
        looked_at, leases = monotonic(), self._leases
        missing = yield from self._found(leads)
        unknown = len(missing)
        if missing and leases is not None:
            missing = yield from self._acquire(leases, missing)
            # The previous holder of a lease may have stored the result before this one was acquired.
            if not leases.is_recent(looked_at):
                missing = yield from self._found(missing)
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
        entries: list[Entry | None] = yield in_thread(lambda: cached.find_many(keys))
        missing: list[LeadItem] = []
        for lead, entry in zip(leads, entries, strict=True):
            if entry is None or not self._serve(lead.index, lead.item, lead.call, entry):
                lead.old = entry
                missing.append(lead)
                continue
            # Those that came while it was looked up get the same.
            notify(self._complete(lead), SharedResult(entry))
            for index, item in lead.followers:
                self._serve(index, item, lead.call, entry)
        return missing

    # --- other processes ----------------------------------------------------------------------------

    def _acquire(self, leases: Leases, leads: list[LeadItem]) -> StepLogic[list[LeadItem]]:
        """Acquire the leases of items and return those that may be computed now; park the others.

        Args:
            leases: The leases of the function's keys.
            leads: The items, all of them new, or all of them parked before.
        """
        new = [leases.new(lead.flight.key) for lead in leads]
        wanted = [lease for lease in new if lease is not None]
        if not wanted:
            return leads
        again, blocking = leads[0].wait is not None, not self._awaits
        granted = yield from leases.acquire(wanted, again=again, blocking=blocking)
        mine, free = dict(zip(wanted, granted, strict=True)), list[LeadItem]()
        for lead, lease in zip(leads, new, strict=True):
            answer = None if lease is None else mine[lease]
            if answer is not False or self._waited(lead):
                lead.flight.lease = lease if answer else None
                free.append(lead)
        return free

    def _waited(self, lead: LeadItem) -> bool:
        """Return whether an item that another process computes has waited long enough; else park or end it."""
        from opero.caching.lease import LeaseWait

        lead.wait = wait = lead.wait or LeaseWait(self._limit())
        pause = wait.next()
        if pause is not None:
            self._parked[lead] = ambient.clock().monotonic() + pause
            return False
        if wait.late:
            self._end_late(lead)
            return False
        return True

    def _take_due(self) -> list[LeadItem]:
        """Take out the parked items that are to be looked up now."""
        now = ambient.clock().monotonic()
        if min(self._parked.values()) > now:
            return []
        due = [lead for lead, at in self._parked.items() if at <= now + _TOGETHER]
        for lead in due:
            del self._parked[lead]
        return due

    # --- while others compute ------------------------------------------------------------------------

    def _note(self, follower: InFlightElsewhere) -> None:
        self._arrived.append(follower)
        self._wake()

    def arrivals(self) -> StepLogic[list[Batch]]:
        """Take what other callers have computed for this map, here or in other processes."""
        if self._parked:
            yield from self._look_up(self._take_due())
        self._leave_late()
        while self._arrived:
            follower = self._arrived.popleft()
            self._followers.discard(follower)
            index, item, verdict = follower.index, follower.item, follower.value
            if verdict is Instruction.LEAD:
                lead = self._lead(index, item, follower.call, follower.flight)
                if self._leases is None:
                    self._begin(lead)
                else:  # its leader has given the lease back
                    self._new.append(lead)
            elif verdict is Instruction.LOOK_AGAIN:
                self._sort_one(index, item)
            else:
                self._share(index, item, follower.call, take_verdict(follower))
        leads, self._new = self._new, []
        yield from self._look_up(leads)
        return self._take_known()

    def _leave_late(self) -> None:
        """Give up results of other callers for which there is no more time."""
        now = ambient.clock().monotonic()
        for follower in list(self._followers):
            due = follower.request
            if due is not None and due <= now and self._flights.leave(follower.flight, follower):
                self._followers.discard(follower)
                self._late(follower.index, follower.item, follower.call, None)

    def _end_late(self, lead: LeadItem) -> None:
        """Give up an item that another process computes for too long."""
        self._abandon(lead)
        for index, item in ((lead.index, lead.item), *lead.followers):
            self._late(index, item, lead.call, lead.old)

    def _late(self, index: int, item: Any, call: Call, old: Entry | None) -> None:
        try:
            result = self._cache.late(call, old)
        except DeadlineError as error:
            self._add("fresh", index, item, _uncalled(error=error))
        else:
            self._add("stale", index, item, result)

    # --- items that are not computed -----------------------------------------------------------------

    def _take_known(self) -> list[Batch]:
        batches, self._known = list(self._known.values()), {}
        return batches

    def _add(self, origin: Origin, index: int, item: Any, result: Any) -> None:
        """Add an item that is finished with a result or an `ItemOutcome`."""
        batch = self._known.setdefault(origin, Batch([], [], [], {}, origin))
        batch.add(index, item, result)

    def _share(self, index: int, item: Any, call: Call, verdict: Verdict) -> None:
        """Give an item the outcome of an equal one."""
        if isinstance(verdict, Instruction):
            self._compute([index], [item])
            return
        stale = isinstance(verdict, SharedResult) and verdict.stale
        origin: Origin = "stale" if stale else "shared"
        try:
            self._add(origin, index, item, self._cache.share(call, verdict))
        except Rejected as rejected:
            self._add(origin, index, item, _uncalled(value=rejected.value, rejected=True))
        except Exception as error:  # noqa: BLE001 - the other's failure is this item's as well
            self._add(origin, index, item, _uncalled(error=error))
        finally:
            del verdict  # a frame that names an error which passes through it is a reference cycle

    # --- results -------------------------------------------------------------------------------------

    def settle(self, batches: list[Batch]) -> StepLogic[list[Batch]]:
        """Store results, notify those that wait for them, and return the results of equal items.

        An item that failed and gets an expired result instead moves from its batch to one of those.
        """
        computed: list[tuple[LeadItem, Any, float]] = []
        for number, batch in enumerate(batches):
            stale: set[int] = set()
            for position, index in enumerate(batch.idx):
                lead = self._leads.get(index)
                if lead is None:
                    continue
                outcome = batch.odd.get(position)
                if outcome is None or outcome.error is None:
                    computed.append((lead, batch.values[position], _fill_in(lead.call, outcome)))
                elif self._failed(lead, outcome.error):
                    stale.add(position)
            if stale:
                batches[number] = batch.without(stale)
        yield from self._store(computed)  # if that is cancelled, `close` abandons them
        return self._take_known()

    def _store(self, computed: list[tuple[LeadItem, Any, float]]) -> StepLogic[None]:
        """Store results, then notify those that wait for them."""
        if not computed:
            return
        cache, entries = self._cache, self._cache.entries
        wanted = [
            (lead.flight, value, cache.lifetime(lead.call, value, began))
            for lead, value, began in computed
        ]
        kept: list[Entry | None]
        if not self._slow:
            kept = [entries.store(*one) for one in wanted]
        else:
            kept = yield from entries.storing(wanted)
        for (lead, value, _), entry in zip(computed, kept, strict=True):
            waiters = self._complete(lead)
            if waiters or lead.followers:
                verdict = cache.verdict(value, entry, rejected=lead.call.rejected)
                notify(waiters, verdict)
                for index, item in lead.followers:
                    self._share(index, item, lead.call, verdict)

    def _failed(self, lead: LeadItem, error: BaseException) -> bool:
        """Share a failure; True if all, the item itself too, get an expired result instead."""
        cache, call = self._cache, lead.call
        if not isinstance(error, Exception):
            self._abandon(lead)
            self._compute(
                [index for index, _ in lead.followers], [one for _, one in lead.followers]
            )
            return False
        # A caller short of time says nothing about what the next one will achieve.
        lead.flight.without_result = not isinstance(error, DeadlineError)
        old = None
        if cache.freshness is not None:
            old = cache.stand_in(call, lead.flight, lead.old, error)
        waiters = self._complete(lead)
        if old is not None:
            notify(waiters, SharedResult(old, stale=True))
            for index, item in ((lead.index, lead.item), *lead.followers):
                self._add("stale", index, item, cache.entries.serve_stale(call, old, error))
            return True
        if waiters or lead.followers:
            verdict = SharedFailure(copy_error(error))
            notify(waiters, verdict)
            for index, item in lead.followers:
                self._share(index, item, call, verdict)
        return False

    def _complete(self, lead: LeadItem) -> Iterable[Waiter]:
        """End the flight of an item; return the callers that wait for it."""
        del self._led[lead.flight.key], self._leads[lead.index]
        return self._flights.complete(lead.flight) if self._shares else ()

    def _abandon(self, lead: LeadItem) -> None:
        """Let another caller compute an item."""
        del self._led[lead.flight.key], self._leads[lead.index]
        self._flights.abandon(lead.flight)

    # --- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what was started: other callers take over, and none waits for this map any more."""
        self._marker.done = True
        self._parked.clear()
        for lead in self._led.values():
            self._flights.abandon(lead.flight)
        self._led.clear()
        self._leads.clear()
        for follower in list(self._followers):
            self._flights.leave(follower.flight, follower)
        self._followers.clear()


def _uncalled(**made: Any) -> ItemOutcome:
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
