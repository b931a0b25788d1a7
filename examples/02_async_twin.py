#!/usr/bin/env python3
# this_file: examples/02_async_twin.py
"""The same decorator on a coroutine: fallback values, equal calls at once, cancellation."""

from __future__ import annotations

import asyncio
import inspect
import time

from opero import opero

asked: list[str] = []


@opero(arg_fallback="model", retries=1, min_delay="20ms")
async def ask(prompt: str, model: str | tuple[str, ...] = ("big", "small")) -> str:
    """Ask a model; the big one is overloaded."""
    asked.append(str(model))
    await asyncio.sleep(0.02)
    if model == "big":
        raise ConnectionError("overloaded")
    return f"{model} says: {prompt}!"


@opero(cache=False, retries=100, min_delay="1h", max_delay="1h")
async def patient() -> None:
    """Fail, and wait an hour before trying again."""
    raise ConnectionError("not yet")


async def main() -> None:
    """Run the three scenes."""
    print(f"still a coroutine function: {inspect.iscoroutinefunction(ask)}")

    # 1. The first model fails, the next one answers.
    receipt = await ask.call("hello")
    print(f"{receipt.value!r} came from {receipt.fallback!r}; models asked: {', '.join(asked)}")

    # 2. Ten equal questions at once are one question; the others wait for its answer.
    asked.clear()
    answers = await asyncio.gather(*(ask("good morning") for _ in range(10)))
    print(
        f"10 equal questions at once: {len(set(answers))} answer, models asked: {', '.join(asked)}"
    )
    print(f"stats: {ask.stats}")

    # 3. A cancelled call ends at once, even in the middle of a pause.
    task = asyncio.create_task(patient())
    await asyncio.sleep(0.05)
    cancelled = time.perf_counter()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        took = time.perf_counter() - cancelled
        print(f"cancelled during an hour's pause: gone after {took:.3f} s")


asyncio.run(main())
