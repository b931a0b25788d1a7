#!/usr/bin/env python3
# this_file: examples/10_tasks.py
"""Functions composed to a pipeline: in order, side by side, retried, behind a circuit breaker; and its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

from terminal import use_utf8

from opero.errors import CircuitOpenError
from opero.tasks import CircuitGroup, Parallel, Sequence, Task, event_bus, run

if TYPE_CHECKING:
    from opero.events import Event

calls = count(1)
depths: dict[str | None, int] = {None: -1}


async def fetch(number: int) -> str:
    """Ask a service."""
    await asyncio.sleep(0.02)
    return f"data_{number}"


def process(data: str) -> str:
    """Work on it. This is no coroutine, so it runs in a thread, and the event loop goes on."""
    time.sleep(0.01)
    return data.upper()


def save(data: str) -> str:
    """Keep it."""
    return f"{data} saved"


def flaky() -> str:
    """Fail twice."""
    if next(calls) < 3:
        raise ConnectionError("no route")
    return "recovered"


def broken() -> None:
    """Fail always."""
    raise ConnectionError("down")


async def log_event(event: Event) -> None:
    """Print an event, indented as its run is nested."""
    if event["type"] == "circuit":
        print(f"      {event['circuit']}: {event['old_state']} → {event['new_state']}")
    if event["type"] == "task":
        depth = depths.setdefault(event["run_id"], depths.get(event["parent_id"], -1) + 1)
        outcome = f" {event['result']!r}" if "result" in event else ""
        outcome += f" {event['error']!r}" if "error" in event else ""
        print(f"      {'   ' * depth}{event['task']!r} {event['state'].name}{outcome}")


@contextmanager
def events_shown() -> Iterator[None]:
    """Print the events of a block; a handler that returns a task is awaited, one event after the other."""
    with event_bus.subscribe(lambda event: asyncio.create_task(log_event(event))):
        yield


async def main() -> None:
    """Run all parts."""
    print("in order, each step with the result of the one before")
    pipeline = Sequence(
        Task(fetch, 1, name="Fetch1"),
        Task(process, name="Process1"),
        Task(save, name="Save1"),
        name="Pipeline",
    )
    with events_shown():
        results = await pipeline.run()
        await event_bus.drain()
    print(f"   {results}")

    print("\nside by side, ten at a time, results in the order of the jobs")
    began = time.monotonic()
    fetched = await Parallel((Task(fetch, n) | process for n in range(50)), limit=10).run()
    print(f"   {fetched[0]} ... {fetched[-1]} in {time.monotonic() - began:.2f} s")

    print("\none definition, a hundred runs at once")
    numbers = fetch | Task(process) | save
    print(f"   {len(await asyncio.gather(*(numbers.run(n) for n in range(100))))} results")

    print("\nretried: each retry is a state")
    with events_shown():
        await Task(flaky, name="Flaky", options={"retries": 3, "min_delay": 0.01}).run()
        await event_bus.drain()

    print("\none job fails: the others are cancelled, and its own error is raised")
    with events_shown():
        try:
            await Parallel(Task(asyncio.sleep, 60, name="Slow"), Task(broken), name="Both").run()
        except ConnectionError as error:
            await event_bus.drain()
            print(f"   {error!r}: {error.__notes__[0]}")

    print("\nbehind a circuit breaker: after two failures no call is made")
    shop = CircuitGroup(Task(broken), fail_max=2, reset_timeout=10, name="Shop")
    with events_shown():
        for _ in range(3):
            try:
                await shop.run()
            except CircuitOpenError as error:
                await event_bus.drain()
                print(f"   {error}")
            except ConnectionError:
                await event_bus.drain()

    print("\nnested as you like")
    mixed = Sequence(
        Parallel(Sequence(Task(fetch, 1), process), Task(fetch, 2), name="Two"),
        lambda both: f"{both[0][-1]} and {both[1]}",
        returns="last",
    )
    print(f"   {await run(mixed)}")


use_utf8()
asyncio.run(main())
