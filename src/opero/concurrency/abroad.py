# this_file: src/opero/concurrency/abroad.py
"""Items that other processes compute just now: this map waits for them, and works on others meanwhile.

An item that the cache does not have is computed by who has its lease. Leases are claimed for many items at once, when
these are about to be dispatched, and given back when their results are stored. Items whose lease somebody else has are
parked here: looked up again after growing pauses, they neither reach a worker nor take the place of others. The map
computes what it has leases for whatever it waits for, so that two maps never wait for each other in a circle.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from opero.caching.lease import LeaseWait
from opero.concurrency.errand import InThread, Steps
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.caching.lease import Leases
    from opero.concurrency.claim import Lead

__all__ = ["Abroad"]

_TOGETHER: Final = 0.005
"""Items that are due so many seconds later are looked up with those that are due now."""


class Abroad:
    """The leases of a map's items, and the items that wait for those of others.

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
        self._parked: list[tuple[float, int, Lead]] = []
        self._serial = itertools.count()
        self.waiting: int = 0

    def claim(self, leads: Sequence[Lead], late: list[Lead]) -> Steps[list[Lead]]:
        """Claim the leases of items and return those that may be computed now; park the others.

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
        claims = [lease for _, lease in wanted]
        again, blocking = wanted[0][0].wait is not None, not self._awaits
        told: list[bool | None] = yield InThread(
            lambda: self._leases.claim_many(claims, again=again, blocking=blocking)
        )
        self._leases.keep([lease for lease, mine in zip(claims, told, strict=True) if mine])
        for (lead, _), mine in zip(wanted, told, strict=True):
            if mine is None:
                lead.lease = None
            elif not mine:
                self._park(lead, late)
        return [lead for lead in leads if not lead.parked and lead not in late]

    def _park(self, lead: Lead, late: list[Lead]) -> None:
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

    def follow(self, lead: Lead) -> None:
        """Take note of an item that is equal to another one."""
        if lead.parked:
            self.waiting += 1

    def next_due(self) -> float | None:
        """Return the clock reading at which parked items are to be looked up, None without any."""
        return self._parked[0][0] if self._parked else None

    def due(self) -> list[Lead]:
        """Take out the items that are to be looked up now."""
        found: list[Lead] = []
        if self._parked and self._parked[0][0] <= (now := ambient.clock().monotonic()):
            while self._parked and self._parked[0][0] <= now + _TOGETHER:
                lead = heapq.heappop(self._parked)[2]
                lead.parked = False
                self.waiting -= 1 + len(lead.followers)
                found.append(lead)
        return found

    def give_back(self, leads: Iterable[Lead]) -> None:
        """End the leases of items, without waiting for the store."""
        for lead in leads:
            lease, lead.lease = lead.lease, None
            self._leases.release(lease, lead.flight)

    def close(self) -> None:
        """Wait for nobody any more."""
        self._parked.clear()
        self.waiting = 0
