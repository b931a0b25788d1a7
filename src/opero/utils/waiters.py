# this_file: src/opero/utils/waiters.py
"""Let threads and tasks of any event loop wait in line, first come, first served.

    ThreadWaiter, TaskWaiter  one waiting caller; woken at most once, from any thread
    WaitingLine               callers in order of arrival; the first one has its turn until it leaves
    HandoffQueue              the callers that wait for something that is taken and given back, in order of arrival

What is handed over is never lost: a caller that is cancelled, interrupted or out of time at the very moment passes
on what it was given. A task whose event loop does not run is skipped, and queues again when its loop goes on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from opero.utils.ambient import require_loop, running_loop
from opero.utils.steps import BlockingStep, StepLogic, run_async, run_sync
from opero.utils.threads import locked, wait_for_release

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future


LookUp = Callable[[], float | None]
"""Called before each pause of a waiting caller. Returns how many seconds to pause at most (None: until woken; 0 or
less: the time is up), or raises to end the wait."""

SHORTEST_PAUSE: Final = 0.0005
"""Seconds that a waiting caller pauses at least before it looks at the clock again."""


# --- one waiting caller ---------------------------------------------------------------------------


class Waiter:
    """One waiting caller, as the one that wakes it sees it.

    Args:
        request: What the caller asks for, or is ready to accept, as its queue understands it.

    Attributes:
        request: As above.
        granted: Whether `value` is the caller's, though it may not run yet.
        value: What it was woken with.
    """

    __slots__ = ("granted", "request", "value")

    def __init__(self, request: Any = None) -> None:
        self.request: Any = request
        self.granted: bool = False
        self.value: Any = None

    @property
    def ready(self) -> bool:
        """Whether the caller would go on at once if it were woken."""
        raise NotImplementedError

    def wake(self, value: Any = True) -> bool:
        """Let the caller go on with a value; False if it cannot take it now."""
        raise NotImplementedError

    def wait(self, seconds: float | None = None) -> Any:
        """Wait until `wake`; False if the time was up first. It may be called again then."""
        raise NotImplementedError


class ThreadWaiter(Waiter):
    """A waiting thread."""

    __slots__ = ("_lock",)

    value: Any
    granted: bool

    def __init__(self, request: Any = None) -> None:
        super().__init__(request)
        self._lock = locked()

    @property
    def ready(self) -> bool:
        """A thread always is."""
        return True

    def wake(self, value: Any = True) -> bool:
        """Let the thread go on, once."""
        self.value, self.granted = value, True
        self._lock.release()
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Block the thread."""
        return wait_for_release(self._lock, seconds)


class TaskWaiter(Waiter):
    """A waiting task, in the event loop in which this object was made."""

    __slots__ = ("_future", "_loop", "_woken")

    granted: bool
    value: Any

    def __init__(self, request: Any = None) -> None:
        super().__init__(request)
        self._woken = False
        self._loop: AbstractEventLoop = require_loop("wait in line")
        self._future: Future[None] = self._loop.create_future()

    @property
    def ready(self) -> bool:
        """Whether its loop runs and it was not cancelled."""
        return self._loop.is_running() and not self._future.cancelled()

    def wake(self, value: Any = True) -> bool:
        """Let the task go on, from any thread, once.

        Returns:
            False if it was cancelled or its loop does not run. If the loop ever runs again, the task wakes up without
            having been granted anything, and has to queue again.
        """
        if self._future.cancelled():
            return False
        # Set before the task is woken, which may look at once.
        running = self.granted = self._loop.is_running()
        self.value = value if running else None
        try:
            if running_loop() is self._loop:
                self._wake_up()
            else:
                self._loop.call_soon_threadsafe(self._wake_up)
        except RuntimeError:
            # The loop is closed.
            self.granted, self.value = False, None
            return False
        return running

    def _wake_up(self) -> None:
        self._woken = True
        self._time_is_up()

    def _time_is_up(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, seconds: float | None = None) -> bool:
        """Suspend the task."""
        timer = None
        if seconds is not None:
            timer = self._loop.call_later(max(0.0, seconds), self._time_is_up)
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()
        # Granted between the timer and here: what `wake` scheduled finds the old future.
        woken = self._woken or self.granted
        if not self.granted:
            self._woken, self._future = False, self._loop.create_future()
        return woken


# --- queues ---------------------------------------------------------------------------------------


class WaitingLine:
    """Callers in order of arrival; the first one has its turn until it leaves.

    `threading.Lock` would let a thread that comes back at once overtake those that are just waking up.

    Attributes:
        waiting: The callers; truthy while there are any.
        lock: Held while the line changes. Reentrant, because the garbage collector may end an abandoned coroutine,
            and its wait, at any allocation.
    """

    def __init__(self) -> None:
        self.waiting: OrderedDict[Waiter, None] = OrderedDict()
        self.lock: threading.RLock = threading.RLock()

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def first(self) -> Waiter | None:
        """The first caller; None if there is none."""
        with self.lock:
            # In a loop, between whose steps no garbage is collected.
            for waiter in self.waiting:
                return waiter
        return None

    def join(self, waiter: Waiter) -> None:
        """Put a caller at the end."""
        with self.lock:
            self.waiting[waiter] = None

    def leave(self, waiter: Waiter) -> bool:
        """Take a caller out, in whatever state it is; if it had its turn, the next one is woken."""
        with self.lock:
            had_turn = self.first is waiter
            if self.waiting.pop(waiter, self) is self:
                return False
            if had_turn and (following := self.first) is not None:
                following.wake()
            return True

    def dismiss(self, value: Any, fits: Callable[[Waiter], bool]) -> None:
        """End the waits of those callers that `fits` chooses, with a value."""
        with self.lock:
            for waiter in list(self.waiting):
                if fits(waiter) and self.waiting.pop(waiter, self) is None:
                    waiter.wake(value)


class HandoffQueue(WaitingLine):
    """The callers that wait for something that is taken and given back, such as permits, in order of arrival.

    A subclass says what: it implements `take` and `put_back`. No caller has a turn: each is woken with what it gets.
    """

    def leave(self, waiter: Waiter) -> bool:
        """Take a caller out of the queue; False if it was granted something meanwhile."""
        with self.lock:
            self.waiting.pop(waiter, None)
            return not waiter.granted

    def take(self, request: Any) -> Any:
        """Take one for a caller if there is one, without a look at the queue; None if there is none."""
        raise NotImplementedError

    def put_back(self, taken: Any) -> None:
        """Put one back without a look at the queue."""
        raise NotImplementedError

    def serve(self) -> None:
        """Hand out what there is, in order, while there are callers."""
        with self.lock:
            while (waiter := self.first) and (taken := self.take(waiter.request)):
                # A coroutine that is collected at this moment may have taken it out.
                if self.waiting.pop(waiter, self) is self or not waiter.wake(taken):
                    self.put_back(taken)

    def give_back(self, taken: Any) -> None:
        """Give one back and serve the next caller."""
        # In this order: a caller that queues does it the other way round, so that one of the two sees the other.
        self.put_back(taken)
        if self.waiting:
            self.serve()

    def wait(self, look_up: LookUp | None = None, request: Any = None) -> Any:
        """Block until one could be taken.

        Args:
            look_up: See `LookUp`; None waits for as long as it takes.
            request: What `take` gets.

        Returns:
            What was taken, or False when the time was up first; what `dismiss` was given if that ended the wait.
        """
        return run_sync(self.turn(ThreadWaiter(request), look_up))

    async def wait_async(self, look_up: LookUp | None = None, request: Any = None) -> Any:
        """Do what `wait` does, in a task."""
        return await run_async(self.turn(TaskWaiter(request), look_up))

    def turn(self, waiter: Waiter, look_up: LookUp | None = None) -> StepLogic[Any]:
        """Do what `wait` does for a waiter that the caller has to know.

        A task whose event loop did not run when its turn came queues again, at the end.
        """
        join = self.join
        try:
            while not waiter.granted:
                join(waiter)
                # A place that it had is not refused to it.
                join = partial(HandoffQueue.join, self)
                self.serve()
                while True:
                    seconds = None if look_up is None else look_up()
                    # Never 0, which would look at a clock that does not move without a break.
                    pause = seconds and max(seconds, SHORTEST_PAUSE)
                    if (yield BlockingStep(waiter.wait, waiter.wait, (pause,))):
                        break
                    if seconds is not None and seconds <= 0:
                        return False if self.leave(waiter) else waiter.value
        except BaseException:
            self._withdraw(waiter)
            raise
        return waiter.value

    def _withdraw(self, waiter: Waiter) -> None:
        """Take a caller out whose wait was cut short, and pass on what it was given."""
        if not self.leave(waiter):
            self.give_back(waiter.value)
