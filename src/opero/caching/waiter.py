# this_file: src/opero/caching/waiter.py
"""Those who wait for another caller's computation, in a thread or a task, and what they are told."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opero.utils import ambient
from opero.utils.waiters import ThreadWaiter as BlockedThread

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

    from opero.caching.flight import Flight
    from opero.caching.memory import Entry

__all__ = [
    "Crashed", "Landed", "Order", "TaskWaiter", "ThreadWaiter", "Waiter", "tell", "verdict_of",
]  # fmt: skip


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
        stale: Whether the computation failed, and the entry is the expired one.
    """

    entry: Entry
    rejected: bool = False
    stale: bool = False


class Crashed(NamedTuple):
    """The flight's outcome is a failure.

    Attributes:
        error: A copy that nobody raises: each waiter makes its own from it.
    """

    error: Exception


Verdict = Order | Landed | Crashed


class Waiter(Protocol):
    """Somebody who waits for a flight.

    Attributes:
        deadline: Clock reading at which it stops waiting, None for never.
        flight: What it waits for, once it stands in the queue.
        verdict: What it was told; None while it waits.
    """

    deadline: float | None
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

    __slots__ = ("_gate", "deadline", "flight", "verdict")

    flight: Flight

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.verdict: Verdict | None = None
        self._gate = BlockedThread()

    @property
    def ready(self) -> bool:
        """A thread can always take over."""
        return True

    def wait(self) -> bool:
        """Block until `wake`; False if the deadline came first."""
        return self._gate.wait(_left(self))

    def wake(self) -> bool:
        """Let the thread go on."""
        return self._gate.wake()


class TaskWaiter:
    """A waiting task, in any event loop of any thread."""

    __slots__ = ("_future", "_loop", "deadline", "flight", "verdict")

    flight: Flight

    def __init__(self, deadline: float | None = None) -> None:
        from asyncio import get_running_loop

        self.deadline = deadline
        self.verdict: Verdict | None = None
        self._loop: AbstractEventLoop = get_running_loop()
        self._future: Future[bool] = self._loop.create_future()

    @property
    def ready(self) -> bool:
        """Whether its loop runs and it was not cancelled."""
        return self._loop.is_running() and not self._future.cancelled()

    async def wait(self) -> bool:
        """Suspend the task until `wake`; False if the deadline came first."""
        left = _left(self)
        if left is None:
            return await self._future
        timer = self._loop.call_later(max(0.0, left), self._settle, False)
        try:
            return await self._future
        finally:
            timer.cancel()

    def wake(self) -> bool:
        """Let the task go on, from whatever thread; False if its loop is closed."""
        from asyncio import _get_running_loop

        try:
            if _get_running_loop() is self._loop:
                self._settle(True)
            else:
                self._loop.call_soon_threadsafe(self._settle, True)
        except RuntimeError:
            return False
        return True

    def _settle(self, in_time: bool) -> None:
        if not self._future.done():
            self._future.set_result(in_time)


def _left(waiter: Waiter) -> float | None:
    """Return the seconds that a waiter has."""
    if waiter.deadline is None:
        return None
    return waiter.deadline - ambient.clock().monotonic()


def tell(waiters: Iterable[Waiter], verdict: Verdict) -> None:
    """Hand an outcome to waiters and let them go on."""
    for waiter in waiters:
        waiter.verdict = verdict
        waiter.wake()


def verdict_of(waiter: Waiter) -> Any:
    """Take what a waiter was told, so that no frame keeps an error that passes through it."""
    verdict, waiter.verdict = waiter.verdict, None
    return verdict
