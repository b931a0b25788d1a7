# this_file: src/opero/caching/single_flight.py
"""Compute the same key only once at a time, for threads, tasks and event loops together.

The first caller of a key leads a flight, later ones wait for its outcome. A leader that is cancelled
or killed hands over to a waiter. A caller that leads a flight already never waits for another one but
computes, so that neither recursion nor two leaders that want each other's keys can hang.

A lone leader pays for one small object and a lock; what waiting needs is made when a second caller
comes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any

from opero.utils import ambient
from opero.utils.ambient import warn_on_loop
from opero.utils.fork import reset_after_fork
from opero.utils.lazy import NamedTuple
from opero.utils.steps import BlockingStep

if TYPE_CHECKING:
    from opero.caching.memory import Entry
    from opero.utils.steps import StepLogic
    from opero.utils.waiters import Waiter


# --- outcomes -------------------------------------------------------------------------------------


class Instruction(Enum):
    """What a waiter has to do where there is no outcome to share."""

    LEAD = "take over the flight"
    LOOK_AGAIN = "look in the store again"
    COMPUTE = "compute without sharing"
    LATE = "give up: its deadline has come"


class SharedResult(NamedTuple):
    """The flight's outcome is a result.

    Attributes:
        entry: The result in the form in which it is stored, whether it was stored or not.
        rejected: Whether `retry_if_result` refused it.
        stale: Whether the computation failed, and the entry is the expired one.
    """

    entry: Entry
    rejected: bool = False
    stale: bool = False


class SharedFailure(NamedTuple):
    """The flight's outcome is a failure.

    Attributes:
        error: A copy that is never raised: each waiter makes its own from it.
    """

    error: Exception


Verdict = Instruction | SharedResult | SharedFailure


def notify(waiters: Iterable[Waiter], outcome: Verdict) -> None:
    """Wake those waiters that have no outcome with this one."""
    for waiter in list(waiters):
        if waiter.value is None:
            waiter.wake(outcome)


def take_verdict(waiter: Waiter) -> Any:
    """Return what a waiter was woken with, and forget it: no frame may keep an error that passes through it."""
    verdict, waiter.value = waiter.value, None
    return verdict


# --- flights and their leaders --------------------------------------------------------------------


class Flight:
    """One computation that other callers may wait for.

    Attributes:
        key: What is computed.
        thread: Identifier of the thread in which its leader runs, None while it has no leader.
        done: Whether it has ended, however it ended.
        invalidated: Whether its key was invalidated meanwhile, so that its result must not be stored.
        without_result: Whether it has ended with nothing that other processes could find in the store.
        waiters: The callers that wait, in order of arrival; None while there are none. Their request is the clock
            reading at which they stop waiting, None for never; they are woken with a verdict.
        expired: An expired entry that may stand in if its leader fails; None if there is none.
        lease: The lease that its leader has acquired; None without one. It is released before the lead ends, so that
            whoever leads next finds it free.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.thread: int | None = None
        self.done = False
        self.invalidated = False
        self.without_result = False
        self.waiters: dict[Waiter, None] | None = None
        self.expired: Entry | None = None
        self.lease: Any = None


_led: ContextVar[tuple[Any, ...]] = ContextVar("opero_flights_led", default=())
"""The flights that this thread or task leads: the innermost one, and what was here before. One that is done counts no
more, here and in child tasks, into which this is copied."""


def become_leader(flight: Flight) -> None:
    """Make this context the leader of a flight, until that is done or `stop_leading` is called."""
    led = _led.get()
    while led and led[0].done:
        led = led[1]
    flight.thread = get_ident()
    _led.set((flight, led))


def stop_leading(flight: Flight) -> None:
    """Undo `become_leader`, in the context that it was called in; a coroutine may be closed in another one."""
    led = _led.get()
    while led and (led[0] is flight or led[0].done):
        led = led[1]
    _led.set(led)


def forget_leadership() -> None:
    """Forget the flights of the context that this one was copied from: its caller leads them."""
    _led.set(())


def leads_others(flight: Flight | None = None) -> bool:
    """Whether this context leads another flight than this one."""
    return any(other is not flight and not other.done for other in flights_led())


def flights_led() -> Iterator[Flight]:
    """Iterate over the flights of which this context became the leader and has not stopped, and some that are done."""
    led = _led.get()
    while led:
        yield led[0]
        led = led[1]


class SingleFlight:
    """The flights of one function, by key.

    Attributes:
        start: `start(key, flight)` puts a flight in its key's place, and returns the one that is
            there then: another one if that came first.
        completed: Another object after each flight that has ended. A look in the store that found nothing is still
            valid if none has ended since.

    Example:
        >>> flights = SingleFlight()
        >>> flight = flights.join("key")
        >>> flights.join("key") is flight  # the same thread would wait for itself
        False
        >>> flights.complete(flight), flight.done
        ((), True)
    """

    def __init__(self) -> None:
        self._open: dict[Hashable, Flight] = {}
        self.start: Callable[[Hashable, Flight], Flight] = self._open.setdefault
        self.completed: object = None
        # Reentrant, because the garbage collector may end an abandoned coroutine, and its flight,
        # at any allocation.
        self._lock = RLock()
        self._joining = 0  # callers that are about to wait
        reset_after_fork(self)

    def join(self, key: Hashable, *, blocking: bool = True) -> Flight | None:
        """Return a flight to lead, or None if the caller has to wait.

        A caller that must not wait, though another one is computing, gets a flight that cannot be
        joined.

        Args:
            key: What is wanted.
            blocking: Whether waiting would block the thread, so that a leader in the same thread
                could never finish.
        """
        mine = Flight(key)
        found = self._open.setdefault(key, mine)
        if found is mine:
            return mine
        private = leads_others() or (blocking and found.thread == get_ident())
        return mine if private else None

    def follow(
        self, key: Hashable, deadline: float | None, *, blocking: bool
    ) -> StepLogic[Flight | Verdict]:
        """Wait while another caller computes a key.

        Returns:
            Its outcome, or a flight to lead where there is none to wait for (any more).
        """
        while (mine := self.join(key, blocking=blocking)) is None:
            # Loaded here: most programs never have two callers that want the same at once.
            from opero.utils.waiters import TaskWaiter, ThreadWaiter

            if blocking:
                warn_on_loop("another caller's result")
            waiter: Any = ThreadWaiter(deadline) if blocking else TaskWaiter(deadline)
            flight = self.wait_for(key, waiter)
            if flight is None:
                continue
            try:
                left = None if deadline is None else deadline - ambient.clock().monotonic()
                in_time = yield BlockingStep(waiter.wait, waiter.wait, (left,))
            except BaseException:
                self.leave(flight, waiter)
                raise
            if not in_time and self.leave(flight, waiter):
                return Instruction.LATE
            if waiter.value is Instruction.LEAD:
                return flight
            if waiter.value not in (None, Instruction.LOOK_AGAIN):
                return take_verdict(waiter)  # type: ignore[no-any-return]  # a verdict
        return mine

    def replace(self, key: Hashable) -> Flight:
        """Return a flight to lead whose result counts for more than that of the one under way."""
        mine = Flight(key)
        with self._lock:
            self.invalidate(key)
            self._open[key] = mine
        return mine

    def wait_for(self, key: Hashable, waiter: Waiter) -> Flight | None:
        """Put a waiter in the queue of a flight and return that; None if it has ended by now."""
        with self._lock:
            self._joining += 1
            flight = self._open.get(key)
            if flight is not None:
                if flight.waiters is None:
                    flight.waiters = {}
                flight.waiters[waiter] = None
            self._joining -= 1
            return flight

    def leave(self, flight: Flight, waiter: Waiter) -> bool:
        """Take out a waiter whose wait was cut short; what it was handed goes to the next one.

        Returns:
            False if it has been handed the outcome meanwhile.
        """
        with self._lock:
            if flight.waiters:
                flight.waiters.pop(waiter, None)
        if waiter.value is Instruction.LEAD:
            self.abandon(flight)
            return True
        return waiter.value is None

    def complete(self, flight: Flight) -> Iterable[Waiter]:
        """End a flight and return the waiters that must be notified of its outcome."""
        if not flight.done:
            if flight.lease is not None:
                flight.lease.release(flight)
            # First, for who finds the key's place free compares it.
            self.completed = object()
            found = self._open.pop(flight.key, flight)
            if found is not flight:
                # It was invalidated, or could not be joined, and another one has its key's place.
                self._open.setdefault(flight.key, found)
            flight.done = True
        # No lock else, because every miss comes along here: hardly ever is a caller just about to wait.
        if self._joining:
            with self._lock:
                pass
        # They stay there: should Ctrl-C come before they are notified, `abandon` does it.
        return flight.waiters or ()

    def abandon(self, flight: Flight) -> None:
        """End the lead of a caller that was cancelled or killed: a waiter takes over, if there is one.

        The flight may have ended; waiters that were not notified are.
        """
        if not self._hand_over(flight, None):
            notify(self.complete(flight), Instruction.LOOK_AGAIN)

    def abandon_late(self, flight: Flight, deadline: float | None) -> bool:
        """End the lead of a caller whose deadline has come, if a waiter has more time than that.

        Args:
            flight: The flight.
            deadline: Clock reading at which its leader had to end.

        Returns:
            False if no waiter takes over, so that the leader's failure is the outcome.
        """
        if flight.invalidated:
            # Waiters for an outdated result had better begin anew.
            self.abandon(flight)
            return True
        return self._hand_over(flight, deadline)

    def _hand_over(self, flight: Flight, deadline: float | None) -> bool:
        """Let a waiter lead, one with a later deadline if there is one; False if none can."""
        if flight.lease is not None and not flight.done:
            flight.lease.release(flight)
        with self._lock:
            while not (flight.invalidated or flight.done):
                successor = _successor(flight, deadline)
                if successor is None or flight.waiters is None:
                    break
                flight.waiters.pop(successor)
                flight.thread = None
                # Within the lock, so that it does not leave at the same moment. False if its loop has stopped just now;
                # should that go on, the task looks again.
                if successor.wake(Instruction.LEAD):
                    return True
        return False

    def invalidate(self, key: Hashable) -> None:
        """Keep the result of a flight under way out of the store; new callers lead a new one."""
        with self._lock:
            flight = self._open.pop(key, None)
            if flight is not None:
                flight.invalidated = True

    def invalidate_all(self) -> None:
        """Do the same for all flights."""
        with self._lock:
            for key in list(self._open):
                self.invalidate(key)

    def after_fork(self) -> None:
        """Forget everything: the leaders are in another process."""
        self._open.clear()
        self._lock = RLock()
        self._joining = 0

    def __len__(self) -> int:
        return len(self._open)


def _successor(flight: Flight, deadline: float | None) -> Waiter | None:
    """Return the first waiter that can take over, with a later deadline than that."""
    for waiter in flight.waiters or ():
        later = deadline is None or waiter.request is None or waiter.request > deadline
        # A task of a loop that does not run would hold up all others.
        if later and waiter.ready:
            return waiter
    return None
