# this_file: src/opero/utils/steps.py
"""Run logic that is written once for threads and event loops.

The logic is a generator: where it has to wait it yields a `BlockingStep`, and goes on with its outcome. One
driver blocks, the other one awaits. An error, a cancellation or Ctrl-C in a step is raised where the
generator has yielded it, so that its `except` and `finally` clauses work as in plain code.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from opero.utils.ambient import require_loop
from opero.utils.lazy import NamedTuple

T = TypeVar("T")


class BlockingStep(NamedTuple):
    """Something to wait for.

    Attributes:
        block: Does it in a thread that may wait.
        wait: Returns what is awaited for it in an event loop.
        args: The arguments of both.
    """

    block: Callable[..., Any]
    wait: Callable[..., Awaitable[Any]]
    args: tuple[Any, ...] = ()


StepLogic = Generator[BlockingStep, Any, T]
"""Yields blocking steps, is sent their outcomes, and returns a result."""


def in_thread(work: Callable[[], Any]) -> BlockingStep:
    """Return the step that calls a function which may block; an event loop calls it in another thread."""

    def wait() -> Coroutine[Any, Any, Any]:
        from asyncio import to_thread

        require_loop("wait for what blocks")
        return to_thread(work)

    return BlockingStep(work, wait)


def run_sync(logic: StepLogic[T]) -> T:
    """Run logic to its end in a thread that may wait."""
    try:
        block, _, args = next(logic)
        while True:
            try:
                outcome = [block(*args)]
            except BaseException as error:  # noqa: BLE001 - the logic decides
                block, _, args = logic.throw(error)
            else:
                # Popped: an error that it holds and that is raised now would be in a reference cycle with this frame.
                block, _, args = logic.send(outcome.pop())
    except StopIteration as end:
        # No name for the result: an error in it, that has passed through this frame, would be in a reference cycle.
        return end.value  # type: ignore[no-any-return]  # the logic's result
    except BaseException:
        # Ctrl-C between two steps. (Not in a `finally`: there it would cost the result of logic that has ended.)
        logic.close()
        raise


async def run_async(logic: StepLogic[T]) -> T:
    """Run logic to its end in an event loop."""
    try:
        _, wait, args = next(logic)
        while True:
            try:
                outcome = [await wait(*args)]
            except BaseException as error:  # noqa: BLE001 - as above
                _, wait, args = logic.throw(error)
            else:
                _, wait, args = logic.send(outcome.pop())
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # as above
    except BaseException:
        logic.close()
        raise
