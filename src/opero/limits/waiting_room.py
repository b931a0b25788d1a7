# this_file: src/opero/limits/waiting_room.py
"""Where threads and tasks wait for a slot, in order of arrival, and how long they are ready to."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple

from opero.errors import DeadlineError, RateLimitPausedError
from opero.limits.pace import SECOND
from opero.limits.thread_line import ThreadLine, Ticket
from opero.utils import ambient
from opero.utils.units import Duration, format_seconds, parse_seconds

if TYPE_CHECKING:
    import asyncio

    from opero.limits.loop_queue import LoopQueue
    from opero.limits.pace import Rule
    from opero.limits.slot import Slot

__all__ = ["PATIENT", "Patience", "WaitingRoom", "bear", "nap", "patience_of"]

_LONGEST_NAP: Final = SECOND
"""Who waits looks at least so often: another process may have given a slot back, or paused."""
_LOOP_GRAIN: Final = 1_200_000
"""How late an event loop's timer may be: selectors round up to whole milliseconds."""
_THREAD_GRAIN: Final = 80_000
"""How late a sleeping thread may wake."""


# --- decisions ------------------------------------------------------------------------------------


class Patience(NamedTuple):
    """How long a caller is ready to wait.

    Attributes:
        deadline: Clock reading at which its time is up, None for never.
        longest_pause: Longest rest of a pause, in seconds, that it waits out.
    """

    deadline: float | None = None
    longest_pause: float = math.inf


PATIENT: Final = Patience()
"""Who waits however long it takes."""


def patience_of(timeout: Duration | None) -> Patience:
    """Return the patience of somebody who waits so long at most; None for however long it takes."""
    if timeout is None:
        return PATIENT
    return Patience(ambient.clock().monotonic() + parse_seconds(timeout, "timeout"))


def nap(wait: int, late: int, grain: int) -> float:
    """Decide how long to sleep before looking at the slot clock again.

    Args:
        wait: Nanoseconds until the slot is free.
        late: Nanoseconds that the sleeper may come late without harm to the rate.
        grain: Nanoseconds that the timer may be late.

    Returns:
        Seconds; 0.0 if any sleep would be too long.

    Example:
        >>> nap(100_000_000, late=100_000_000, grain=1_200_000)
        0.1
        >>> nap(100_000, late=100_000, grain=1_200_000)
        0.0
    """
    return max(0, min(wait, _LONGEST_NAP) - max(0, grain - late)) / SECOND


def bear(patience: Patience, now: float, *, wait: int, paused: int) -> None:
    """Let a caller wait on, if it is ready to.

    Args:
        patience: How long it is ready to wait.
        now: Clock reading in seconds.
        wait: Nanoseconds that it will have to wait at least.
        paused: Nanoseconds that are left of a pause.

    Raises:
        RateLimitPausedError: The pause is longer than it would wait.
        DeadlineError: The wait would outlast its deadline.

    Example:
        >>> bear(Patience(deadline=12.0), 10.0, wait=1_500_000_000, paused=0)
        >>> bear(Patience(deadline=11.0), 10.0, wait=1_500_000_000, paused=0)
        Traceback (most recent call last):
        ...
        opero.errors.DeadlineError: the rate limit has no slot for 1.5 s, and the deadline is in 1 s
    """
    if paused > patience.longest_pause * SECOND:
        raise RateLimitPausedError(paused / SECOND)
    if patience.deadline is None:
        return
    left = patience.deadline - now
    # Readings of the clock are floats, and a wait that ends at the deadline is in time.
    if wait > left * SECOND + 1000:
        if left <= 0:
            raise DeadlineError("the deadline passed while the call waited for the rate limit")
        raise DeadlineError(
            f"the rate limit has no slot for {format_seconds(wait / SECOND)}, "
            f"and the deadline is in {format_seconds(left)}"
        )


# --- waiting --------------------------------------------------------------------------------------


class WaitingRoom:
    """The line of threads and the queues of tasks before one slot clock.

    Args:
        rule: The rule of the slot.

    Attributes:
        line: The threads.
        queues: The tasks, by their event loop; a loop is there only while somebody waits in it.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.line = ThreadLine()
        self.queues: dict[asyncio.AbstractEventLoop, LoopQueue] = {}

    @property
    def tickets(self) -> deque[Ticket]:
        """The threads that wait, in order."""
        return self.line.tickets

    def stand_in_line(
        self, take: Callable[[], int], slot: Callable[[], Slot], patience: Patience = PATIENT
    ) -> float:
        """Block until `take` has got a slot.

        Args:
            take: Takes a slot and returns 0, or returns the nanoseconds to wait.
            slot: Returns the slot clock in force.
            patience: How long the caller is ready to wait.

        Returns:
            Seconds waited.

        Raises:
            RateLimitPausedError, DeadlineError: It is not ready to wait so long.
        """
        if ambient.disabled():
            return 0.0
        ahead = len(self.tickets)
        wait = slot().look() if ahead else take()
        if not (ahead or wait):
            return 0.0
        clock = ambient.clock()
        real = isinstance(clock, ambient.RealClock)
        started = clock.monotonic()
        bounded = patience is not PATIENT

        def look_up() -> float:
            now = clock.monotonic()
            bear(patience, now, wait=0, paused=slot().paused())
            return math.inf if patience.deadline is None else patience.deadline - now

        if bounded:
            _bear(slot(), patience, started, wait + ahead * self._rule.spacing)
        ticket = Ticket()
        try:
            waited = self.line.enter(ticket, look_up if bounded else None)
            while wait := take():
                waited = True
                if bounded:
                    _bear(slot(), patience, clock.monotonic(), wait)
                seconds = nap(wait, self._rule.late, _THREAD_GRAIN) if real else wait / SECOND
                if seconds:
                    clock.sleep(seconds)
                else:
                    # So short a wait is spent awake, but other threads get the interpreter.
                    time.sleep(0)
        finally:
            self.line.leave(ticket)
        return clock.monotonic() - started if waited else 0.0

    async def queue_up(
        self, take: Callable[[], int], slot: Callable[[], Slot], patience: Patience = PATIENT
    ) -> float:
        """Do what `stand_in_line` does, for a task and without blocking its event loop."""
        if ambient.disabled():
            return 0.0
        from asyncio import get_running_loop

        loop = get_running_loop()
        queue = self.queues.get(loop)
        wait = 0
        if queue is None:
            wait = take()
            if not wait:
                return 0.0
        from opero.limits.loop_queue import LoopQueue, look_again

        clock = ambient.clock()
        real = isinstance(clock, ambient.RealClock)
        started = clock.monotonic()
        bounded = patience is not PATIENT
        if bounded:
            ahead = queue.waiting * self._rule.spacing + slot().look() if queue else wait
            _bear(slot(), patience, started, ahead)
        if queue is None:
            self._forget_closed_loops()
            queue = self.queues[loop] = LoopQueue(self._rule.pace if real else None)
        queue.waiting += 1
        try:
            await self._take_turn(queue, min(wait, _LONGEST_NAP) / SECOND, patience)
            try:
                while wait := take():
                    if bounded:
                        queue.warn(_bear(slot(), patience, clock.monotonic(), wait) / SECOND)
                    seconds = nap(wait, self._rule.late, _LOOP_GRAIN) if real else wait / SECOND
                    await (clock.asleep(seconds) if seconds else look_again())
            finally:
                queue.leave()
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self.queues.pop(loop, None)
                queue.close()
        return clock.monotonic() - started

    async def _take_turn(self, queue: LoopQueue, wait: float, patience: Patience) -> None:
        """Come back when it is this task's turn, or raise when its patience is at an end."""
        clock = ambient.clock()
        if patience is PATIENT or not isinstance(clock, ambient.RealClock):
            await queue.enter(wait)
            return
        from asyncio import timeout

        left = None if patience.deadline is None else patience.deadline - clock.monotonic()
        ear = None
        try:
            with ExitStack() as leaving:
                async with timeout(left) as alarm:
                    ear = leaving.enter_context(queue.hears(alarm, patience.longest_pause))
                    await queue.enter(wait)
        except TimeoutError:
            if ear is not None and ear.paused:
                raise RateLimitPausedError(ear.paused) from None
            raise DeadlineError(
                "the deadline passed while the call waited for the rate limit"
            ) from None

    def _forget_closed_loops(self) -> None:
        # Tasks of a loop that was closed over their heads never get to their `finally`.
        for loop in list(self.queues):
            if loop.is_closed():
                self.queues.pop(loop, None)


def _bear(slot: Slot, patience: Patience, now: float, wait: int) -> int:
    """Raise if that is too long; return the nanoseconds that are left of a pause."""
    paused = slot.paused()
    bear(patience, now, wait=wait, paused=paused)
    return paused
