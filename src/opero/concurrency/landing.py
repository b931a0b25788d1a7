# this_file: src/opero/concurrency/landing.py
"""What becomes of computed items: their results are stored, and told to those who wait for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from opero.caching.single_flight import SharedFailure, SharedResult, notify
from opero.concurrency.engine import Outcome
from opero.concurrency.errand import InThread, Several, Steps
from opero.concurrency.known import Known
from opero.errors import DeadlineError
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.caching.entries import Stored
    from opero.caching.memory import Entry
    from opero.caching.single_flight import Flight
    from opero.concurrency.abroad import Abroad
    from opero.concurrency.claim import Lead
    from opero.concurrency.engine import Job
    from opero.concurrency.order import Batch
    from opero.core.cache import CacheStage
    from opero.core.call import Call

__all__ = ["Fresh", "Landing"]

Fresh = Callable[[list[int], list[Any]], object]
"""Takes indices and items that must be computed."""


class Landing:
    """Ends what the items of a map led.

    Args:
        cache: The function's cache stage.
        job: How an item becomes a call.
        led: What is computed, by its key; taken out when it ends.
        keys: Keys of the items that are computed, by index; likewise.
        shares: Whether others may wait for these items.
        abroad: The leases of the items, None without any.
    """

    def __init__(
        self,
        cache: CacheStage,
        job: Job,
        *,
        led: dict[Hashable, Lead],
        keys: dict[int, Hashable],
        shares: bool,
        abroad: Abroad | None,
    ) -> None:
        self._cache = cache
        self._job = job
        self._led = led
        self._keys = keys
        self._shares = shares
        self._abroad = abroad
        self._flights = cache.single_flight
        self._slow: bool = cache.store.blocking

    def settle(self, batches: list[Batch], fresh: Fresh) -> Steps[list[Batch]]:
        """Store results, tell those who wait for them, and return those of equal items.

        An item that failed and gets an expired result instead moves from its batch to one of those.
        """
        known = Known()
        landing: list[tuple[Lead, Any]] = []
        keeps: list[tuple[Call, Flight, Any, float]] = []
        moved: dict[int, set[int]] = {}
        ended: list[Lead] = []
        for number, batch in enumerate(batches):
            for position, index in enumerate(batch.idx):
                key = self._keys.pop(index, None)
                lead = None if key is None else self._led.pop(key)
                if lead is None:
                    continue
                ended.append(lead)
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
        try:
            yield from self._store(landing, keeps, fresh, known)
        finally:
            if self._abroad is not None:
                self._abroad.give_back(ended)
        return known.batches

    def _store(
        self,
        landing: list[tuple[Lead, Any]],
        keeps: list[tuple[Call, Flight, Any, float]],
        fresh: Fresh,
        known: Known,
    ) -> Steps[None]:
        """Store results, then tell those who wait for them."""
        try:
            entries = yield from self._keep(keeps)
        except BaseException:
            # The map is cancelled, and nobody else will end these flights.
            for lead, _ in landing:
                self._flights.abandon(lead.flight)
            raise
        for (lead, value), entry in zip(landing, entries, strict=True):
            if self._cache.freshness is not None:
                self._cache.computed(lead.call, lead.flight.key)
            self._land(lead, value, entry, fresh, known)

    def _keep(self, keeps: list[tuple[Call, Flight, Any, float]]) -> Steps[list[Entry | None]]:
        cache, writer = self._cache, self._cache.writer
        wanted = [
            (flight, value, cache.lifetime(call, value, began))
            for call, flight, value, began in keeps
        ]
        if not (self._slow and writer.stores_many and keeps):
            storing = Several(writer.store, writer.astore, wanted)
            several: list[Entry | None] = (
                (yield storing) if self._slow and keeps else storing.here()
            )
            return several
        stored: list[Stored] = yield InThread(lambda: writer.store_many(wanted))
        return [
            writer.report(flight, one) for (flight, _, _), one in zip(wanted, stored, strict=True)
        ]

    def _land(
        self,
        lead: Lead,
        value: Any,
        entry: Entry | None,
        fresh: Fresh,
        known: Known,
    ) -> None:
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
                told = (
                    Outcome(value=copy, rejected=True, attempts=0, calls=0)
                    if call.rejected
                    else copy
                )
                known.add("shared", index, item, told)
            else:
                fresh([index], [item])

    def _crash(self, lead: Lead, error: Exception, known: Known) -> bool:
        """Tell of a failure; True if everybody, the item itself too, gets an expired result instead."""
        from opero.caching.single_flight import copy_error

        cache, call = self._cache, lead.call
        # Who was short of time says nothing about what the next one will achieve.
        lead.flight.without_result = not isinstance(error, DeadlineError)
        old = None
        if cache.freshness is not None:
            old = cache.stand_in(call, lead.flight, lead.old, error)
        waiters = self._flights.complete(lead.flight) if self._shares else ()
        if old is not None:
            notify(waiters, SharedResult(old, stale=True))
            for index, item in ((lead.index, lead.item), *lead.followers):
                known.add("stale", index, item, cache.serve_stale(call, old, error))
            return True
        if waiters:
            notify(waiters, SharedFailure(copy_error(error)))
        for index, item in lead.followers:
            known.add("shared", index, item, Outcome(error=copy_error(error), attempts=0, calls=0))
        return False


def _filled_in(call: Call, outcome: Outcome | None) -> float:
    """Note on a call how it went; return the clock reading at its start."""
    began = ambient.clock().monotonic()
    if outcome is None:
        call.calls = 1
        return began
    call.attempts, call.calls, call.rejected = outcome.attempts, outcome.calls, outcome.rejected
    call.label, call.value, call.slept = outcome.label, outcome.fallback, outcome.slept
    return began - outcome.seconds
