# this_file: src/opero/caching/flight.py
"""Single-flight: the same key at the same time is computed once, by threads, tasks and event loops
together.

The first caller of a key leads a flight, later ones wait for its outcome. A leader that is
cancelled or killed hands over to a waiter. A caller that leads a flight already never waits for
another one but computes, so that neither recursion nor two leaders that want each other's keys can
hang.

A lone leader pays for one small object and a lock; what waiting needs is made when a second caller
comes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextvars import ContextVar, Token
from threading import RLock, get_ident

from opero.caching.waiter import Order, Waiter, tell

__all__ = ["Flight", "Flights", "board", "lead_nothing", "leads_others", "unboard"]


class Flight:
    """One computation that others may wait for.

    Attributes:
        key: What is computed.
        thread: Identifier of the thread in which its leader runs, None while nobody has boarded.
        done: Whether it has ended, however it ended.
        void: Whether its key was invalidated meanwhile, so that its result must not be stored.
        barren: Whether it has ended with nothing that other processes could find in the store.
        waiters: Who waits, in order of arrival; None while nobody does.
    """

    # Defaults are class attributes, so that a lone leader sets next to nothing.
    thread: int | None = None
    done = False
    void = False
    barren = False
    waiters: dict[Waiter, None] | None = None

    def __init__(self, key: Hashable) -> None:
        self.key = key

    def __repr__(self) -> str:
        state = "done" if self.done else "under way"
        return f"<Flight {state}, {len(self.waiters or ())} waiters>"


_led: ContextVar[tuple[Flight, ...]] = ContextVar("opero_flights_led", default=())
"""The flights that this thread or task leads. Copied into child tasks, where it may name flights
that are done."""


def board(flight: Flight) -> Token[tuple[Flight, ...]]:
    """Become the leader of a flight in this context."""
    led = _led.get()
    flight.thread = get_ident()
    return _led.set((*(f for f in led if not f.done), flight) if led else (flight,))


def unboard(token: Token[tuple[Flight, ...]]) -> None:
    """Undo `board`."""
    try:
        _led.reset(token)
    except ValueError:
        # A coroutine that is closed by the garbage collector ends in a stranger's context.
        return


def lead_nothing() -> None:
    """Forget the flights of the context that this one was copied from: a stranger leads them."""
    _led.set(())


def leads_others(flight: Flight) -> bool:
    """Whether this context leads another flight than this one."""
    return any(other is not flight and not other.done for other in _led.get())


def _leads() -> bool:
    return any(not flight.done for flight in _led.get())


# --- flights --------------------------------------------------------------------------------------


class Flights:
    """The flights of one store, by key.

    Attributes:
        claim: `claim(key, flight)` puts a flight in its key's place, and returns the one that is
            there then: another one if that came first.

    Example:
        >>> flights = Flights()
        >>> flight = flights.join("key")
        >>> flights.join("key") is flight  # the same thread would wait for itself
        False
        >>> flights.land(flight), flight.done
        ((), True)
    """

    def __init__(self) -> None:
        self._open: dict[Hashable, Flight] = {}
        self.claim: Callable[[Hashable, Flight], Flight] = self._open.setdefault
        # Reentrant, because the garbage collector may end an abandoned coroutine, and its flight,
        # at any allocation.
        self._lock = RLock()

    def join(self, key: Hashable, *, blocking: bool = True) -> Flight | None:
        """Return a flight to lead, or None if the caller has to wait.

        A caller that must not wait, though somebody else is computing, gets a flight that nobody
        can join.

        Args:
            key: What is wanted.
            blocking: Whether waiting would block the thread, so that a leader in the same thread
                could never finish.
        """
        mine = Flight(key)
        found = self._open.setdefault(key, mine)
        if found is mine:
            return mine
        private = _leads() or (blocking and found.thread == get_ident())
        return mine if private else None

    def replace(self, key: Hashable) -> Flight:
        """Return a flight to lead whose result counts for more than that of the one under way."""
        mine = Flight(key)
        with self._lock:
            self.void(key)
            self._open[key] = mine
        return mine

    def wait_for(self, key: Hashable, waiter: Waiter) -> bool:
        """Put a waiter in the queue; False if the flight has ended by now."""
        with self._lock:
            flight = self._open.get(key)
            if flight is None:
                return False
            if flight.waiters is None:
                flight.waiters = {}
            flight.waiters[waiter] = None
            waiter.flight = flight
        return True

    def leave(self, waiter: Waiter) -> bool:
        """Take a waiter out whose wait was cut short; what it was handed goes to the next one.

        Returns:
            False if it has been told the outcome meanwhile.
        """
        flight = waiter.flight
        with self._lock:
            if flight.waiters:
                flight.waiters.pop(waiter, None)
        if waiter.verdict is Order.LEAD:
            self.abandon(flight)
            return True
        return waiter.verdict is None

    def land(self, flight: Flight) -> Iterable[Waiter]:
        """End a flight and return who must be told its outcome."""
        lock = self._lock
        lock.acquire()  # half the cost of `with`, and every miss comes along here
        try:
            flight.done = True
            if self._open.get(flight.key) is flight:
                del self._open[flight.key]
            waiters = flight.waiters
            if waiters is None:
                return ()
            flight.waiters = None
            return waiters
        finally:
            lock.release()

    def abandon(self, flight: Flight) -> None:
        """End the lead of a caller that was cancelled or killed: a waiter takes over, or nobody."""
        if not self._hand_over(flight, None):
            tell(self.land(flight), Order.AGAIN)

    def outlive(self, flight: Flight, deadline: float | None) -> bool:
        """End the lead of a caller whose deadline has come, if a waiter has more time than that.

        Args:
            flight: The flight.
            deadline: Clock reading at which its leader had to end.

        Returns:
            False if nobody takes over, so that the leader's failure is the outcome.
        """
        if flight.void:
            # Those who wait for an outdated result had better begin anew.
            self.abandon(flight)
            return True
        return self._hand_over(flight, deadline)

    def _hand_over(self, flight: Flight, deadline: float | None) -> bool:
        """Let a waiter lead, one with a later deadline if there is one; False if nobody can."""
        while True:
            with self._lock:
                heir = None if flight.void or flight.done else _heir(flight, deadline)
                if heir is None or flight.waiters is None:
                    return False
                flight.waiters.pop(heir)
                flight.thread = None
                heir.verdict = Order.LEAD
            if heir.wake():
                return True
            # Its loop is closed. When it is collected, it must not hand over once more.
            heir.verdict = None

    def void(self, key: Hashable) -> None:
        """Keep the result of a flight under way out of the store; new callers lead a new one."""
        with self._lock:
            flight = self._open.pop(key, None)
            if flight is not None:
                flight.void = True

    def void_all(self) -> None:
        """Do the same for all flights."""
        with self._lock:
            for key in list(self._open):
                self.void(key)

    def reset(self) -> None:
        """Forget everything: after a fork, the leaders are in another process."""
        self._open.clear()
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._open)


def _heir(flight: Flight, deadline: float | None) -> Waiter | None:
    """Return the first waiter that can take over, with a later deadline than that if there is one."""
    for waiter in flight.waiters or ():
        later = deadline is None or waiter.deadline is None or waiter.deadline > deadline
        # A task of a loop that stands still would hold up everybody else.
        if later and waiter.ready:
            return waiter
    return None
