# this_file: src/opero/caching/adapters.py
"""How a call passes the cache, once for threads and once for event loops.

look in the store → hit
                  → miss → first caller: look again → compute → store → tell those who wait
                         → others: wait for the first one's outcome
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from opero.caching.flight import Flight, board, unboard
from opero.caching.waiter import Order, TaskWaiter, ThreadWaiter, tell
from opero.errors import UnkeyableError
from opero.utils import ambient
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.caching.memory import Entry
    from opero.caching.stage import Cache
    from opero.core.call import AsyncProceed, Call, Proceed

__all__ = ["async_adapter", "sync_adapter"]


def sync_adapter(cache: Cache, proceed: Proceed) -> Proceed:
    """Return what looks, leads or follows, and calls `proceed` for what has to be computed."""
    lookup, keeper, sharing = cache.lookup, cache.keeper, cache.sharing
    flights, make_key = cache.shelf.flights, cache.shelf.keying.key
    claim, land = flights.claim, flights.land
    get, lives, serve = lookup.find, lookup.lives, lookup.serve
    leases = cache.leases
    count_miss, heard = lookup.count_miss, lookup.heard
    keep, timed = keeper.keep, keeper.condition is not None
    aging, renewal = cache.aging, cache.renewal

    def run(call: Call) -> Any:
        # Who switches caches off for a test holds the switch.
        # A wrapper whose arguments are plain has built the key, and found nothing.
        key, looked = call.key, call.key is not None
        if cache.off or (switch.on and ambient.disabled()):
            key = None
        elif not looked:
            try:
                key = make_key(call)
            except UnkeyableError as error:
                if cache.asked:
                    raise
                cache.switch_off(str(error))
        if key is None:
            return proceed(call)
        call.key = key
        if call.renews:
            return lead(call, call.flight or flights.replace(key))
        entry = None if looked and aging is None else get(key)
        if entry is not None:
            if lives(key, entry):
                if renewal is not None and renewal.due(key, entry):
                    renewal.start_thread(call, key)
                return serve(call, entry)
            if aging is not None and aging.spares(key, entry):
                return lookup.serve_stale(call, entry)
        flight = Flight(key)
        return lead(call, flight) if claim(key, flight) is flight else follow(call, key, entry)

    def lead(call: Call, flight: Flight) -> Any:
        boarded = board(flight)
        key, entry, lease = flight.key, None, None
        try:
            # The leader before may have landed between our look and our join.
            if leases is None or call.renews:
                entry = get(key)
            else:
                entry, lease, late = leases.take_turn(call, flight)
                if late:
                    lookup.late(call, None)  # raises; the entry may stand in
            if entry is None or call.renews or not lives(key, entry):
                if not call.renews:
                    if aging is None:
                        count_miss()
                    if heard or switch.on:
                        lookup.missed()
                began = ambient.clock().monotonic() if timed else 0.0
                value = proceed(call)
                if aging is not None:
                    lookup.computed(call, key)
                entry = keep(call, flight, value, began)
            else:
                value = serve(call, entry)
            waiters = land(flight)
            if waiters:
                tell(waiters, sharing.landed(value, entry, rejected=call.rejected))
        except Exception as error:
            old = None if aging is None else lookup.stand_in(call, flight, entry, error)
            sharing.fail(call, flight, error, old)
            if old is None or call.renews:
                raise
            value = lookup.serve_stale(call, old, error)
        except BaseException:
            flights.abandon(flight)
            raise
        finally:
            unboard(boarded)
            if leases is not None:
                leases.give_back(lease, flight)
        return value

    def follow(call: Call, key: Hashable, old: Entry | None) -> Any:
        while (flight := flights.join(key)) is None:
            waiter = ThreadWaiter(call.deadline)
            if not flights.wait_for(key, waiter):
                continue
            try:
                in_time = waiter.wait()
            except BaseException:
                flights.leave(waiter)
                raise
            if not in_time and flights.leave(waiter):
                return lookup.late(call, old)
            if waiter.verdict is Order.LEAD:
                flight = waiter.flight
                break
            if waiter.verdict is Order.ALONE:
                return proceed(call)
            if waiter.verdict is not Order.AGAIN:
                return sharing.share(call, waiter)
        return lead(call, flight)

    return run


def async_adapter(cache: Cache, proceed: AsyncProceed) -> AsyncProceed:
    """Return the same for an event loop."""
    lookup, keeper, sharing = cache.lookup, cache.keeper, cache.sharing
    flights, make_key = cache.shelf.flights, cache.shelf.keying.key
    claim, land = flights.claim, flights.land
    get, lives, serve = lookup.find, lookup.lives, lookup.serve
    leases = cache.leases
    count_miss, heard = lookup.count_miss, lookup.heard
    keep, timed = keeper.keep, keeper.condition is not None
    # What may take long is awaited; memory is looked at in passing.
    slow, aget, akeep = cache.store.blocking, lookup.afind, keeper.akeep
    aging, renewal = cache.aging, cache.renewal

    async def run(call: Call) -> Any:
        # A wrapper whose arguments are plain has built the key, and found nothing.
        key, looked = call.key, call.key is not None
        if cache.off or (switch.on and ambient.disabled()):
            key = None
        elif not looked:
            try:
                key = make_key(call)
            except UnkeyableError as error:
                if cache.asked:
                    raise
                cache.switch_off(str(error))
        if key is None:
            return await proceed(call)
        call.key = key
        if call.renews:
            return await lead(call, call.flight or flights.replace(key))
        entry = None
        if aging is not None or not looked:
            entry = await aget(key) if slow else get(key)
        if entry is not None:
            if lives(key, entry):
                if renewal is not None and renewal.due(key, entry):
                    renewal.start_task(call, key)
                return serve(call, entry)
            if aging is not None and aging.spares(key, entry):
                return lookup.serve_stale(call, entry)
        flight = Flight(key)
        if claim(key, flight) is flight:
            return await lead(call, flight)
        return await follow(call, key, entry)

    async def lead(call: Call, flight: Flight) -> Any:
        boarded = board(flight)
        key, entry, lease = flight.key, None, None
        try:
            # The leader before may have landed between our look and our join.
            if leases is None or call.renews or call.begun is not None:
                entry = await aget(key) if slow else get(key)
            else:
                entry, lease, late = await leases.atake_turn(call, flight)
                if late:
                    lookup.late(call, None)  # raises; the entry may stand in
            if entry is None or call.renews or not lives(key, entry):
                # A call that is already made (`Call.begun`) was counted before it was made.
                if not call.renews and call.begun is None:
                    if aging is None:
                        count_miss()
                    if heard or switch.on:
                        lookup.missed()
                began = ambient.clock().monotonic() if timed else 0.0
                value = await proceed(call)
                if aging is not None:
                    lookup.computed(call, key)
                entry = (
                    await akeep(call, flight, value, began)
                    if slow
                    else keep(call, flight, value, began)
                )
            else:
                value = serve(call, entry)
            waiters = land(flight)
            if waiters:
                tell(waiters, sharing.landed(value, entry, rejected=call.rejected))
        except Exception as error:
            old = None if aging is None else lookup.stand_in(call, flight, entry, error)
            sharing.fail(call, flight, error, old)
            if old is None or call.renews:
                raise
            value = lookup.serve_stale(call, old, error)
        except BaseException:
            flights.abandon(flight)
            raise
        finally:
            unboard(boarded)
            if leases is not None:
                leases.give_back(lease, flight)
        return value

    async def follow(call: Call, key: Hashable, old: Entry | None) -> Any:
        while (flight := flights.join(key, blocking=False)) is None:
            waiter = TaskWaiter(call.deadline)
            if not flights.wait_for(key, waiter):
                continue
            try:
                in_time = await waiter.wait()
            except BaseException:
                flights.leave(waiter)
                raise
            if not in_time and flights.leave(waiter):
                return lookup.late(call, old)
            if waiter.verdict is Order.LEAD:
                flight = waiter.flight
                break
            if waiter.verdict is Order.ALONE:
                return await proceed(call)
            if waiter.verdict is not Order.AGAIN:
                return sharing.share(call, waiter)
        return await lead(call, flight)

    return run
