# this_file: src/opero/durable/timers.py
"""Record what a workflow takes from outside, so that a replay sees the same: time, chance, ids, pauses, signals.

Outside a workflow each of them is the plain thing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import random as chance
import time
import uuid as ids
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from opero.durable.records import Move, State, StepRecord, StepState, Take
from opero.durable.step import Scope, Step, current
from opero.durable.workflow_run import Ending
from opero.errors import OperoUsageError
from opero.utils import ambient
from opero.utils.ambient import running_loop
from opero.utils.steps import BlockingStep, StepLogic, run_async, run_sync
from opero.utils.units import Duration, parse_seconds

T = TypeVar("T")

_HELD: Final = 1.0
"""Seconds of a pause for which a synchronous workflow keeps its thread; for longer ones it is put aside."""
_GLANCE: Final = 5.0
"""Longest wait on the monotonic clock before the wall clock is read again: it may have been wrong."""


def now() -> dt.datetime:
    """Return the present time in UTC; on replay, the time it was then."""
    return _fact("now", lambda: dt.datetime.now(dt.UTC))


def uuid() -> ids.UUID:
    """Return a new random UUID; on replay, the one drawn then. Good as an idempotency key."""
    return _fact("uuid", ids.uuid4)


def random() -> float:
    """Return a random number from [0, 1); on replay, the one drawn then."""
    return _fact("random", chance.random)


def _fact(name: str, make: Callable[[], T]) -> T:
    scope = current()
    if scope is None or scope.run.cancelling:
        return make()
    with scope:
        step = Step(scope, name)
        if step.recorded:
            found: T = step.outcome()
            return found
        value = make()
        step.succeeded(value)
        step.run.write_soon(step.record)
        return value


# --- pauses -------------------------------------------------------------------------------------------------------


def sleep(seconds: Duration) -> Any:
    """Pause a workflow; it survives restarts and ends when it would have ended anyway.

    Within an event loop it is to be awaited. A synchronous workflow that sleeps for longer than a
    second gives up its thread: its function is unwound (its `finally` blocks run) and run again
    when it is time.

    Args:
        seconds: The pause, as a duration.

    Raises:
        OperoUsageError: It is no duration.
    """
    pause = parse_seconds(seconds, "sleep")
    scope = current()
    if scope is None or scope.run.cancelling:
        return time.sleep(pause) if running_loop() is None else asyncio.sleep(pause)
    return _drive(_sleep(scope, pause))


def _sleep(scope: Scope, pause: float) -> StepLogic[None]:
    with scope:
        step = Step(scope, "sleep")
        if step.recorded:
            yield _in_order(step)
            return
        wait = _Wait(scope, step, pause)
        yield _written(step)
        yield BlockingStep(wait.hold, wait.ahold)
        step.succeeded(None)
        yield _written(step)


class _Wait:
    """A step that waits until a time on the wall clock, which also counts what passes while no process runs.

    Args:
        scope: The line that waits.
        step: The step; one that was waiting before a crash keeps its time.
        pause: Seconds from now on, None for ever.
    """

    def __init__(self, scope: Scope, step: Step, pause: float | None) -> None:
        step.wait_until(None if pause is None else time.time() + pause)
        self.run = scope.run
        self._in_branch = not scope.root
        self._quiet = not scope.run.active
        self._wake = step.record.wake
        # In case the wall clock was wrong when the pause began.
        self._latest = None if pause is None else time.monotonic() + pause

    def left(self) -> float:
        """Return the seconds until then."""
        if self._wake is None:
            return math.inf
        left = self._wake - time.time()
        return left if self._latest is None else min(left, self._latest - time.monotonic())

    def put_aside(self, state: State) -> None:
        """Unwind the workflow until then, unless this is only a branch of it.

        Raises:
            Unwind: As it says.
        """
        if not self._in_branch:
            self.run.end(Ending(state, wake=self._wake, latest=self._latest))
            self.run.check()

    def move(self, state: State) -> None:
        """Show the workflow in another state if nothing else of it runs."""
        if self._quiet:
            wake = None if state is State.RUNNING else self._wake
            self.run.post(Move(*self.run.ownership, state, wake=wake, free=False))

    def hold(self) -> None:
        """Wait in this thread for a short pause, or in a branch; else put the workflow aside."""
        if (self._wake or 0.0) - time.time() > _HELD:
            self.put_aside(State.SLEEPING)
        while (left := self.left()) > 0:
            ambient.clock().sleep(min(left, 0.1))
            self.run.check()

    async def ahold(self) -> None:
        """Wait; the workflow counts as sleeping if nothing else of it runs."""
        self.move(State.SLEEPING)
        while (left := self.left()) > 0:
            await ambient.clock().asleep(min(left, _GLANCE))
        self.move(State.RUNNING)


# --- signals ------------------------------------------------------------------------------------------------------


def wait_for(name: str, timeout: Duration | None = None) -> Any:
    """Wait for a signal and return its value; within an event loop it is to be awaited.

    Signals of a name are kept until they are taken, in the order in which they were sent. A
    synchronous workflow that waits gives up its thread, as for `sleep`.

    Args:
        name: Its name, as in `Orchestrator.signal(workflow_id, name, value)`.
        timeout: Longest wait, as a duration; None waits for ever.

    Raises:
        TimeoutError: It has not come in time.
        OperoUsageError: This is no workflow.
    """
    scope = current()
    if scope is None:
        raise OperoUsageError(
            f"wait_for({name!r}) only works in a workflow that an Orchestrator runs."
        )
    pause = None if timeout is None else parse_seconds(timeout, "timeout")
    return _drive(_receive(scope, name, pause))


def _receive(scope: Scope, name: str, pause: float | None) -> StepLogic[Any]:
    with scope:
        step = Step(scope, f"wait for {name}")
        if step.recorded:
            yield _in_order(step)
            return step.outcome()
        run, wait = step.run, _Wait(scope, step, pause)
        take = Take(*run.ownership, name, step.record)
        arrived = None if running_loop() is None else run.listen(name)
        try:
            while (value := (yield BlockingStep(run.apply, run.aapply, (take,)))) is None:
                if wait.left() <= 0:
                    failure = step.failed(TimeoutError(f"signal {name!r} has not come in time"))
                    yield _written(step)
                    raise failure
                yield BlockingStep(_wait_aside, _wait_for_signal, (wait, arrived))
        finally:
            if arrived is not None:
                run.unlisten(arrived)
        if arrived is not None:
            wait.move(State.RUNNING)
        step.record.state, step.record.value = StepState.DONE, value
        return step.outcome()


def _wait_aside(wait: _Wait, arrived: None) -> None:
    """Put the workflow aside until the signal comes; a branch of it looks again soon."""
    del arrived
    wait.put_aside(State.WAITING)
    time.sleep(0.05)
    wait.run.check()


async def _wait_for_signal(wait: _Wait, arrived: asyncio.Event) -> None:
    wait.move(State.WAITING)
    left = wait.left()
    with suppress(TimeoutError):
        async with asyncio.timeout(None if left == math.inf else max(0.0, min(left, _GLANCE))):
            await arrived.wait()
    arrived.clear()


# --- in a thread and on an event loop -----------------------------------------------------------------------------


def _drive(logic: StepLogic[Any]) -> Any:
    """Run it here, or return a coroutine that does where there is an event loop."""
    return run_sync(logic) if running_loop() is None else run_async(logic)


def _written(step: Step) -> BlockingStep:
    return BlockingStep(step.run.write, step.run.awrite, (step.record,))


def _in_order(step: Step) -> BlockingStep:
    return BlockingStep(_at_once, step.run.in_order, (step.record,))


def _at_once(record: StepRecord) -> None:
    """A synchronous workflow has one line, whose steps are in order."""
