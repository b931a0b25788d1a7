# this_file: src/opero/limits/waiting.py
"""Wait for the slots of a rate limit, in order of arrival, for as long as a caller is ready to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero.errors import DeadlineError, OperoUsageError, RateLimitPausedError
from opero.limits.gcra import SECOND, Rule
from opero.utils import ambient
from opero.utils.ambient import warn_on_loop
from opero.utils.steps import BlockingStep, run_async, run_sync
from opero.utils.units import Duration, format_seconds, parse_seconds
from opero.utils.waiters import SHORTEST_PAUSE, TaskWaiter, ThreadWaiter, WaitingLine

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from opero.limits.limiter_state import LimiterState
    from opero.utils.steps import StepLogic
    from opero.utils.waiters import Waiter


_LONGEST_SLEEP: Final = SECOND
"""The first in a queue looks at least so often: another process may have given a slot back, or paused."""
_LOOP_GRAIN: Final = 1_200_000
"""How late an event loop's timer may be: selectors round up to whole milliseconds."""
_THREAD_GRAIN: Final = 80_000
"""How late a sleeping thread may wake."""
_LOOK_UP_SECONDS: Final = 1.0
"""A thread in the queue reads the clock so often, which a test may have set."""
_STOP_SECONDS: Final = 0.05
"""A caller that may be stopped asks so often whether it is."""


# --- decisions ------------------------------------------------------------------------------------


class WaitBudget(NamedTuple):
    """How long a caller is ready to wait.

    Attributes:
        deadline: Clock reading at which its time is up, None for never.
        longest_pause: Longest remainder of a pause, in seconds, that it waits out.
        stop: Called now and then while it waits; raises to end the wait.
    """

    deadline: float | None = None
    longest_pause: float = inf
    stop: Callable[[], object] | None = None


UNLIMITED: Final = WaitBudget()
"""That of a caller that waits for as long as it takes."""


def budget_of(timeout: Duration | None) -> WaitBudget:
    """Return the budget of a caller that waits so long at most; None for as long as it takes."""
    if timeout is None:
        return UNLIMITED
    return WaitBudget(ambient.clock().monotonic() + parse_seconds(timeout, "timeout"))


def sleep_time(wait: int, late: int, grain: int) -> float:
    """Decide how long to sleep before looking at the slot clock again.

    Args:
        wait: Nanoseconds until the slot is free.
        late: Nanoseconds that the sleeper may come late without harm to the rate.
        grain: Nanoseconds that the timer may be late.

    Returns:
        Seconds; 0.0 if any sleep would be too long.

    Example:
        >>> sleep_time(100_000_000, late=100_000_000, grain=1_200_000)
        0.1
        >>> sleep_time(100_000, late=100_000, grain=1_200_000)
        0.0
    """
    return max(0, min(wait, _LONGEST_SLEEP) - max(0, grain - late)) / SECOND


def check_budget(budget: WaitBudget, now: float, *, wait: int, paused: int) -> None:
    """Raise if a wait would exceed a caller's budget.

    Args:
        budget: The budget.
        now: Clock reading in seconds.
        wait: Nanoseconds that it will have to wait at least.
        paused: Nanoseconds that are left of a pause.

    Raises:
        RateLimitPausedError: The pause is longer than it would wait.
        DeadlineError: The wait would outlast its deadline.

    Example:
        >>> check_budget(WaitBudget(deadline=12.0), 10.0, wait=1_500_000_000, paused=0)
        >>> check_budget(WaitBudget(deadline=11.0), 10.0, wait=1_500_000_000, paused=0)
        Traceback (most recent call last):
        ...
        opero.errors.DeadlineError: the rate limit has no slot for 1.5 s, and the deadline is in 1 s
    """
    if paused > budget.longest_pause * SECOND:
        raise RateLimitPausedError(paused / SECOND)
    if budget.deadline is None:
        return
    left = budget.deadline - now
    # Readings of the clock are floats, and a wait that ends at the deadline is in time.
    if wait > left * SECOND + 1000:
        if left <= 0:
            raise _too_late()
        raise DeadlineError(
            f"the rate limit has no slot for {format_seconds(wait / SECOND)}, "
            f"and the deadline is in {format_seconds(left)}"
        )


def _too_late() -> DeadlineError:
    return DeadlineError("the deadline passed while the call waited for the rate limit")


# --- the queue ------------------------------------------------------------------------------------

Take = Callable[[], int]
"""Takes a slot and returns 0, or returns the nanoseconds to wait."""


class SlotQueue:
    """The callers that wait for the slots of one limit: one line of threads, and one of tasks for each event loop.

    Only the first of each line looks at the slot clock, so that an event loop that is blocked holds up no other.

    Args:
        rule: The rule of the limit.

    Attributes:
        threads: The threads.
        loops: The tasks, by their event loop; a loop is there only while a task waits in it.
    """

    __slots__ = ("_rule", "loops", "threads")

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.threads: WaitingLine = WaitingLine()
        self.loops: dict[AbstractEventLoop, WaitingLine] = {}

    def wait(
        self, take: Take, state: Callable[[], LimiterState], budget: WaitBudget = UNLIMITED
    ) -> float:
        """Block until `take` has got a slot.

        Args:
            take: See `Take`.
            state: Returns the state in force.
            budget: How long the caller is ready to wait.

        Returns:
            Seconds waited.

        Raises:
            RateLimitPausedError, DeadlineError: It is not ready to wait so long.
        """
        return run_sync(self._wait(self.threads, ThreadWaiter, take, state, budget))

    async def wait_async(
        self, take: Take, state: Callable[[], LimiterState], budget: WaitBudget = UNLIMITED
    ) -> float:
        """Do what `wait` does, for a task and without blocking its event loop."""
        ambient.require_loop("wait for a slot of its rate limit")
        from asyncio import get_running_loop

        loop = get_running_loop()
        if loop not in self.loops:
            # Tasks that were pending when their loop was closed never get to their `finally`.
            for closed in [one for one in self.loops if one.is_closed()]:
                self.loops.pop(closed, None)
        line = self.loops.setdefault(loop, WaitingLine())
        try:
            return await run_async(self._wait(line, TaskWaiter, take, state, budget))
        finally:
            if not line and self.loops.get(loop) is line:
                del self.loops[loop]

    def _wait(
        self,
        line: WaitingLine,
        kind: Callable[[WaitBudget], Waiter],
        take: Take,
        state: Callable[[], LimiterState],
        budget: WaitBudget,
    ) -> StepLogic[float]:
        ahead = len(line)
        wait = state().wait_for() if ahead else take()
        if not (ahead or wait):
            return 0.0
        clock = ambient.clock()
        started, waited, real = clock.monotonic(), False, isinstance(clock, ambient.RealClock)
        _check(state(), budget, wait + ahead * self._rule.spacing)
        in_thread = kind is ThreadWaiter
        if in_thread:
            warn_on_loop("a slot of its rate limit")
        waiter = kind(budget)
        look_up: Callable[[], float] | None = None
        # A test's clock moves in one step: what wakes a task then is the first in the line.
        if budget.stop is not None or (budget.deadline is not None and (in_thread or real)):
            look_up = partial(_pause, budget, _LOOK_UP_SECONDS if in_thread else inf)
        # An interrupt may come between any two steps.
        try:
            line.join(waiter)
            while line.first is not waiter:
                waited, seconds = True, None if look_up is None else look_up()
                # Never 0, which would look at a clock that does not move without a break.
                pause = seconds and max(seconds, SHORTEST_PAUSE)
                woken = yield BlockingStep(waiter.wait, waiter.wait, (pause,))
                if waiter.granted and waiter.value is not True:
                    raise RateLimitPausedError(waiter.value)
                if not woken and seconds is not None and seconds <= 0:
                    raise _too_late()
            while wait := take():
                waited, paused = True, _check(state(), budget, wait)
                if paused:
                    _dismiss(line, paused)
                seconds = wait / SECOND
                if real:
                    grain = _THREAD_GRAIN if in_thread else _LOOP_GRAIN
                    # 0 is spent awake, but other threads and tasks have their turns.
                    seconds = sleep_time(wait, self._rule.late, grain)
                if budget.stop is not None:
                    seconds = min(seconds, _STOP_SECONDS)
                yield BlockingStep(clock.sleep, clock.asleep, (seconds,))
        finally:
            line.leave(waiter)
        return clock.monotonic() - started if waited else 0.0


def _pause(budget: WaitBudget, longest: float) -> float:
    """Return for how many seconds a caller in the line pauses before it looks again; 0 or less if its time is up."""
    if budget.stop is not None:
        budget.stop()
        longest = min(longest, _STOP_SECONDS)
    end = budget.deadline
    return longest if end is None else min(longest, end - ambient.clock().monotonic())


def _check(state: LimiterState, budget: WaitBudget, wait: int = 0) -> int:
    """Raise if a wait exceeds a budget; return the nanoseconds that are left of a pause."""
    if budget.stop is not None:
        budget.stop()
    paused = state.paused()
    check_budget(budget, ambient.clock().monotonic(), wait=max(wait, paused), paused=paused)
    return paused


def _dismiss(line: WaitingLine, paused: int) -> None:
    """End the waits of those that would not wait out the rest of a pause: they get its seconds."""
    seconds = paused / SECOND
    line.dismiss(
        seconds,
        lambda waiter: waiter.request is not None and seconds > waiter.request.longest_pause,
    )


# --- a limiter of the user's ----------------------------------------------------------------------

_UNNOTICED: Final = 0.001
"""Whether a foreign limiter has waited is not known; what is shorter than so many seconds is not counted."""


class ExternalLimiter:
    """A user's own limiter: an object with `async wait()`, for example of asynciolimiter.

    Such an object belongs to one event loop at a time. Its `reset()`, if it has one, frees it from a loop that has
    ended, where asynciolimiter would wait for a timer that never fires.

    Args:
        limiter: The object.
    """

    __slots__ = ("_loop", "limiter")

    def __init__(self, limiter: Any) -> None:
        self.limiter: Any = limiter
        self._loop: weakref.ref[AbstractEventLoop] | None = None

    def refusal(self, what: str) -> OperoUsageError:
        """Return the error of a caller that asks for more than it can do."""
        return OperoUsageError(
            f"{self.limiter!r} can only be awaited in one event loop at a time, so it cannot {what}. "
            'Write rate_limit="100/minute", or share a RateLimiter("100/minute").'
        )

    async def wait(self, state: LimiterState, budget: WaitBudget) -> float:
        """Wait as the user's limiter does, after the end of a pause; return for how many seconds that was."""
        ambient.require_loop("await a limiter")
        from asyncio import timeout

        clock = ambient.clock()
        started = clock.monotonic()
        while paused := _check(state, budget):
            await clock.asleep(min(1.0, paused / SECOND))
        end = budget.deadline
        alarm = timeout(None if end is None else end - clock.monotonic())
        try:
            async with alarm:
                await self._wait()
        except TimeoutError:
            if not alarm.expired():
                raise  # the limiter's own
            raise DeadlineError("the deadline passed while the call waited") from None
        waited = clock.monotonic() - started
        return waited if waited > _UNNOTICED else 0.0

    async def _wait(self) -> None:
        from asyncio import get_running_loop

        running = get_running_loop()
        before = self._loop() if self._loop is not None else running
        if before is not running:
            if before is not None and not before.is_closed():
                raise self.refusal("serve another event loop while the first is open")
            reset = getattr(self.limiter, "reset", None)
            if callable(reset):
                reset()
        if before is not running or self._loop is None:
            self._loop = weakref.ref(running)
        await self.limiter.wait()
