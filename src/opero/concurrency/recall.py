# this_file: src/opero/concurrency/recall.py
"""What a map need not compute: results in the cache, results that somebody computes just now, equal items.

It uses the store, keys and flights of the function's own cache stage. The workers have no cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from contextvars import Context
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any

from opero.concurrency.engine import Outcome
from opero.concurrency.order import Batch, Origin
from opero.core import ambient
from opero.core.cache.flight import Flight, board
from opero.core.cache.waiter import Crashed, Landed, Order, Verdict, tell
from opero.core.call import Call, Rejected
from opero.errors import UnkeyableError

if TYPE_CHECKING:
    from opero.concurrency.engine import Job
    from opero.core.cache import Cache

__all__ = ["Recall"]

Fresh = Callable[[list[int], list[Any]], object]
"""Takes indices and items that must be computed."""


@dataclass(slots=True, eq=False)
class _Lead:
    """An item that this map computes, and the equal ones that wait for it."""

    flight: Flight
    call: Call
    followers: list[tuple[int, Any]] = field(default_factory=list)


class _Follower:
    """An item that somebody outside this map computes just now: a waiter of that flight."""

    __slots__ = ("_arrived", "call", "deadline", "flight", "index", "item", "key", "verdict")

    def __init__(
        self, index: int, item: Any, call: Call, key: Hashable, arrived: Callable[[_Follower], None]
    ) -> None:
        self.index = index
        self.item = item
        self.call = call
        self.key = key
        self.flight = Flight(None)
        self.deadline: float | None = None
        self.verdict: Verdict | None = None
        self._arrived = arrived

    @property
    def ready(self) -> bool:
        """A map can always take over."""
        return True

    def wake(self) -> bool:
        """Hand the verdict to the map, from whatever thread."""
        self._arrived(self)
        return True


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
    ) -> None:
        self._cache = cache
        self._job = job
        self._shares = shares
        self._wake = wake
        self._flights = cache.shelf.flights
        self._led: dict[Hashable, _Lead] = {}
        self._keys: dict[int, Hashable] = {}
        self._alone: dict[int, Call] = {}
        self._followers: set[_Follower] = set()
        self._arrived: deque[_Follower] = deque()
        self._marker = Flight(None)
        context.run(board, self._marker)

    @property
    def waiting(self) -> int:
        """Items that wait for somebody outside this map."""
        return len(self._followers)

    # --- before the dispatch -------------------------------------------------------------------------

    def sort(self, idx: range, items: list[Any], fresh: Fresh) -> list[Batch]:
        """Sort pulled items: return what is known, hand on what must be computed, keep what waits."""
        known: dict[Origin, Batch] = {}
        for index, item in zip(idx, items, strict=True):
            try:
                self._sort_one(index, item, fresh, known)
            except Exception as error:  # noqa: BLE001 - what a user's `cache_key` raises is the item's error
                _add(known, "fresh", index, item, Outcome(error=error, attempts=0, calls=0))
        return list(known.values())

    def _sort_one(self, index: int, item: Any, fresh: Fresh, known: dict[Origin, Batch]) -> None:
        cache, job = self._cache, self._job
        call = Call((*job.before, item, *job.after), dict(job.kwargs))
        key = None if cache.off or ambient.disabled() else self._key(call)
        if key is None:
            fresh([index], [item])
            return
        call.key = key
        lead = self._led.get(key)
        if lead is not None:
            lead.followers.append((index, item))
            return
        entry = cache.lookup.find(key)
        if entry is not None and cache.lookup.lives(key, entry):
            _add(known, "hit", index, item, cache.lookup.serve(call, entry))
            return
        self._fly(index, item, call, key, fresh)

    def _key(self, call: Call) -> Hashable | None:
        try:
            return self._cache.shelf.keying.key(call)
        except UnkeyableError as error:
            if self._cache.asked:
                raise
            self._cache.switch_off(str(error))
            return None

    def _fly(self, index: int, item: Any, call: Call, key: Hashable, fresh: Fresh) -> None:
        """Lead a flight, or wait for the one that somebody else leads."""
        flight = Flight(key) if not self._shares else self._flights.join(key, blocking=False)
        while flight is None:
            follower = _Follower(index, item, call, key, self._note)
            if self._flights.wait_for(key, follower):
                self._followers.add(follower)
                return
            flight = self._flights.join(key, blocking=False)
        self._cache.lookup.count_miss()
        self._cache.lookup.missed()
        self._lead(index, item, call, flight, fresh)

    def _lead(self, index: int, item: Any, call: Call, flight: Flight, fresh: Fresh) -> None:
        # Who calls the function in this very thread, such as `on_result`, must not wait for this map.
        flight.thread = get_ident()
        self._led[flight.key] = _Lead(flight, call)
        self._keys[index] = flight.key
        fresh([index], [item])

    # --- while others compute ------------------------------------------------------------------------

    def _note(self, follower: _Follower) -> None:
        self._arrived.append(follower)
        self._wake()

    def arrivals(self, fresh: Fresh) -> list[Batch]:
        """Take what others have computed for this map."""
        known: dict[Origin, Batch] = {}
        while self._arrived:
            follower = self._arrived.popleft()
            self._followers.discard(follower)
            index, item, verdict = follower.index, follower.item, follower.verdict
            if verdict is Order.LEAD:
                self._lead(index, item, follower.call, follower.flight, fresh)
            elif verdict is Order.ALONE:
                fresh([index], [item])
            elif isinstance(verdict, Order):
                self._sort_one(index, item, fresh, known)
            else:
                _add(known, "shared", index, item, self._shared(follower))
        return list(known.values())

    def _shared(self, follower: _Follower) -> Any:
        try:
            return self._cache.sharing.share(follower.call, follower)
        except Rejected as rejected:
            return Outcome(value=rejected.value, rejected=True, attempts=0, calls=0)
        except Exception as error:  # noqa: BLE001 - the other's failure is this item's as well
            return Outcome(error=error, attempts=0, calls=0)

    # --- after the work ------------------------------------------------------------------------------

    def settle(self, batch: Batch, fresh: Fresh) -> list[Batch]:
        """Store results, tell those who wait for them, and return those of equal items."""
        known: dict[Origin, Batch] = {}
        for position, index in enumerate(batch.idx):
            key = self._keys.pop(index, None)
            lead = None if key is None else self._led.pop(key)
            if lead is None:
                continue
            outcome = batch.odd.get(position)
            error = None if outcome is None else outcome.error
            if error is None:
                self._land(lead, batch.values[position], outcome, fresh, known)
            elif isinstance(error, Exception):
                self._crash(lead, error, known)
            else:
                self._flights.abandon(lead.flight)
                for follower in lead.followers:
                    fresh([follower[0]], [follower[1]])
        return list(known.values())

    def _land(
        self,
        lead: _Lead,
        value: Any,
        outcome: Outcome | None,
        fresh: Fresh,
        known: dict[Origin, Batch],
    ) -> None:
        call = lead.call
        began = ambient.clock().monotonic()
        if outcome is not None:
            began -= outcome.seconds
            call.attempts, call.calls, call.rejected = (
                outcome.attempts,
                outcome.calls,
                outcome.rejected,
            )
            call.label, call.value, call.slept = outcome.label, outcome.fallback, outcome.slept
        else:
            call.calls = 1
        cache = self._cache
        entry = cache.keeper.keep(call, lead.flight, value, began)
        waiters = self._flights.land(lead.flight) if self._shares else ()
        if not (waiters or lead.followers):
            return
        verdict = cache.sharing.landed(value, entry, rejected=call.rejected)
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

    def _crash(self, lead: _Lead, error: Exception, known: dict[Origin, Batch]) -> None:
        from opero.core.cache.copy_error import copy_error

        if self._shares:
            waiters = self._flights.land(lead.flight)
            if waiters:
                tell(waiters, Crashed(copy_error(error)))
        for index, item in lead.followers:
            _add(
                known, "shared", index, item, Outcome(error=copy_error(error), attempts=0, calls=0)
            )

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
