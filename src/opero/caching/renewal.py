# this_file: src/opero/caching/renewal.py
"""Computing a result anew behind the scenes, while callers still get the one that is stored."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

from opero import events
from opero.caching.background import start_task, start_thread
from opero.caching.flight import Flight, Flights, lead_nothing
from opero.caching.handle import RefreshCall
from opero.caching.isolate import Uncopyable, isolated
from opero.core.deadline import bind_no_more
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.caching.aging import Aging
    from opero.caching.lease import Leases, Turn
    from opero.caching.memory import Entry
    from opero.caching.shelf import Shelf
    from opero.core.call import Call
    from opero.events.bus import Emitter

__all__ = ["Renewal"]


_OTHERS_LULL: Final = 1.0
"""Seconds for which this process leaves an entry to another one that is renewing it."""


class _Renewing(RefreshCall):
    """A call that renews an entry for nobody in particular.

    Should it be dropped before it has begun, because its event loop was closed, it gives its flight
    to those who wait.
    """

    def __init__(self, call: Call, flight: Flight, flights: Flights) -> None:
        super().__init__(
            tuple(_own(value) for value in call.args),
            {name: _own(value) for name, value in call.kwargs.items()},
        )
        self.flight = flight
        self._flights = flights

    def __del__(self) -> None:
        if not self.flight.done:
            self._flights.abandon(self.flight)


def _own(value: Any) -> Any:
    """Copy an argument that its owner is likely to change after the call."""
    if type(value) in (list, dict, set, bytearray):
        try:
            return isolated(value)
        except Uncopyable:
            return value
    return value


def _forget_caller() -> None:
    """Let go of what a context has inherited from a call that does not wait for this one."""
    lead_nothing()
    bind_no_more()


class Renewal:
    """Renews the entries of one function, each by one call at a time.

    Args:
        shelf: The entries.
        aging: Their ages.
        emitter: Where the function's events go.
        leases: Single-flight across processes; None for a store that they do not share.

    Attributes:
        due: Tells whether a live entry is to be renewed now.
        rerun: Runs a call through the whole pipeline, the cache included; gives a coroutine if the
            function is asynchronous.
    """

    def __init__(
        self, shelf: Shelf, aging: Aging, emitter: Emitter, leases: Leases | None = None
    ) -> None:
        self.due: Callable[[Hashable, Entry], bool] = aging.due
        self._lulls = aging.lulls
        self._leases = leases
        self._flights = shelf.flights
        self._make_key = shelf.keying.key
        self._emitter = emitter
        self.rerun: Callable[[Call], Any] | None = None

    def start_thread(self, call: Call, key: Hashable) -> None:
        """Begin on another thread, unless somebody computes that key already."""
        again = self._claimed(call, key)
        if again is not None:
            start_thread(lambda: self._run(again))

    def start_task(self, call: Call, key: Hashable) -> None:
        """Begin in another task, unless somebody computes that key already."""
        again = self._claimed(call, key)
        if again is not None:
            start_task(self._arun(again))

    def _claimed(self, call: Call, key: Hashable) -> _Renewing | None:
        flight = Flight(key)
        if self.rerun is None or self._flights.claim(key, flight) is not flight:
            return None
        return _Renewing(call, flight, self._flights)

    def _run(self, again: _Renewing) -> None:
        _forget_caller()
        leases, lease = self._leases, None
        try:
            if not self._begins(again):
                return
            if leases is not None:
                turn = leases.try_turn(again.flight)
                lease = turn and turn.lease
                if self._needless(again.flight.key, turn):
                    return
            left = self.rerun(again) if self.rerun is not None else None
            if isinstance(left, CoroutineType):
                # The first call ever: only now is it known that the function returns awaitables.
                left.close()
                begun = again.take_begun()
                if isinstance(begun, CoroutineType):
                    begun.close()
                return
        except Exception as error:  # noqa: BLE001 - the old result stays, and listeners hear of it
            self._tell(again, error)
        else:
            self._tell(again, None)
        finally:
            if leases is not None:
                leases.give_back(lease, again.flight)

    async def _arun(self, again: _Renewing) -> None:
        _forget_caller()
        leases, lease = self._leases, None
        try:
            if not self._begins(again) or self.rerun is None:
                return
            if leases is not None:
                turn = await leases.atry_turn(again.flight)
                lease = turn and turn.lease
                if self._needless(again.flight.key, turn):
                    return
            await self.rerun(again)
        except Exception as error:  # noqa: BLE001 - the old result stays, and listeners hear of it
            self._tell(again, error)
        else:
            self._tell(again, None)
        finally:
            if leases is not None:
                leases.give_back(lease, again.flight)

    def _needless(self, key: Hashable, turn: Turn | None) -> bool:
        """Whether another process is renewing an entry, or just has."""
        if turn is None:
            # For a moment nobody needs to ask again.
            now = ambient.clock().monotonic()
            self._lulls.begin(key, now, _OTHERS_LULL, excused=False)
            return True
        return turn.entry is not None and not self.due(key, turn.entry)

    def _begins(self, again: _Renewing) -> bool:
        """Whether the arguments are still those of the entry: they may have been changed meanwhile."""
        again.key = self._make_key(again)
        return bool(again.key == again.flight.key)

    def _tell(self, again: _Renewing, error: Exception | None) -> None:
        if self._emitter.active:
            renewed = error is None and not again.rejected
            self._emitter.emit(
                events.CacheRefreshed(function=self._emitter.function, renewed=renewed, error=error)
            )
