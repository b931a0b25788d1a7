# this_file: src/opero/core/cache/flight.py
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
from enum import Enum
from threading import Lock, RLock, get_ident
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

    from opero.core.cache.memory import Entry

__all__ = [
    "Crashed", "Flight", "Flights", "Landed", "Order", "TaskWaiter", "ThreadWaiter", "Waiter",
    "board", "tell", "unboard", "verdict_of",
]  # fmt: skip

_PATIENCE: Final = 1.0
"""Seconds after which a waiting thread looks up, so that Ctrl-C reaches it on every platform."""


class Order(Enum):
    """What a waiter shall do where there is no outcome to share."""

    LEAD = "take over the flight"
    AGAIN = "look in the store again"
    ALONE = "compute without sharing"


class Landed(NamedTuple):
    """The flight's outcome is a result.

    Attributes:
        entry: The result in the form in which it is stored, whether it was stored or not.
        rejected: Whether `retry_if_result` refused it.
    """

    entry: Entry
    rejected: bool


class Crashed(NamedTuple):
    """The flight's outcome is a failure.

    Attributes:
        error: A copy that nobody raises: each waiter makes its own from it.
    """

    error: Exception


Verdict = Order | Landed | Crashed


class Flight:
    """One computation that others may wait for.

    Attributes:
        key: What is computed.
        thread: Identifier of the thread in which its leader runs, None while nobody has boarded.
        done: Whether it has ended, however it ended.
        void: Whether its key was invalidated meanwhile, so that its result must not be stored.
        waiters: Who waits, in order of arrival; None while nobody does.
    """

    # Defaults are class attributes, so that a lone leader sets next to nothing.
    thread: int | None = None
    done = False
    void = False
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


def _leads() -> bool:
    return any(not flight.done for flight in _led.get())


NOWHERE: Final = Flight(None)
"""Where a waiter is that has not joined a flight yet."""


# --- waiting --------------------------------------------------------------------------------------


class Waiter(Protocol):
    """Somebody who waits for a flight."""

    flight: Flight
    verdict: Verdict | None

    @property
    def ready(self) -> bool:
        """Whether it can be expected to take over."""
        ...

    def wake(self) -> bool:
        """Let it go on; False if that is impossible."""
        ...


class ThreadWaiter:
    """A waiting thread."""

    __slots__ = ("_gate", "flight", "verdict")

    def __init__(self) -> None:
        self.flight = NOWHERE
        self.verdict: Verdict | None = None
        self._gate = Lock()
        self._gate.acquire()

    @property
    def ready(self) -> bool:
        """A thread can always take over."""
        return True

    def wait(self) -> None:
        """Block until `wake`."""
        while not self._gate.acquire(timeout=_PATIENCE):
            pass

    def wake(self) -> bool:
        """Let the thread go on."""
        self._gate.release()
        return True


class TaskWaiter:
    """A waiting task, in any event loop of any thread."""

    __slots__ = ("_future", "_loop", "flight", "verdict")

    def __init__(self) -> None:
        from asyncio import get_running_loop

        self.flight = NOWHERE
        self.verdict: Verdict | None = None
        self._loop: AbstractEventLoop = get_running_loop()
        self._future: Future[None] = self._loop.create_future()

    @property
    def ready(self) -> bool:
        """Whether its loop runs and it was not cancelled."""
        return self._loop.is_running() and not self._future.cancelled()

    async def wait(self) -> None:
        """Suspend the task until `wake`."""
        await self._future

    def wake(self) -> bool:
        """Let the task go on, from whatever thread; False if its loop is closed."""
        from asyncio import _get_running_loop

        try:
            if _get_running_loop() is self._loop:
                self._settle()
            else:
                self._loop.call_soon_threadsafe(self._settle)
        except RuntimeError:
            return False
        return True

    def _settle(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


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

    def leave(self, waiter: Waiter) -> None:
        """Take a waiter out whose wait was cut short; what it was handed goes to the next one."""
        flight = waiter.flight
        with self._lock:
            if flight.waiters:
                flight.waiters.pop(waiter, None)
        if waiter.verdict is Order.LEAD:
            self.abandon(flight)

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
        while True:
            with self._lock:
                heir = None if flight.void or flight.done else _heir(flight)
                if heir is None or flight.waiters is None:
                    break
                flight.waiters.pop(heir)
                flight.thread = None
                heir.verdict = Order.LEAD
            if heir.wake():
                return
            # Its loop is closed. When it is collected, it must not hand over once more.
            heir.verdict = None
        tell(self.land(flight), Order.AGAIN)

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


def _heir(flight: Flight) -> Waiter | None:
    # A task of a loop that stands still would hold up everybody else.
    return next((waiter for waiter in flight.waiters or () if waiter.ready), None)


def tell(waiters: Iterable[Waiter], verdict: Verdict) -> None:
    """Hand an outcome to waiters and let them go on."""
    for waiter in waiters:
        waiter.verdict = verdict
        waiter.wake()


def verdict_of(waiter: Waiter) -> Any:
    """Take what a waiter was told, so that no frame keeps an error that passes through it."""
    verdict, waiter.verdict = waiter.verdict, None
    return verdict
