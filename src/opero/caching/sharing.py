# this_file: src/opero/caching/sharing.py
"""Sharing the outcome of a computation with those who waited for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.caching.copying import Uncopyable
from opero.caching.waiter import Crashed, Landed, Order, tell, verdict_of
from opero.utils.matching import Rejected

if TYPE_CHECKING:
    from opero.caching.flight import Flight, Flights
    from opero.caching.keeper import Keeper
    from opero.caching.lookup import Lookup
    from opero.caching.memory import Entry
    from opero.caching.waiter import Waiter
    from opero.core.call import Call
    from opero.core.stats import Stats

__all__ = ["Sharing"]


class Sharing:
    """Brings outcomes from leaders to followers, to each a copy of its own.

    Args:
        flights: What is being computed.
        keeper: Makes entries.
        lookup: Serves expired ones.
        stats: The function's counters.
    """

    __slots__ = ("_flights", "_make_entry", "_serve_stale", "_stats")

    def __init__(self, flights: Flights, keeper: Keeper, lookup: Lookup, stats: Stats) -> None:
        self._flights = flights
        self._serve_stale = lookup.serve_stale
        self._make_entry = keeper.entry
        self._stats = stats

    def landed(self, value: Any, entry: Entry | None, *, rejected: bool) -> Landed | Order:
        """Return what those who wait are told of a result.

        Args:
            value: The result.
            entry: It as it was stored; None if it was not.
            rejected: Whether `retry_if_result` refused it.
        """
        try:
            return Landed(entry or self._make_entry((), value, None), rejected)
        except Uncopyable:
            return Order.ALONE

    def crash(self, flight: Flight, error: Exception) -> None:
        """End a flight with a failure."""
        waiters = self._flights.land(flight)
        if not waiters:
            return
        if isinstance(error, Rejected):
            tell(waiters, self.landed(error.value, None, rejected=True))
        else:
            from opero.caching.copy_error import copy_error

            tell(waiters, Crashed(copy_error(error)))

    def fail(self, call: Call, flight: Flight, error: Exception, old: Entry | None) -> None:
        """End the lead of a call that failed.

        Args:
            call: The call.
            flight: What it leads.
            error: What it failed with.
            old: The expired entry that callers get instead; None if there is none.
        """
        # Who was short of time says nothing about what the next one will achieve.
        flight.barren = not call.overdue
        if call.overdue and self._flights.outlive(flight, call.deadline):
            return
        if old is None:
            self.crash(flight, error)
        else:
            tell(self._flights.land(flight), Landed(old, stale=True))

    def share(self, call: Call, waiter: Waiter) -> Any:
        """Return or raise a follower's own copy of the outcome."""
        verdict = verdict_of(waiter)
        if isinstance(verdict, Landed) and verdict.stale:
            return self._serve_stale(call, verdict.entry)
        call.source = "shared"
        self._stats.add(shared=1)
        if isinstance(verdict, Landed):
            value = verdict.entry.open()
            if verdict.rejected:
                raise Rejected(value)
            return value
        from opero.caching.copy_error import copy_error

        error = copy_error(verdict.error)
        behind = error.__context__
        try:
            raise error
        finally:
            # `raise` has put there what the caller is handling just now; what went before matters
            # more.
            error.__context__ = behind
            del error, behind, verdict
