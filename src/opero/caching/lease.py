# this_file: src/opero/caching/lease.py
"""Compute the same key only once at a time across processes: of those that miss it, one computes.

    acquire → won  → compute → store → release
            → lost → look → pause → acquire again

The leader of a flight acquires a lease in the store that its process shares with others. A process that
does not get it looks for the result, with growing pauses. The lease of a killed leader runs out after
seconds. A leader that ends without a result leaves a flag: processes that have waited for it compute
then, all at once, instead of waiting for each other.

A call that leads another flight already never waits but computes, so that neither recursion nor
leaders that want each other's keys can hang; nor does a plain call in the thread of an event loop
that holds the lease. A store that fails lends no leases.

A lease is short, so that a killed holder keeps others waiting for seconds only. One thread per process
renews the leases of calls that take longer, and releases those that have ended: a caller does not wait
for that.
"""

from __future__ import annotations

import atexit
import itertools
import math
import operator
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from threading import get_ident
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

from opero.caching.single_flight import leads_others
from opero.errors import StoreError
from opero.utils import ambient
from opero.utils.fork import run_after_fork
from opero.utils.lazy import NamedTuple
from opero.utils.steps import BlockingStep

if TYPE_CHECKING:
    from opero.caching.entries import Entries
    from opero.caching.memory import Entry, EntryStore
    from opero.caching.single_flight import Flight
    from opero.caching.stores.base import ByteStore
    from opero.utils.steps import StepLogic


SECONDS: Final = 5.0
"""For how long a lease is acquired, and how long a killed holder can keep others waiting."""

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.5
_GROWTH: Final = 1.5
_PATIENCE: Final = 600.0
"""Seconds after which a caller computes although another one still does. Only threads that wait for
each other across processes come that far."""

_A_MOMENT: Final = 0.001
_RENEW_AFTER: Final = 1.5
_IDLE: Final = 10.0
_FLAG_SECONDS: Final = 2.0
_GATHER: Final = 0.02
"""Seconds for which an ended lease is kept, to be released together with others. A look in the store that
was begun less than that before a lease is acquired is still valid: had another process stored a result, it
would hold its lease."""
_AT_ONCE: Final = 500
"""Leases that are renewed or released in one go, so that other callers need not wait for the store for long."""


# --- taking turns ---------------------------------------------------------------------------------


class LeaseWait:
    """One call's wait for the result of another process.

    Args:
        deadline: Clock reading at which it must end, None for never.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._longest = _FIRST_PAUSE
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
        # Drawn, so that callers which began together do not ask together.
        import random

        pause = self._longest * random.uniform(0.5, 1)
        self._longest = min(self._longest * _GROWTH, _LONGEST_PAUSE)
        return pause if self._deadline is None else min(pause, self._deadline - now)


class Leases:
    """The leases of one function's keys.

    Args:
        store: The function's entries, in a store that lends leases.
        entries: Finds results, and reports a store that lends none.
    """

    def __init__(self, store: EntryStore, entries: Entries) -> None:
        self._store: Any = store  # one with a `backend`
        self._entries = entries

    def take_turn(
        self,
        flight: Flight,
        deadline: float | None,
        seen: Entry | None,
        seen_at: float,
        *,
        blocking: bool,
        patient: bool = True,
    ) -> StepLogic[tuple[Entry | None, Lease | None, bool]]:
        """Wait while another process computes a key.

        Args:
            flight: The flight that the caller leads.
            deadline: Clock reading at which it stops waiting, None for never.
            seen: What the caller has found in the store.
            seen_at: Machine time at which it began to look; `-math.inf` if that does not count.
            blocking: Whether waiting blocks the thread.
            patient: False to return as if it were late at once where another process computes the key.

        Returns:
            What is in the store now, perhaps expired; the lease that the caller has to release, None if it goes
            without; whether it had no time to wait for another process.
        """
        find, key, wait = self._entries.find_step, flight.key, None
        lease = None if leads_others(flight) else self.new(key)
        if lease is None:
            return (yield find(key)), None, False
        try:
            while True:
                (mine,) = yield from self.acquire(
                    (lease,), again=wait is not None, blocking=blocking, patient=False
                )
                if mine is False and not patient:
                    return None, None, True
                if not (mine and self.is_recent(seen_at)):
                    seen = yield find(key)
                seen_at = -math.inf
                if mine is not False or (seen is not None and self._entries.is_fresh(key, seen)):
                    return seen, lease if mine else None, False
                wait = wait or LeaseWait(deadline)
                pause = wait.next()
                if pause is None:
                    return seen, None, wait.late
                yield BlockingStep(ambient.clock().sleep, ambient.clock().asleep, (pause,))
        except BaseException:
            # Perhaps it was lent, though nothing came of it.
            _renewer.release(lease)
            raise

    def is_recent(self, looked_at: float) -> bool:
        """Return whether a look in the store, begun then, still counts now that a lease was acquired."""
        return monotonic() - looked_at < _GATHER / 2

    def acquire_at_once(self, flight: Flight, seen_at: float) -> bool | None:
        """Acquire the lease of a flight if it is free; if not, `take_turn` has to decide what is to be done.

        Args:
            flight: The flight that the caller leads, in a thread that may wait for the store.
            seen_at: As for `take_turn`.

        Returns:
            Whether what was seen counts; None if another caller has the lease.
        """
        lease = None if leads_others(flight) else self.new(flight.key)
        if lease is None:
            return False
        try:
            if not lease.store.acquire([(lease.key, lease.owner)], SECONDS)[0]:
                return None
            _renewer.keep((lease,))
            flight.lease = lease
            return monotonic() - seen_at < _GATHER / 2
        except Exception as error:  # noqa: BLE001 - without leases the call goes on, too
            self._failed(error)
        except BaseException:
            flight.lease = None
            _renewer.release(lease)
            raise
        return False

    def new(self, key: Any) -> Lease | None:
        """Return the lease of a key, which is not held yet; None if the store lends none.

        It is made in the thread that is going to wait, because no thread may wait for itself.
        """
        try:
            owner = f"{_renewer.token}-{next(_renewer.serial)}"
            return Lease(self._store.backend, key, owner, _renewer.pid, get_ident())
        except Exception as error:  # noqa: BLE001 - without leases the call goes on, too
            self._failed(error)
            return None

    def acquire(
        self, leases: Sequence[Lease], *, again: bool, blocking: bool, patient: bool = True
    ) -> StepLogic[list[bool | None]]:
        """Acquire leases of one store, and keep those that are ours then.

        Args:
            leases: As `new` has made them.
            again: Whether other processes had them, and this caller has waited.
            blocking: Whether waiting would block the thread that wants them.
            patient: Whether to wait until this process has released another lease of the same key.

        Returns:
            For each, whether it is ours now or another caller's; None to go without.
        """
        try:
            granted: dict[Lease, bool | None] = dict(
                zip(leases, (yield self._asking(leases, SECONDS)), strict=True)
            )
            ours = [lease for lease in leases if granted[lease]]
            _renewer.keep(ours)
            if again and ours:
                # A caller that has waited in vain does not make others wait for it in turn. A flag that is not
                # there is raised for a moment only, to see that.
                unflagged = yield self._asking(ours, _A_MOMENT, flags=True)
                for lease in itertools.compress(ours, map(operator.not_, unflagged)):
                    _renewer.release(lease)
                    granted[lease] = None
        except BaseException as error:
            for lease in leases:
                _renewer.release(lease)
            if not isinstance(error, Exception):
                raise
            self._failed(error)  # without leases the call goes on, too
            return [None] * len(leases)
        lost = [lease for lease in leases if granted[lease] is False]
        granted |= dict.fromkeys(_renewer.own(lost, blocking=blocking, patient=patient))
        return [granted[lease] for lease in leases]

    def _asking(
        self, leases: Sequence[Lease], seconds: float, *, flags: bool = False
    ) -> BlockingStep:
        """Return the step that acquires leases, or their flags."""
        owners = [(_flag(lease.key) if flags else lease.key, lease.owner) for lease in leases]
        return BlockingStep(self._store.acquire, self._store.aacquire, (owners, seconds))

    def _failed(self, error: Exception) -> None:
        why = str(error) if isinstance(error, StoreError) else type(error).__name__
        self._entries.skipped(
            f"other processes may compute the same: the store lends no lease ({why})", once=True
        )


# --- leases of this process -----------------------------------------------------------------------


class Lease(NamedTuple):
    """The right to compute one key.

    Attributes:
        store: Where it is noted.
        key: What it is for.
        owner: Text that is unique for this lease, whatever process or machine.
        process: Identifier of the process that acquired it.
        thread: Identifier of the thread that did.
    """

    store: ByteStore
    key: str
    owner: str
    process: int
    thread: int

    def release(self, flight: Flight) -> None:
        """End it soon, without waiting for the store, and take it from the flight that was computed with it."""
        without_result = flight.without_result or flight.invalidated
        _renewer.release(self, without_result=without_result)
        flight.lease = None


def _flag(key: str) -> str:
    """Return what is acquired for a moment to show that a holder ended without a result."""
    return f"{key}!"


class _LeaseRenewer:
    """Keeps and releases the leases of this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all leases: a forked child has none."""
        self.pid = os.getpid()
        self.token = os.urandom(12).hex()  # `secrets` would import a dozen modules
        self.serial = itertools.count()
        self._held: dict[Lease, None] = {}
        self._ending: dict[Lease, bool] = {}  # and whether without result
        # Reentrant, because the garbage collector may end an abandoned coroutine at any allocation.
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._flushing = threading.Lock()

    def keep(self, leases: Iterable[Lease]) -> None:
        """Keep leases until `release`."""
        with self._changed:
            self._held.update(dict.fromkeys(leases))
            if self._thread is None:
                self._start()

    def release(self, lease: Lease, *, without_result: bool = False) -> None:
        """End a lease soon.

        Args:
            lease: The lease; one of the parent process is not touched.
            without_result: Whether there is no result for the processes that wait.
        """
        if lease.process == self.pid:
            with self._changed:
                self._held.pop(lease, None)
                self._ending[lease] = without_result
                if self._thread is None:
                    self._start()
                self._changed.notify()

    def own(self, lost: Collection[Lease], *, blocking: bool, patient: bool) -> list[Lease]:
        """Return those for which no caller can wait, because this process has another lease of their key.

        That is so where it is just releasing that one, and where a blocked thread would wait for a task of its
        own event loop.
        """
        threads = {lease.thread for lease in lost} if blocking else set[int]()
        with self._changed:
            ours = [lease for lease in self._held if lease.thread in threads]
            ours += () if patient else self._ending
            known = {(lease.key, id(lease.store)) for lease in ours}
        return [lease for lease in lost if (lease.key, id(lease.store)) in known]

    def flush(self, most: int | None = None) -> None:
        """Release the leases that ended first, all by default; afterwards no thread is at it any more."""
        with self._flushing:
            with self._changed:
                ending = dict(itertools.islice(self._ending.items(), most))
            for leases in _portions(ending):
                _end(leases, [lease for lease in leases if ending[lease]])
                with self._changed:
                    for lease in leases:
                        self._ending.pop(lease, None)

    def _start(self) -> None:
        # A daemon, so that a call that never ends does not keep the program alive.
        thread = threading.Thread(target=self._run, name="opero-leases", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: leases run out by themselves
            return
        self._thread = thread

    def _run(self) -> None:
        renewed = idle_since = monotonic()
        while True:
            with self._changed:
                if not self._ending:
                    # Machine time, whatever clock a test has installed: stores count in it.
                    self._changed.wait(_RENEW_AFTER / 2)
                # Their number: while this thread sleeps, no name may keep a store open.
                ending, now = len(self._ending), monotonic()
                if self._held or ending:
                    idle_since = now
                elif now - idle_since > _IDLE:
                    self._thread = None
                    return
            if ending:
                sleep(_GATHER)
                self.flush(ending)
            if now - renewed >= _RENEW_AFTER:
                self._renew()
                renewed = now

    def _renew(self) -> None:
        with self._changed:
            held = list(self._held)
        for leases in _portions(held):
            wanted = [(lease.key, lease.owner) for lease in leases]
            with suppress(Exception):  # the store may be back at the next try
                still = leases[0].store.acquire(wanted, SECONDS)
                with self._changed:
                    for lease, ours in zip(leases, still, strict=True):
                        if not ours:  # it had run out, because this process stood still
                            self._held.pop(lease, None)


def _portions(leases: Iterable[Lease]) -> Iterator[list[Lease]]:
    """Yield the leases of each store, not too many at once."""
    stores: dict[int, list[Lease]] = {}
    for lease in leases:
        stores.setdefault(id(lease.store), []).append(lease)
    for those in stores.values():
        yield from (those[start : start + _AT_ONCE] for start in range(0, len(those), _AT_ONCE))


def _end(leases: list[Lease], without_result: list[Lease]) -> None:
    store = leases[0].store
    with suppress(Exception):  # they run out by themselves
        if without_result:
            flags = [(_flag(lease.key), lease.owner) for lease in without_result]
            store.acquire(flags, _FLAG_SECONDS)
        store.release([(lease.key, lease.owner) for lease in leases])


_renewer: Final = _LeaseRenewer()
run_after_fork(_renewer.reset)
atexit.register(_renewer.flush)  # before the stores are closed: they would be opened again
