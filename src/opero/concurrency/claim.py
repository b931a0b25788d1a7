# this_file: src/opero/concurrency/claim.py
"""Who computes a key: an item of this map, or somebody else that an item of this map waits for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opero.caching.memory import Entry
from opero.caching.single_flight import Flight
from opero.core.call import Call

if TYPE_CHECKING:
    from opero.caching.lease import (
        Lease,  # noqa: TC004 - as above
        LeaseWait,  # noqa: TC004 - loaded with the first store that lends leases
    )
    from opero.caching.single_flight import Verdict

__all__ = ["Follower", "Lead"]


@dataclass(slots=True, eq=False)
class Lead:
    """An item that this map computes, and the equal ones that wait for it."""

    flight: Flight
    call: Call
    index: int
    item: Any
    followers: list[tuple[int, Any]] = field(default_factory=list)
    old: Entry | None = None
    """What the cache had, if it has expired."""
    lease: Lease | None = None
    """What keeps other processes from computing it, once it is claimed."""
    wait: LeaseWait | None = None
    """The wait for the process that computes it, while one does or after one did."""
    parked: bool = False
    """Whether it waits for that now."""


class Follower:
    """An item that somebody outside this map computes just now: a waiter of that flight."""

    __slots__ = ("_arrived", "call", "deadline", "flight", "index", "item", "key", "verdict")

    def __init__(
        self,
        index: int,
        item: Any,
        call: Call,
        key: Hashable,
        arrived: Callable[[Follower], None],
        deadline: float | None = None,
    ) -> None:
        self.index = index
        self.item = item
        self.call = call
        self.key = key
        self.flight = Flight(None)
        self.deadline: float | None = deadline
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
