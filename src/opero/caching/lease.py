# this_file: src/opero/caching/lease.py
"""Single-flight across processes: of those that miss the same key, one computes.

    claim → mine → look → compute → store → give back
          → somebody's → look → pause → claim again

The leader of a flight claims a lease in the store that its process shares with others. Whoever does
not get it looks for the result, with growing pauses. The lease of a killed leader runs out after
seconds. A leader that ends without a result leaves a flag: those who have waited for it compute
then, all at once, instead of waiting for each other.

A call that leads another flight already never waits but computes, so that neither recursion nor
leaders that want each other's keys can hang; nor does a plain call in the thread of an event loop
that holds the lease. A store that fails lends no leases.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from opero.caching.flight import leads_others
from opero.caching.lease_keeper import (
    SECONDS,
    Lease,
    ends_here,
    flag,
    give_back,
    held_here,
    hold,
    new_lease,
    those_held_here,
)
from opero.errors import StoreError
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.caching.flight import Flight
    from opero.caching.lookup import Lookup
    from opero.caching.memory import Entry, EntryStore
    from opero.caching.skips import Skips
    from opero.core.call import Call

__all__ = ["Leases", "Turn", "Wait", "longest_pauses"]

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.5
_GROWTH: Final = 1.5
_PATIENCE: Final = 600.0
"""Seconds after which a caller computes although somebody else still does. Only threads that wait
for each other across processes come that far."""

_A_MOMENT: Final = 0.001

_CLAIM, _FIND, _PAUSE = "claim", "find", "pause"


def longest_pauses() -> Iterator[float]:
    """Yield the most seconds between two looks for somebody else's result.

    Example:
        >>> [round(pause, 3) for pause, _ in zip(longest_pauses(), range(4))]
        [0.01, 0.015, 0.022, 0.034]
    """
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(pause * _GROWTH, _LONGEST_PAUSE)


class Turn(NamedTuple):
    """What a leader knows when its turn has come.

    Attributes:
        entry: What is in the store now, perhaps expired.
        lease: The lease that it has to give back; None if it goes without.
        late: Whether it is its deadline that ended the wait.
    """

    entry: Entry | None
    lease: Lease | None = None
    late: bool = False


class Wait:
    """One call's wait for somebody else's result.

    Args:
        deadline: Clock reading at which it must end, None for never.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._pauses = longest_pauses()
        self._patient_until = ambient.clock().monotonic() + _PATIENCE

    @property
    def late(self) -> bool:
        """Whether its deadline has come."""
        return self._deadline is not None and ambient.clock().monotonic() >= self._deadline

    def next(self) -> float | None:
        """Return the next pause, None if it has waited long enough."""
        now = ambient.clock().monotonic()
        if self.late or now >= self._patient_until:
            return None
        # Drawn, so that those who began together do not ask together.
        pause = next(self._pauses) * random.uniform(0.5, 1)
        return pause if self._deadline is None else min(pause, self._deadline - now)


_T = TypeVar("_T")

_Asking = Generator[tuple[Any, ...], Any, _T]
"""Yields what to do next, and is sent what came of it."""


class Leases:
    """The leases of one function's keys.

    Args:
        store: The function's entries, in a store that lends leases.
        lookup: Looks for results.
        skips: Who hears of a store that lends none.
    """

    def __init__(self, store: EntryStore, lookup: Lookup, skips: Skips) -> None:
        self._store: Any = store  # one with a `backend`
        self._lookup = lookup
        self._skips = skips

    def take_turn(self, call: Call, flight: Flight) -> Turn:
        """Wait while another process computes what a flight is after."""
        return self._drive(self._ask(call, flight))

    async def atake_turn(self, call: Call, flight: Flight) -> Turn:
        """Do the same for an event loop."""
        return await self._adrive(self._ask(call, flight))

    def try_turn(self, flight: Flight) -> Turn | None:
        """Return None instead of waiting if another process computes what a flight is after."""
        return self._drive(self._ask_once(flight))

    async def atry_turn(self, flight: Flight) -> Turn | None:
        """Do the same for an event loop."""
        return await self._adrive(self._ask_once(flight))

    def give_back(self, lease: Lease | None, flight: Flight) -> None:
        """End a lease, without waiting for the store.

        Args:
            lease: The lease, None for none.
            flight: What was computed with it.
        """
        if lease is not None:
            give_back(lease, barren=flight.barren or flight.void)

    # --- for maps: many at once -------------------------------------------------------------------

    def new(self, key: Any) -> Lease | None:
        """Return the lease of a key, which nobody has yet; None if the store lends none.

        It is made in the thread that is going to wait, because nobody may wait for himself.
        """
        return self._new(key)

    def claim_many(
        self, leases: Sequence[Lease], *, again: bool, blocking: bool
    ) -> list[bool | None]:
        """Claim leases of one store.

        Those that were got must be kept with `keep`. Who is cancelled before that keeps nobody waiting for long.

        Args:
            leases: As `new` has made them.
            again: Whether somebody else had them, and this caller has waited.
            blocking: Whether waiting would block the thread that wants them.

        Returns:
            For each, whether it is ours now or somebody else's; None to go without.
        """
        store = leases[0].store
        try:
            won = store.claim_many([(lease.key, lease.owner) for lease in leases], SECONDS)
            told: list[bool | None] = list(won)
            ours = [place for place, mine in enumerate(won) if mine]
            if again and ours:
                flags = [(flag(leases[place].key), leases[place].owner) for place in ours]
                # As a single call: whoever has waited for nothing lets nobody wait in turn.
                for place, mine in zip(ours, store.claim_many(flags, _A_MOMENT), strict=True):
                    if not mine:
                        give_back(leases[place])
                        told[place] = None
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
            for lease in leases:
                give_back(lease)
            return [None] * len(leases)
        if blocking and len(ours) < len(leases):
            lost = [lease for lease, mine in zip(leases, won, strict=True) if not mine]
            mine_too = those_held_here(lost)
            for place, lease in enumerate(leases):
                if lease in mine_too:
                    told[place] = None
        return told

    def keep(self, leases: Sequence[Lease]) -> None:
        """Keep leases until they are given back."""
        hold(leases)

    # --- in steps ---------------------------------------------------------------------------------

    def _ask_once(self, flight: Flight) -> _Asking[Turn | None]:
        lease = self._new(flight.key)
        if lease is None:
            return Turn(None)
        ours = ends_here(lease)  # afterwards it may have been given back
        try:
            mine = yield _CLAIM, lease.key, lease
            if mine is False and not ours:
                return None
            return Turn((yield _FIND, flight.key), lease if mine else None)
        except BaseException:
            give_back(lease)
            raise

    def _ask(self, call: Call, flight: Flight) -> _Asking[Turn]:
        key, lease, wait = flight.key, None, None
        if leads_others(flight) or (lease := self._new(key)) is None:
            return Turn((yield _FIND, key))
        try:
            while True:
                mine = yield _CLAIM, lease.key, lease
                entry = yield _FIND, key
                if entry is not None and self._lookup.lives(key, entry):
                    return Turn(entry, lease if mine else None)
                if mine is not False:
                    break
                wait = wait or Wait(call.deadline)
                pause = wait.next()
                if pause is None:
                    return Turn(entry, late=wait.late)
                yield _PAUSE, pause
            # Whoever has waited for nothing does not make others wait for it in turn.
            if mine and wait and (yield _CLAIM, flag(lease.key), lease) is False:
                give_back(lease)
                mine = None
        except BaseException:
            # Perhaps nobody knows yet whether it was lent.
            give_back(lease)
            raise
        return Turn(entry, lease if mine else None)

    # --- asking the store -------------------------------------------------------------------------

    def _drive(self, asking: _Asking[_T]) -> _T:
        try:
            answer: Any = None
            while True:
                verb, *given = asking.send(answer)
                if verb is _FIND:
                    answer = self._lookup.find(*given)
                elif verb is _CLAIM:
                    answer = self._claim(*given)
                else:
                    ambient.clock().sleep(*given)
        except StopIteration as end:
            outcome: _T = end.value
            return outcome
        finally:
            asking.close()

    async def _adrive(self, asking: _Asking[_T]) -> _T:
        try:
            answer: Any = None
            while True:
                verb, *given = asking.send(answer)
                if verb is _FIND:
                    answer = await self._lookup.afind(*given)
                elif verb is _CLAIM:
                    answer = await self._aclaim(*given)
                else:
                    await ambient.clock().asleep(*given)
        except StopIteration as end:
            outcome: _T = end.value
            return outcome
        finally:
            asking.close()

    def _new(self, key: Any) -> Lease | None:
        try:
            return new_lease(self._store.backend, key)
        except Exception as error:  # noqa: BLE001 - without leases it goes, too
            self._failed(error)
            return None

    def _claim(self, key: str, lease: Lease) -> bool | None:
        """Tell whether a key is ours now or somebody else's; None to do without."""
        try:
            mine = lease.store.claim(key, lease.owner, _span(key, lease))
            if not mine and key == lease.key and held_here(lease):
                return None
            return self._told(key, lease, mine)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
            return None

    async def _aclaim(self, key: str, lease: Lease) -> bool | None:
        """Do the same for an event loop."""
        ask = self._store.abackend.aclaim
        try:
            return self._told(key, lease, await ask(key, lease.owner, _span(key, lease)))
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
            return None

    @staticmethod
    def _told(key: str, lease: Lease, mine: bool) -> bool | None:
        if key == lease.key:
            if mine:
                hold((lease,))
            elif ends_here(lease):
                return None
        return mine

    def _failed(self, error: Exception) -> None:
        why = str(error) if isinstance(error, StoreError) else type(error).__name__
        self._skips.tell(
            f"other processes may compute the same: the store lends no lease ({why})", once=True
        )


def _span(key: str, lease: Lease) -> float:
    """Return for how long to claim: a flag that is not there is raised only to see that."""
    return SECONDS if key == lease.key else _A_MOMENT
