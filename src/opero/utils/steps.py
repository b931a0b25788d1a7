# this_file: src/opero/utils/steps.py
"""Run logic that is written once for threads and event loops.

The logic is a generator: where it has to wait it yields a `BlockingStep`, and goes on with its outcome. One
driver blocks, the other one awaits. An error, a cancellation or Ctrl-C in a step closes the
generator, whose `except BaseException` and `finally` clauses clean up, and reaches the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, NamedTuple, TypeVar

__all__ = ["BlockingStep", "StepLogic", "run_async", "run_sync"]

T = TypeVar("T")


class BlockingStep(NamedTuple):
    """Something to wait for.

    Attributes:
        block: Does it in a thread that may wait.
        wait: Returns a coroutine that does it in an event loop.
        args: The arguments of both.
    """

    block: Callable[..., Any]
    wait: Callable[..., Coroutine[Any, Any, Any]]
    args: tuple[Any, ...] = ()


StepLogic = Generator[BlockingStep, Any, T]
"""Yields blocking steps, is sent their outcomes, and returns a result."""


def run_sync(logic: StepLogic[T]) -> T:
    """Run logic to its end in a thread that may wait."""
    try:
        block, _, args = next(logic)
        while True:
            block, _, args = logic.send(block(*args))
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        logic.close()


async def run_async(logic: StepLogic[T]) -> T:
    """Run logic to its end in an event loop."""
    try:
        _, wait, args = next(logic)
        while True:
            _, wait, args = logic.send(await wait(*args))
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        logic.close()
