# this_file: src/opero/durable/timers.py
"""Record what a workflow takes from outside, so that a replay sees the same: time, chance, ids, pauses, signals.

Outside a workflow each of them is the plain thing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random as chance
import time
import uuid as ids
from collections.abc import Callable
from typing import Any, Final, TypeVar

from opero.durable.records import Move, State, Take
from opero.durable.run import Ending, EndingKind
from opero.durable.step import Scope, Step, current, step_at
from opero.errors import OperoUsageError
from opero.utils import ambient
from opero.utils.units import Duration, parse_seconds

__all__ = ["now", "random", "sleep", "uuid", "wait_for"]

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
    scope.enter()
    try:
        step = step_at(scope, name)
        if step.recorded:
            found: T = step.outcome()
            return found
        value = make()
        step.succeeded(value)
        step.run.write_soon(step.record)
        return value
    finally:
        scope.leave()


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
    plain = scope is None or scope.run.cancelling
    if _on_loop():
        return asyncio.sleep(pause) if plain or scope is None else _asleep(scope, pause)
    if plain or scope is None:
        time.sleep(pause)
        return None
    scope.enter()
    try:
        step = _waiting_step(scope, "sleep", time.time() + pause)
        if not step.recorded:
            step.run.write(step.record)
            _hold(scope, step, time.monotonic() + pause)
            step.succeeded(None)
            step.run.write(step.record)
    finally:
        scope.leave()
    return None


def _hold(scope: Scope, step: Step, latest: float) -> None:
    """Wait in this thread for a short pause, or in a branch; else put the workflow aside."""
    wake = step.record.wake or 0.0
    if scope.root and wake - time.time() > _HELD:
        step.run.end(Ending(EndingKind.SLEEP, wake=wake, latest=latest))
        step.run.check()
    while (left := _left(wake, latest)) > 0:
        ambient.clock().sleep(min(left, 0.1))
        step.run.check()


async def _asleep(scope: Scope, pause: float) -> None:
    scope.enter()
    try:
        step = _waiting_step(scope, "sleep", time.time() + pause)
        if step.recorded:
            await step.run.in_order(step.record)
            return
        await step.run.awrite(step.record)
        await _until(step, step.record.wake or 0.0, time.monotonic() + pause)
        step.succeeded(None)
        await step.run.awrite(step.record)
    finally:
        scope.leave()


async def _until(step: Step, wake: float, latest: float) -> None:
    """Wait for a time on the wall clock; the workflow counts as sleeping if nothing else of it runs."""
    run = step.run
    quiet = not run.active
    if quiet:
        run.post(_move(step, State.SLEEPING, wake))
    while (left := _left(wake, latest)) > 0:
        await ambient.clock().asleep(min(left, _GLANCE))
    if quiet:
        run.post(_move(step, State.RUNNING, None))


def _left(wake: float, latest: float | None) -> float:
    """Return the seconds until a pause ends.

    Args:
        wake: Its end on the wall clock, which also counts what passed while no process ran.
        latest: Its end on the monotonic clock, in case the wall clock was wrong when it began.
    """
    left = wake - time.time()
    return left if latest is None else min(left, latest - time.monotonic())


def _ends_of(pause: float | None) -> tuple[float | None, float | None]:
    """Return the end of a pause on the wall clock and on the monotonic one, None without."""
    return (None, None) if pause is None else (time.time() + pause, time.monotonic() + pause)


def _move(step: Step, state: State, wake: float | None) -> Move:
    record = step.run.record
    return Move(record.id, record.owner or "", record.epoch, state, wake=wake, free=False)


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
    return _await_signal(scope, name, pause) if _on_loop() else _receive(scope, name, pause)


def _receive(scope: Scope, name: str, pause: float | None) -> Any:
    scope.enter()
    try:
        limit, latest = _ends_of(pause)
        step = _waiting_step(scope, f"wait for {name}", limit)
        if step.recorded:
            return step.outcome()
        run = step.run
        while not _taken(step, run.take(_take(step, name))):
            if _late(step, latest):
                failure = step.failed(_timed_out(name))
                run.write(step.record)
                raise failure
            if scope.root:
                run.end(Ending(EndingKind.WAIT, wake=step.record.wake, latest=latest))
            else:
                time.sleep(0.05)
            run.check()
        return step.outcome()
    finally:
        scope.leave()


async def _await_signal(scope: Scope, name: str, pause: float | None) -> Any:
    scope.enter()
    try:
        limit, latest = _ends_of(pause)
        step = _waiting_step(scope, f"wait for {name}", limit)
        if step.recorded:
            await step.run.in_order(step.record)
            return step.outcome()
        run = step.run
        arrived = run.listen(name)
        quiet = not run.active
        try:
            while not _taken(step, await run.atake(_take(step, name))):
                if _late(step, latest):
                    failure = step.failed(_timed_out(name))
                    await run.awrite(step.record)
                    raise failure
                if quiet:
                    run.post(_move(step, State.WAITING, step.record.wake))
                await _either(arrived, step.record.wake, latest)
                arrived.clear()
        finally:
            run.unlisten(name, arrived)
        if quiet:
            run.post(_move(step, State.RUNNING, None))
        return step.outcome()
    finally:
        scope.leave()


async def _either(arrived: asyncio.Event, limit: float | None, latest: float | None) -> None:
    left = None if limit is None else max(0.0, min(_left(limit, latest), _GLANCE))
    try:
        async with asyncio.timeout(left):
            await arrived.wait()
    except TimeoutError:
        pass


def _waiting_step(scope: Scope, name: str, wake: float | None) -> Step:
    """Return a step that is not done at once; one that was waiting before a crash keeps its time."""
    step = step_at(scope, name)
    if not step.recorded:
        step.wait_until(wake)
    return step


def _take(step: Step, name: str) -> Take:
    record = step.run.record
    return Take(record.id, record.owner or "", record.epoch, name, step.record)


def _taken(step: Step, value: str | None) -> bool:
    if value is None:
        return False
    step.received(value)
    return True


def _late(step: Step, latest: float | None) -> bool:
    wake = step.record.wake
    return wake is not None and _left(wake, latest) <= 0


def _timed_out(name: str) -> TimeoutError:
    return TimeoutError(f"signal {name!r} has not come in time")


def _on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
