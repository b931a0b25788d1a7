# this_file: src/opero/caching/lease_keeper.py
"""Renewing leases while their holders compute, and giving them back, on one thread per process.

A lease is short, so that a killed holder keeps nobody waiting for long; a call that takes longer is
extended from here. The caller does not wait for its lease to be given back.
"""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import threading
from threading import get_ident
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from opero.caching.stores.base import ByteStore

__all__ = [
    "SECONDS", "Lease", "ends_here", "flag", "give_back", "held_here", "hold", "new_lease",
    "those_held_here",
]  # fmt: skip

SECONDS: Final = 5.0
"""For how long a lease is claimed, and how long a killed holder can keep others waiting."""

_RENEW_AFTER: Final = 1.5
_IDLE: Final = 10.0
_FLAG_SECONDS: Final = 2.0
_GATHER: Final = 0.02
"""Seconds that an ended lease waits for others to be given back with: who looks for the result finds it meanwhile."""
_AT_ONCE: Final = 500
"""Leases that are renewed or given back in one go, so that nobody else has to wait for the store for long."""


class Lease(NamedTuple):
    """The right to compute one key.

    Attributes:
        store: Where it is noted.
        key: What it is for.
        owner: Who has it; unique, whatever process or machine.
        process: Identifier of the process that claimed it.
        thread: Identifier of the thread that did.
    """

    store: ByteStore
    key: str
    owner: str
    process: int
    thread: int


def new_lease(store: ByteStore, key: str) -> Lease:
    """Return a lease that nobody has yet."""
    process = _process
    return Lease(store, key, f"{process.token}-{next(process.serial)}", process.pid, get_ident())


def flag(key: str) -> str:
    """Return what is claimed for a moment to show that a holder ended without a result."""
    return f"{key}!"


class _Keeper:
    def __init__(self) -> None:
        self._held: dict[Lease, float] = {}  # in the order in which they are to be renewed
        self._ending: dict[Lease, bool] = {}
        # Reentrant, because the garbage collector may end an abandoned coroutine at any allocation.
        self._news = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._flushing = threading.Lock()

    def hold(self, leases: Iterable[Lease]) -> None:
        with self._news:
            due = monotonic() + _RENEW_AFTER
            for lease in leases:
                self._held[lease] = due
            self._start()

    def give_back(self, lease: Lease, *, barren: bool) -> None:
        with self._news:
            self._held.pop(lease, None)
            self._ending[lease] = barren
            self._start()
            self._news.notify()

    def holds(self, wanted: Lease) -> bool:
        with self._news:
            return any(
                _same(lease, wanted) and lease.thread == wanted.thread for lease in self._held
            )

    def ends(self, wanted: Lease) -> bool:
        with self._news:
            return any(_same(lease, wanted) for lease in self._ending)

    def held(self, wanted: Collection[Lease]) -> set[Lease]:
        threads = {lease.thread for lease in wanted}
        with self._news:
            held = {(lease.key, id(lease.store)) for lease in self._held if lease.thread in threads}
        return {lease for lease in wanted if (lease.key, id(lease.store)) in held}

    def flush(self) -> None:
        """Give back what has ended; afterwards, nobody is at it any more."""
        with self._flushing:
            with self._news:
                ending = dict(self._ending)
            for leases in _portions(ending):
                _end(leases, [lease for lease in leases if ending[lease]])
                with self._news:
                    for lease in leases:
                        self._ending.pop(lease, None)

    def _start(self) -> None:
        if self._thread is not None:
            return
        # A daemon, so that a call that never ends does not keep the program alive.
        thread = threading.Thread(target=self._run, name="opero-leases", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: leases run out by themselves
            return
        self._thread = thread

    def _run(self) -> None:
        idle_since = monotonic()
        while True:
            with self._news:
                if not self._ending:
                    # Real time, whatever clock a test has installed: stores count in it.
                    self._news.wait(_RENEW_AFTER / 2)
                now = monotonic()
                if self._held or self._ending:
                    idle_since = now
                elif now - idle_since > _IDLE:
                    self._thread = None
                    return
                due, ending = self._due(now), bool(self._ending)
            if ending:
                sleep(_GATHER)
                self.flush()
            for leases in _portions(due):
                self._renew(leases)

    def _due(self, now: float) -> list[Lease]:
        found = itertools.takewhile(lambda held: held[1] <= now, self._held.items())
        return [lease for lease, _ in found]

    def _renew(self, leases: list[Lease]) -> None:
        with self._news:  # some may just have been given back
            leases = [lease for lease in leases if lease in self._held]
        if not leases:
            return
        try:
            claims = [(lease.key, lease.owner) for lease in leases]
            still = leases[0].store.claim_many(claims, SECONDS)
        except Exception:  # noqa: BLE001 - the store may be back at the next try
            still = [True] * len(leases)
        with self._news:
            due = monotonic() + _RENEW_AFTER
            for lease, ours in zip(leases, still, strict=True):
                # What is not ours any more had run out, because this process stood still.
                if self._held.pop(lease, None) is not None and ours:
                    self._held[lease] = due


def _same(lease: Lease, wanted: Lease) -> bool:
    return lease.key == wanted.key and lease.store is wanted.store


def _portions(leases: Iterable[Lease]) -> Iterator[list[Lease]]:
    """Yield the leases of each store, not too many at once."""
    stores: dict[int, list[Lease]] = {}
    for lease in leases:
        stores.setdefault(id(lease.store), []).append(lease)
    for those in stores.values():
        yield from (those[start : start + _AT_ONCE] for start in range(0, len(those), _AT_ONCE))


def _end(leases: list[Lease], barren: list[Lease]) -> None:
    store = leases[0].store
    try:
        if barren:
            store.claim_many([(flag(lease.key), lease.owner) for lease in barren], _FLAG_SECONDS)
        store.release_many([(lease.key, lease.owner) for lease in leases])
    except Exception:  # noqa: BLE001 - they run out by themselves
        return


class _Process:
    """What belongs to this process, and is made anew in a forked child."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.token = secrets.token_hex(12)
        self.serial = itertools.count()
        self.keeper = _Keeper()


_process = _Process()


def hold(leases: Iterable[Lease]) -> None:
    """Keep leases until `give_back`."""
    _process.keeper.hold(leases)


def held_here(lease: Lease) -> bool:
    """Whether the thread of a lease holds another one of the same key, so that waiting would be for itself.

    That is so if an event loop runs there: one of its tasks has it.
    """
    return _process.keeper.holds(lease)


def those_held_here(wanted: Collection[Lease]) -> set[Lease]:
    """Return those of many leases for which `held_here` is true."""
    return _process.keeper.held(wanted)


def ends_here(lease: Lease) -> bool:
    """Whether another one of the same key is just being given back by this process."""
    return _process.keeper.ends(lease)


def give_back(lease: Lease, *, barren: bool = False) -> None:
    """End a lease soon.

    Args:
        lease: The lease; one of the parent process is left alone.
        barren: Whether there is no result for those who wait.
    """
    if lease.process == _process.pid:
        _process.keeper.give_back(lease, barren=barren)


def _after_fork() -> None:
    global _process  # noqa: PLW0603 - the parent's leases are not ours
    _process = _Process()


def _at_exit() -> None:
    # Before the stores are closed: they would be opened again.
    _process.keeper.flush()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
