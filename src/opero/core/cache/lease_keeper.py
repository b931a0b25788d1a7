# this_file: src/opero/core/cache/lease_keeper.py
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
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from opero.core.cache.stores.protocol import ByteStore

__all__ = ["SECONDS", "Lease", "ends_here", "flag", "give_back", "held_here", "hold", "new_lease"]

SECONDS: Final = 5.0
"""For how long a lease is claimed, and how long a killed holder can keep others waiting."""

_RENEW_AFTER: Final = 1.5
_IDLE: Final = 10.0
_FLAG_SECONDS: Final = 2.0


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
        self._held: dict[Lease, float] = {}
        self._ending: dict[Lease, bool] = {}
        # Reentrant, because the garbage collector may end an abandoned coroutine at any allocation.
        self._news = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._flushing = threading.Lock()

    def hold(self, lease: Lease) -> None:
        with self._news:
            self._held[lease] = monotonic() + _RENEW_AFTER
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

    def flush(self) -> None:
        """Give back what has ended; afterwards, nobody is at it any more."""
        with self._flushing:
            with self._news:
                ending = list(self._ending.items())
            for lease, barren in ending:
                _end(lease, barren)
                with self._news:
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
                due = [lease for lease, when in self._held.items() if when <= now]
            self.flush()
            for lease in due:
                self._renew(lease)

    def _renew(self, lease: Lease) -> None:
        if lease not in self._held:  # it has just been given back
            return
        try:
            still = lease.store.claim(lease.key, lease.owner, SECONDS)
        except Exception:  # noqa: BLE001 - the store may be back at the next try
            still = True
        with self._news:
            if lease in self._held:
                if still:
                    self._held[lease] = monotonic() + _RENEW_AFTER
                else:  # it had run out, because this process stood still
                    del self._held[lease]


def _same(lease: Lease, wanted: Lease) -> bool:
    return lease.key == wanted.key and lease.store is wanted.store


def _end(lease: Lease, barren: bool) -> None:
    try:
        if barren:
            lease.store.claim(flag(lease.key), lease.owner, _FLAG_SECONDS)
        lease.store.release(lease.key, lease.owner)
    except Exception:  # noqa: BLE001 - it runs out by itself
        return


class _Process:
    """What belongs to this process, and is made anew in a forked child."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.token = secrets.token_hex(12)
        self.serial = itertools.count()
        self.keeper = _Keeper()


_process = _Process()


def hold(lease: Lease) -> None:
    """Keep a lease until `give_back`."""
    _process.keeper.hold(lease)


def held_here(lease: Lease) -> bool:
    """Whether the thread of a lease holds another one of the same key, so that waiting would be for itself.

    That is so if an event loop runs there: one of its tasks has it.
    """
    return _process.keeper.holds(lease)


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
